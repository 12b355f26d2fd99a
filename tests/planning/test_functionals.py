import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.distributions import cvar, expectation, law, mixture, quantile, wasserstein
from volvelle.planning.functionals import (
    ExpectedUtility,
    above,
    constrained,
    discount_factor,
    discount_violation,
    homeostasis,
    mean,
    mixture_violation,
    per_law,
    require_conditions,
    shortfall,
    slope,
    surplus,
    target,
)


def variance(laws):
    return expectation(laws, np.square) - expectation(laws) ** 2


def test_cvar_is_not_indifferent_to_mixtures():
    """delta_0 and {0: .5, 10: .5} tie at CVaR_.5 = 0; mixed half-half with delta_5 they give 0 and 2.5."""
    sure, risky, five = law([0], [1]), law([0, 10], [0.5, 0.5]), law([5], [1])
    assert cvar(sure, 0.5)[0] == cvar(risky, 0.5)[0] == 0
    mixed = [law(np.append(x.atoms, five.atoms), np.append(0.5 * x.weights, 0.5)) for x in (sure, risky)]
    assert [cvar(m, 0.5)[0] for m in mixed] == [0, 2.5]


@pytest.mark.parametrize("functional", [lambda x: cvar(x, 0.5), lambda x: -variance(x), lambda x: quantile(x, 0.5),
                                        lambda x: expectation(x) - variance(x)])
def test_the_search_finds_breaches_of_mixture_indifference(functional):
    found = mixture_violation(functional, np.random.default_rng(0))
    assert found.condition == "M" and found.loss > 0
    assert functional(found.better)[0] >= functional(found.worse)[0]


@pytest.mark.parametrize("objective", [mean(), shortfall(), surplus(), target(0), target(0, 2), above(0)])
def test_expected_utilities_keep_their_order_under_mixtures_and_discount(objective):
    rng = np.random.default_rng(1)
    assert mixture_violation(objective, rng) is None
    assert discount_violation(objective, 0.7, rng) is None


def test_exponential_utility_is_not_indifferent_to_the_discount():
    """delta_1 (-.3679) beats {0: .5, 3: .5} (-.5249); after scaling by .25 it loses, -.7788 to -.7362."""
    one, two = law([1], [1]), law([0, 3], [0.5, 0.5])
    utility = ExpectedUtility(lambda x: -np.exp(-x))
    values = [utility(x)[0] for x in (one, two, one.map(lambda x: x / 4), two.map(lambda x: x / 4))]
    np.testing.assert_allclose(values, [-0.3679, -0.5249, -0.7788, -0.7362], atol=5e-5)
    assert discount_violation(utility, 0.25, np.random.default_rng(0)).condition == "G"


@pytest.mark.parametrize("utility, factor", [
    (lambda x: x, 0.25), (lambda x: np.minimum(x, 0), 0.25), (lambda x: np.maximum(x, 0) + 7, 0.25), (lambda x: -np.abs(x), 0.25),
    (lambda x: -x**2, 1 / 16),
    (lambda x: np.sign(x) * np.abs(x) ** 3, 1 / 64), (lambda x: (x >= 0) * 1.0, 1.0), (lambda x: -np.exp(-x), None), (lambda x: -np.abs(x - 3), None),
    (lambda x: np.sin(x), None),
])
def test_discount_factor(utility, factor):
    found = discount_factor(utility, 0.25)
    assert found is None if factor is None else found == pytest.approx(factor)


def test_discount_factor_of_vector_utilities():
    assert discount_factor(homeostasis([1, 2]).utility, 0.5, components=2) == pytest.approx(0.5)
    assert discount_factor(constrained(3, 2.0).utility, 0.5, components=2) == pytest.approx(0.5)
    assert discount_factor(lambda x: -np.linalg.norm(x - 1, axis=-1), 0.5, components=2) is None


@pytest.mark.parametrize("objective", [mean(), shortfall(), surplus(), target(0)])
def test_lipschitz_constants_bound_the_functional(objective):
    rng = np.random.default_rng(2)
    atoms, weights = rng.normal(size=(2, 200, 3)), rng.dirichlet(np.ones(3), size=(2, 200))
    for i in range(200):
        one, other = law(atoms[0, i], weights[0, i]), law(atoms[1, i], weights[1, i])
        assert abs(objective(one) - objective(other))[0] <= objective.lipschitz * wasserstein(one, other)[0] + 1e-12
    assert slope(objective.utility, np.linspace(-4, 4, 17)) == pytest.approx(objective.lipschitz)


def test_requirements_refuse_by_name():
    rng = np.random.default_rng(0)
    require_conditions(shortfall(), 0.9, None, None)
    require_conditions(ExpectedUtility(lambda x: -np.exp(-x)), 1.0, None, None)
    require_conditions(per_law(lambda x, w: float(w @ x)), 0.9, None, rng)
    with pytest.raises(UserError, match="'kinked' is not indifferent to discount 0.9"):
        require_conditions(ExpectedUtility(lambda x: -np.abs(x - 3), name="kinked"), 0.9, None, None)
    with pytest.raises(UserError, match="'variance' is not indifferent to mixtures"):
        require_conditions(variance, 1.0, None, rng)
    with pytest.raises(UserError, match="pass rng"):
        require_conditions(variance, 1.0, None, None)
    with pytest.raises(UserError, match="'above' is not Lipschitz"):
        require_conditions(above(0), 0.9, None, None, endless=True)


def test_per_law_is_the_functional_law_by_law():
    laws = mixture(law([1, 2], [0.5, 0.5]), [0, 1], [0, 0], [1, 1], 2, shift=[0.0, 10.0])
    np.testing.assert_allclose(per_law(lambda x, w: float(w @ x))(laws), [1.5, 11.5])
