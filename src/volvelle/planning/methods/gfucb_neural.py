"""GFUCB with a neural representation (arXiv 2205.15701): the practical form, where the class is a network with M linear heads.

Per round: (a) a few steps of joint least squares give the fit; (b) optimism, either "optimistic": a copy of the network is trained for a few
dozen steps to maximise sum_i max_a f_i(C_i, a) - multiplier [sum over data of (f - fit)^2 - beta]_+, the maximum softened at first, the
multiplier doubling while the constraint is violated, and the best iterate inside the set is played; or "bonus": the representation is frozen and the closed form of
methods.gfucb gives the joint bonus; or "greedy": epsilon-greedy on the fit. Exact maximisation over a network is intractable: "optimistic" is a
lower bound of it. Values are clipped to [-1, 1] and features to length 1, else gradient ascent finds wild extrapolations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from volvelle.core.claims import Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.schedule import at
from volvelle.core.trainable import AdamW, Optimiser, Trainable

from ..bandit_tasks import Count, Explore, Explorer, NonNegative
from ..bandits import LinearMdps
from .gfucb import Beta, Fit, ball, gram, optimistic, practical_beta, widths


@part("gfucb-neural")
class Neural(Explorer):
    """GFUCB with a network. log_class: what stands for the logarithm of the class's size in the radius; factor scales the radius."""

    mode: Literal["bonus", "optimistic", "greedy"] = "bonus"
    rank: Count = 10
    hidden: tuple[Count, ...] = (32,)
    optimiser: Optimiser = AdamW(lr=1e-2, weight_decay=2.0, clip=None)
    fit_steps: Count = 20
    ascent_steps: Count = 30
    log_class: NonNegative = 10.0
    factor: NonNegative = 0.03
    ridge: Annotated[float, Field(gt=0)] = 1e-2
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.05

    def require(self, problem):
        if problem.inputs is None or isinstance(problem.world, LinearMdps):
            raise UserError("explorer=gfucb-neural: this problem's inputs are no vectors; use explorer=gfucb")

    def player(self, problem, groups, run):
        beta = practical_beta(self.log_class, self.rank, problem.world.noise, self.factor)
        return NeuralGfucb(problem.inputs, problem.world.tasks, beta, run.torch_rng("gfucb"), self,
                           lambda name, net: run.model(name, net, self.optimiser), groups)


class SharedNet(torch.nn.Module):
    """A trunk shared by all tasks, features of length at most 1, one linear head per task."""

    def __init__(self, size: int, tasks: int, rank: int, hidden: Sequence[int], generator: torch.Generator):
        super().__init__()
        sizes = [size, *hidden, rank]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.heads = torch.nn.Parameter(torch.randn(tasks, rank, generator=generator) / rank**0.5)
        for layer in self.layers:
            with torch.no_grad():
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / layer.in_features) ** 0.5)
                layer.bias.zero_()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        x = self.layers[-1](x)
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., M, K, d], the inputs of each task -> values [..., M, K]."""
        return (self.features(x) * self.heads[:, None]).sum(-1)


class NeuralGfucb:
    """Plays bandits whose inputs are vectors [X, d]. groups: which tasks share a network and a ball (default: all).
    train(name, net): makes a network trainable (a run's `model`); `options` holds the numbers."""

    def __init__(self, inputs: Float[np.ndarray, "X d"], tasks: int, beta: Beta, generator: torch.Generator, options: Neural,
                 train: Callable[[str, torch.nn.Module], Trainable], groups: Sequence[Sequence[int]] | None = None):
        self.inputs, self.beta, self.generator, self.options = torch.as_tensor(inputs, dtype=torch.float32), beta, generator, options
        self.groups = [list(g) for g in groups] if groups else [list(range(tasks))]
        self.nets = [train(f"net-{i}", SharedNet(self.inputs.shape[1], len(g), options.rank, options.hidden, generator)) for i, g in enumerate(self.groups)]
        self.seen, self.rewards = np.zeros((0, tasks), int), np.zeros((0, tasks))

    def choose(self, shown):
        picked = np.zeros(len(shown), int)
        mode = self.options.mode
        for net, group in zip((t.module for t in self.nets), self.groups, strict=True):
            inputs = self.inputs[torch.as_tensor(shown[group])]                        # [M, K, d]
            radius = self.beta(len(self.seen), len(group))
            if mode == "bonus":
                picked[group] = self._bonus(net, group, shown[group], radius)
            elif mode == "optimistic":
                picked[group] = self._ascend(net, group, inputs, radius)
            else:
                with torch.no_grad():
                    greedy = net(inputs).argmax(1)
                chance = torch.randint(inputs.shape[1], greedy.shape, generator=self.generator)
                explore = torch.rand(greedy.shape, generator=self.generator) < self.options.epsilon
                picked[group] = torch.where(explore, chance, greedy).numpy()
        return shown[np.arange(len(shown)), picked]

    def observe(self, inputs, rewards):
        self.seen, self.rewards = np.vstack([self.seen, inputs]), np.vstack([self.rewards, rewards])
        for net, group in zip(self.nets, self.groups, strict=True):
            x, y = self._data(group), torch.as_tensor(self.rewards[:, group].T, dtype=torch.float32)
            for _ in range(self.options.fit_steps):
                net.backward(((net(x) - y) ** 2).sum(0).mean())
                net.step()

    def state_dict(self):
        return {"seen": self.seen, "rewards": self.rewards}

    def load_state_dict(self, state):
        self.seen, self.rewards = state["seen"], state["rewards"]

    def _data(self, group) -> torch.Tensor:
        return self.inputs[torch.as_tensor(self.seen[:, group].T)]                     # [M, t, d]

    def _bonus(self, net, group, shown, radius):
        with torch.no_grad():
            features = net.features(self.inputs).double().numpy()[None]
            heads = net.heads.double().numpy()[None]
        counts = np.stack([np.bincount(self.seen[:, i], minlength=len(self.inputs)) for i in group]).astype(float)
        inverses = gram(features, counts, self.options.ridge)
        predictions = heads[0] @ features[0].T
        region = ball(features, counts, Fit(0, heads, np.zeros(1), predictions), inverses, radius)
        phi = features[:, shown]
        return optimistic(np.einsum("pmak,pmk->pma", phi, region.centres), widths(phi, inverses), region.slack)[2]

    def _ascend(self, net, group, inputs, radius):
        moving = copy.deepcopy(net)
        optimiser = torch.optim.Adam(moving.parameters(), at(self.options.optimiser.lr, 0))
        data = self._data(group)
        with torch.no_grad():
            anchor = net(data)
            best, picked, multiplier = -np.inf, None, 1.0
        for step in range(self.options.ascent_steps + 1):
            values = moving(inputs).clamp(-1, 1)
            excess = ((moving(data) - anchor) ** 2).sum() - radius
            total = values.amax(1).sum()
            if step == 0 or (excess <= 1e-6 * max(radius, 1.0) and total > best):
                best, picked = float(total.detach()), values.argmax(1)
            if step == self.options.ascent_steps:
                break
            multiplier = multiplier * 2 if excess > 0 else multiplier
            heat = 0.5 * (1 - step / self.options.ascent_steps) + 0.01  # a soft maximum first, else only the fit's favourites would rise
            optimiser.zero_grad()
            (multiplier * torch.relu(excess) - heat * torch.logsumexp(values / heat, 1).sum()).backward()
            torch.nn.utils.clip_grad_norm_(moving.parameters(), 10.0)
            optimiser.step()
        return picked.numpy()


neural = Explore(explorer=Neural())
claim = Claim(
    says="a network shared by all tasks loses less than a network for each",
    arms={"joint": neural, "independent": neural(sharing="separate"), "greedy": neural(explorer=Neural(mode="greedy"))},
    task="digits-bandits", steps=150, seeds=5, equal="rounds", minutes=15, run={"checkpoint_every": 0}, quick={"steps": 3, "seeds": 2},
    expects=("joint < independent on regret", "joint < greedy on regret"))

method("gfucb-neural", neural, title="GFUCB with a neural representation", source="arXiv 2205.15701", claim=claim)
