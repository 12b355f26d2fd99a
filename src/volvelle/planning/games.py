"""Normal-form games of any number of players, as float64 arrays: measuring and solving (game_files.py reads them).

A game is one array `payoffs[i, a_1, ..., a_n]`: what player i receives when the players choose a_1 ... a_n. A profile is a list of
distributions, one per player. Two-player zero-sum games are solved by linear programming (HiGHS), other two-player games by the
mixed-integer program of Sandholm, Gilpin and Conitzer (AAAI 2005) or, for all equilibria, by enumeration of supports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy.optimize import Bounds, LinearConstraint, linprog, milp, root
from scipy.special import softmax

from volvelle.core.errors import UserError

from .simplex import check_floor

Profile = list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Game:
    """A normal-form game. payoffs: [players, A_1, ..., A_n], float64, finite."""

    payoffs: Float[np.ndarray, " players *actions"]
    name: str = "game"

    def __post_init__(self):
        try:
            payoffs = np.asarray(self.payoffs, dtype=np.float64)
        except (TypeError, ValueError):
            raise UserError(f"{self.name}: payoffs must be a full array of numbers, one table per player, all of one shape") from None
        if payoffs.ndim < 2 or payoffs.ndim != len(payoffs) + 1 or 0 in payoffs.shape:
            raise UserError(f"{self.name}: payoffs of shape {payoffs.shape}; expected (n, A_1, ..., A_n) for n players")
        if not np.isfinite(payoffs).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(payoffs))[0])
            raise UserError(f"{self.name}: payoff {payoffs[where]} at {where}; every payoff must be finite")
        object.__setattr__(self, "payoffs", payoffs)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.payoffs.shape[1:]

    @property
    def players(self) -> int:
        return len(self.payoffs)

    @property
    def zero_sum(self) -> bool:
        """Whether two players' payoffs add up to one constant."""
        total = self.payoffs.sum(0)
        return self.players == 2 and bool(np.ptp(total) <= 1e-12 * max(1.0, np.abs(self.payoffs).max()))

    def table(self, player: int) -> Float[np.ndarray, "own others"]:
        """The player's payoffs as a matrix: own actions by joint actions of the others (in order of players)."""
        return np.moveaxis(self.payoffs[player], player, 0).reshape(self.sizes[player], -1)

    def uniform(self) -> Profile:
        return [np.full(size, 1 / size) for size in self.sizes]


def zero_sum(matrix: Any, name: str = "game") -> Game:
    """The row player receives `matrix`, the column player its negative."""
    matrix = np.asarray(matrix, dtype=np.float64)
    return Game(np.stack([matrix, -matrix]), name)


def symmetric(matrix: Any, name: str = "game") -> Game:
    """Both players receive `matrix[own action, other's action]`."""
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise UserError(f"{name}: a symmetric game needs a square payoff matrix, got shape {matrix.shape}")
    return Game(np.stack([matrix, matrix.T]), name)


# ------------------------------------------------------------------------------------------------------- measuring

def others(profile: Profile, player: int) -> Float[np.ndarray, " joint"]:
    """The product distribution over the joint actions of everybody but `player`, in the order of `Game.table`'s columns."""
    rest = [p for i, p in enumerate(profile) if i != player]
    return reduce(np.multiply.outer, rest, np.ones(())).reshape(-1)


def action_values(game: Game, profile: Profile, player: int) -> Float[np.ndarray, " own"]:
    """Expected payoff of each own action against the others' mixed strategies."""
    return game.table(player) @ others(profile, player)


def expected_payoffs(game: Game, profile: Profile) -> Float[np.ndarray, " players"]:
    return np.array([p @ action_values(game, profile, i) for i, p in enumerate(profile)])


def moments(game: Game, profile: Profile, player: int) -> tuple[Float[np.ndarray, " own"], Float[np.ndarray, "own own"]]:
    """Mean of each own action and their covariance over the others' joint action: Sigma_jk = sum_b q_b (M_jb - m_j)(M_kb - m_k)."""
    table, q = game.table(player), others(profile, player)
    mean = table @ q
    centred = table - mean[:, None]
    covariance = (centred * q) @ centred.T
    return mean, (covariance + covariance.T) / 2


def outcomes(game: Game, profile: Profile, mistakes: float = 0.0) -> dict[str, Float[np.ndarray, " players"]]:
    """What each player gets when every other one acts uniformly at random with probability `mistakes`: "mean", "variance" (over the
    others' actions) and "worst", the expected payoff at the worst joint action that the others then play with positive probability."""
    rest = [(1 - mistakes) * p + mistakes / len(p) for p in profile]
    found: dict[str, list[float]] = {"mean": [], "variance": [], "worst": []}
    for i, p in enumerate(profile):
        received, q = p @ game.table(i), others(rest, i)
        found["mean"].append(received @ q)
        found["variance"].append(q @ (received - received @ q) ** 2)
        found["worst"].append(received[q > 0].min())
    return {name: np.array(values) for name, values in found.items()}


def judge(game: Game, profile: Profile, mistakes: float = 0.0) -> dict[str, float]:
    """`outcomes` in three numbers: the players' average mean and variance, and the worst of their worst cases."""
    found = outcomes(game, profile, mistakes)
    return {"mean": float(found["mean"].mean()), "variance": float(found["variance"].mean()), "worst": float(found["worst"].min())}


def exploitability(game: Game, profile: Profile) -> float:
    """The most that one player gains by deviating alone; 0 exactly at a Nash equilibrium."""
    return float(max((v := action_values(game, profile, i)).max() - p @ v for i, p in enumerate(profile)))


def tremble(p: np.ndarray, floor: float) -> np.ndarray:
    """The distribution with every entry at least `floor` and the remaining mass spread as in `p`."""
    check_floor(len(p), floor)
    return floor + (1 - len(p) * floor) * p


def pure_equilibria(game: Game, strict: bool = False) -> list[tuple[int, ...]]:
    """The pure Nash equilibria, as tuples of actions; `strict`: those where every deviation loses."""
    found = []
    for cell in np.ndindex(*game.sizes):
        gaps = [game.payoffs[(i, *cell)] - np.delete(game.payoffs[(i, *cell[:i], slice(None), *cell[i + 1:])], cell[i])
                for i in range(game.players)]
        if all((gap > 0).all() if strict else (gap >= 0).all() for gap in gaps):
            found.append(cell)
    return found


def risk_dominance(game: Game) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """For every strict pure equilibrium of a two-player game, the other ones that it risk-dominates.

    Harsanyi and Selten (1988): A dominates B when the product of the two players' losses from leaving A alone for their part of B
    is larger than the product of their losses from leaving B for their part of A.
    """
    if game.players != 2:
        raise UserError(f"{game.name}: risk dominance compares equilibria of two players, this game has {game.players}")

    def losses(here, there):
        a, b = game.payoffs
        return (a[here] - a[there[0], here[1]]) * (b[here] - b[here[0], there[1]])

    points = pure_equilibria(game, strict=True)
    found: dict[tuple[int, int], list[tuple[int, int]]] = {point: [] for point in points}
    for one, two in combinations(points, 2):
        forth, back = losses(one, two), losses(two, one)
        if forth != back:
            found[one if forth > back else two].append(two if forth > back else one)
    return found


# ------------------------------------------------------------------------------------------------------- solving

def solve_zero_sum(matrix: Float[np.ndarray, "rows columns"]) -> tuple[np.ndarray, np.ndarray, float]:
    """Optimal strategies of the row (maximising) and column player, and the value, by linear programming."""
    matrix = np.asarray(matrix, dtype=np.float64)

    def maximin(table):
        rows, columns = table.shape
        found = linprog(np.append(np.zeros(rows), -1.0), A_ub=np.hstack([-table.T, np.ones((columns, 1))]), b_ub=np.zeros(columns),
                        A_eq=np.append(np.ones(rows), 0.0)[None], b_eq=[1.0], bounds=[(0, None)] * rows + [(None, None)])
        p = np.maximum(found.x[:-1], 0)
        return p / p.sum()

    p, q = maximin(matrix), maximin(-matrix.T)
    return p, q, float(p @ matrix @ q)


def nash_equilibria(game: Game) -> list[Profile]:
    """Every equilibrium of a small two-player game whose supports have equal size: all of them if the game is not degenerate.

    (nashpy's enumeration compares payoffs for exact equality and so misses about one mixed equilibrium in eight of a random game.)
    """
    if game.players != 2:
        raise UserError(f"{game.name}: support enumeration is for two players, this game has {game.players}")
    (a, b), scale, found = game.payoffs, max(np.ptp(game.payoffs), 1e-12), []

    def mixed(table, rows, columns):                        # weights on `columns` that make `rows` equally good
        system = np.ones((len(rows) + 1, len(rows) + 1))
        system[:-1, :-1], system[:-1, -1], system[-1, -1] = table[np.ix_(rows, columns)] / scale, -1, 0
        if np.linalg.cond(system) > 1e12:
            return None
        weights = np.zeros(table.shape[1])
        weights[list(columns)] = np.linalg.solve(system, np.append(np.zeros(len(rows)), 1))[:-1]
        return weights

    for size in range(1, min(game.sizes) + 1):
        for rows, columns in product(combinations(range(game.sizes[0]), size), combinations(range(game.sizes[1]), size)):
            profile = [mixed(b.T, columns, rows), mixed(a, rows, columns)]
            if all(p is not None and p.min() >= -1e-12 for p in profile) and exploitability(game, profile) <= 1e-9 * scale:
                found.append(profile)
    return found


def nash(game: Game, select: Literal["first", "welfare"] = "first") -> Profile:
    """One Nash equilibrium of two players: by linear programming if zero-sum, else by a mixed-integer program (fit for some 30
    actions each), which takes the first it finds or the one with the largest sum of payoffs (each player's scaled to [0, 1]). For more players solve the risk-averse equilibrium at gamma 0 (planning.methods.rae)."""
    if game.players != 2:
        raise UserError(f"{game.name}: nash() takes two players, this game has {game.players}; use rae.solve with gamma=0, floor=0")
    return list(solve_zero_sum(game.payoffs[0])[:2]) if game.zero_sum else _nash_milp(game, select)


def _nash_milp(game: Game, select: str) -> Profile:
    """Feasibility program over p, q, the two values and one binary per action ("the action is not played"). The supports it finds
    are solved again by linear programming, to machine precision; supports that hold only within the program's tolerance are cut off."""
    rows, columns = game.sizes
    n = rows + columns
    low, spread = game.payoffs.min((1, 2)), np.maximum(np.ptp(game.payoffs, (1, 2)), 1e-12)
    a, b = (game.payoffs - low[:, None, None]) / spread[:, None, None]
    value = np.zeros((n, 2 * n + 2))                        # columns: p, q, value of row, value of column, binaries
    value[:rows, rows:n], value[rows:, :rows] = -a, -b.T
    value[:rows, n], value[rows:, n + 1] = 1, 1
    binary = np.hstack([np.zeros((n, n + 2)), np.eye(n)])
    sums = np.zeros((2, 2 * n + 2))
    sums[0, :rows], sums[1, rows:n] = 1, 1
    played = np.hstack([np.eye(n), np.zeros((n, 2)), np.eye(n)])
    limits = Bounds(0, np.concatenate([np.ones(n), [2, 2], np.ones(n)]))
    rules = [LinearConstraint(sums, 1, 1), LinearConstraint(value, 0, np.inf), LinearConstraint(value - binary, -np.inf, 0),
             LinearConstraint(played, 0, 1)]
    goal = np.zeros(2 * n + 2)
    goal[[n, n + 1]] = {"first": 0, "welfare": -1}[select]
    for _ in range(1000):
        found = milp(goal, integrality=np.concatenate([np.zeros(n + 2), np.ones(n)]), bounds=limits, constraints=rules)
        if found.x is None:
            break
        out = found.x[n + 2:] > 0.5
        p, q = _indifferent(b.T, ~out[rows:], ~out[:rows]), _indifferent(a, ~out[:rows], ~out[rows:])
        if p is not None and q is not None:
            return [p, q]
        rules.append(LinearConstraint(np.concatenate([np.zeros(n + 2), np.where(out, -1, 1)]), 1 - out.sum(), np.inf))
    raise RuntimeError(f"{game.name}: the equilibrium program ended without an answer ({found.message})")


def _indifferent(table: np.ndarray, best: np.ndarray, support: np.ndarray) -> np.ndarray | None:
    """A distribution on the columns `support` that makes the rows `best` optimal, or None."""
    size, width = table.shape
    gap = np.hstack([table, -np.ones((size, 1))])
    solved = linprog(np.zeros(width + 1), A_ub=gap, b_ub=np.zeros(size),
                     A_eq=np.vstack([gap[best], np.append(np.ones(width), 0)]), b_eq=np.append(np.zeros(best.sum()), 1),
                     bounds=[(0, 1 if s else 0) for s in support] + [(None, None)],
                     options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10})
    if solved.x is None:
        return None
    q = np.maximum(solved.x[:-1], 0)
    return q / q.sum()


def quantal_response(game: Game, rationality: float, steps: int = 40) -> Profile:
    """The logit equilibrium p^i = softmax(rationality * action values) on the branch that starts at uniform play (McKelvey and
    Palfrey, 1995), followed in `steps` growing values of the rationality, each solved by Newton's method."""
    if rationality < 0:
        raise UserError(f"rationality={rationality}: must be at least 0")
    cuts = np.cumsum(game.sizes)[:-1]

    def gap(logits, at):
        profile = [softmax(part) for part in np.split(logits, cuts)]
        wanted = [at * action_values(game, profile, i) for i in range(game.players)]
        return logits - np.concatenate([w - w.mean() for w in wanted])

    logits = np.zeros(sum(game.sizes))
    for at in rationality * np.linspace(0, 1, steps + 1)[1:] ** 2:
        found = root(gap, logits, args=(at,), options={"xtol": 1e-13})
        if np.abs(gap(found.x, at)).max() > 1e-6:
            raise RuntimeError(f"{game.name}: the logit branch was lost at rationality {at:.3g}; use more steps or less rationality")
        logits = found.x
    return [softmax(part) for part in np.split(logits, cuts)]


def fictitious_play(respond: Callable[[Profile, int], np.ndarray], start: Profile, steps: int, rate: float | None = None,
                    tolerance: float = 0.0) -> tuple[Profile, float, int]:
    """x <- (1 - a) x + a respond(x), all players at once, a = 1/(t + 1) or the constant `rate`; stops when no response differs from
    the play by more than `tolerance`. Returns the profile, that last difference and the steps taken."""
    x, gap = [np.array(p) for p in start], np.inf
    for t in range(1, steps + 1):
        replies = [respond(x, i) for i in range(len(x))]
        gap = max(np.abs(r - p).max() for r, p in zip(replies, x, strict=True))
        if gap <= tolerance:
            return x, float(gap), t - 1
        a = rate if rate is not None else 1 / (t + 1)
        x = [(1 - a) * p + a * r for p, r in zip(x, replies, strict=True)]
    return x, float(gap), steps


def random_game(sizes: Sequence[int], generator: np.random.Generator, crashes: int = 0, crash: float = -100.0) -> Game:
    """Payoffs uniform in [0, 10]; `crashes` random joint actions pay everybody `crash` instead."""
    payoffs = generator.uniform(0, 10, (len(sizes), *sizes))
    cells = generator.choice(int(np.prod(sizes)), crashes, replace=False)
    payoffs.reshape(len(sizes), -1)[:, cells] = crash
    return Game(payoffs, f"random-{'x'.join(map(str, sizes))}")
