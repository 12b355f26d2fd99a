"""What one may want of a return: statistical functionals K of a law, and the conditions under which dynamic programming can maximise them.

A functional maps a stack of n laws to n numbers. Distributional dynamic programming with stock maximises K(law of stock + return) if K has

    M  indifference to mixtures: K nu_i >= K nu'_i for all i implies K(sum p_i nu_i) >= K(sum p_i nu'_i)
    G  indifference to the discount: K(X) >= K(Y) implies K(discount X) >= K(discount Y); not needed at discount 1
    L  |K nu - K nu'| <= L w_1(nu, nu'), for rates over an endless horizon

An expected utility E f(X) always has M, and M with continuity leaves only these. It has G exactly if f(discount x) - f(0) = a (f(x) - f(0)) for some
a >= 0, and L with the Lipschitz constant of f. Source: arXiv 2501.13028; the criterion for G and the searches below are worked out here.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from volvelle.core.errors import UserError

from .distributions import Laws, combine, expectation, mixture

PROBES = np.concatenate([-(2.0 ** np.arange(-4, 6)), 2.0 ** np.arange(-4, 6), [-3.7, -0.3, 0.7, 5.1]])


@dataclass(frozen=True)
class ExpectedUtility:
    """E utility(stock + return), to be started from `start_stock`.

    utility maps [n] (or [n, m]) to [n]. lipschitz: its constant in Wasserstein-1, None if it has none.
    """
    utility: Callable
    start_stock: float | tuple[float, ...] = 0.0
    lipschitz: float | None = 1.0
    name: str = "expected utility"

    def __call__(self, laws: Laws) -> np.ndarray:
        return expectation(laws, self.utility)


def mean() -> ExpectedUtility:
    """The ordinary objective; the stock plays no part."""
    return ExpectedUtility(lambda x: x, 0.0, 1.0, "mean")


def shortfall(stock: float = 0.0) -> ExpectedUtility:
    """E min(stock + G, 0): the soft form of keeping the return above -stock, and the inner problem of CVaR."""
    return ExpectedUtility(lambda x: np.minimum(x, 0), stock, 1.0, "shortfall")


def surplus(stock: float = 0.0) -> ExpectedUtility:
    """E max(stock + G, 0), the inner problem of the optimistic CVaR."""
    return ExpectedUtility(lambda x: np.maximum(x, 0), stock, 1.0, "surplus")


def target(goal: float, power: float = 1.0) -> ExpectedUtility:
    """Hit a return: E -|G - goal|^power. Lipschitz for power 1."""
    if power <= 0:
        raise UserError(f"target: power {power}; accepted: above 0")
    return ExpectedUtility(lambda x: -np.abs(x) ** power, -goal, 1.0 if power == 1 else None, "target")


def above(threshold: float) -> ExpectedUtility:
    """P(G >= threshold). Not Lipschitz: sound for finite horizons only."""
    return ExpectedUtility(lambda x: (x >= -1e-9).astype(float), -threshold, None, "above")


def homeostasis(deviation, order: float = 1.0) -> ExpectedUtility:
    """Regulate m quantities that start `deviation` [m] away from their set points: E -||deviation + G||_order, vector rewards."""
    return ExpectedUtility(lambda x: -np.linalg.norm(np.atleast_2d(x), ord=order, axis=-1), tuple(np.ravel(deviation).tolist()), 1.0, "homeostasis")


def constrained(budget: float, price: float) -> ExpectedUtility:
    """Mean of the first reward component with the second, a cost counted negatively, kept within `budget`: E x_1 + price * min(x_2, 0).

    Lipschitz with respect to the l_1 distance, constant max(1, price).
    """
    return ExpectedUtility(lambda x: x[:, 0] + price * np.minimum(x[:, 1], 0), (0.0, budget), max(1.0, price), "constrained")


def per_law(function: Callable) -> Callable:
    """A functional from function(atoms, weights) -> number, applied law by law."""
    return lambda laws: np.array([function(*laws[i]) for i in range(len(laws))])


# ---- conditions --------------------------------------------------------------------------------------------------------------------
def discount_factor(utility: Callable, discount: float, components: int | None = None) -> float | None:
    """The a >= 0 with f(discount x) - f(0) = a (f(x) - f(0)) on a fixed set of probes, None if there is none (G fails)."""
    x = PROBES if components is None else np.stack([np.roll(PROBES, 7 * i) for i in range(components)], -1)
    origin = utility(np.zeros_like(x[:1]))
    outer, inner = utility(x) - origin, utility(discount * x) - origin
    a = float(outer @ inner / (outer @ outer)) if np.any(outer) else 1.0
    return a if a >= 0 and np.allclose(inner, a * outer, rtol=1e-7, atol=1e-9) else None


def slope(utility: Callable, points) -> float:
    """The steepest slope between neighbouring points: a lower bound on the Lipschitz constant, exact for piecewise linear f with kinks on them."""
    points = np.sort(np.asarray(points, dtype=float))
    return float(np.max(np.abs(np.diff(utility(points)) / np.diff(points))))


class Violation(NamedTuple):
    """K(better) >= K(worse), and yet K of `better` transformed falls below K of `worse` transformed, by `loss`."""
    condition: str
    better: Laws
    worse: Laws
    loss: float


def mixture_violation(functional: Callable, rng: np.random.Generator, tries: int = 2000, tolerance: float = 1e-7) -> Violation | None:
    """Search random small scalar laws for a breach of M; None if none was found (which proves nothing)."""
    one, two = _random_laws(rng, tries), _random_laws(rng, tries)
    partner, share = _random_laws(rng, tries), rng.uniform(0.1, 0.9, tries)
    return _breach("M", functional, one, two, _blend(one, partner, share), _blend(two, partner, share), tolerance)


def discount_violation(functional: Callable, discount: float, rng: np.random.Generator, tries: int = 2000,
                       tolerance: float = 1e-7) -> Violation | None:
    """Search random small scalar laws for a breach of G; None if none was found (which proves nothing)."""
    one, two = _random_laws(rng, tries), _random_laws(rng, tries)
    return _breach("G", functional, one, two, one.map(lambda x: discount * x), two.map(lambda x: discount * x), tolerance)


def require_conditions(objective: Callable, discount: float, components: int | None, rng: np.random.Generator | None, endless: bool = False):
    """UserError unless `objective` can be maximised. Expected utilities are checked on probes, other functionals searched with rng."""
    if isinstance(objective, ExpectedUtility):
        if discount < 1 and discount_factor(objective.utility, discount, components) is None:
            raise UserError(f"objective {objective.name!r} is not indifferent to discount {discount}: f({discount} x) - f(0) must be a fixed "
                            "multiple of f(x) - f(0); put a kink off zero into the start stock, or use discount 1")
        if endless and objective.lipschitz is None:
            raise UserError(f"objective {objective.name!r} is not Lipschitz: give a finite horizon")
        return
    if rng is None:
        raise UserError("a functional that is no ExpectedUtility is searched for violations of its conditions: pass rng, or check=False")
    if components is not None:
        raise UserError(f"a functional of vector returns ({components} components) cannot be checked; pass an ExpectedUtility, or check=False")
    found = mixture_violation(objective, rng) or (discount_violation(objective, discount, rng) if discount < 1 else None)
    if found:
        words = {"M": "mixtures", "G": f"discount {discount}"}[found.condition]
        name = getattr(objective, "__name__", type(objective).__name__)
        raise UserError(f"functional {name!r} is not indifferent to {words} (a pair of laws changes order by {found.loss:.3g}); dynamic programming "
                        "cannot be trusted with it: find an expected utility, or pass check=False")


def _random_laws(rng, n, atoms=3) -> Laws:
    values = rng.choice([-2.0, -1.0, 0.0, 1.0, 2.0, 5.0], size=n * atoms) + rng.choice([0.0, 0.5], size=n * atoms)
    return combine(np.repeat(np.arange(n), atoms), values, rng.dirichlet(np.ones(atoms), size=n).ravel(), n)


def _blend(one: Laws, other: Laws, share) -> Laws:
    n = len(one)
    both = Laws(np.concatenate([one.atoms, other.atoms]), np.concatenate([one.weights, other.weights]),
                np.concatenate([one.offsets, one.offsets[-1] + other.offsets[1:]]))
    return mixture(both, np.tile(np.arange(n), 2), np.arange(2 * n), np.concatenate([share, 1 - share]), n)


def _breach(condition, functional, one, two, after_one, after_two, tolerance) -> Violation | None:
    sign = np.sign(functional(one) - functional(two))
    loss = -sign * (functional(after_one) - functional(after_two))
    worst = int(np.argmax(loss))
    if loss[worst] <= tolerance:
        return None
    better, worse = (one, two) if sign[worst] > 0 else (two, one)
    return Violation(condition, better.take([worst]), worse.take([worst]), float(loss[worst]))
