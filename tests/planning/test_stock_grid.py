"""The grid against exact enumeration, within the bounds its module proves, on 200 random instances."""
import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.distributions import Laws, cvar, expectation, wasserstein
from volvelle.planning.functionals import ExpectedUtility, above, shortfall, target
from volvelle.planning.grid_kernels import choose, mix
from volvelle.planning.methods.distributional_dp import optimise
from volvelle.planning.stock_grid import StockGrid, act_on_grid, cell_shifts, covering_grid, plan_on_grid, total_range
from volvelle.planning.worlds import random_mdp

H = 3


def instance(seed, **kwargs):
    rng = np.random.default_rng(seed)
    return rng, random_mdp(rng, 3, 2, successors=int(rng.integers(1, 3)), horizon=H, **kwargs).with_(initial=np.eye(3)[0])


def test_rewards_on_the_grid_make_it_exact():
    for seed in range(200):
        rng, mdp = instance(seed)
        stock = float(rng.integers(-4, 3))
        plan = plan_on_grid(mdp, shortfall(), covering_grid(mdp, -4, 2, spacing=1.0))
        exact = optimise(mdp, shortfall(stock))
        assert plan.value(0, [stock])[0] == pytest.approx(exact.value(0, stock), abs=1e-8)
        law = plan.law(0, stock)
        assert expectation(law, np.vectorize(lambda x: min(x, 0)))[0] == pytest.approx(exact.value(0, stock), abs=1e-8)


def test_values_keep_the_discretisation_bound():
    tight = 0
    for seed in range(200):
        rng, mdp = instance(seed, rewards=np.random.default_rng(seed).normal(size=4), discount=float(0.7 if seed % 2 else 1.0))
        grid = covering_grid(mdp, -2.0, -2.0, spacing=0.5)
        error = abs(plan_on_grid(mdp, target(0), grid, laws=False).value(0, [-2.0])[0] - optimise(mdp, target(2.0)).value(0, -2.0))
        assert error <= grid.value_bound(1.0, H) + 1e-12
        tight = max(tight, error / grid.value_bound(1.0, H))
    assert tight > 0.3  # the bound is not idle


def executed_value(mdp, plan, utility, t, state, total):
    """What acting on the grid plan really yields, by walking every outcome."""
    if t == mdp.horizon:
        return float(utility(np.array([total]))[0])
    row = state * mdp.actions + act_on_grid(mdp, plan, t, state, total)[0]
    return sum(mdp.probability[o] * executed_value(mdp, plan, utility, t + 1, mdp.next_state[o], total + mdp.discount**t * mdp.reward[o])
               for o in range(mdp.offsets[row], mdp.offsets[row + 1]))


def test_acting_on_the_grid_keeps_the_policy_bound():
    for seed in range(200):
        rng, mdp = instance(seed, rewards=np.random.default_rng(seed).normal(size=4), discount=0.8)
        plan = plan_on_grid(mdp, target(0), covering_grid(mdp, -1.0, -1.0, spacing=0.5), laws=False)
        best = optimise(mdp, target(1.0)).value(0, -1.0)
        got = executed_value(mdp, plan, target(0).utility, 0, 0, -1.0)
        assert best - plan.grid.policy_bound(1.0, H) - 1e-12 <= got <= best + 1e-9


def test_laws_and_scores_tell_the_same_story():
    _, mdp = instance(3, rewards=(-0.3, 0.4, 1.1))
    plan = plan_on_grid(mdp, shortfall(), covering_grid(mdp, -3, 1, points=60))
    np.testing.assert_allclose(plan.laws.sum(-1), 1)
    for stock in np.linspace(*plan.starts, 7):
        assert expectation(plan.law(1, stock), shortfall().utility)[0] == pytest.approx(plan.value(1, [stock])[0], abs=1e-10)
    np.testing.assert_allclose(plan.laws @ shortfall().utility(plan.grid.totals), plan.scores[0], atol=1e-10)  # at the edges too


def test_mixing_is_the_bellman_operator_of_the_policy_and_keeps_means():
    rng, mdp = instance(5, rewards=(-0.3, 0.4, 1.1))
    grid = covering_grid(mdp, -1, 1, points=40)
    policy = rng.integers(2, size=(3, 40)).astype(np.int16)
    cells, fraction = cell_shifts(mdp, grid, 0)
    laws, out = rng.dirichlet(np.ones(40), size=(3, 40)), np.empty((3, 40, 40))
    mix(mdp.offsets, mdp.next_state, mdp.probability, cells, fraction, policy, laws, out)
    for s, j in ((0, 20), (1, 12), (2, 25)):
        expected = np.zeros(40)
        for o in range(mdp.offsets[2 * s + policy[s, j]], mdp.offsets[2 * s + policy[s, j] + 1]):
            place = (grid.totals[j] + mdp.reward[o] - grid.low) / grid.spacing
            left = int(np.floor(place))
            for k, w in ((left, 1 - (place - left)), (left + 1, place - left)):
                expected += mdp.probability[o] * w * laws[mdp.next_state[o], k]
        np.testing.assert_allclose(out[s, j], expected, atol=1e-12)


def test_any_functional_can_be_planned_for():
    """A functional given as such agrees with the same expected utility."""
    for seed in range(20):
        _, mdp = instance(seed)
        grid = covering_grid(mdp, -3, 0, spacing=1.0)
        named = plan_on_grid(mdp, target(0), grid)
        plain = plan_on_grid(mdp, lambda laws: expectation(laws, lambda x: -np.abs(x)), grid)
        np.testing.assert_allclose(plain.scores, named.scores, atol=1e-10)


def test_a_discontinuous_utility_on_the_lattice():
    _, mdp = instance(7)
    plan = plan_on_grid(mdp, above(0), covering_grid(mdp, -4, 0, spacing=1.0))
    for stock in (-4.0, -2.0, 0.0):
        assert plan.value(0, [stock])[0] == pytest.approx(optimise(mdp, above(-stock)).value(0, stock), abs=1e-8)


def test_distance_between_the_laws_is_an_area_on_the_grid():
    totals, rng = StockGrid(-1, 0.25, 9).totals, np.random.default_rng(0)
    one, two = rng.dirichlet(np.ones(9), size=2)
    offsets = np.array([0, 9])
    area = np.abs(np.cumsum(one - two)).sum() * 0.25
    assert wasserstein(Laws(totals, one, offsets), Laws(totals, two, offsets))[0] == pytest.approx(area)
    assert cvar(Laws(totals, one, offsets), 1.0)[0] == pytest.approx(one @ totals)


def test_refusals():
    _, mdp = instance(0)
    with pytest.raises(UserError, match="points or spacing"):
        covering_grid(mdp, 0, 0)
    with pytest.raises(UserError, match="from 0 to inf"):
        covering_grid(mdp, 0, np.inf, points=5)
    with pytest.raises(UserError, match="narrower than the returns"):
        plan_on_grid(mdp, shortfall(), StockGrid(0.0, 0.1, 5))
    plan = plan_on_grid(mdp, shortfall(), covering_grid(mdp, 0, 0, spacing=1.0))
    with pytest.raises(UserError, match="start stock 5"):
        plan.value(0, 5.0)
    with pytest.raises(UserError, match="scalar reward"):
        total_range(random_mdp(np.random.default_rng(0), 2, 2, horizon=2, components=2))
    with pytest.raises(UserError, match="not finite everywhere"):
        plan_on_grid(mdp, ExpectedUtility(lambda x: np.where(x > 0, x, np.inf)), covering_grid(mdp, 0, 0, spacing=1.0))


def test_ties_go_to_the_first_action():
    _, mdp = instance(0, rewards=(0.0,))
    policy, score = np.empty((3, 4), np.int16), np.empty((3, 4))
    choose(mdp.offsets, mdp.next_state, mdp.probability, *cell_shifts(mdp, StockGrid(0, 1, 4), 0), np.ones((3, 4)), score, policy)
    assert not policy.any()
    np.testing.assert_allclose(score, 1)
