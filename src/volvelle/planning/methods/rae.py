"""RAE: risk-averse equilibria of games, and policy-space response oracles that aim at them (arXiv 2205.15434, ICML 2023).

Problem: a Nash equilibrium does not look at how much a payoff varies with what the others may do. Here every player maximises its
expected payoff minus gamma times the variance of that payoff over the others' actions:

    r_gamma(p, q) = p' M q - gamma p' Sigma(q) p,     Sigma_jk(q) = sum_b q_b (M_jb - m_j)(M_kb - m_k),   m = M q

with every action played with probability >= `floor` (a tremble), so that rare actions count. r_gamma is concave in p: an equilibrium
exists, a best response is a quadratic program, and stochastic fictitious play finds equilibria of zero-sum and potential games.
PSRO-RAE uses the equilibrium as meta-strategy over growing populations of policies, each new one trained on mean minus variance.

Pick it when a bad surprise costs more than the average gains: crash avoidance, coordination with unreliable partners. Not when
the aim is low exploitability, and not for large gamma where mean-variance is not monotone (a flat, dominated action can win:
`least_variance` with a level of payoff is then the better form). The floor is this library's explicit form of the paper's full-support opponent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float
from pydantic import Field

from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part

from ..game_tasks import Concept, Count, Logit, Nash, NonNegative, Populations, Probability, Solve
from ..games import Game, Profile, fictitious_play, moments, tremble
from ..simplex import check_floor, equilibrium, maximise_quadratic, maximise_smoothed

Vector = Float[np.ndarray, " own"]
Matrix = Float[np.ndarray, "own own"]


def utility(p: Vector, mean: Vector, covariance: Matrix, gamma: float) -> float:
    """r_gamma: expected payoff minus gamma times the variance, over the others' actions, of the mixture-averaged payoff."""
    return float(p @ mean - gamma * p @ covariance @ p)


def best_response(mean: Vector, covariance: Matrix, gamma: float, floor: float = 0.0, temperature: float = 0.0,
                  start: Vector | None = None) -> Vector:
    """argmax of r_gamma over the trembling simplex; with a temperature, of r_gamma plus temperature times entropy (unique)."""
    if gamma < 0:
        raise UserError(f"gamma={gamma}: must be at least 0")
    if temperature > 0:
        return maximise_smoothed(mean, gamma * covariance, temperature, floor, start)
    return maximise_quadratic(mean, gamma * covariance, floor)


def least_variance(mean: Vector, covariance: Matrix, level: float, floor: float = 0.0) -> Vector:
    """The constrained form: least p' Sigma p with p' mean >= level. gamma is the multiplier; its critical value is found by
    bisection and the two best responses beside it are mixed so that the level is met exactly."""
    def response(weight):                                   # weight = 1 / gamma
        return maximise_quadratic(weight * mean, covariance, floor)

    def solved(p):
        return p @ mean >= level

    low = response(0.0)
    if solved(low):
        return low
    most = maximise_quadratic(mean, 0 * covariance, floor)
    if not solved(most) and most @ mean < level - 1e-12 * max(1.0, abs(level)):
        raise UserError(f"level={level}: the largest expected payoff here is {most @ mean:.6g}")
    small, large = 0.0, 1.0
    while not solved(high := response(large)):
        if large > 1e15:
            return most
        large *= 4
    for _ in range(100):
        middle = (small + large) / 2
        p = response(middle)
        if solved(p):
            large, high = middle, p
        else:
            small, low = middle, p
    share = (level - low @ mean) / (high @ mean - low @ mean)
    return (1 - share) * low + share * high


def gains(game: Game, profile: Profile, gamma: float, floor: float = 0.0) -> Float[np.ndarray, " players"]:
    """What each player could still gain in r_gamma by deviating alone; the largest is the RAE-exploitability."""
    found = []
    for i, p in enumerate(profile):
        m, s = moments(game, profile, i)
        found.append(utility(best_response(m, s, gamma, floor), m, s, gamma) - utility(p, m, s, gamma))
    return np.array(found)


@dataclass(frozen=True, eq=False)
class Equilibrium:
    """A profile, its RAE-exploitability, and how fictitious play ended (last difference to the best responses, steps)."""

    profile: Profile
    exploitability: float
    residual: float = np.nan
    steps: int = 0


def solve(game: Game, gamma: float, floor: float = 0.0, temperature: float = 0.01, steps: int = 5000, rate: float | None = None,
          tolerance: float = 1e-3, start: Profile | None = None, exact: bool = True, restarts: int = 0,
          generator: np.random.Generator | None = None) -> Equilibrium:
    """Stochastic fictitious play from `start` (uniform), then, if `exact`, the risk-averse equilibrium next to where it ended.

    Converges in two-player zero-sum and potential games; elsewhere read `exploitability` (measured without the entropy term) and
    give `restarts` random starts, drawn from `generator`: they are used one by one while the exploitability exceeds 1e-8.
    """
    if restarts and generator is None:
        raise UserError(f"restarts={restarts}: random starts need a generator")
    best = _play(game, gamma, floor, temperature, steps, rate, tolerance, start or game.uniform(), exact)
    for _ in range(restarts):
        if best.exploitability <= 1e-8:
            break
        again = [generator.dirichlet(np.ones(size)) for size in game.sizes]
        best = min(best, _play(game, gamma, floor, temperature, steps, rate, tolerance, again, exact), key=lambda e: e.exploitability)
    return best


def _play(game, gamma, floor, temperature, steps, rate, tolerance, start, exact) -> Equilibrium:
    last: dict[int, np.ndarray] = {}

    def respond(profile, i):
        last[i] = best_response(*moments(game, profile, i), gamma, floor, temperature, last.get(i))
        return last[i]

    profile, residual, taken = fictitious_play(respond, [tremble(p, floor) for p in start], steps, rate, tolerance)
    found = Equilibrium(profile, float(gains(game, profile, gamma, floor).max()), residual, taken)
    if exact:
        sharp = near(game, gamma, floor, profile)
        if sharp.exploitability <= found.exploitability:
            return Equilibrium(sharp.profile, sharp.exploitability, residual, taken)
    return found


def near(game: Game, gamma: float, floor: float, start: Profile) -> Equilibrium:
    """The equilibrium that the optimality conditions lead to from `start`, stable or not; check its exploitability."""
    def gradients(profile):
        found = []
        for i, p in enumerate(profile):
            m, s = moments(game, profile, i)
            found.append(m - 2 * gamma * s @ p)
        return found

    profile = equilibrium(gradients, start, floor)
    return Equilibrium(profile, float(gains(game, profile, gamma, floor).max()))


def equilibria(game: Game, gamma: float, floor: float, starts: int, generator: np.random.Generator) -> list[Equilibrium]:
    """The distinct equilibria (stable or not) that `near` reaches from random profiles and from every pure one; no claim to all."""
    pure = [[np.eye(size)[a] for a, size in zip(cell, game.sizes, strict=True)] for cell in np.ndindex(*game.sizes)]
    drawn = [[generator.dirichlet(np.ones(size)) for size in game.sizes] for _ in range(starts)]
    found: list[Equilibrium] = []
    for start in pure + drawn:
        point = near(game, gamma, floor, [tremble(p, floor) for p in start])
        new = all(max(np.abs(a - b).max() for a, b in zip(point.profile, old.profile, strict=True)) > 1e-6 for old in found)
        if new and point.exploitability <= 1e-9 * max(1.0, np.ptp(game.payoffs)):
            found.append(point)
    return found


def stable_range(game: Game, actions: Sequence[int], floor: float) -> tuple[float, float]:
    """The values of gamma at which the pure profile `actions`, trembling by `floor`, is a risk-averse equilibrium: (low, high).

    At a vertex of the trembling simplex the optimality conditions are linear in gamma, so the ends are exact. (inf, -inf): never.
    """
    profile = [tremble(np.eye(size)[a], floor) for a, size in zip(actions, game.sizes, strict=True)]
    low, high = 0.0, np.inf
    for i, own in enumerate(actions):
        check_floor(game.sizes[i], floor)
        m, s = moments(game, profile, i)
        slope = 2 * s @ profile[i]
        for ahead, faster in zip(np.delete(m[own] - m, own), np.delete(slope[own] - slope, own), strict=True):
            if faster > 1e-15:                              # own is worth more by `ahead`, and loses `faster` per unit of gamma
                high = min(high, ahead / faster)
            elif faster < -1e-15:
                low = max(low, ahead / faster)
            elif ahead < 0:
                return np.inf, -np.inf
    return (low, high) if low <= high else (np.inf, -np.inf)


def path(game: Game, gammas: Sequence[float], floor: float, **options) -> list[Equilibrium]:
    """Equilibria for rising gamma, each solved from the one before."""
    found: list[Equilibrium] = []
    for gamma in gammas:
        start = found[-1].profile if found else None
        found.append(solve(game, gamma, floor, start=start, **options))
    return found


@part("rae")
class RiskAverse(Concept):
    """The risk-averse equilibrium: gamma weighs the variance, floor is every action's least probability. `temperature`, `rate` (none:
    1 / (t + 1)) and `rounds` are fictitious play's; `restarts`: further random starts while a solution over populations is not exact."""

    gamma: NonNegative = 0.1
    floor: Probability = 0.01
    temperature: NonNegative = 0.01
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    rounds: Count = 500
    restarts: Annotated[int, Field(ge=0)] = 3

    def solve(self, game, generator):
        return solve(game, self.gamma, self.floor, self.temperature, self.rounds, self.rate, restarts=self.restarts, generator=generator).profile

    def improve(self, game, profile, t, generator):
        profile = [tremble(p, self.floor) for p in profile] if t == 0 else profile
        rate = self.rate or 1 / (t + 2)
        replies = [best_response(*moments(game, profile, i), self.gamma, self.floor, self.temperature) for i in range(game.players)]
        return [(1 - rate) * p + rate * r for p, r in zip(profile, replies, strict=True)]

    def finish(self, game, profile):
        sharp = near(game, self.gamma, self.floor, profile)
        return sharp.profile if sharp.exploitability < gains(game, profile, self.gamma, self.floor).max() else profile

    def floor_in(self, game):
        return self.floor


claim = Claim(
    says="against players who err now and then, the payoff varies far less than that of a Nash equilibrium or of logit play, at little cost in its mean",
    arms={"nash": Arm(Solve(concept=Nash("welfare")), steps=1), "logit": Arm(Solve(concept=Logit()), steps=1),
          "rae": Solve(concept=RiskAverse(gamma=0.1)), "rae-strong": Solve(concept=RiskAverse(gamma=1.0))},
    task="random-game", steps=300, seeds=20, equal="games", minutes=4, run={"checkpoint_every": 0}, quick={"steps": 20, "seeds": 2},
    expects=("rae < nash on variance", "rae < logit on variance", "rae-strong < rae on variance", "rae >= nash - 1 on mean"))

rae = method("rae", Solve(concept=RiskAverse()), title="Equilibria that weigh the variance over what the others do", source="arXiv 2205.15434",
             claim=claim)

population_claim = Claim(
    says="over populations of policies, where the Nash equilibrium of the largest payoffs hunts the stag the risk-averse one hunts hares, and with "
         "partners who err it crashes less",
    arms={"nash": Populations(), "rae": Populations(concept=RiskAverse(1.0, 0.05), risk=0.1),
          "nash-merge": Arm(Populations(tremble=0.2), task="merge"),
          "rae-merge": Arm(Populations(concept=RiskAverse(0.1, 0.05), risk=0.02, tremble=0.2), task="merge")},
    task="stag-hunt", steps=5, seeds=20, equal="policies", minutes=15, run={"checkpoint_every": 0}, quick={"steps": 1, "seeds": 2},
    expects=("rae > nash on hares", "rae-merge < nash-merge on crashes_trembling", "rae-merge >= nash-merge - 0.05 on arrivals_trembling"))

psro = method("psro", Populations(), title="Grow populations of policies against a Nash equilibrium of those so far", source="arXiv 1711.00832")
psro_rae = method("psro-rae", Populations(concept=RiskAverse(), risk=0.1), title="Populations of policies that weigh the variance over opponents",
                  source="arXiv 2205.15434", claim=population_claim)
