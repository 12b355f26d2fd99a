"""Stacks of finitely supported probability laws, exact on their atoms, and what one measures on them.

`Laws` holds n laws of different sizes flat: atoms [K] (or [K, m] for vectors), weights [K], law i at offsets[i]:offsets[i+1].
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from volvelle.core.errors import UserError

DECIMALS = 10  # atoms that agree to this many decimals are one atom


@dataclass(frozen=True, eq=False)
class Laws:
    atoms: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(atoms, weights) of law i."""
        i = range(len(self))[i]
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.atoms[part], self.weights[part]

    @cached_property
    def row(self) -> np.ndarray:
        """[K]: which law each atom belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def take(self, rows) -> Laws:
        """The stack of laws `rows` (repeats allowed)."""
        rows = np.asarray(rows)
        picked, counts = spans(self.offsets, rows)
        return Laws(self.atoms[picked], self.weights[picked], np.append(0, np.cumsum(counts)))

    def map(self, function: Callable) -> Laws:
        """The laws of function(X), atom by atom; equal atoms are not merged."""
        return Laws(function(self.atoms), self.weights, self.offsets)

    def shift(self, amount) -> Laws:
        """The laws of X + amount, amount [n] or [n, m]."""
        return Laws(self.atoms + np.asarray(amount)[self.row], self.weights, self.offsets)


def spans(offsets, rows) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions of ragged `rows`, concatenated, and their counts [len(rows)]."""
    counts = offsets[rows + 1] - offsets[rows]
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(offsets[rows] - (ends - counts), counts), counts


def diracs(values) -> Laws:
    """One unit mass per entry of values [n] or [n, m]."""
    values = np.asarray(values, dtype=float)
    return Laws(values, np.ones(len(values)), np.arange(len(values) + 1))


def law(atoms, weights) -> Laws:
    """A stack of one. Raises UserError if the weights are negative or do not sum to one."""
    atoms, weights = np.asarray(atoms, dtype=float), np.asarray(weights, dtype=float)
    if weights.shape != atoms.shape[:1]:
        raise UserError(f"weights have shape {weights.shape}; accepted: {atoms.shape[:1]}, one per atom")
    if weights.min() < 0 or abs(weights.sum() - 1) > 1e-8:
        raise UserError(f"weights sum to {weights.sum():.10g} with smallest entry {weights.min():g}; they must be non-negative and sum to one")
    return combine(np.zeros(len(atoms), np.int64), atoms, weights, 1)


def combine(row, atoms, weights, n: int, decimals: int = DECIMALS) -> Laws:
    """n laws from loose atoms: atom k has weight weights[k] in law row[k]. Equal atoms merge; within a law atoms are sorted."""
    keep = weights > 0
    row, atoms, weights = row[keep], atoms[keep], weights[keep]
    rounded = np.round(atoms, decimals).reshape(len(atoms), -1)
    order = np.lexsort((*rounded.T[::-1], row))
    row, atoms, weights, rounded = row[order], atoms[order], weights[order], rounded[order]
    fresh = np.ones(len(row), bool)
    fresh[1:] = (row[1:] != row[:-1]) | (rounded[1:] != rounded[:-1]).any(1)
    first = np.flatnonzero(fresh)
    counts = np.bincount(row[first], minlength=n)
    return Laws(atoms[first], np.add.reduceat(weights, first) if len(first) else weights, np.append(0, np.cumsum(counts)))


def mixture(laws: Laws, group, part, weight, n: int, shift=None, scale: float = 1.0) -> Laws:
    """n laws; law g is the mixture over the entries k with group[k] = g of shift[k] + scale * X, X ~ laws[part[k]], with weight[k]."""
    picked, counts = spans(laws.offsets, np.asarray(part))
    entry = np.repeat(np.arange(len(counts)), counts)
    atoms = scale * laws.atoms[picked]
    if shift is not None:
        atoms = atoms + np.asarray(shift)[entry]
    return combine(np.asarray(group)[entry], atoms, np.asarray(weight)[entry] * laws.weights[picked], n)


def expectation(laws: Laws, function: Callable = lambda x: x) -> np.ndarray:
    """E function(X) per law, [n] (or [n, m] when function returns vectors)."""
    values = np.asarray(function(laws.atoms), dtype=float)
    return np.add.reduceat((values.T * laws.weights).T, laws.offsets[:-1])


def cvar(laws: Laws, tau: float) -> np.ndarray:
    """Mean of the worst share tau of each law, [n]; tau in (0, 1]."""
    row, atoms, weights, cumulated = _sorted(laws, tau)
    inside = np.clip(tau - (cumulated - weights), 0, weights)
    return np.bincount(row, inside * atoms, len(laws)) / tau


def upper_cvar(laws: Laws, tau: float) -> np.ndarray:
    """Mean of the best share tau of each law, [n]."""
    return -cvar(laws.map(np.negative), tau)


def quantile(laws: Laws, tau: float) -> np.ndarray:
    """The smallest x with P(X <= x) >= tau, [n]."""
    row, atoms, _, cumulated = _sorted(laws, tau)
    below = np.bincount(row, cumulated < tau - 1e-12, len(laws)).astype(int)
    return atoms[np.minimum(laws.offsets[:-1] + below, laws.offsets[1:] - 1)]


def _sorted(laws: Laws, tau: float):
    if not 0 < tau <= 1:
        raise UserError(f"tau {tau}; accepted: above 0, at most 1")
    _scalar(laws)
    order = np.lexsort((laws.atoms, laws.row))
    weights = laws.weights[order]
    total = np.cumsum(weights)
    return laws.row, laws.atoms[order], weights, total - np.append(0, total)[laws.offsets[laws.row]]


def wasserstein(one: Laws, other: Laws) -> np.ndarray:
    """Wasserstein-1 distance, law by law, [n]: the area between the two distribution functions. Scalar atoms."""
    _scalar(one), _scalar(other)
    if len(one) != len(other):
        raise UserError(f"wasserstein compares stacks of one length; got {len(one)} and {len(other)}")
    row = np.concatenate([one.row, other.row])
    atoms = np.concatenate([one.atoms, other.atoms])
    order = np.lexsort((atoms, row))
    row, atoms = row[order], atoms[order]
    difference = np.cumsum(np.concatenate([one.weights, -other.weights])[order])  # returns to 0 at the end of every law
    gaps = np.where(row[1:] == row[:-1], np.diff(atoms), 0.0)
    return np.bincount(row[1:], np.abs(difference[:-1]) * gaps, len(one))


def project(laws: Laws, low: float, spacing: float, points: int) -> np.ndarray:
    """[n, points]: each atom's mass split between its two neighbours on the grid low + spacing * (0..points-1), keeping the mean.

    Moves no mass further than one cell, so Wasserstein-1 <= spacing / 2. UserError if an atom lies outside the grid.
    """
    _scalar(laws)
    place = (laws.atoms - low) / spacing
    if place.min() < -1e-9 or place.max() > points - 1 + 1e-9:
        raise UserError(f"project: atoms run from {laws.atoms.min():g} to {laws.atoms.max():g}; the grid covers {low:g} to "
                        f"{low + spacing * (points - 1):g}")
    place = np.clip(place, 0, points - 1)
    left = np.minimum(place.astype(np.int64), max(points - 2, 0))
    right = np.minimum(left + 1, points - 1)
    fraction, base = place - left, laws.row * points
    out = np.bincount(base + left, laws.weights * (1 - fraction), len(laws) * points)
    return (out + np.bincount(base + right, laws.weights * fraction, len(laws) * points)).reshape(len(laws), points)


def _scalar(laws: Laws):
    if laws.atoms.ndim != 1:
        raise UserError(f"atoms have {laws.atoms.shape[1]} components; this measure is for scalar returns")
