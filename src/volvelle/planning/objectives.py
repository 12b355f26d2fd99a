"""What a planner may be asked for, as parts: each names a functional, the start stocks among which it may choose, and how it is judged."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part

from . import functionals as f
from .distributions import Laws, cvar, expectation
from .mdp import MDP
from .stock import achievable_returns
from .stock_grid import StockGrid

Positive = Annotated[float, Field(gt=0)]


class ReturnObjective(Part):
    """A functional of the law of start stock + return.

    A plain function (atoms, weights) -> number can stand here; it is searched for violations of its conditions before planning.
    """

    slot: ClassVar[str] = "objective"
    call: ClassVar[tuple[str, ...]] = ("atoms", "weights")

    @classmethod
    def from_function(cls, function, call):
        return _Function(function, call.name)

    def functional(self):
        """What dynamic programming maximises for each start stock: a callable from a stack of laws [n] to numbers [n]."""
        raise NotImplementedError

    def starts(self, mdp: MDP) -> np.ndarray:
        """Start stocks [k] (or [k, m]) to choose from."""
        return np.array([self.functional().start_stock], dtype=float)

    def outer(self, stocks, values) -> np.ndarray:
        """[k]: how good each start stock is, given the functional's values [k] from there."""
        return values

    def grid_error(self, grid: StockGrid, horizon: int) -> float | None:
        """How far the value on a stock grid may be from the truth; None if no bound is known."""
        lipschitz = getattr(self.functional(), "lipschitz", None)
        return None if lipschitz is None else grid.value_bound(lipschitz, horizon) + lipschitz * grid.spacing / 2

    def judge(self, law: Laws, stock) -> float:
        """The number the user asked for, from the law [1] of the return."""
        return float(self.functional()(law.shift(np.asarray(stock, dtype=float)[None]))[0])


class _Function(ReturnObjective):
    def __init__(self, function, name):
        self.name, self._functional = name, f.per_law(function)
        self._functional.__name__ = name

    def functional(self):
        return self._functional

    def starts(self, mdp):
        return np.zeros((1, *mdp.reward.shape[1:]))


@part("mean")
class Mean(ReturnObjective):
    """The expected return."""

    def functional(self):
        return f.mean()


@part("shortfall")
class Shortfall(ReturnObjective):
    """E min(return - threshold, 0): keep the return above a threshold, softly."""

    threshold: float = 0.0

    def functional(self):
        return f.shortfall(-self.threshold)


@part("surplus")
class Surplus(ReturnObjective):
    """E max(return - threshold, 0)."""

    threshold: float = 0.0

    def functional(self):
        return f.surplus(-self.threshold)


@part("target")
class Target(ReturnObjective):
    """E -|return - goal|^power: bring about a requested return."""

    goal: float = 0.0
    power: Positive = 1.0

    def functional(self):
        return f.target(self.goal, self.power)


@part("above")
class Above(ReturnObjective):
    """P(return >= threshold)."""

    threshold: float = 0.0

    def functional(self):
        return f.above(self.threshold)


@part("cvar")
class Cvar(ReturnObjective):
    """The mean of the worst share tau of returns, through an outer choice of the start stock."""

    tau: Annotated[float, Field(gt=0, le=1)] = 0.25

    def functional(self):
        return f.shortfall()

    def starts(self, mdp):
        if mdp.reward.ndim > 1:
            raise UserError(f"objective=cvar needs a scalar reward; this task's has {mdp.reward.shape[1]} components")
        return -achievable_returns(mdp)

    def outer(self, stocks, values):
        return -stocks + values / self.tau

    def grid_error(self, grid, horizon):
        return grid.cvar_bound(self.tau, horizon)

    def judge(self, law, stock):
        return float(cvar(law, self.tau)[0])


@part("homeostasis")
class Homeostasis(ReturnObjective):
    """E -||deviation + return||: bring several quantities to their set points; for tasks with vector rewards."""

    deviation: tuple[float, ...] = (0.0, 0.0)
    order: Annotated[float, Field(ge=1)] = 1.0

    def functional(self):
        return f.homeostasis(self.deviation, self.order)


@part("constrained")
class Constrained(ReturnObjective):
    """The mean of the first reward component, less `price` times what the second, a negative cost, overdraws `budget`."""

    budget: float = 0.0
    price: Positive = 1.0

    def functional(self):
        return f.constrained(self.budget, self.price)


def describe(law: Laws, taus) -> dict[str, float]:
    """Numbers of one return law for the log: mean return and CVaR; mean per component for vector returns."""
    average = np.atleast_1d(expectation(law)[0])
    if law.atoms.ndim > 1:
        return {f"return/{i}": float(x) for i, x in enumerate(average)}
    return {"return": float(average[0])} | {f"cvar@{tau:g}": float(cvar(law, tau)[0]) for tau in taus}


def require_fit(objective: ReturnObjective, mdp: MDP) -> None:
    """UserError unless the objective's stock has the shape of the task's reward."""
    need, have = np.shape(objective.starts(mdp))[1:], mdp.reward.shape[1:]
    if need != have:
        raise UserError(f"objective: its stock has {need[0] if need else 1} components, the task's reward has {have[0] if have else 1}")
