"""Steering a frozen policy by a value function: which of its samples is played."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from volvelle.control.networks import Output
from volvelle.control.policy import Policy
from volvelle.control.stacked import Streams
from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part

from .bases import Built
from .policies import repeated


def choose(values: Tensor, beta: float, gumbel: Tensor | None) -> Tensor:
    """Index [...] into values [..., K]: the largest for beta=0, else drawn from softmax(values / beta) by the Gumbel numbers [..., K]."""
    return values.argmax(-1) if beta == 0 else (values / beta + gumbel).argmax(-1)


class Scale(Part):
    """Slot: how a policy's actions stand for physical ones."""

    slot: ClassVar[str] = "scale"


@part("units")
class Units(Scale):
    """physical = shift + scale * action, per dimension: of a policy that emits actions in statistics of its own (bounds to [-1, 1], or mean and deviation)."""

    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)

    @classmethod
    def bounds(cls, low, high) -> Units:
        """Of actions in [-1, 1] between the bounds."""
        return cls(tuple((h + w) / 2 for w, h in zip(low, high)), tuple((h - w) / 2 for w, h in zip(low, high)))

    def physical(self, actions: Tensor) -> Tensor:
        return actions * actions.new_tensor(self.scale) + actions.new_tensor(self.shift)

    def normalised(self, actions: Tensor) -> Tensor:
        return (actions - actions.new_tensor(self.shift)) / actions.new_tensor(self.scale)


class Steered(Built):
    """The base policy, and the lagged critic that scores its samples. part: a recipe with base, critic, candidates, beta, score, units, primitives."""

    def __init__(self, part: Any, spec, seeds: int):
        super().__init__(part.base, spec, seeds)
        spec.actions.only("continuous", part.part_name)
        critic = part.critic
        copies = seeds * critic.critics
        self.part, self.members = part, critic.critics
        self.critic = Output(critic.network.build(spec.observations, copies, spec.actions.continuous), copies, critic.value.width, critic.network.init, members=critic.critics)
        self.critic.requires_grad_(False)
        for name, action in zip(("primitives", "bounds"), (part.primitives, (spec.actions.low, spec.actions.high))):
            if any(len(a) != spec.actions.continuous for a in action):
                raise UserError(f"{name}: actions have {spec.actions.continuous} numbers; got {action}")
            self.register_buffer(name, torch.tensor(action), persistent=False)

    def candidates(self, observations, streams: Streams) -> Tensor:
        """K samples of the base in physical units, then the primitives, [S, B, K, d]."""
        made = self.base.propose(observations, self.part.candidates, streams)
        if self.part.units is not None:
            made = self.part.units.physical(made).clamp(*self.bounds)
        if not len(self.primitives):
            return made
        return torch.cat([made, self.primitives.expand(*made.shape[:2], -1, -1)], 2)

    def values(self, observations, actions: Tensor) -> Tensor:
        """Q of candidates [S, B, K, d], [S, B, K]: the smallest (or mean) over the lagged critics."""
        count = actions.shape[2]
        outputs = self.critic(repeated(observations, count), actions.flatten(1, 2))
        each = self.part.critic.value.value(outputs).unflatten(0, (self.seeds, self.members))
        return (each.amin(1) if self.part.score == "min" else each.mean(1)).unflatten(-1, (-1, count))

    @torch.no_grad()
    def greedy(self, observations, streams):
        actions = self.candidates(observations, streams)
        if actions.shape[2] == 1:
            return actions.squeeze(2)
        values = self.values(observations, actions)
        gumbel = torch.from_numpy(streams.gumbel(*values.shape[1:])).to(values.device) if self.part.beta else None
        picked = choose(values, self.part.beta, gumbel)
        return actions.gather(2, picked[..., None, None].expand(*picked.shape, 1, actions.shape[-1])).squeeze(2)

    def explore(self, observations, streams):
        return self.greedy(observations, streams)

    def best(self, observations):
        return self.greedy(observations, Streams.fixed("steering", range(self.seeds)))


class Steering:
    """Steers any policy outside this library: an object with `sample_actions(observation, instruction, n)` -> [n, d], or chunks [n, T, d].

    critic: the saved policy of a v-gps run (its base is not used). units: of the policy's actions. Of chunks the first actions are scored, and the whole chunk
    is handed back, in the policy's own units and as the policy gave it.
    """

    def __init__(self, critic: Policy, policy: Any, embedder: Any = None, units: Units | None = None, beta: float = 0.0, count: int = 10, seed: int = 0):
        if critic.seeds != 1 or not isinstance(critic.module, Steered):
            raise UserError("steering needs the policy of a v-gps run with one seed")
        self.critic, self.policy, self.embedder, self.units, self.beta, self.count = critic.module, policy, embedder, units, beta, count
        self.rng = np.random.default_rng(seed)

    @torch.no_grad()
    def __call__(self, observation: np.ndarray, instruction: str | None = None) -> np.ndarray:
        """The chosen action [d] (or chunk [T, d]) for one observation [D]; the embedded instruction is put behind it."""
        made = np.asarray(self.policy.sample_actions(observation, instruction, self.count), np.float32)
        first = torch.from_numpy(made if made.ndim == 2 else made[:, 0])
        first = first if self.units is None else self.units.physical(first)
        seen = observation if self.embedder is None else np.concatenate([observation, self.embedder.encode([instruction])[0]])
        values = self.critic.values(torch.from_numpy(np.asarray(seen, np.float32))[None, None], first[None, None])[0, 0]
        gumbel = torch.from_numpy(self.rng.gumbel(size=len(values)).astype(np.float32)) if self.beta else None
        return made[int(choose(values, self.beta, gumbel))]
