"""Distributional dynamic programming with stock augmentation (arXiv 2501.13028).

Solves: make a functional of the whole return distribution as large as possible: the mean of the worst tenth (CVaR), hitting a requested return, staying
near a set point, a mean under a cost budget.

Idea. Add to the state the stock c, the rewards so far at today's worth: C' = (C + R) / discount. Then c + R + discount G' = discount (C' + G'), so raising
K(C' + G') at every successor raises K(c + G), provided K keeps its order under mixtures and under scaling by the discount. Value and policy iteration over
return distributions eta(s, c) therefore optimise K, and one table answers every start stock: the start stock says which target or budget is meant.

Pick it when risk, targets or trade-offs matter and the start stock can be chosen. Do not pick it when the plain mean is the goal, or when K breaks
under mixtures (variance, median; CVaR itself, which is reached through an outer choice of the stock instead).

Bounds, for sweeps n, discount d < 1, K with Lipschitz constant L, from the start law eta_0 (`sweep_bound`, `greedy_bound`):
    F eta_n >= sup_pi F eta^pi - L d^n sup w_1(eta_0, eta^pi*)                     F eta^(greedy of eta_n) >= sup - 2 L d^(n+1) / (1 - d) sup_pi w_1(eta_0, eta^pi)
    policy iteration: F eta^pi_n >= sup - L d^n sup w_1(eta^pi_0, eta^pi*)         a horizon H: exact after H sweeps
The second holds for expected utilities: a Lipschitz f indifferent to d has f(dx) - f(0) = d (f(x) - f(0)), so F T_pi is monotone with slack times d.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from volvelle.core.errors import UserError

from ..distributions import Laws, mixture, upper_cvar
from ..functionals import ExpectedUtility, require_conditions, shortfall, surplus
from ..mdp import MDP
from ..return_operators import TIE, evaluate, greedy, lookahead, scores, start_laws
from ..stock import Augmented, achievable_returns, augment
from ..stock_grid import GridPlan, covering_grid, plan_on_grid, total_range

# ---- value and policy iteration over return distributions -------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Plan:
    """policy [T, n]: the action of each pair with T, T-1, ... steps to go (one row if stationary); laws: returns from each pair at time 0."""
    pairs: Augmented
    functional: Callable
    policy: np.ndarray
    laws: Laws

    def act(self, t: int, state: int, stock) -> int:
        return int(self.policy[min(t, len(self.policy) - 1), self.pairs.index(state, stock)])

    def law(self, state: int, stock) -> Laws:
        """The law of the return from (state, stock); shift it by the stock for what the functional judges."""
        return self.laws.take([self.pairs.index(state, stock)])

    def values(self) -> np.ndarray:
        """F_K: the functional of stock + return for every pair, [n]; right for the pairs the plan starts from."""
        return self.functional(self.laws.shift(self.pairs.stock))

    def value(self, state: int, stock) -> float:
        i = self.pairs.index(state, stock)
        return float(self.functional(self.laws.take([i]).shift(self.pairs.stock[i:i + 1]))[0])


def value_iteration(pairs: Augmented, functional: Callable, sweeps: int | None = None, laws: Laws | None = None) -> Plan:
    """eta_{k+1} = T_* eta_k for `sweeps` steps (default: the depth of the pairs), from eta_0 = `laws` (default: all mass on 0)."""
    laws, policies = start_laws(pairs, laws), []
    for _ in range(pairs.depth if sweeps is None else sweeps):
        policy, laws = greedy(pairs, functional, laws)
        policies.append(policy)
    return Plan(pairs, functional, policy=np.array(policies[::-1]), laws=laws)


def policy_iteration(pairs: Augmented, functional: Callable, policy=None, max_rounds: int = 1000) -> Plan:
    """Evaluate, improve, repeat until no pair's functional rises; starts from `policy` [n] (default: action 0 everywhere)."""
    policy = np.zeros(pairs.mdp.states, np.int64) if policy is None else np.asarray(policy)
    for _ in range(max_rounds):
        laws = evaluate(pairs, policy)
        value = scores(pairs, functional, lookahead(pairs, laws))
        stay = value[np.arange(len(policy)), policy]
        better = value.max(1) > stay + TIE
        if not better.any():
            return Plan(pairs, functional, policy[None], laws)
        policy = np.where(better, value.argmax(1), policy)
    raise UserError(f"policy_iteration: still improving after {max_rounds} rounds")


# ---- solving -----------------------------------------------------------------------------------------------------------------------
def optimise(mdp: MDP, objective: Callable, stock=None, sweeps: int | None = None, rng: np.random.Generator | None = None, check: bool = True) -> Plan:
    """The best stock-augmented policy from the initial states and one start stock (default: the objective's), on exactly enumerated pairs.

    Without a horizon, `sweeps` sets how many steps are planned, and `sweep_bound` says what is lost. UserError if the objective's conditions fail
    (arbitrary functionals are searched for violations with rng; check=False turns this off and with it every guarantee).
    """
    components = None if mdp.reward.ndim == 1 else mdp.reward.shape[1]
    if check:
        require_conditions(objective, mdp.discount, components, rng, endless=mdp.horizon is None)
    states = np.flatnonzero(mdp.initial)
    stock = getattr(objective, "start_stock", None if stock is None else stock) if stock is None else stock
    if stock is None:
        stock = 0.0 if components is None else np.zeros(components)
    return value_iteration(augment(mdp, states, np.broadcast_to(stock, states.shape + np.shape(stock)), sweeps), objective)


def start_law(mdp: MDP, plan: Plan, stock) -> Laws:
    """The law of the return over the initial distribution, all starting with `stock`."""
    states = np.flatnonzero(mdp.initial)
    rows = [plan.pairs.index(s, stock) for s in states]
    return mixture(plan.laws, np.zeros(len(rows), np.int64), rows, mdp.initial[states], 1)


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
    bound = grid.value_bound(1.0, mdp.horizon) / tau + grid.spacing / 2 * max(1.0, 1 / tau - 1)
    return float(outer[best]), float(stocks[best]), plan, bound


def _share(tau):
    if not 0 < tau <= 1:
        raise UserError(f"tau {tau}; accepted: above 0, at most 1")


# ---- bounds ------------------------------------------------------------------------------------------------------------------------
def sweep_bound(lipschitz: float, discount: float, sweeps: int, distance: float) -> float:
    """L d^n w: how far n sweeps of value iteration (or n rounds of policy iteration) may stay below the optimum; w = sup w_1 from the start."""
    return lipschitz * discount**sweeps * distance


def greedy_bound(lipschitz: float, discount: float, sweeps: int, distance: float) -> float:
    """2 L d^(n+1) w / (1 - d): how far the stationary policy greedy for eta_n may stay below the optimum of an expected utility."""
    return 2 * lipschitz * discount ** (sweeps + 1) * distance / (1 - discount)
