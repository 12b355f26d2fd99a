"""Policies that are fitted to recorded actions: a network, a head, and what both say about an action."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volvelle.control.heads import PolicyHead
from volvelle.control.networks import Network, Output
from volvelle.control.policy import Deciding
from volvelle.control.spaces import Spec


class HeadPolicy(Deciding):
    """Observations (state and goal side by side for goals) to a distribution over actions. `gain` scales the first weights of the last layer."""

    def __init__(self, network: Network, head: PolicyHead, spec: Spec, seeds: int, gain: float = 1.0):
        super().__init__()
        self.head = head.bind(spec.actions)
        self.net = Output(network.build(spec.observations, seeds), seeds, self.head.width, network.init, gain)
        self.free = nn.Parameter(torch.full((seeds, 1, self.head.free), self.head.start)) if self.head.free else None

    def forward(self, x):
        made = self.net(x)
        return made if self.free is None else (made, self.free)

    def log_prob(self, observations, actions: Tensor) -> Tensor:
        """log pi(a|s), [S, B]."""
        return self.head.log_prob(self(observations), actions)

    def best(self, observations):
        return self.head.mode(self(observations))

    def explore(self, observations, streams):
        outputs = self(observations)
        rows = (outputs[0] if isinstance(outputs, tuple) else outputs).shape[1]
        return self.head.sample(outputs, streams.noise(self.head, rows).to(next(self.parameters()).device))

    def _apply(self, fn, recurse=True):
        made = super()._apply(fn, recurse)
        if hasattr(self.head, "to"):
            self.head.to(next(self.parameters()).device)
        return made


def repeated(observations, count: int):
    """Every row `count` times in a row, [S, B * count, ...]."""
    return {k: repeated(v, count) for k, v in observations.items()} if isinstance(observations, dict) else observations.repeat_interleave(count, 1)
