"""What SQIRL's network form is made of: heads that act by the time step, and a replay buffer whose transitions age."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from volvelle.control.buffers import Replay, ReplayPart
from volvelle.control.envs import each
from volvelle.control.networks import Dueling, Output
from volvelle.control.policy import Deciding
from volvelle.core.errors import UserError
from volvelle.core.parts import part


@part("aged")
class Aged(ReplayPart):
    """Transitions count `factor` times less for every iteration since they were stored (1: all alike)."""

    factor: Annotated[float, Field(gt=0, le=1)] = 1.0

    @property
    def live(self):
        return AgedReplay


class AgedReplay(Replay):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.weight = np.zeros(self.length)

    def add(self, *values, **more):
        self.weight[self.added % self.length] = 1.0
        super().add(*values, **more)

    def age(self) -> None:
        self.weight *= self.part.factor

    def draw(self, step):
        if self.part.factor == 1:
            return super().draw(step)
        cumulated = np.cumsum(self.weight[: len(self)])
        at = self.rng.uniform(self.part.batch).astype(float) * cumulated[-1]
        return np.minimum(np.searchsorted(cumulated, at, side="right"), len(self) - 1), None

    def state_dict(self):
        return super().state_dict() | {"weight": self.weight.copy()}

    def load(self, state, folder):
        super().load(state, folder)
        self.weight = state["weight"].copy()


class Timed(Deciding):
    """The network, and one frozen copy of it [i, P] for every time step learnt. Its memory is the time step of every environment."""

    def __init__(self, recipe: Any, spec):
        super().__init__()
        spec.actions.only("discrete", "sqirl-network")
        self.actions, self.k, self.width, self.head = spec.actions.codes[0], recipe.depth, recipe.value.width, recipe.value
        self.separate, self.time, self.limit = recipe.separate, recipe.time, 1.0
        heads, members = (1, self.k) if recipe.separate else (self.k, 1)
        body = recipe.network.build(spec.observations, members, int(recipe.time))
        if recipe.dueling:
            self.net = _DuelingHeads(body, members, heads, self.actions, self.width, recipe.network.init)
        else:
            self.net = Output(body, 1, heads * self.actions * self.width, recipe.network.init) if members == 1 else _Members(body, members, self.actions * self.width, recipe.network.init)
        self.frozen = torch.zeros(0, sum(p.numel() for p in self.parameters()))
        self.others: list[torch.nn.Module] = []  # where a frozen copy is put to act

    def outputs(self, x: Any, t: Tensor, net: torch.nn.Module | None = None) -> Tensor:
        """[B, k, A, width] of observations [1, B, ...] at time steps t [B]."""
        net = self.net if net is None else net
        made = net(x, (t / self.limit)[None, :, None].float()) if self.time else net(x)
        return made.transpose(0, 1).reshape(made.shape[1], self.k, self.actions, self.width)

    def greedy_at(self, x: Any, t: np.ndarray, random: np.ndarray | None = None) -> np.ndarray:
        """Actions [B]: by the frozen copy of its time step, or after those by `random` [B] (None: by the network as it is now)."""
        if not self.others:
            self.others.append(copy.deepcopy(self.net).requires_grad_(False))
        found = np.zeros(len(t), np.int64)
        for step in np.unique(np.minimum(t, len(self.frozen))):
            rows = np.flatnonzero(np.minimum(t, len(self.frozen)) == step)
            net = self.net
            if step < len(self.frozen):
                net = self.others[0]
                vector_to_parameters(self.frozen[int(step)].to(self.device), net.parameters())
            elif random is not None:
                found[rows] = random[rows]
                continue
            mine = each(lambda o: o[:, rows], x)
            with torch.no_grad():
                q = self.head.value(self.outputs(mine, torch.from_numpy(t[rows]).to(self.device), net)[:, -1])
            found[rows] = q.argmax(-1).cpu().numpy()
        return found

    def remember(self, observations, memory, explore, streams):
        count = next(iter(observations.values())).shape[1] if isinstance(observations, dict) else observations.shape[1]
        t = np.zeros(count, np.int64) if memory is None else memory
        random = streams.integers(self.actions, count)[0] if explore else None
        return torch.from_numpy(self.greedy_at(observations, t, random))[None], t + 1

    def forget(self, memory, row):
        memory = memory.copy()
        memory[row] = 0
        return memory

    def best(self, observations):
        return self.remember(observations, None, False, None)[0]

    def freeze(self, net: torch.nn.Module) -> None:
        self.frozen = torch.cat([self.frozen, parameters_to_vector(net.parameters()).detach().cpu()[None].clone()])

    def weights(self):
        return dict(self.state_dict()) | {"frozen": self.frozen, "limit": torch.tensor(float(self.limit))}

    def load_weights(self, saved, where):
        saved = dict(saved)
        self.frozen, self.limit = saved.pop("frozen").clone(), float(saved.pop("limit"))
        super().load_weights(saved, where)


class _Members(torch.nn.Module):
    """A network per head: [1, B, ...] -> [k, B, A * width] -> [1, B, k * A * width]."""

    def __init__(self, body, members, width, how):
        super().__init__()
        self.net, self.members = Output(body, members, width, how), members

    def forward(self, x, extra=None):
        wide = each(lambda o: o.expand(self.members, *o.shape[1:]).contiguous(), x)
        made = self.net(wide, None if extra is None else extra.expand(self.members, *extra.shape[1:]).contiguous())
        return made.transpose(0, 1).flatten(1)[None]


class _DuelingHeads(torch.nn.Module):
    """Q - mean Q + V, per head."""

    def __init__(self, body, members, heads, actions, width, how):
        super().__init__()
        if members > 1:
            raise UserError("dueling=true with separate=true: choose one of them")
        self.net = Dueling(body, 1, actions, heads * width, how)
        self.heads, self.actions = heads, actions

    def forward(self, x, extra=None):
        if extra is not None:
            raise UserError("dueling=true with time=true: choose one of them")
        made = self.net(x).unflatten(-1, (self.actions, self.heads, -1))
        return made.transpose(-2, -3).flatten(2)
