"""Stock augmentation on a grid, for problems whose reachable stocks are too many to enumerate.

The grid holds the running total B_t = discount^t C_t = c_0 + R_1 + discount R_2 + ..., which unlike the stock itself does not grow: at the end it *is*
c_0 + G_0. Backwards from the horizon, laws[s, j] is the law of the final total given state s and total grid[j]. A reward moves the total by
discount^t R; when that is no whole number of cells the law is interpolated linearly between the two neighbours, which keeps means exact.

Error. Let f be L-Lipschitz, h the spacing and H the horizon. sup_pi E f(B + ...) is L-Lipschitz in B, so one interpolation costs at most 2 w (1 - w) L h
<= L h / 2 and averaging never enlarges errors: values are within H L h / 2 of the truth (`value_bound`), and exact when rewards fall on the grid. Acting
greedily by one step of look-ahead on the interpolated values loses at most L h H (H + 1) / 2 (`policy_bound`).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from volvelle.core.errors import UserError

from .distributions import Laws, diracs
from .mdp import MDP

try:
    from numba import njit
except ModuleNotFoundError as error:  # pragma: no cover
    raise UserError("planning on a stock grid needs numba, which is not installed; pip install 'volvelle[planning]'") from error

compiled = njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract"})


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

    def place(self, total) -> tuple[np.ndarray, np.ndarray]:
        """(left cell, fraction towards its right neighbour); UserError outside the grid."""
        position = (np.asarray(total, dtype=float) - self.low) / self.spacing
        if position.size and (position.min() < -1e-9 or position.max() > self.points - 1 + 1e-9):
            raise UserError(f"total {np.min(total):g} to {np.max(total):g} lies outside the stock grid {self.low:g} to {self.high:g}")
        left = np.clip(np.floor(position + 1e-9).astype(np.int64), 0, max(self.points - 2, 0))
        return left, np.clip(position - left, 0.0, 1.0)


def covering_grid(mdp: MDP, low: float, high: float, points: int | None = None, spacing: float | None = None) -> StockGrid:
    """A grid over every total reachable within the horizon from stocks in [low, high]; give points or spacing, low is on the grid."""
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


def plan_on_grid(mdp: MDP, objective: Callable, grid: StockGrid, laws: bool = True) -> GridPlan:
    """Maximise the objective of c_0 + G_0 for every state and every start stock on the grid, in one backward pass over the horizon.

    objective: an ExpectedUtility, or a functional of a stack of laws (which needs the laws of all actions: slower, and laws stays on). Because totals
    are final returns, the discount needs no condition here; indifference to mixtures does.
    """
    least, most = total_range(mdp)
    starts = grid.low - least, grid.high - most
    if starts[0] > starts[1] + 1e-9:
        raise UserError(f"stock grid {grid.low:g} to {grid.high:g} is narrower than the returns, {least:g} to {most:g}")
    S, N, T = mdp.states, grid.points, mdp.horizon
    utility = getattr(objective, "utility", None)
    laws = laws or utility is None
    scores, policy = np.empty((T + 1, S, N)), np.empty((T, S, N), np.int16)
    scores[T] = objective(diracs(grid.totals))
    if not np.isfinite(scores[T]).all():
        raise UserError(f"the objective is not finite everywhere on the grid {grid.low:g} to {grid.high:g}")
    now, after = (np.empty((S, N, N)), np.empty((S, N, N))) if laws else (None, None)
    if laws:
        now[:] = np.eye(N)
    for t in reversed(range(T)):
        moves = (mdp.offsets, mdp.next_state, mdp.probability, *cell_shifts(mdp, grid, t))
        now, after = after, now
        if utility is None:
            q = [functional_score(objective, grid, moves, np.full((S, N), a, np.int16), after, now) for a in range(mdp.actions)]
            policy[t], scores[t] = np.argmax(q, 0), np.max(q, 0)
        else:
            choose(*moves, scores[t + 1], scores[t], policy[t])
        if laws:
            mix(*moves, policy[t], after, now)
    return GridPlan(grid, policy, scores, now, starts)


def functional_score(functional, grid, moves, policy, laws, scratch) -> np.ndarray:
    """The functional of the laws that `policy` [S, N] makes of the next time's laws, [S, N]."""
    mix(*moves, policy, laws, scratch)
    S, N, K = scratch.shape
    return functional(Laws(np.tile(grid.totals, S * N), scratch.ravel(), np.arange(S * N + 1) * K)).reshape(S, N)


def act_on_grid(mdp: MDP, plan: GridPlan, t: int, state, total) -> np.ndarray:
    """Greedy actions [n] at time t in states [n] with running totals [n]: one step of look-ahead on the interpolated scores of an expected utility."""
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


@compiled
def choose(offsets, next_state, probability, cells, fraction, score, new_score, policy):
    """Greedy step on expected utilities: score [S, N] of the next time -> new_score [S, N] and the maximising actions policy [S, N].

    Totals that leave the grid stay at its edge; a covering grid never lets that reach a start stock.
    """
    S, N = score.shape
    A = (len(offsets) - 1) // S
    q = np.empty((A, N))
    for s in range(S):
        for a in range(A):
            row = q[a]
            row[:] = 0.0
            for o in range(offsets[s * A + a], offsets[s * A + a + 1]):
                p, k, w, v = probability[o], cells[o], fraction[o], score[next_state[o]]
                low = min(max(0, -k), N)
                high = max(min(N, N - 1 - k), low)
                for j in range(low):
                    row[j] += p * v[0]
                if w == 0.0:
                    for j in range(low, high):
                        row[j] += p * v[j + k]
                else:
                    for j in range(low, high):
                        row[j] += p * ((1 - w) * v[j + k] + w * v[j + k + 1])
                for j in range(high, N):
                    row[j] += p * v[N - 1]
        best, arg = new_score[s], policy[s]
        best[:] = q[0]
        arg[:] = 0
        for a in range(1, A):
            row = q[a]
            for j in range(N):
                if row[j] > best[j] + 1e-12:
                    best[j] = row[j]
                    arg[j] = a


@compiled
def mix(offsets, next_state, probability, cells, fraction, policy, laws, new_laws):
    """The policy's Bellman operator: laws [S, N, K] of the next time -> new_laws [S, N, K], each a mixture of the successors' laws."""
    S, N, K = laws.shape
    A = (len(offsets) - 1) // S
    for s in range(S):
        for j in range(N):
            row, first = new_laws[s, j], offsets[s * A + policy[s, j]]
            for o in range(first, offsets[s * A + policy[s, j] + 1]):
                k = min(max(j + cells[o], 0), N - 1)
                w = probability[o] * fraction[o] if j + cells[o] >= 0 else 0.0
                near = probability[o] - w
                x, y = laws[next_state[o], k], laws[next_state[o], min(k + 1, N - 1)]
                if o == first:
                    if w == 0.0:
                        for i in range(K):
                            row[i] = near * x[i]
                    else:
                        for i in range(K):
                            row[i] = near * x[i] + w * y[i]
                elif w == 0.0:
                    for i in range(K):
                        row[i] += near * x[i]
                else:
                    for i in range(K):
                        row[i] += near * x[i] + w * y[i]
