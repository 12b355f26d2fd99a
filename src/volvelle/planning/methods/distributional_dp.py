"""Distributional dynamic programming with stock augmentation (arXiv 2501.13028).

Problem. Make a functional of the whole return distribution as large as possible: the mean of the worst tenth (CVaR), hitting a requested
return, staying near a set point, a mean under a cost budget.

Idea. Add to the state the stock c, the rewards so far at today's worth: C' = (C + R) / discount. Then c + R + discount G' = discount (C' + G'),
so raising K(C' + G') at every successor raises K(c + G), provided K keeps its order under mixtures and under scaling by the discount. Value and
policy iteration over return distributions eta(s, c) therefore optimise K, and one table answers every start stock: the start stock says which
target or budget is meant.

Pick it when risk, targets or trade-offs matter and the start stock can be chosen. Do not pick it when the plain mean is the goal, or when K breaks
under mixtures (variance, median; CVaR itself, which is reached through an outer choice of the stock instead).

Bounds, for F eta (s, c) = K(law of c + G), sweeps n, discount d < 1, Lipschitz constant L, start eta_0 (`sweep_bound`, `greedy_bound`):
    value iteration    F eta_n >= sup_pi F eta^pi - L d^n sup w_1(eta_0, eta^pi*);  with a horizon H: exact after H sweeps
    greedy for eta_n   F eta^greedy >= sup_pi F eta^pi - 2 L d^(n+1) / (1 - d) sup_pi w_1(eta_0, eta^pi)
    policy iteration   F eta^pi_n >= sup_pi F eta^pi - L d^n sup w_1(eta^pi_0, eta^pi*)
The second holds for expected utilities: a Lipschitz f indifferent to d has f(dx) - f(0) = d (f(x) - f(0)), so F T_pi is monotone with slack times d.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from volvelle.core.claims import Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import Recipe, method, part

from ..distributions import Laws, combine, mixture
from ..functionals import mean, require_conditions
from ..mdp import MDP
from ..objectives import Cvar, Mean, ReturnObjective, describe, require_fit
from ..return_operators import Plan, bellman, best_action, greedy, lookahead, scores, start_laws, value_iteration
from ..stock import Augmented, augment
from ..stock_grid import GridSweeps, covering_grid
from ..tables import Tables
from ..tasks import TabularTask


def optimise(mdp: MDP, objective: Callable, stock=None, sweeps: int | None = None, rng: np.random.Generator | None = None,
             check: bool = True) -> Plan:
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


# ---- bounds ------------------------------------------------------------------------------------------------------------------------
def sweep_bound(lipschitz: float, discount: float, sweeps: int, distance: float) -> float:
    """L d^n w: how far n sweeps of value iteration (or n rounds of policy iteration) may stay below the optimum; w = sup w_1 from the start."""
    return lipschitz * discount**sweeps * distance


def greedy_bound(lipschitz: float, discount: float, sweeps: int, distance: float) -> float:
    """2 L d^(n+1) w / (1 - d): how far the stationary policy greedy for eta_n may stay below the optimum of an expected utility."""
    return 2 * lipschitz * discount ** (sweeps + 1) * distance / (1 - discount)


# ---- the recipe: one step is one sweep -------------------------------------------------------------------------------------------------
@part("distributional-dp")
class DistributionalDP(Recipe):
    """Distributional value iteration on (state, stock) pairs; finished after as many steps as the task has time steps.

    stock: "blind" leaves the stock out and acts greedily for the objective on the return laws of the mean-optimal policy, the heuristic that
    stock augmentation replaces. points: plan on a stock grid of that many points instead of enumerating stocks exactly. taus: which CVaRs to report.
    """

    wing: ClassVar[str] = "planning"
    objective: ReturnObjective = Cvar()
    stock: Literal["augmented", "blind"] = "augmented"
    points: Annotated[int, Field(ge=2)] | None = None
    taus: tuple[float, ...] = (0.1, 0.25, 0.5)

    def validate(self, task=None):
        super().validate(task)
        if not isinstance(task, TabularTask):
            raise UserError(f"distributional-dp: task {task.label() if task else None} has no transition table; accepted: a tabular task such as "
                            "table:FrozenLake-v1, lottery-grid or mdp:FILE")
        if self.points and self.stock == "blind":
            raise UserError(f"points={self.points}: a stock-blind plan has no stock grid; leave points out or set stock=augmented")

    def start(self, run):
        mdp, objective = run.config.task.mdp(run.seed), run.start("objective", self.objective)
        require_fit(objective, mdp)
        if self.stock == "blind":
            if mdp.reward.ndim > 1:
                raise UserError("stock=blind: a plan for the mean needs a scalar reward; this task's has several components")
        else:
            components = None if mdp.reward.ndim == 1 else mdp.reward.shape[1]
            require_conditions(objective.functional(), 1.0 if self.points else mdp.discount, components, run.rng("conditions"))
        return (_OnGrid if self.points else _Exact)(self, objective, mdp)


class _Exact:
    """Sweeps over enumerated pairs. policies[h - 1]: the actions with h steps to go; laws: eta after the sweeps so far."""

    def __init__(self, recipe, objective, mdp):
        self.recipe, self.objective, self.mdp = recipe, objective, mdp
        self.functional, states = objective.functional(), np.flatnonzero(mdp.initial)
        if recipe.stock == "blind":
            every = np.arange(mdp.states)
            self.pairs = Augmented(mdp, every, np.zeros((mdp.states, *mdp.reward.shape[1:])), mdp.horizon, {})
            self.stocks, self.where = objective.starts(mdp)[:1], states[:, None]
        else:
            self.stocks = objective.starts(mdp)
            k = len(self.stocks)
            self.pairs = augment(mdp, np.repeat(states, k), np.tile(self.stocks, (len(states),) + (1,) * (self.stocks.ndim - 1)))
            self.where = np.array([[self.pairs.index(s, c) for c in self.stocks] for s in states])
        self.policies, self.laws = [], start_laws(self.pairs)

    @property
    def finished(self):
        return len(self.policies) == self.mdp.horizon

    def step(self):
        if self.recipe.stock == "blind":
            rows = lookahead(self.pairs, self.laws)
            policy, self.laws = best_action(scores(self.pairs, self.functional_of_law, rows)), greedy(self.pairs, mean(), self.laws)[1]
        else:
            policy, self.laws = greedy(self.pairs, self.functional, self.laws)
        self.policies.append(policy)
        return {"sweep": len(self.policies), "pairs": len(policy), "atoms": len(self.laws.atoms)}

    def functional_of_law(self, laws):
        return np.array([self.objective.judge(laws.take([i]), self.stocks[0]) for i in range(len(laws))])

    def choose(self):
        """(start stock, law [1] of the return) of the policy so far, evaluated exactly: action 0 where no sweep has decided yet."""
        laws, idle = start_laws(self.pairs), np.zeros(len(self.pairs.state), np.int64)
        for h in range(self.mdp.horizon):
            laws = bellman(self.pairs, self.policies[h] if h < len(self.policies) else idle, laws)
        weight = self.mdp.initial[self.mdp.initial > 0]
        values = [weight @ self.functional(laws.take(rows).shift(self.pairs.stock[rows])) for rows in self.where.T]
        best = int(best_action(self.objective.outer(self.stocks, np.array(values))[None])[0])
        return self.stocks[best], mixture(laws, np.zeros(len(weight), np.int64), self.where[:, best], weight, 1)

    def evaluate(self):
        stock, law = self.choose()
        return {"value": self.objective.judge(law, stock), **describe(law, self.recipe.taus)}

    def product(self):
        return {"policy": Tables(state=self.pairs.state, stock=self.pairs.stock, start_stock=np.asarray(self.choose()[0]).tolist(),
                                 policy=np.array(self.policies[::-1]), discount=self.mdp.discount)}

    def state_dict(self):
        return {"policies": list(self.policies), "atoms": self.laws.atoms, "weights": self.laws.weights, "offsets": self.laws.offsets}

    def load_state_dict(self, state):
        self.policies, self.laws = list(state["policies"]), Laws(state["atoms"], state["weights"], state["offsets"])


class _OnGrid:
    """Sweeps over a stock grid, from the horizon back."""

    def __init__(self, recipe, objective, mdp):
        self.recipe, self.objective, self.mdp = recipe, objective, mdp
        starts = objective.starts(mdp)
        grid = covering_grid(mdp, float(starts.min()), float(starts.max()), recipe.points)
        self.sweeps = GridSweeps(mdp, objective.functional(), grid)
        inside = (grid.totals >= starts.min() - 1e-9) & (grid.totals <= starts.max() + 1e-9)
        self.stocks = grid.totals[inside] if len(starts) > 1 else starts

    @property
    def finished(self):
        return self.sweeps.t == 0

    def step(self):
        self.sweeps.sweep()
        return {"sweep": self.mdp.horizon - self.sweeps.t, "pairs": self.sweeps.scores[0].size}

    def choose(self):
        plan, states = self.sweeps.plan(), np.flatnonzero(self.mdp.initial)
        weight = self.mdp.initial[states]
        outer = self.objective.outer(self.stocks, sum(w * plan.value(s, self.stocks) for s, w in zip(states, weight)))
        stock = float(self.stocks[best_action(outer)])
        entries = [plan.law(s, stock) for s in states]
        return stock, combine(np.zeros(sum(len(e.atoms) for e in entries), np.int64), np.concatenate([e.atoms - stock for e in entries]),
                              np.concatenate([w * e.weights for w, e in zip(weight, entries)]), 1)

    def evaluate(self):
        """What the grid's own model says; grid_error: how far `value` may be from the truth, where a bound is known."""
        stock, law = self.choose()
        error = self.objective.grid_error(self.sweeps.grid, self.mdp.horizon)
        return {"value": self.objective.judge(law, stock), **describe(law, self.recipe.taus)} | ({} if error is None else {"grid_error": error})

    def product(self):
        grid = self.sweeps.grid
        return {"policy": Tables(policy=self.sweeps.policy, scores=self.sweeps.scores, start_stock=self.choose()[0], low=grid.low,
                                 spacing=grid.spacing, discount=self.mdp.discount)}

    def state_dict(self):
        return {"t": self.sweeps.t, "policy": self.sweeps.policy, "scores": self.sweeps.scores, "laws": self.sweeps.laws}

    def load_state_dict(self, state):
        self.sweeps.t, self.sweeps.laws = state["t"], state["laws"]
        self.sweeps.policy, self.sweeps.scores = state["policy"], state["scores"]


augmented = DistributionalDP()
claim = Claim(
    says="with the stock in the state, dynamic programming finds the policy that is best for the worst quarter of returns; planning for the "
         "mean, or for the worst quarter without the stock, does not",
    arms={"stock": augmented, "blind": augmented(stock="blind"), "mean": augmented(objective=Mean())},
    task="lottery-grid", steps=8, seeds=10, equal="steps", minutes=2, quick={"seeds": 2},
    expects=("stock > blind on cvar@0.25", "stock > mean on cvar@0.25", "mean > stock on return"))

method("distributional-dp", augmented, title="Optimise a functional of the return distribution, exactly", source="arXiv 2501.13028", claim=claim)
