"""Monotone submodular functions of the set of visited states, as oracles that give marginal gains, and what can be computed from them.

F maps sets of states 0 ... V-1 to numbers, F(empty) = 0, and a state adds the less the more is already there:
F(v|X) = F(X + v) - F(X) >= F(v|Y) >= 0 for X within Y. States of a measure are immutable: `gains(state)` are F(v|X) for every v [V],
`add(state, v)` is the state of X + v. Everything is float64. Descriptions, for recipes, are in `setfunctions`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray


class Measure:
    """F over `size` states. A state that was visited before adds nothing, unless the measure `repeats` (is additive over visits)."""

    size: int
    repeats: bool = False

    def empty(self) -> Any:
        """The state of the empty set."""
        raise NotImplementedError

    def gains(self, state: Any) -> Array:
        """F(v|X) for every v, [V]."""
        raise NotImplementedError

    def gain(self, state: Any, v: int) -> float:
        return float(self.gains(state)[v])

    def add(self, state: Any, v: int) -> Any:
        raise NotImplementedError

    @property
    def singles(self) -> Array:
        """F({v}) for every v, [V]."""
        return self.gains(self.empty())

    def marginals(self, visited) -> Array:
        """F(s_j | s_0 ... s_{j-1}) for a sequence of states, [len]; the first entry is F({s_0})."""
        state, found = self.empty(), []
        for v in visited:
            found.append(self.gain(state, v))
            state = self.add(state, v)
        return np.array(found)

    def value(self, visited) -> float:
        """F of the set of the states in a sequence."""
        return float(self.marginals(visited).sum())


class Covering(Measure):
    """Sum of the weights [U] of what the visited states cover [V, U] (bool) together."""

    def __init__(self, covers: Array, weights: Array):
        self.covers, self.weights, self.size = covers.astype(float), weights.astype(float), len(covers)
        self.lists = [np.flatnonzero(row) for row in covers]

    def empty(self):
        return self.weights

    def gains(self, state):
        return self.covers @ state

    def gain(self, state, v):
        return float(state[self.lists[v]].sum())

    def add(self, state, v):
        left = state.copy()
        left[self.lists[v]] = 0.0
        return left


class Counting(Measure):
    """Sum over groups of a concave function of how many distinct members were visited; member [V, G]; steps [G, n]: what the n-th one adds."""

    def __init__(self, member: Array, steps: Array):
        self.member, self.size = member.astype(float), len(member)
        self.steps = np.concatenate([steps, np.zeros((len(steps), 1))], 1)

    def empty(self):
        return np.zeros(self.member.shape[1], int), np.ones(self.size)

    def gains(self, state):
        counts, fresh = state
        return fresh * (self.member @ self.steps[np.arange(len(counts)), np.minimum(counts, self.steps.shape[1] - 1)])

    def add(self, state, v):
        counts, fresh = state
        if not fresh[v]:
            return state
        fresh = fresh.copy()
        fresh[v] = 0.0
        return counts + self.member[v].astype(int), fresh


class Informing(Measure):
    """Information of noisy measurements about a Gaussian process with covariance K [V, V]: F(X) = log det(I + K_X / noise^2) / 2.

    This is the mutual information between the process and its measurements at X, and the D-criterion of experimental design.
    constant: F(X) = log det(K_X + noise^2 I) / 2 + constant |X| instead; not monotone where constant < -log(noise).
    """

    def __init__(self, covariance: Array, noise: float, constant: float | None = None):
        self.covariance, self.variance, self.size = covariance, noise**2, len(covariance)
        self.constant = -math.log(noise) if constant is None else constant

    def empty(self):
        return np.zeros((0, self.size)), np.diag(self.covariance).copy(), np.ones(self.size)

    def gains(self, state):
        _, left, fresh = state
        return fresh * (0.5 * np.log(left + self.variance) + self.constant)

    def gain(self, state, v):
        _, left, fresh = state
        return float(fresh[v] * (0.5 * math.log(left[v] + self.variance) + self.constant))

    def add(self, state, v):
        rows, left, fresh = state
        if not fresh[v]:
            return state
        row = (self.covariance[v] - rows[:, v] @ rows) / math.sqrt(left[v] + self.variance)
        fresh = fresh.copy()
        fresh[v] = 0.0
        return np.concatenate([rows, row[None]]), np.maximum(left - row**2, 0.0), fresh


class Locating(Measure):
    """Facility location: sum over u of weights_u max over visited v of similarity[v, u] (>= 0)."""

    def __init__(self, similarity: Array, weights: Array):
        self.similarity, self.weights, self.size = similarity, weights, len(similarity)

    def empty(self):
        return np.zeros(self.similarity.shape[1])

    def gains(self, state):
        return np.maximum(self.similarity - state, 0) @ self.weights

    def gain(self, state, v):
        return float(np.maximum(self.similarity[v] - state, 0) @ self.weights)

    def add(self, state, v):
        return np.maximum(state, self.similarity[v])


class Detecting(Measure):
    """Probabilistic coverage: sum over u of weights_u (1 - product over visited v of (1 - chance[v, u]))."""

    def __init__(self, chance: Array, weights: Array):
        self.chance, self.weights, self.size = chance, weights, len(chance)

    def empty(self):
        return self.weights, np.ones(self.size)

    def gains(self, state):
        return state[1] * (self.chance @ state[0])

    def gain(self, state, v):
        return float(state[1][v] * (self.chance[v] @ state[0]))

    def add(self, state, v):
        missed, fresh = state
        if not fresh[v]:
            return state
        fresh = fresh.copy()
        fresh[v] = 0.0
        return missed * (1 - self.chance[v]), fresh


class Modular(Measure):
    """Sum of weights [V] over all visits (time-stamped states): additive, so every visit counts."""

    repeats = True

    def __init__(self, weights: Array):
        self.weights, self.size = weights, len(weights)

    def empty(self):
        return None

    def gains(self, state):
        return self.weights

    def add(self, state, v):
        return None


class Blended(Measure):
    """A sum of measures with non-negative factors."""

    def __init__(self, measures: list[Measure], factors: list[float]):
        self.repeats = any(m.repeats for m in measures)
        self.measures, self.factors, self.size = measures, factors, measures[0].size

    def empty(self):
        return tuple(m.empty() for m in self.measures)

    def gains(self, state):
        return sum(f * m.gains(s) for f, m, s in zip(self.factors, self.measures, state))

    def gain(self, state, v):
        return sum(f * m.gain(s, v) for f, m, s in zip(self.factors, self.measures, state))

    def add(self, state, v):
        return tuple(m.add(s, v) for m, s in zip(self.measures, state))


# ---------------------------------------------------------------------------------------------- facts about a measure

def curvature(measure: Measure) -> float:
    """c = 1 - min over v of F(v | all others) / F({v}), over states with F({v}) > 0: 0 for additive functions, 1 if some state becomes worthless.

    V^2 oracle calls.
    """
    singles, least = measure.singles, 1.0
    for v in np.flatnonzero(singles > 0):
        state = measure.empty()
        for u in range(measure.size):
            state = state if u == v else measure.add(state, u)
        least = min(least, measure.gain(state, int(v)) / singles[v])
    return 1.0 - least


def violation(measure: Measure, rng: np.random.Generator, trials: int = 100) -> float:
    """The largest of F(v|Y) - F(v|X) and -F(v|Y) over random X within Y and v outside Y: at most rounding error if F is monotone and submodular."""
    worst = -np.inf
    for _ in range(trials):
        order = rng.permutation(measure.size)
        small, large = np.sort(rng.integers(0, measure.size, size=2))
        state = measure.empty()
        for v in order[:small]:
            state = measure.add(state, int(v))
        before = measure.gains(state)[order[large:]]
        for v in order[small:large]:
            state = measure.add(state, int(v))
        after = measure.gains(state)[order[large:]]
        worst = max(worst, float((after - before).max()), float(-after.min()))
    return worst


def greedy_set(measure: Measure, count: int) -> tuple[list[int], float]:
    """`count` states by the largest marginal gain, free of any path, and F of them: at least 1 - 1/e of the best such set (Nemhauser et al. 1978)."""
    chosen, state, total = [], measure.empty(), 0.0
    for _ in range(count):
        gains = measure.gains(state)
        v = int(gains.argmax())
        total, state = total + float(gains[v]), measure.add(state, v)
        chosen.append(v)
    return chosen, total
