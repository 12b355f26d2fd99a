"""Numbers worked out by hand, and the solvers against brute force on 200 random instances each."""
import itertools

import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.cvar import maximise_cvar, maximise_cvar_on_grid, maximise_upper_cvar
from volvelle.planning.distributions import combine, cvar, diracs, expectation, law, upper_cvar, wasserstein
from volvelle.planning.functionals import ExpectedUtility, above, constrained, homeostasis, mean, shortfall, surplus, target
from volvelle.planning.mdp import MDP, backward_induction, unroll
from volvelle.planning.methods.distributional_dp import greedy_bound, optimise, sweep_bound
from volvelle.planning.return_operators import bellman, policy_iteration, start_law, start_laws, value_iteration
from volvelle.planning.stock import augment
from volvelle.planning.worlds import random_mdp

A, B = 0, 1


def lottery(discount=1.0):
    """One state, two steps; A pays 1, B pays 0 or 3 with probability 1/2."""
    return MDP.from_outcomes(1, 2, [0, 0, 0], [A, B, B], [0, 0, 0], [1, 0.5, 0.5], [1, 0, 3], horizon=2, discount=discount)


# ---- by hand ---------------------------------------------------------------------------------------------------------------------------
def test_shortfall_by_hand():
    values = [optimise(lottery(), shortfall(c)).value(0, c) for c in range(0, -8, -1)]
    np.testing.assert_allclose(values, [0, 0, 0, -0.75, -1.25, -2.25, -3, -4], atol=1e-12)
    plan = optimise(lottery(), shortfall(-3))
    assert plan.act(0, 0, -3) == B and plan.act(1, 0, 0) == A and plan.act(1, 0, -3) == B
    np.testing.assert_allclose(plan.law(0, -3)[0], ([0, 3, 4], [0.25, 0.25, 0.5]))


@pytest.mark.parametrize("tau, value, stock", [(0.3, 2, -2), (0.6, 2, -2), (0.75, 7 / 3, -4), (0.9, 8 / 3, -6), (1, 3, -6)])
def test_cvar_by_hand(tau, value, stock):
    found = maximise_cvar(lottery(), tau)
    assert found.value == pytest.approx(value) and found.stock == stock
    assert cvar(found.law, tau)[0] == pytest.approx(value)
    assert -found.stock in found.law.atoms


def test_cvar_crossover():
    below, after = maximise_cvar(lottery(), 0.6249), maximise_cvar(lottery(), 0.6251)
    np.testing.assert_allclose(below.law[0], ([2], [1]))
    assert len(after.law.atoms) == 3 and after.value == pytest.approx(4 - 1.25 / 0.6251)


def test_target_by_hand():
    values = [optimise(lottery(), target(g)).value(0, -g) for g in range(7)]
    np.testing.assert_allclose(values, [-2, -1, 0, -1, -1.25, -2.25, -3], atol=1e-12)
    plan = optimise(lottery(0.5), target(3))
    assert plan.value(0, -3) == pytest.approx(-1.25)
    np.testing.assert_allclose(plan.law(0, -3)[0], ([1, 2.5], [0.5, 0.5]))


def test_reacting_to_the_stock_is_worth_something():
    """At c_0 = -4 the best plan that ignores the stock reaches -1.5, the best policy -1.25; at -3 and -2 they tie."""
    returns = {"AA": ([2], [1]), "AB": ([1, 4], [0.5, 0.5]), "BB": ([0, 3, 6], [0.25, 0.5, 0.25])}
    for stock, blind in ((-4, -1.5), (-3, -0.75), (-2, 0)):
        assert max(np.minimum(np.array(x) + stock, 0) @ w for x, w in returns.values()) == pytest.approx(blind)
    assert optimise(lottery(), shortfall(-4)).value(0, -4) == pytest.approx(-1.25)
    assert optimise(lottery(), shortfall(-3)).value(0, -3) == pytest.approx(-0.75)


def test_upper_cvar_by_hand():
    found = maximise_upper_cvar(lottery(), 0.25)
    assert found.value == pytest.approx(6) and upper_cvar(found.law, 0.25)[0] == pytest.approx(6)


def test_what_ends_still_counts():
    """With f(0) != 0 the utility of the stock is due when the episode is over."""
    ended = MDP.from_successors([[[(1.0, 0, 1.0, True)], [(1.0, 0, -1.0, True)]]], horizon=3)
    for utility, value in ((lambda x: np.exp(x), np.exp(3)), (lambda x: 5 - np.abs(x), 4.0)):
        assert optimise(ended, ExpectedUtility(utility), stock=2.0).value(0, 2.0) == pytest.approx(value)


# ---- against brute force ---------------------------------------------------------------------------------------------------------------
def instance(seed, **kwargs):
    rng = np.random.default_rng(seed)
    return random_mdp(rng, 3, 2, successors=int(rng.integers(1, 3)), **{"horizon": 3, **kwargs}).with_(initial=np.eye(3)[0])


def tree_value(mdp, utility, stock, t=0, state=0, total=0.0):
    """sup over history-dependent policies of E f(stock + G), by walking the tree of histories without merging any."""
    if t == mdp.horizon:
        return float(utility(np.asarray(stock + total)[None])[0])
    worth = [sum(mdp.probability[o] * tree_value(mdp, utility, stock, t + 1, mdp.next_state[o], total + mdp.discount**t * mdp.reward[o])
                 for o in range(mdp.offsets[row], mdp.offsets[row + 1])) for row in range(state * mdp.actions, (state + 1) * mdp.actions)]
    return max(worth)


@pytest.mark.parametrize("make, discount", [(lambda r: shortfall(r), 1.0), (lambda r: target(-r), 0.8), (lambda r: above(-r), 0.5),
                                            (lambda r: ExpectedUtility(lambda x: -np.exp(-x), r), 1.0)])
def test_expected_utilities_agree_with_brute_force(make, discount):
    for seed in range(200):
        mdp = instance(seed, discount=discount)
        objective = make(float(np.random.default_rng(seed).integers(-4, 4)))
        plan = optimise(mdp, objective)
        assert plan.value(0, objective.start_stock) == pytest.approx(tree_value(mdp, objective.utility, objective.start_stock), abs=1e-8)


@pytest.mark.parametrize("objective", [homeostasis([2.0, -1.0], 1), homeostasis([1.0, 1.0], 2), constrained(1.0, 3.0)])
def test_vector_objectives_agree_with_brute_force(objective):
    for seed in range(200):
        mdp = instance(seed, discount=0.9, components=2)
        value = optimise(mdp, objective).value(0, objective.start_stock)
        assert value == pytest.approx(tree_value(mdp, objective.utility, np.array(objective.start_stock)), abs=1e-8)


def policy_laws(mdp):
    """The return law of every deterministic history-dependent policy."""
    def below(t, state, total):
        if t == mdp.horizon:
            return [([total], [1.0])]
        found = []
        for row in range(state * mdp.actions, (state + 1) * mdp.actions):
            outcomes = range(mdp.offsets[row], mdp.offsets[row + 1])
            branches = [below(t + 1, mdp.next_state[o], total + mdp.discount**t * mdp.reward[o]) for o in outcomes]
            for choice in itertools.product(*branches):
                found.append((sum((c[0] for c in choice), []), sum(([mdp.probability[o] * w for w in c[1]] for o, c in zip(outcomes, choice)), [])))
        return found
    return [law(*found) for found in below(0, 0, 0.0)]


def test_cvar_agrees_with_trying_every_policy():
    """CVaR is convex in mixtures, so deterministic policies suffice."""
    for seed in range(200):
        mdp = instance(seed, horizon=2, discount=0.5 if seed % 3 == 0 else 1.0)
        laws, tau = policy_laws(mdp), float(np.random.default_rng(seed).uniform(0.05, 1))
        found = maximise_cvar(mdp, tau)
        assert found.value == pytest.approx(max(cvar(x, tau)[0] for x in laws), abs=1e-8)
        assert cvar(found.law, tau)[0] == pytest.approx(found.value, abs=1e-8)


def test_upper_cvar_bounds_every_policy_and_says_how_far_it_is():
    attained = 0
    for seed in range(60):
        mdp, tau = instance(seed, horizon=2), float(np.random.default_rng(seed).uniform(0.1, 0.9))
        best = max(upper_cvar(x, tau)[0] for x in policy_laws(mdp))
        found = maximise_upper_cvar(mdp, tau)
        assert upper_cvar(found.law, tau)[0] <= best + 1e-8 and best <= found.value + 1e-7
        attained += found.value - upper_cvar(found.law, tau)[0] < 1e-6
    assert 30 <= attained  # the rest needs mixtures of policies


def test_policy_iteration_agrees_with_value_iteration():
    for seed in range(200):
        mdp = unroll(instance(seed, discount=0.9))
        objective = (shortfall, surplus)[seed % 2](-1.0)
        pairs = augment(mdp, [0], [-1.0])
        stationary, swept = policy_iteration(pairs, objective), value_iteration(pairs, objective)
        np.testing.assert_allclose(stationary.values(), swept.values(), atol=1e-8)
        np.testing.assert_allclose(expectation(bellman(pairs, stationary.policy[0], stationary.laws)), expectation(stationary.laws), atol=1e-10)


def test_cvar_on_the_grid_keeps_its_bound():
    for seed in range(100):
        mdp = instance(seed, rewards=np.random.default_rng(seed).normal(size=4), discount=0.9)
        value, _, _, bound = maximise_cvar_on_grid(mdp, 0.4, spacing=0.05)
        assert abs(value - maximise_cvar(mdp, 0.4).value) <= bound
        assert bound < 0.3
    value, stock, plan, _ = maximise_cvar_on_grid(lottery(), 0.75, spacing=1.0)
    assert value == pytest.approx(7 / 3) and stock == -4 and cvar(plan.law(0, -4), 0.75)[0] == pytest.approx(7 / 3 - 4)


# ---- theorems --------------------------------------------------------------------------------------------------------------------------
def test_two_starts_agree_exactly_after_as_many_sweeps_as_steps():
    rng = np.random.default_rng(0)
    pairs = augment(unroll(instance(0, discount=0.8)), [0], [-1.0])
    n = len(pairs.state)
    other = combine(np.repeat(np.arange(n), 3), rng.normal(size=3 * n), rng.dirichlet(np.ones(3), size=n).ravel(), n)
    runs = [value_iteration(pairs, shortfall(), 3, laws) for laws in (None, diracs(np.full(n, 50.0)), other)]
    for run in runs[1:]:
        assert wasserstein(runs[0].laws, run.laws).max() < 1e-12
        np.testing.assert_array_equal(runs[0].policy[0], run.policy[0])
    assert wasserstein(value_iteration(pairs, shortfall(), 2, other).laws, runs[0].laws).max() > 0.1  # two sweeps are not enough


def test_the_mean_ignores_the_stock():
    for seed in range(50):
        mdp = instance(seed)
        classic = backward_induction(mdp)
        pairs = augment(mdp, [0, 0, 0], [-3.0, 0.0, 5.0])
        plan = value_iteration(pairs, mean())
        for stock in (-3.0, 0.0, 5.0):
            assert plan.value(0, stock) - stock == pytest.approx(classic.values[0, 0], abs=1e-10)
            if np.ptp(classic.q[0, 0]) > 1e-9:
                assert plan.act(0, 0, stock) == classic.policy[0, 0]


def test_endless_horizon_bounds():
    """Without a horizon, n sweeps and the policy greedy after n sweeps stay within their bounds of the optimum (known to within its own bound)."""
    discount, deep, idle = 0.5, 11, []
    for seed in range(20):
        mdp = random_mdp(np.random.default_rng(seed), 2, 2, successors=1, horizon=None, discount=discount).with_(initial=np.eye(2)[0])
        distance = np.abs(mdp.reward).max() / (1 - discount)       # every return law is this close to all mass on 0
        pairs = augment(mdp, [0], [-1.0], deep)
        best, slack = value_iteration(pairs, target(0)).value(0, -1.0), sweep_bound(1.0, discount, deep, distance)
        for n in range(1, 5):
            plan = value_iteration(pairs, target(0), n)
            assert plan.value(0, -1.0) >= best - slack - sweep_bound(1.0, discount, n, distance)
            stationary = value_iteration(pairs, target(0), n + 1).policy[0]                  # greedy for eta_n
            laws = start_laws(pairs)
            for _ in range(deep):
                laws = bellman(pairs, stationary, laws)
            achieved = target(0)(laws.take([0]).shift(np.array([-1.0])))[0]
            assert achieved >= best - 2 * slack - greedy_bound(1.0, discount, n, distance)
            idle.append((best - achieved) / greedy_bound(1.0, discount, n, distance))
    assert max(idle) > 0


def test_every_round_of_policy_iteration_is_no_worse():
    for seed in range(30):
        pairs = augment(unroll(instance(seed)), [0], [-2.0])
        values = [policy_iteration(pairs, shortfall(), np.full(len(pairs.state), a)).value(0, -2.0) for a in (0, 1)]
        assert values[0] == pytest.approx(values[1], abs=1e-10)


def test_objectives_without_guarantee_are_refused():
    with pytest.raises(UserError, match="'expected utility' is not indifferent to discount 0.5"):
        optimise(lottery(0.5), ExpectedUtility(lambda x: -np.exp(-x)))
    with pytest.raises(UserError, match="is not indifferent to mixtures"):
        optimise(lottery(), lambda laws: cvar(laws, 0.5), rng=np.random.default_rng(0))
    with pytest.raises(UserError, match="give a finite horizon"):
        optimise(lottery(0.5).with_(horizon=None), above(1), sweeps=3)
    with pytest.raises(UserError, match="tau 1.5"):
        maximise_cvar(lottery(), 1.5)
    greedy_cvar = optimise(lottery(), lambda laws: cvar(laws, 0.75), stock=0.0, check=False)
    assert cvar(greedy_cvar.law(0, 0.0), 0.75)[0] < 7 / 3 - 0.1  # and rightly: without the outer stock CVaR itself is missed


def test_start_law_averages_over_initial_states():
    mdp = MDP.from_outcomes(2, 1, [0, 1], [0, 0], [0, 1], [1, 1], [1.0, 3.0], [0.25, 0.75], horizon=1)
    np.testing.assert_allclose(start_law(mdp, optimise(mdp, mean()), 0.0)[0], ([1, 3], [0.25, 0.75]))
    assert maximise_cvar(mdp, 0.5).value == pytest.approx(2.0)
