"""Set functions to choose from: coverage, item collection, information, facility location and more, bound to the places of states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy.spatial.distance import cdist

from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part

from .measures import Array, Blended, Counting, Covering, Detecting, Informing, Locating, Measure, Modular

Positive = Annotated[float, Field(gt=0)]


class SetFunction(Part):
    """Slot: a set function of visited states. `bind(places)` makes its measure for states at places [V, 2] (row, column)."""

    slot: ClassVar[str] = "set-function"

    def bind(self, places: Array) -> Measure:
        raise NotImplementedError


def density(kind: str, places: Array, seed: int) -> Array:
    """Weights [V] of places: 1 everywhere; the sum of three Gaussian bumps; or exp of a draw from a smooth Gaussian process, as nest densities are."""
    rng, span = np.random.default_rng(seed), np.ptp(places, axis=0).max() or 1.0
    if kind == "uniform":
        return np.ones(len(places))
    if kind == "bumps":
        middles = places[rng.choice(len(places), min(3, len(places)), replace=False)]
        return np.exp(-0.5 * (cdist(places, middles) / (0.15 * span)) ** 2).sum(1)
    drawn = np.linalg.cholesky(kernel("squared", places, 0.2 * span) + 1e-6 * np.eye(len(places))) @ rng.standard_normal(len(places))
    return np.exp(drawn)


def kernel(kind: str, places: Array, scale: float) -> Array:
    """Covariance [V, V] with variance 1: squared (exponential), matern (smoothness 5/2), exponential; linear: inner products of (1, place / scale)."""
    if kind == "linear":
        features = np.concatenate([np.ones((len(places), 1)), places / scale], 1)
        return features @ features.T
    distance = cdist(places, places) / scale
    if kind == "squared":
        return np.exp(-0.5 * distance**2)
    if kind == "exponential":
        return np.exp(-distance)
    r = np.sqrt(5) * distance
    return (1 + r + r**2 / 3) * np.exp(-r)


def read_weights(path: str, size: int) -> Array:
    """Weights [V] from a .npy file (any shape of V numbers, row by row), which is read without pickle."""
    try:
        found = np.load(path, allow_pickle=False).reshape(-1).astype(float)
    except (OSError, ValueError) as error:
        raise UserError(f"weights {path!r}: {str(error).splitlines()[0]}; expected a .npy file of numbers") from None
    if len(found) != size or not np.isfinite(found).all() or found.min() < 0:
        raise UserError(f"weights {path!r}: {len(found)} numbers, least {found.min():g}; accepted: {size} finite ones of 0 or more, one per state")
    return found


@dataclass(frozen=True, eq=False)
class Weighted(SetFunction):
    """density: weights of the states (uniform, bumps, process), drawn with `seed`; weights: a .npy file with them instead."""

    density: Literal["uniform", "bumps", "process"] = "uniform"
    seed: int = 0
    weights: str | None = None

    def weigh(self, places: Array) -> Array:
        return read_weights(self.weights, len(places)) if self.weights else density(self.density, places, self.seed)


QUAD = np.array([(0, 0), (0, 1), (1, 0), (1, 1)])


@part("coverage")
class Coverage(Weighted):
    """Weight of all that lies within the discs around visited states.

    disc: cell (the state itself), quad (it and its right, lower and lower right neighbours), large (the quad of every cell of the quad),
    round (everything within `radius`).
    """

    disc: Literal["cell", "quad", "large", "round"] = "quad"
    radius: Positive = 1.5

    def bind(self, places):
        if self.disc == "round":
            return Covering(cdist(places, places) <= self.radius, self.weigh(places))
        offsets = {"cell": QUAD[:1], "quad": QUAD, "large": (QUAD[:, None] + QUAD).reshape(-1, 2)}[self.disc]
        reached = (places[:, None, None] + offsets[None, :, None] == places[None, None]).all(-1)       # [V, offsets, V]
        return Covering(reached.any(1), self.weigh(places))


@part("items")
class Items(SetFunction):
    """Item collection (group Steiner): sum over groups g of min(distinct members visited, required_g).

    groups: their states; empty: `count` groups of `members` states drawn with `seed`. required: per group; empty: 1 each.
    """

    groups: tuple[tuple[int, ...], ...] = ()
    required: tuple[int, ...] = ()
    count: Annotated[int, Field(gt=0)] = 6
    members: Annotated[int, Field(gt=0)] = 3
    seed: int = 0

    def bind(self, places):
        size, groups = len(places), self.groups
        if not groups:
            if self.count * self.members > size:
                raise UserError(f"count={self.count} groups of members={self.members}: more than the {size} states there are")
            groups = np.random.default_rng(self.seed).permutation(size)[: self.count * self.members].reshape(self.count, self.members)
        if any(not 0 <= v < size for g in groups for v in g):
            raise UserError(f"groups={self.groups}: accepted are states from 0 to {size - 1}")
        required = self.required or (1,) * len(groups)
        if len(required) != len(groups) or min(required) < 1:
            raise UserError(f"required={self.required}: accepted is one number of 1 or more for each of the {len(groups)} groups")
        member = np.zeros((size, len(groups)), bool)
        for i, group in enumerate(groups):
            member[list(group), i] = True
        return Counting(member, np.arange(max(required)) < np.array(required)[:, None])


@part("log-count")
class LogCount(SetFunction):
    """Sum over square blocks of `block` x `block` places of log(1 + distinct states visited in it)."""

    block: Annotated[int, Field(gt=0)] = 3

    def bind(self, places):
        _, which = np.unique(np.floor(places / self.block), axis=0, return_inverse=True)
        which = which.reshape(-1)
        member = which[:, None] == np.arange(which.max() + 1)
        n = np.arange(int(member.sum(0).max()))
        return Counting(member, np.tile(np.log(2 + n) - np.log(1 + n), (member.shape[1], 1)))


@part("information")
class Information(SetFunction):
    """Informative path planning and experimental design: what measurements with noise tell about a Gaussian process or a linear model.

    kernel: squared, matern (5/2), exponential, or linear (coefficients of 1, row and column: the D-criterion of a regression); scale: its
    length. constant: per state, in place of -log(noise), which makes F monotone with F(empty) = 0.
    """

    kernel: Literal["squared", "matern", "exponential", "linear"] = "matern"
    scale: Positive = 2.0
    noise: Positive = 0.5
    constant: float | None = None

    def bind(self, places):
        return Informing(kernel(self.kernel, places, self.scale), self.noise, self.constant)


@part("facility-location")
class FacilityLocation(Weighted):
    """How near the nearest visited state is to every place: similarity exp(-distance^2 / (2 scale^2))."""

    scale: Positive = 1.5

    def bind(self, places):
        return Locating(kernel("squared", places, self.scale), self.weigh(places))


@part("detection")
class Detection(Weighted):
    """Probabilistic coverage: a visit notices a place with probability chance * exp(-distance / scale)."""

    chance: Annotated[float, Field(gt=0, le=1)] = 0.8
    scale: Positive = 1.0

    def bind(self, places):
        return Detecting(self.chance * kernel("exponential", places, self.scale), self.weigh(places))


@part("modular")
class ModularSum(Weighted):
    """Additive: the weight of the state at every visit."""

    def bind(self, places):
        return Modular(self.weigh(places))


@part("blend")
class Blend(SetFunction):
    """share * (F({v}) summed over all visits) + (1 - share) * F: curvature from that of `of` down to 0."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    of: SetFunction = Coverage()

    def bind(self, places):
        inner = self.of.bind(places)
        return Blended([Modular(inner.singles), inner], [self.share, 1 - self.share])
