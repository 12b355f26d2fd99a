"""Conditional value at risk of returns, maximised: an outer choice of the start stock over inner expected utilities (arXiv 2501.13028)."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from volvelle.core.errors import UserError

from .distributions import Laws, upper_cvar
from .functionals import ExpectedUtility, shortfall, surplus
from .mdp import MDP
from .return_operators import TIE, Plan, start_law, value_iteration
from .stock import achievable_returns, augment
from .stock_grid import GridPlan, covering_grid, plan_on_grid, total_range


class Outer(NamedTuple):
    """value of the functional, the start stock that gives it, the plan, and the law [1] of the return under it."""
    value: float
    stock: float
    plan: Plan
    law: Laws


def maximise_cvar(mdp: MDP, tau: float) -> Outer:
    """The policy with the best mean of its worst share tau of returns, exactly.

    sup_pi CVaR = max over c of -c + max_pi E min(0, c + G) / tau; the maximum sits at minus an achievable return, its tau-quantile.
    """
    _share(tau)
    stocks = -achievable_returns(mdp)
    plan, value = _inner(mdp, shortfall(), stocks)
    outer = -stocks + value / tau
    best = stocks[int((outer >= outer.max() - TIE).argmax())]
    return Outer(float(outer.max()), float(best), plan, start_law(mdp, plan, best))


def maximise_upper_cvar(mdp: MDP, tau: float) -> Outer:
    """The best mean of the best share tau: min over c of -c + max_pi E max(0, c + G) / tau.

    The value bounds every policy's optimistic CVaR from above. One deterministic policy need not attain it (this is a max-min problem); how far
    the returned law falls short is value - upper_cvar(law).
    """
    _share(tau)
    stocks = np.sort(-achievable_returns(mdp))
    outer = -stocks + _inner(mdp, surplus(), stocks)[1] / tau
    i = int(outer.argmin())
    best, value = float(stocks[i]), float(outer[i])
    left, right = stocks[max(i - 1, 0)], stocks[min(i + 1, len(stocks) - 1)]
    if right > left:  # convex in c and linear between crossings of policies, which may lie between achievable returns
        found = minimize_scalar(lambda c: -c + _inner(mdp, surplus(), np.array([c]))[1][0] / tau, bounds=(left, right), method="bounded",
                                options={"xatol": 1e-10})
        if found.fun < value - 1e-9:
            best, value = float(found.x), float(found.fun)
    tries = []
    for stock in (best - 1e-9, best, best + 1e-9):  # where policies cross, the one on either side may do better
        plan = _inner(mdp, surplus(), np.array([stock]))[0]
        tries.append(Outer(value, stock, plan, start_law(mdp, plan, stock)))
    return max(tries, key=lambda found: upper_cvar(found.law, tau)[0])


def _inner(mdp: MDP, objective: ExpectedUtility, stocks) -> tuple[Plan, np.ndarray]:
    """One plan for many start stocks [k], and the objective over the initial distribution for each, [k]."""
    states = np.flatnonzero(mdp.initial)
    pairs = augment(mdp, np.repeat(states, len(stocks)), np.tile(stocks, len(states)))
    plan = value_iteration(pairs, objective)
    where = np.array([[pairs.index(s, c) for c in stocks] for s in states])
    return plan, mdp.initial[states] @ plan.values()[where]


def maximise_cvar_on_grid(mdp: MDP, tau: float, points: int | None = None, spacing: float | None = None) -> tuple[float, float, GridPlan, float]:
    """(value, start stock, plan, error bound): CVaR where stocks are too many to enumerate.

    Each inner value is within H h / 2 and the outer maximum within h / 2 max(1, 1 / tau - 1) of the truth (H the horizon, h the spacing).
    """
    _share(tau)
    least, most = total_range(mdp)
    grid = covering_grid(mdp, -most, -least, points, spacing)
    plan = plan_on_grid(mdp, shortfall(), grid)
    stocks = grid.totals[(grid.totals >= plan.starts[0] - 1e-9) & (grid.totals <= plan.starts[1] + 1e-9)]
    outer = -stocks + sum(p * plan.value(s, stocks) for s, p in enumerate(mdp.initial) if p > 0) / tau
    best = int(outer.argmax())
    return float(outer[best]), float(stocks[best]), plan, grid.cvar_bound(tau, mdp.horizon)


def _share(tau):
    if not 0 < tau <= 1:
        raise UserError(f"tau {tau}; accepted: above 0, at most 1")
