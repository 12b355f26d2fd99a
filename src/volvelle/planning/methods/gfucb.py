"""GFUCB: optimism over a joint confidence set of all tasks (arXiv 2205.15701, NeurIPS 2022).

Problem: M bandits or decision processes, played side by side, share an unknown and possibly non-linear representation phi, each with its own
linear head w_i. How much does learning them together help exploration?

Per round: fit phi and all heads by joint least squares; keep every (phi, w_1 .. w_M) whose predictions on the inputs seen so far, summed over ALL
tasks, lie within beta of the fit's; play, in all tasks at once, the actions of the largest summed value in that set. One ball for
all tasks is the point: its radius grows with log |class| + M k where M separate learners pay M log |class|.

For a finite class the maximum is closed form: with G_i = sum phi phi', w~_i the projection of the fit (not of the rewards) onto phi and gap its
squared distance, it is sum_i phi(a_i)' w~_i + sqrt((beta - gap) sum_i phi(a_i)' G_i^-1 phi(a_i)). The tasks meet only under the
root, so coordinate ascent over tasks replaces the search over joint actions. The bound |f| <= 1 of the theory is not imposed there.

Pick it when several bandits (or finite-horizon decision processes) run in step, plausibly share features and exploration is dear. With one task or
unrelated tasks it gains nothing. beta from the theory is loose: sweep its factor for every arm. For a neural phi, see gfucb_neural.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ...core.errors import UserError
from ..bandits import LinearMdps

Beta = Callable[[int, int], float]  # (rounds so far, tasks in the ball) -> squared radius


def practical_beta(log_class: float, rank: int, noise: float, factor: float = 1.0) -> Beta:
    """factor noise^2 (log |class| + M k log(2 + t)): the theory's growth without its constants."""
    return lambda t, tasks: factor * noise**2 * (log_class + tasks * rank * np.log(2 + t))


def theory_beta(log_class: float, rank: int, noise: float, rounds: int, delta: float = 0.05) -> Beta:
    """Russo and Van Roy's radius with covering numbers at scale alpha = 1 / (k M T) and heads of length at most sqrt(k):
    8 noise^2 log(N / delta) + 2 alpha M t (8 + sqrt(8 noise^2 log(4 (M t)^2 / delta)))."""
    def beta(t, tasks):
        alpha, n = 1 / (rank * tasks * rounds), max(tasks * t, 1)
        log_cover = log_class + tasks * rank * np.log(1 + 4 * np.sqrt(rank) / alpha)
        return 8 * noise**2 * (log_cover - np.log(delta)) + 2 * alpha * n * (8 + np.sqrt(8 * noise**2 * np.log(4 * n**2 / delta)))
    return beta


# ------------------------------------------------------------------------------------------------- closed form

@dataclass(frozen=True, eq=False)
class Fit:
    """Joint least squares: `best` map of the class, heads [P, M, k] of every map, total squared error [P], predictions [M, X]."""

    best: int
    heads: Float[np.ndarray, "P M k"]
    errors: Float[np.ndarray, "P"]
    predictions: Float[np.ndarray, "M X"]


@dataclass(frozen=True, eq=False)
class Ball:
    """The joint confidence set, map by map: centres [P, M, k], inverse Gram matrices [P, M, k, k], slack = beta - gap [P]."""

    centres: Float[np.ndarray, "P M k"]
    inverses: Float[np.ndarray, "P M k k"]
    slack: Float[np.ndarray, "P"]


def gram(features: Float[np.ndarray, "P X k"], counts: Float[np.ndarray, "M X"], ridge: float) -> Float[np.ndarray, "P M k k"]:
    """Inverse of G_i + ridge I for every map and task. UserError where that is singular."""
    k = features.shape[2]
    matrices = np.einsum("mx,pxk,pxl->pmkl", counts, features, features) + ridge * np.eye(k)
    if ridge == 0 and (bad := np.argwhere(np.linalg.matrix_rank(matrices) < k)).size:
        raise UserError(f"ridge=0: the inputs of task {bad[0][1]} do not span the features of map {bad[0][0]}; use a positive ridge")
    return np.linalg.inv(matrices)


def fit(features, counts, sums, inverses, squares: float = 0.0) -> Fit:
    """Joint least squares from counts and summed rewards per input ([M, X] each); `squares` = sum of Y^2 makes the errors absolute."""
    moments = np.einsum("mx,pxk->pmk", sums, features)
    heads = np.einsum("pmkl,pml->pmk", inverses, moments)
    predicted = np.einsum("pxk,pmk->pmx", features, heads)
    errors = squares + (counts * predicted**2 - 2 * sums * predicted).sum((1, 2))
    best = int(np.argmin(errors))
    return Fit(best, heads, errors, predicted[best])


def ball(features, counts, fitted: Fit, inverses, beta: float) -> Ball:
    """{f : sum over tasks and data of (f - fit)^2 <= beta}. Centred at the fit's predictions; the fit itself is always inside."""
    moments = np.einsum("mx,mx,pxk->pmk", counts, fitted.predictions, features)
    centres = np.einsum("pmkl,pml->pmk", inverses, moments)
    centres[fitted.best] = fitted.heads[fitted.best]
    gaps = (counts * (np.einsum("pxk,pmk->pmx", features, centres) - fitted.predictions) ** 2).sum((1, 2))
    gaps[fitted.best] = 0.0
    return Ball(centres, inverses, beta - gaps)


def widths(phi: Float[np.ndarray, "P M K k"], inverses: Float[np.ndarray, "P M k k"]) -> Float[np.ndarray, "P M K"]:
    """phi' G^-1 phi."""
    return np.einsum("...mak,...mkl,...mal->...ma", phi, inverses, phi)


def optimistic(means: Float[np.ndarray, "*batch P M K"], width: Float[np.ndarray, "*batch P M K"], slack: Float[np.ndarray, "P"],
               sweeps: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest sum_i mean_i(a_i) + sqrt(slack sum_i width_i(a_i)) over feasible maps and joint actions, by coordinate ascent.
    Returns the value [*batch], the map [*batch] and the actions [*batch, M]."""
    room = np.maximum(slack, 0.0)
    pick = (means + np.sqrt(room[:, None, None] * width)).argmax(-1)

    def chosen(table):
        return np.take_along_axis(table, pick[..., None], -1)[..., 0]

    for _ in range(sweeps):
        for i in range(means.shape[-2]):
            others = np.arange(means.shape[-2]) != i
            rest = chosen(width)[..., others].sum(-1)[..., None]
            pick[..., i] = (means[..., i, :] + np.sqrt(room[:, None] * (rest + width[..., i, :]))).argmax(-1)
    value = chosen(means).sum(-1) + np.sqrt(room * chosen(width).sum(-1))
    value = np.where(slack >= 0, value, -np.inf)
    best = value.argmax(-1)
    actions = np.take_along_axis(pick, best[..., None, None], -2)[..., 0, :]
    return value.max(-1), best, actions


def separate(tasks: int) -> list[list[int]]:
    """Every task its own ball: the baseline of independent learning."""
    return [[i] for i in range(tasks)]


class Gfucb:
    """Plays bandits on a finite class. groups: which tasks share a ball (default: all); one map in the class: LinUCB.
    epsilon: instead of optimism, follow the fit and with this probability act at random (`generator`)."""

    def __init__(self, features: Float[np.ndarray, "P X k"], tasks: int, beta: Beta, ridge: float = 1e-3,
                 groups: Sequence[Sequence[int]] | None = None, epsilon: float | None = None, generator: np.random.Generator | None = None):
        if epsilon is not None and generator is None:
            raise UserError(f"epsilon={epsilon}: random actions need a generator")
        self.features, self.beta, self.ridge, self.epsilon, self.generator = features, beta, ridge, epsilon, generator
        self.groups = [list(g) for g in groups] if groups else [list(range(tasks))]
        self.counts, self.sums = np.zeros((2, tasks, features.shape[1]))
        self.rounds = 0

    def choose(self, shown):
        picked = np.zeros(len(shown), dtype=int)
        for group in self.groups:
            counts, sums, inputs = self.counts[group], self.sums[group], shown[group]
            inverses = gram(self.features, counts, self.ridge)
            fitted = fit(self.features, counts, sums, inverses)
            if self.epsilon is not None:
                greedy = np.take_along_axis(fitted.predictions, inputs, 1).argmax(1)
                chance = self.generator.integers(inputs.shape[1], size=len(group))
                picked[group] = np.where(self.generator.random(len(group)) < self.epsilon, chance, greedy)
                continue
            region = ball(self.features, counts, fitted, inverses, self.beta(self.rounds, len(group)))
            phi = self.features[:, inputs]                   # [P, M, K, k]
            picked[group] = optimistic(np.einsum("pmak,pmk->pma", phi, region.centres), widths(phi, inverses), region.slack)[2]
        return shown[np.arange(len(shown)), picked]

    def observe(self, inputs, rewards):
        tasks = np.arange(len(inputs))
        self.counts[tasks, inputs] += 1
        self.sums[tasks, inputs] += rewards
        self.rounds += 1


# ------------------------------------------------------------------------------------------------- decision processes

class GfucbMdp:
    """The finite-horizon form: per level, backward least squares on r + optimistic value of the next state, one joint ball, a shared bonus.

    The paper's global optimism over all levels is intractable; here every tuple of states (one per task, visited in the same step) takes
    the largest joint value at its own level, as in LSVI-UCB, and a task's part of the root is in proportion to its width.
    """

    def __init__(self, problem: LinearMdps, beta: Beta, ridge: float = 1e-3, groups: Sequence[Sequence[int]] | None = None):
        self.problem, self.beta, self.ridge = problem, beta, ridge
        self.groups = [list(g) for g in groups] if groups else [list(range(problem.tasks))]
        h, m = problem.horizon, problem.tasks
        self.inputs, self.rewards, self.after = np.zeros((0, h, m), int), np.zeros((0, h, m)), np.zeros((0, h, m), int)

    def values(self, region: Ball, states: Int[np.ndarray, "N M"], most: float) -> tuple[np.ndarray, np.ndarray]:
        """Each task's share of the joint optimistic value of its state tuple, clipped to [0, most], and the actions."""
        actions = self.problem.actions
        inputs = states[..., None] * actions + np.arange(actions)                                  # [N, M, A]
        phi = np.moveaxis(self.problem.features[:, inputs], 0, 1)                                    # [N, P, M, A, k]
        means = np.einsum("npmak,pmk->npma", phi, region.centres)
        width = widths(phi, region.inverses)
        _, maps, chosen = optimistic(means, width, region.slack)
        rows = np.arange(len(states))
        mean = np.take_along_axis(means[rows, maps], chosen[..., None], -1)[..., 0]
        part = np.take_along_axis(width[rows, maps], chosen[..., None], -1)[..., 0]
        bonus = np.sqrt(region.slack[maps])[:, None] * part / np.sqrt(np.maximum(part.sum(1, keepdims=True), 1e-300))
        return np.clip(mean + bonus, 0.0, most), chosen

    def plan(self) -> list[list[Ball]]:
        """Backwards over levels: [level][group] the joint confidence set."""
        p = self.problem
        plan: list[list[Ball]] = [[] for _ in range(p.horizon)]
        for g, group in enumerate(self.groups):
            for h in reversed(range(p.horizon)):
                later = 0.0
                if h + 1 < p.horizon and len(self.after):
                    later = self.values(plan[h + 1][g], self.after[:, h][:, group], p.horizon - h - 1)[0]
                target = self.rewards[:, h][:, group] + later
                counts, sums = np.zeros((2, len(group), p.features.shape[1]))
                columns = np.broadcast_to(np.arange(len(group)), target.shape)
                np.add.at(counts, (columns, self.inputs[:, h][:, group]), 1)
                np.add.at(sums, (columns, self.inputs[:, h][:, group]), target)
                inverses = gram(p.features, counts, self.ridge)
                radius = self.beta(len(self.rewards), len(group)) * (p.horizon - h) ** 2
                plan[h].append(ball(p.features, counts, fit(p.features, counts, sums, inverses), inverses, radius))
        return plan

    def episode(self, generator: np.random.Generator) -> Float[np.ndarray, "M"]:
        """Play one episode in all tasks. Returns each task's regret as the summed optimality gaps of its actions (unbiased)."""
        p, plan, best = self.problem, self.plan(), self.problem.values()
        states, tasks, lost = np.zeros(p.tasks, int), np.arange(p.tasks), np.zeros(p.tasks)
        rows = np.zeros((3, 1, p.horizon, p.tasks))
        for h in range(p.horizon):
            actions = np.zeros(p.tasks, int)
            for region, group in zip(plan[h], self.groups, strict=True):
                actions[group] = self.values(region, states[None, group], p.horizon - h)[1][0]
            lost += best[h, tasks, states].max(1) - best[h, tasks, states, actions]
            inputs = states * p.actions + actions
            reward, states = p.move(inputs, generator)
            rows[:, 0, h] = inputs, reward, states
        self.inputs = np.concatenate([self.inputs, rows[0].astype(int)])
        self.rewards = np.concatenate([self.rewards, rows[1]])
        self.after = np.concatenate([self.after, rows[2].astype(int)])
        return lost
