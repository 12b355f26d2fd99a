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
from itertools import pairwise
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

from ..bandit_tasks import Count, DigitsBandits, Explore, Explorer, NonNegative
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
    """Networks of `groups` groups of tasks side by side: in each a trunk shared by its tasks, features of length at most 1, one linear head
    per task. Every parameter has a leading group axis; groups share nothing."""

    def __init__(self, size: int, groups: int, tasks: int, rank: int, hidden: Sequence[int], generator: torch.Generator):
        super().__init__()
        sizes = [size, *hidden, rank]
        self.weights = torch.nn.ParameterList(torch.randn(groups, a, b, generator=generator) * (2 / a) ** 0.5 for a, b in pairwise(sizes))
        self.biases = torch.nn.ParameterList(torch.zeros(groups, 1, b) for b in sizes[1:])
        self.heads = torch.nn.Parameter(torch.randn(groups, tasks, rank, generator=generator) / rank**0.5)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """x [G, n, d] -> [G, n, k]."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (torch.relu(x) if i else x) @ weight + bias
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [G, m, K, d], the inputs of each task of each group -> values [G, m, K]."""
        return (self.features(x.flatten(1, 2)).unflatten(1, x.shape[1:3]) * self.heads[:, :, None]).sum(-1)


class NeuralGfucb:
    """Plays bandits whose inputs are vectors [X, d]. groups: consecutive tasks that share a network and a ball, all groups of one size
    (default: one group of all). train(name, net): makes a network trainable (a run's `model`); `options` holds the numbers."""

    def __init__(self, inputs: Float[np.ndarray, "X d"], tasks: int, beta: Beta, generator: torch.Generator, options: Neural,
                 train: Callable[[str, torch.nn.Module], Trainable], groups: Sequence[Sequence[int]] | None = None):
        self.inputs, self.beta, self.generator, self.options = torch.as_tensor(inputs, dtype=torch.float32), beta, generator, options
        self.size = len(groups[0]) if groups else tasks
        if groups and [i for g in groups for i in g] != list(range(tasks)) or tasks % self.size:
            raise UserError(f"groups={groups}: expected consecutive tasks in groups of one size")
        self.net = train("net", SharedNet(self.inputs.shape[1], tasks // self.size, self.size, options.rank, options.hidden, generator))
        self.seen, self.rewards = np.zeros((0, tasks), int), np.zeros((0, tasks))

    def choose(self, shown):
        radius = self.beta(len(self.seen), self.size)
        if self.options.mode == "bonus":
            picked = self._bonus(shown, radius)
        elif self.options.mode == "optimistic":
            picked = self._ascend(self._grouped(shown), radius)
        else:
            with torch.no_grad():
                greedy = self.net(self._grouped(shown)).argmax(2).flatten()
            chance = torch.randint(shown.shape[1], greedy.shape, generator=self.generator)
            explore = torch.rand(greedy.shape, generator=self.generator) < self.options.epsilon
            picked = torch.where(explore, chance, greedy).numpy()
        return shown[np.arange(len(shown)), picked]

    def observe(self, inputs, rewards):
        self.seen, self.rewards = np.vstack([self.seen, inputs]), np.vstack([self.rewards, rewards])
        x, y = self._grouped(self.seen.T), torch.as_tensor(self.rewards.T, dtype=torch.float32).unflatten(0, (-1, self.size))
        for _ in range(self.options.fit_steps):
            self.net.backward(((self.net(x) - y) ** 2).mean(2).sum())
            self.net.step()

    def state_dict(self):
        return {"seen": self.seen, "rewards": self.rewards}

    def load_state_dict(self, state):
        self.seen, self.rewards = state["seen"], state["rewards"]

    def _grouped(self, places: np.ndarray) -> torch.Tensor:
        """The input vectors at `places` [M, K] as [G, m, K, d]."""
        return self.inputs[torch.as_tensor(places)].unflatten(0, (-1, self.size))

    def _bonus(self, shown, radius):
        net, picked = self.net.module, []
        with torch.no_grad():
            maps = net.features(self.inputs.expand(len(net.heads), -1, -1)).double().numpy()
            heads = net.heads.double().numpy()
        counts = np.stack([np.bincount(row, minlength=len(self.inputs)) for row in self.seen.T]).astype(float)
        for g, (features, head) in enumerate(zip(maps[:, None], heads, strict=True)):
            tasks = slice(g * self.size, (g + 1) * self.size)
            inverses = gram(features, counts[tasks], self.options.ridge)
            region = ball(features, counts[tasks], Fit(0, head[None], np.zeros(1), head @ features[0].T), inverses, radius)
            phi = features[:, shown[tasks]]
            picked.append(optimistic(np.einsum("pmak,pmk->pma", phi, region.centres), widths(phi, inverses), region.slack)[2])
        return np.concatenate(picked)

    def _ascend(self, inputs, radius):
        moving = copy.deepcopy(self.net.module)
        optimiser = torch.optim.Adam(moving.parameters(), at(self.options.optimiser.lr, 0))
        data = self._grouped(self.seen.T)
        with torch.no_grad():
            anchor = moving(data)
        best, multiplier = torch.full((len(inputs),), -torch.inf), torch.ones(len(inputs))
        picked = torch.zeros(inputs.shape[:2], dtype=torch.long)
        for step in range(self.options.ascent_steps + 1):
            values = moving(inputs).clamp(-1, 1)                                       # [G, m, K]
            excess = ((moving(data) - anchor) ** 2).sum((1, 2)) - radius               # [G]; the fit itself, step 0, is always inside
            total = values.detach().amax(2).sum(1)
            better = (total > best) & (excess.detach() <= 0)
            best, picked = torch.where(better, total, best), torch.where(better[:, None], values.argmax(2), picked)
            multiplier = torch.where(excess.detach() > 0, 2 * multiplier, multiplier)
            heat = 0.5 * max(1 - step / self.options.ascent_steps, 0) + 0.01  # a soft maximum first, else only the fit's favourites would rise
            optimiser.zero_grad()
            (multiplier * torch.relu(excess) - heat * torch.logsumexp(values / heat, 2).sum(1)).sum().backward()
            optimiser.step()
        return picked.flatten().numpy()


neural = Explore(explorer=Neural())
claim = Claim(
    says="a network shared by all tasks loses less than a network for each",
    arms={"joint": neural, "independent": neural(sharing="separate"), "greedy": neural(explorer=Neural(mode="greedy"))},
    task=DigitsBandits(tasks=8), steps=300, seeds=15, first_seed=5, equal="rounds", minutes=25, run={"checkpoint_every": 0}, quick={"steps": 3, "seeds": 2},
    expects=("joint < independent on regret", "joint < independent on regret_last_quarter", "joint < greedy on regret"))

method("gfucb-neural", neural, title="GFUCB with a neural representation", source="arXiv 2205.15701", claim=claim)
