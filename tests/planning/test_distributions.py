import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from volvelle.core.errors import UserError
from volvelle.planning.distributions import combine, cvar, diracs, expectation, law, mixture, project, quantile, upper_cvar, wasserstein


def random_laws(rng, n, size=5):
    return combine(
        np.repeat(np.arange(n), size), rng.choice([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0], size=n * size), rng.dirichlet(np.ones(size), size=n).ravel(), n)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_wasserstein_agrees_with_scipy(seed):
    rng = np.random.default_rng(seed)
    one, other = random_laws(rng, 6), random_laws(rng, 6, 3).shift(rng.normal(size=6))
    expected = [wasserstein_distance(one[i][0], other[i][0], one[i][1], other[i][1]) for i in range(6)]
    np.testing.assert_allclose(wasserstein(one, other), expected, atol=1e-10)


def test_combine_merges_equal_atoms_and_sorts():
    laws = combine(np.array([1, 0, 0, 0]), np.array([5.0, 2.0, 1.0, 2.0 + 1e-13]), np.array([1, 0.25, 0.5, 0.25]), 2)
    np.testing.assert_allclose(laws[0], ([1, 2], [0.5, 0.5]))
    np.testing.assert_allclose(laws[1], ([5], [1]))
    vectors = combine(np.zeros(3, int), np.array([[1.0, 0], [0, 1], [1, 0]]), np.array([0.2, 0.3, 0.5]), 1)
    np.testing.assert_allclose(vectors[0][0], [[0, 1], [1, 0]])
    np.testing.assert_allclose(vectors[0][1], [0.3, 0.7])


def test_cvar_and_quantile_by_hand():
    x = law([0, 3, 4], [0.25, 0.25, 0.5])
    assert cvar(x, 0.75)[0] == pytest.approx((0.25 * 0 + 0.25 * 3 + 0.25 * 4) / 0.75)
    assert cvar(x, 0.1)[0] == 0 and cvar(x, 1)[0] == pytest.approx(2.75)
    assert upper_cvar(x, 0.5)[0] == 4 and upper_cvar(x, 0.75)[0] == pytest.approx((2 + 0.75) / 0.75)
    assert [quantile(x, t)[0] for t in (0.1, 0.25, 0.26, 0.5, 0.51, 1)] == [0, 0, 3, 3, 4, 4]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_cvar_is_its_variational_form(seed, tau):
    laws = random_laws(np.random.default_rng(seed), 4)
    inner = np.max([c + expectation(laws, lambda x, c=c: np.minimum(x - c, 0)) / tau for c in np.unique(laws.atoms)], 0)
    np.testing.assert_allclose(cvar(laws, tau), inner, atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_projection_keeps_means_and_moves_little(seed):
    rng = np.random.default_rng(seed)
    laws = random_laws(rng, 5).shift(rng.uniform(0, 1, 5))
    weights = project(laws, -2.0, 0.3, 23)
    grid = -2.0 + 0.3 * np.arange(23)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights @ grid, expectation(laws), atol=1e-12)
    on_grid = combine(np.repeat(np.arange(5), 23), np.tile(grid, 5), weights.ravel(), 5)
    assert wasserstein(laws, on_grid).max() <= 0.15 + 1e-12


def test_mixture_shifts_scales_and_weights():
    mixed = mixture(diracs([1.0, 2.0]), [0, 0, 1], [0, 1, 1], [0.5, 0.5, 1.0], 2, shift=[10.0, 20.0, 0.0], scale=0.5)
    np.testing.assert_allclose(mixed[0], ([10.5, 21], [0.5, 0.5]))
    np.testing.assert_allclose(mixed[1], ([1], [1]))


def test_take_repeats_and_reorders():
    laws = combine(np.array([0, 1, 1]), np.array([7.0, 1.0, 2.0]), np.array([1, 0.5, 0.5]), 2)
    picked = laws.take([1, 0, 1])
    np.testing.assert_allclose(picked.atoms, [1, 2, 7, 1, 2])
    assert len(picked) == 3


def test_refusals():
    with pytest.raises(UserError, match="sum to 0.9"):
        law([0, 1], [0.5, 0.4])
    with pytest.raises(UserError, match=r"weights have shape \(3,\)"):
        law([0, 1], [0.5, 0.4, 0.1])
    with pytest.raises(UserError, match="tau 0;"):
        cvar(diracs([1.0]), 0)
    with pytest.raises(UserError, match="2 components"):
        cvar(diracs(np.ones((3, 2))), 0.5)
    with pytest.raises(UserError, match="got 1 and 2"):
        wasserstein(diracs([1.0]), diracs([1.0, 2.0]))
    with pytest.raises(UserError, match="the grid covers 0 to 1"):
        project(diracs([2.0]), 0.0, 0.5, 3)
