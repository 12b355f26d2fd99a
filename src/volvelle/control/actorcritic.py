"""What off-policy actor-critics share: an ensemble of Q networks with their targets, and actors with bounded actions."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from volvelle.core.trainable import Optimiser

from .networks import Network, Output
from .spaces import Layout, Observation
from .stacked import make
from .valueheads import ValueHead


class Critics:
    """`members` value networks per seed (of observations alone with extra=0), trained together, with lagged copies (`tau`).

    Calling gives outputs [S * members, B, width]; `values` [S, members, B]. Members see the same batch and differ in their start.
    """

    def __init__(self, run, network: Network, value: ValueHead, optimiser: Optimiser, layout: Layout, extra: int, outputs: int, seeds: int, members: int,
                 tau: float | None, name: str = "critics"):
        copies = seeds * members
        module = Output(network.build(layout, copies, extra), copies, outputs * value.width, network.init, members=members)
        self.net = make(run, name, module, optimiser, seeds, members)
        self.target = run.lagged(self.net, tau=tau, name=f"{name}-target")
        self.value, self.seeds, self.members, self.outputs = value, seeds, members, outputs
        self.size = sum(p.numel() for p in module.parameters())

    def read(self, outputs: Tensor) -> Tensor:
        """Values [S, members, B] (or [S, members, B, outputs] for several outputs) of raw outputs."""
        if self.outputs > 1:
            outputs = outputs.unflatten(-1, (self.outputs, -1))
        return self.values_of(outputs)

    def values_of(self, outputs: Tensor) -> Tensor:
        """Values [S, members, B, ...] of the value head's numbers [S * members, B, ..., width]."""
        return self.value.value(outputs).unflatten(0, (self.seeds, self.members))

    def values(self, observations: Observation, actions: Tensor | None = None) -> Tensor:
        return self.read(self.net(observations, actions))

    def target_values(self, observations: Observation, actions: Tensor | None = None) -> Tensor:
        return self.read(self.target.module(observations, actions))

    @functools.cached_property
    def leader(self) -> torch.nn.Module:
        """The first member of every seed's ensemble as a module without gradients, on the same memory: for losses that need no other."""
        made = copy.deepcopy(self.net.module).requires_grad_(False)
        for mine, theirs in zip(made.parameters(), self.net.module.parameters(), strict=True):
            mine.grad, mine.data = None, theirs.data.unflatten(0, (self.seeds, self.members))[:, 0]
        made.members = 1
        return made

    def leading(self, observations: Observation, actions: Tensor | None = None) -> Tensor:
        """Values of the first member, [S, B]; gradients flow to the actions alone."""
        return self.value.value(self.leader(observations, actions))

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Loss per member and row [S, members, B] against one target per row [S, B]."""
        each = target.repeat_interleave(self.members, 0) if self.seeds > 1 else target.expand(self.members, -1)
        return self.value.loss(outputs, each).unflatten(0, (self.seeds, self.members))


def uniform_actions(low: Tensor, high: Tensor, chance: Tensor) -> Tensor:
    """Uniform actions within the bounds from numbers in [0, 1)."""
    return torch.lerp(low, high, chance)
