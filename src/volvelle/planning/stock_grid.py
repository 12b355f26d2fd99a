"""Stock augmentation on a grid, for problems whose reachable stocks are too many to enumerate.

The grid holds the running total B_t = discount^t C_t = c_0 + R_1 + discount R_2 + ..., which unlike the stock itself does not grow: at the end
it *is* c_0 + G_0. Backwards from the horizon, laws[s, j] is the law of the final total given state s and total grid[j]. A reward moves the
total by discount^t R; when that is no whole number of cells the law is interpolated linearly between the two neighbours, which keeps means.

Error. Let f be L-Lipschitz, h the spacing and H the horizon. sup_pi E f(B + ...) is L-Lipschitz in B, so one interpolation costs at most
2 w (1 - w) L h <= L h / 2 and averaging never enlarges errors: values are within H L h / 2 of the truth (`value_bound`), and exact when
rewards fall on the grid; a start between grid points adds L h / 2. Acting greedily by one step of look-ahead on the interpolated values loses at
most L h H (H + 1) / 2 (`policy_bound`).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from volvelle.core.errors import UserError

from .distributions import Laws, diracs
from .mdp import MDP


@dataclass(frozen=True)
class StockGrid:
    """low + spacing * (0 .. points - 1)."""
    low: float
    spacing: float
    points: int

    @property
    def totals(self) -> np.ndarray:
        return self.low + self.spacing * np.arange(self.points)

    @property
    def high(self) -> float:
        return self.low + self.spacing * (self.points - 1)

    def value_bound(self, lipschitz: float, horizon: int) -> float:
        return horizon * lipschitz * self.spacing / 2

    def policy_bound(self, lipschitz: float, horizon: int) -> float:
        return lipschitz * self.spacing * horizon * (horizon + 1) / 2

    def cvar_bound(self, tau: float, horizon: int) -> float:
        """For the outer maximum of CVaR: each inner value counts 1 / tau, and the best start stock may lie between grid points."""
        return self.value_bound(1.0, horizon) / tau + self.spacing / 2 * max(1.0, 1 / tau - 1)

    def place(self, total) -> tuple[np.ndarray, np.ndarray]:
        """(left cell, fraction towards its right neighbour); UserError outside the grid."""
        position = (np.asarray(total, dtype=float) - self.low) / self.spacing
        if position.size and (position.min() < -1e-9 or position.max() > self.points - 1 + 1e-9):
            raise UserError(f"total {np.min(total):g} to {np.max(total):g} lies outside the stock grid {self.low:g} to {self.high:g}")
        left = np.clip(np.floor(position + 1e-9).astype(np.int64), 0, max(self.points - 2, 0))
        return left, np.clip(position - left, 0.0, 1.0)


def covering_grid(mdp: MDP, low: float, high: float, points: int | None = None, spacing: float | None = None) -> StockGrid:
    """A grid over every total reachable within the horizon from stocks in [low, high]; give points or spacing (low is then on the grid)."""
    if (points is None) == (spacing is None):
        raise UserError("covering_grid: give points or spacing, one of the two")
    if not np.isfinite([low, high]).all() or high < low:
        raise UserError(f"covering_grid: start stocks from {low} to {high}; the range must be finite with low <= high")
    least, most = total_range(mdp)
    if points is not None:
        if points < 2:
            raise UserError(f"covering_grid: points {points}; accepted: 2 or more")
        below = least + low
        return StockGrid(below, max(high + most - below, 1e-12) / (points - 1), points)
    if spacing <= 0:
        raise UserError(f"covering_grid: spacing {spacing}; accepted: above 0")
    cells = int(np.ceil(-least / spacing - 1e-9))
    return StockGrid(low - cells * spacing, spacing, cells + 1 + int(np.ceil((high - low + most) / spacing - 1e-9)))


def total_range(mdp: MDP) -> tuple[float, float]:
    """The least (at most 0) and greatest (at least 0) discounted return within the horizon, by outcome, not on average. Scalar rewards."""
    if mdp.reward.ndim != 1 or mdp.horizon is None:
        raise UserError("a stock grid needs a scalar reward and a horizon; vector rewards are enumerated exactly (volvelle.planning.stock)")
    least = most = np.zeros(mdp.states)
    low = high = 0.0
    starts = mdp.offsets[:-1:mdp.actions]
    for _ in range(mdp.horizon):
        least = np.minimum.reduceat(mdp.reward + mdp.discount * least[mdp.next_state], starts)
        most = np.maximum.reduceat(mdp.reward + mdp.discount * most[mdp.next_state], starts)
        low, high = min(low, least.min()), max(high, most.max())
    return low, high


@dataclass(frozen=True, eq=False)
class GridPlan:
    """policy [T, S, N] by time, state and total; scores [T+1, S, N]: the objective from there on; laws [S, N, N]: weights over grid.totals at time 0.

    `starts`: the range of start stocks from which the grid covers every return.
    """
    grid: StockGrid
    policy: np.ndarray
    scores: np.ndarray
    laws: np.ndarray | None
    starts: tuple[float, float]

    def value(self, state: int, stock) -> np.ndarray:
        """The objective from (state, stock [n]) at time 0, [n]."""
        left, fraction = self._start(stock)
        return (1 - fraction) * self.scores[0, state, left] + fraction * self.scores[0, state, np.minimum(left + 1, self.grid.points - 1)]

    def law(self, state: int, stock: float) -> Laws:
        """The law of stock + return from (state, stock) at time 0."""
        left, fraction = self._start(stock)
        weights = (1 - fraction) * self.laws[state, left] + fraction * self.laws[state, min(left + 1, self.grid.points - 1)]
        kept = weights > 0
        return Laws(self.grid.totals[kept], weights[kept], np.array([0, kept.sum()]))

    def _start(self, stock):
        if np.min(stock) < self.starts[0] - 1e-9 or np.max(stock) > self.starts[1] + 1e-9:
            raise UserError(f"start stock {stock}: this grid covers all returns from stocks {self.starts[0]:g} to {self.starts[1]:g}")
        return self.grid.place(stock)


class GridSweeps:
    """The backward pass, one `sweep()` per time step. objective: an ExpectedUtility, or a functional of a stack of laws (which needs the laws of
    all actions: slower, and laws are kept). Because totals are final returns the discount needs no condition here; indifference to mixtures does.
    """

    def __init__(self, mdp: MDP, objective: Callable, grid: StockGrid, laws: bool = True):
        try:
            from . import grid_kernels
        except ModuleNotFoundError as error:
            raise UserError(f"planning on a stock grid needs the package {error.name!r}; install volvelle[planning], or plan exactly") from error
        self._kernels = grid_kernels
        least, most = total_range(mdp)
        self.starts = grid.low - least, grid.high - most
        if self.starts[0] > self.starts[1] + 1e-9:
            raise UserError(f"stock grid {grid.low:g} to {grid.high:g} is narrower than the returns, {least:g} to {most:g}")
        S, N = mdp.states, grid.points
        self.mdp, self.objective, self.grid, self.t = mdp, objective, grid, mdp.horizon
        self.scores, self.policy = np.zeros((self.t + 1, S, N)), np.zeros((self.t, S, N), np.int16)
        self.scores[self.t] = objective(diracs(grid.totals))
        if not np.isfinite(self.scores[self.t]).all():
            raise UserError(f"the objective is not finite everywhere on the grid {grid.low:g} to {grid.high:g}")
        self._linear = getattr(objective, "utility", None) is not None
        self.laws = np.broadcast_to(np.eye(N), (S, N, N)).copy() if laws or not self._linear else None
        self._scratch = np.empty_like(self.laws) if self.laws is not None else None

    def sweep(self):
        """Decide time t - 1 from what is known about time t."""
        self.t -= 1
        t, moves = self.t, self._moves(self.t)
        if self._linear:
            self._kernels.choose(*moves, self.scores[t + 1], self.scores[t], self.policy[t])
        else:
            q = [self._score(moves, np.full_like(self.policy[t], a)) for a in range(self.mdp.actions)]
            self.policy[t], self.scores[t] = np.argmax(q, 0), np.max(q, 0)
        if self.laws is not None:
            self._kernels.mix(*moves, self.policy[t], self.laws, self._scratch)
            self.laws, self._scratch = self._scratch, self.laws

    def plan(self) -> GridPlan:
        """The plan so far: at times not yet decided action 0 is taken."""
        laws, scores = self.laws, self.scores.copy()
        for t in reversed(range(self.t)):
            before, laws = laws, np.empty_like(laws)
            self._kernels.mix(*self._moves(t), self.policy[t], before, laws)
            scores[t] = self._judge(laws)
        return GridPlan(self.grid, self.policy, scores, laws, self.starts)

    def _moves(self, t):
        return self.mdp.offsets, self.mdp.next_state, self.mdp.probability, *cell_shifts(self.mdp, self.grid, t)

    def _score(self, moves, policy) -> np.ndarray:
        self._kernels.mix(*moves, policy, self.laws, self._scratch)
        return self._judge(self._scratch)

    def _judge(self, laws) -> np.ndarray:
        S, N, K = laws.shape
        return self.objective(Laws(np.tile(self.grid.totals, S * N), laws.ravel(), np.arange(S * N + 1) * K)).reshape(S, N)


def plan_on_grid(mdp: MDP, objective: Callable, grid: StockGrid, laws: bool = True) -> GridPlan:
    """Maximise the objective of c_0 + G_0 for every state and every start stock on the grid; see GridSweeps. Without laws only scores are kept."""
    sweeps = GridSweeps(mdp, objective, grid, laws)
    while sweeps.t:
        sweeps.sweep()
    return sweeps.plan()


def act_on_grid(mdp: MDP, plan: GridPlan, t: int, state, total) -> np.ndarray:
    """Greedy actions [n] at time t in states [n] with running totals [n]: one step of look-ahead on the scores of an expected utility."""
    state, total = np.atleast_1d(state).astype(np.int64), np.atleast_1d(np.asarray(total, dtype=float))
    q = np.empty((len(state), mdp.actions))
    for i, (s, b) in enumerate(zip(state, total)):
        part = slice(mdp.offsets[s * mdp.actions], mdp.offsets[(s + 1) * mdp.actions])
        left, fraction = plan.grid.place(b + mdp.discount**t * mdp.reward[part])
        score = plan.scores[t + 1][mdp.next_state[part]]
        rows = np.arange(len(left))
        value = (1 - fraction) * score[rows, left] + fraction * score[rows, np.minimum(left + 1, plan.grid.points - 1)]
        q[i] = np.bincount(mdp.outcome_row[part] - s * mdp.actions, mdp.probability[part] * value, mdp.actions)
    return q.argmax(-1)


def cell_shifts(mdp: MDP, grid: StockGrid, t: int) -> tuple[np.ndarray, np.ndarray]:
    """How far each outcome moves the total at time t: whole cells [M] and the remaining fraction [M] in [0, 1)."""
    move = mdp.discount**t * mdp.reward / grid.spacing
    cells = np.floor(move + 1e-9)
    return cells.astype(np.int64), np.where(move - cells < 1e-9, 0.0, move - cells)
