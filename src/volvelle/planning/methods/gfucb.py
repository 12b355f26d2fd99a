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
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part

from ..bandit_tasks import Explore, Explorer, NonNegative, SyntheticBandits
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
    errors: Float[np.ndarray, " P"]
    predictions: Float[np.ndarray, "M X"]


@dataclass(frozen=True, eq=False)
class Ball:
    """The joint confidence set, map by map: centres [P, M, k], inverse Gram matrices [P, M, k, k], slack = beta - gap [P]."""

    centres: Float[np.ndarray, "P M k"]
    inverses: Float[np.ndarray, "P M k k"]
    slack: Float[np.ndarray, " P"]


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


def optimistic(means: Float[np.ndarray, "*batch P M K"], width: Float[np.ndarray, "*batch P M K"], slack: Float[np.ndarray, " P"],
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


class Gfucb:
    """Plays bandits on a finite class. groups: which tasks share a ball (default: all; one each: independent
    learning); one map in the class: LinUCB.
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

    def state_dict(self):
        return {"counts": self.counts, "sums": self.sums, "rounds": self.rounds}

    def load_state_dict(self, state):
        self.counts, self.sums, self.rounds = state["counts"], state["sums"], state["rounds"]


# ------------------------------------------------------------------------------------------------- recipe

@part("gfucb")
class Finite(Explorer):
    """GFUCB on a finite class of maps, for bandits and for decision processes. factor scales the radius `beta`; known: the true map is given
    (with sharing=separate: LinUCB, the lower reference); epsilon: greedy play with random actions instead of optimism."""

    beta: Literal["practical", "theory"] = "practical"
    factor: NonNegative = 1.0
    ridge: NonNegative = 1e-3
    known: bool = False
    epsilon: Annotated[float, Field(ge=0, le=1)] | None = None

    def require(self, problem):
        if problem.features is None:
            raise UserError("explorer=gfucb: this problem has no finite class of maps (features); use explorer=gfucb-neural")
        if self.known and (problem.truth is None or len(set(problem.truth.tolist())) > 1):
            raise UserError("explorer.known=true: this problem has no map that is known to be true for all tasks")
        if self.epsilon is not None and isinstance(problem.world, LinearMdps):
            raise UserError(f"explorer.epsilon={self.epsilon}: greedy play is for bandits; leave it out on decision processes")

    def player(self, problem, groups, run):
        features = problem.features[problem.truth[:1]] if self.known else problem.features
        size, rank, noise = np.log(len(features)), features.shape[2], problem.world.noise
        beta = practical_beta(size, rank, noise, self.factor)
        if self.beta == "theory":
            exact = theory_beta(size, rank, noise, max(run.config.steps, 1))
            beta = lambda t, tasks: self.factor * exact(t, tasks)
        if isinstance(problem.world, LinearMdps):
            from .gfucb_mdp import GfucbMdp

            return GfucbMdp(problem.world, features, beta, self.ridge, groups)
        return Gfucb(features, problem.world.tasks, beta, self.ridge, groups, self.epsilon, run.rng("epsilon"))


gfucb = Explore(explorer=Finite())
claim = Claim(
    says="bandits that share an unknown representation lose less when they explore together than each alone; where nothing is shared they lose more",
    arms={"joint": gfucb, "independent": gfucb(sharing="separate"), "known-map": gfucb(explorer=Finite(known=True), sharing="separate"),
          "greedy": gfucb(explorer=Finite(epsilon=0.1)), **{f"nothing-shared-{w}": Arm(gfucb(sharing=w), task=SyntheticBandits(shared=False))
                                                          for w in ("joint", "separate")}},
    task="bandits", steps=40, seeds=20, equal="rounds", minutes=4, run={"checkpoint_every": 0}, quick={"steps": 5, "seeds": 2},
    expects=("joint < independent on regret", "joint < greedy on regret", "nothing-shared-joint > nothing-shared-separate on regret"))

gfucb = method("gfucb", gfucb, title="Optimism over one confidence set for all tasks that share a representation", source="arXiv 2205.15701", claim=claim)
