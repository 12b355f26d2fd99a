"""Risk-averse equilibria: hand-worked numbers, brute force, and the facts that follow from the definition."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from volvelle.core.errors import UserError
from volvelle.planning.games import Game, exploitability, judge, moments, nash_equilibria, random_game, symmetric, tremble, zero_sum
from volvelle.planning.methods import rae

STAG = symmetric([[4, 0], [3, 3]])
RISKY = zero_sum([[10, -10], [2, 1]])


def against(game, q):
    """Moments of the first player against the mixed strategy (q, 1 - q)."""
    return moments(game, [None, np.array([q, 1 - q])], 0)


def test_covariance_by_hand():
    mean, covariance = against(STAG, 0.95)
    np.testing.assert_allclose(mean, [3.8, 3])
    np.testing.assert_allclose(covariance, [[0.76, 0], [0, 0]], atol=1e-12)


@pytest.mark.parametrize("q, gamma, expected", [(0.7, 0.01, 1), (0.7, 0.05, 0.250758), (0.7, 0.2, 0.023216), (0.9, 0.2, 0.416744), (0.9, 1, 0.041243)])
def test_best_response_to_a_risky_and_a_safe_action(q, gamma, expected):
    assert rae.best_response(*against(RISKY, q), gamma)[0] == pytest.approx(expected, abs=1e-6)


def test_best_response_of_two_actions_in_closed_form():
    rng = np.random.default_rng(0)
    for _ in range(200):
        game, q, gamma, floor = zero_sum(rng.normal(size=(2, 2)) * 5), rng.uniform(0.05, 0.95), rng.uniform(0.01, 3), rng.choice([0, 0.05])
        m, s = against(game, q)
        d = game.payoffs[0, :, 0] - game.payoffs[0, :, 1]
        expected = ((m[0] - m[1]) / (2 * gamma * q * (1 - q)) - d[1] * (d[0] - d[1])) / (d[0] - d[1]) ** 2
        assert rae.best_response(m, s, gamma, floor)[0] == pytest.approx(np.clip(expected, floor, 1 - floor), abs=1e-8)


def test_best_response_invariances():
    rng = np.random.default_rng(1)
    for _ in range(50):
        game = random_game((4, 3), rng)
        q = [None, rng.dirichlet(np.ones(3))]
        base = rae.best_response(*moments(game, q, 0), 0.3)
        shifted, scaled = Game(game.payoffs + 7), Game(game.payoffs * 2.5)
        np.testing.assert_allclose(rae.best_response(*moments(shifted, q, 0), 0.3), base, atol=1e-8)
        np.testing.assert_allclose(rae.best_response(*moments(scaled, q, 0), 0.3 / 2.5), base, atol=1e-8)
        greedy = rae.best_response(*moments(game, q, 0), 0.0)
        assert greedy.max() == 1 and greedy.argmax() == moments(game, q, 0)[0].argmax()


def test_utility_is_concave_and_mixing_lowers_variance():
    rng = np.random.default_rng(2)
    lower = 0
    for _ in range(200):
        m, s = moments(random_game((3, 4), rng), [None, rng.dirichlet(np.ones(4))], 0)
        one, two, w = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3)), rng.uniform()
        middle = rae.utility(w * one + (1 - w) * two, m, s, 0.7)
        assert middle >= w * rae.utility(one, m, s, 0.7) + (1 - w) * rae.utility(two, m, s, 0.7) - 1e-9
        variance = (rae.utility(one, m, s, 0) - rae.utility(one, m, s, 0.7)) / 0.7
        assert variance == pytest.approx(one @ s @ one) and variance <= one @ np.diag(s) + 1e-12
        lower += variance < one @ np.diag(s) - 1e-6
    assert lower > 190


def test_stag_hunt_threshold_of_gamma():
    low, high = rae.stable_range(STAG, (0, 0), 0.05)
    assert low == 0 and high == pytest.approx(0.8 / (1.52 * 0.95)) and high == pytest.approx(0.55402, abs=1e-5)
    assert rae.stable_range(STAG, (1, 1), 0.05) == (0, np.inf)
    pure = [tremble(np.array([1.0, 0]), 0.05)] * 2
    assert rae.gains(STAG, pure, 0.554, 0.05).max() < 1e-12 < rae.gains(STAG, pure, 0.5541, 0.05).max()
    for gamma in (0.0, 1.0, 100.0):  # without a tremble a pure opponent hides all risk
        for cell in ((0, 0), (1, 1)):
            assert rae.gains(STAG, [np.eye(2)[a] for a in cell], gamma).max() == pytest.approx(0, abs=1e-12)
    assert rae.stable_range(STAG, (0, 1), 0.05) == (np.inf, -np.inf)


def test_large_gamma_leaves_only_the_risk_dominant_equilibrium():
    rng = np.random.default_rng(3)
    below, above = (rae.equilibria(STAG, gamma, 0.05, 10, rng) for gamma in (0.3, 0.7))
    assert any(e.profile[0][0] > 0.94 for e in below) and len(below) == 3
    assert [round(float(e.profile[0][0]), 6) for e in above] == [0.05]


@pytest.mark.parametrize("gamma, expected", [(0.0, 0.75), (0.05, 0.80106), (0.2, 0.8897), (0.5, 0.94535)])
def test_the_unstable_stag_hunt_equilibrium_moves_with_gamma(gamma, expected):
    found = [e.profile[0][0] for e in rae.equilibria(STAG, gamma, 0.0, 20, np.random.default_rng(0))]
    assert sorted(found) == pytest.approx([0, expected, 1], abs=6e-6)


@pytest.mark.parametrize("gamma", [0.05, 0.3, 1.0])
def test_an_equaliser_nash_is_a_risk_averse_equilibrium(gamma):
    game = zero_sum([[3, -1], [-2, 1]])
    found = rae.solve(game, gamma, steps=300)
    assert found.profile[0][0] == pytest.approx(3 / 7, abs=1e-8) and found.profile[1][0] == pytest.approx(2 / 7, abs=1e-8)
    assert judge(game, found.profile)["variance"] == pytest.approx(0, abs=1e-12)
    assert found.profile[0] @ game.payoffs[0] @ found.profile[1] == pytest.approx(1 / 7)


def test_fictitious_play_alone_approaches_it():
    found = rae.solve(zero_sum([[3, -1], [-2, 1]]), 0.3, steps=2000, tolerance=0.0, exact=False)
    assert found.exploitability < 0.02 and found.steps == 2000
    np.testing.assert_allclose(found.profile[0], [3 / 7, 4 / 7], atol=0.02)
    few = rae.solve(STAG, 0.1, 0.05, steps=3, start=[np.array([1.0, 0])] * 2, exact=False)
    assert min(p.min() for p in few.profile) >= 0.05  # a pure start trembles like everything else


def test_equilibria_of_two_by_two_games_against_a_grid():
    """Every sign change of the composed best response on a fine grid is found."""
    rng = np.random.default_rng(4)
    grid = np.linspace(0.02, 0.98, 301)
    for _ in range(6):
        game, gamma, floor = Game(rng.uniform(0, 10, (2, 2, 2))), rng.uniform(0.02, 0.5), 0.02

        def reply(i, q, game=game, gamma=gamma, floor=floor):
            profile = [np.array([q, 1 - q])] * 2
            return rae.best_response(*moments(game, profile, i), gamma, floor)[0]

        gap = np.array([reply(0, reply(1, p)) - p for p in grid])
        crossings = [grid[k] for k in np.flatnonzero(gap[:-1] * gap[1:] <= 0)]
        ends = [p for p, g in ((grid[0], gap[0]), (grid[-1], gap[-1])) if abs(g) < 1e-9]
        wanted = [p for k, p in enumerate(sorted(crossings + ends)) if k == 0 or p - sorted(crossings + ends)[k - 1] > 4e-3]
        found = sorted(e.profile[0][0] for e in rae.equilibria(game, gamma, floor, 20, rng))
        for p in wanted:
            assert min(abs(p - f) for f in found) < 4e-3


def test_solutions_have_no_gain_left():
    rng = np.random.default_rng(5)
    exact = 0
    for i in range(30):
        game = random_game(rng.integers(2, 5, 2 if i % 3 else 3), rng, crashes=i % 2)
        found = rae.solve(game, float(rng.choice([0.05, 0.5])), 0.02, steps=150, restarts=4, generator=rng)
        assert all(p.min() >= 0.02 - 1e-12 and p.sum() == pytest.approx(1) for p in found.profile)
        exact += found.exploitability < 1e-8 * np.ptp(game.payoffs)
    assert exact >= 28


def test_gamma_zero_and_no_tremble_is_nash():
    rng = np.random.default_rng(6)
    for _ in range(20):
        game = random_game((3, 3), rng)
        found = rae.solve(game, 0.0, steps=150, restarts=5, generator=rng)
        assert found.exploitability < 1e-8
        assert exploitability(game, found.profile) == pytest.approx(found.exploitability, abs=1e-12)
        distances = [max(np.abs(p - q).max() for p, q in zip(found.profile, other)) for other in nash_equilibria(game)]
        assert min(distances) < 1e-6


def test_variance_falls_along_the_path():
    rng = np.random.default_rng(7)
    gammas = [0, 0.03, 0.1, 0.3, 1, 3]
    falls = []
    for _ in range(6):
        game = random_game((4, 4), rng, 2)
        path = rae.path(game, gammas, 0.01, steps=150)
        falls.append([judge(game, e.profile)["variance"] for e in path])
    means = np.mean(falls, 0)
    assert (np.diff(means) < 0).all() and means[0] > 5 * means[3]


def test_least_variance_against_a_general_solver_and_its_limits():
    rng = np.random.default_rng(8)
    for _ in range(40):
        n = int(rng.integers(2, 5))
        m, s = moments(random_game((n, 4), rng), [None, rng.dirichlet(np.ones(4))], 0)
        level = rng.uniform(m.min(), m.max())
        p = rae.least_variance(m, s, level)
        assert p @ m >= level - 1e-9 and p.min() >= 0
        general = minimize(lambda x: x @ s @ x, np.full(n, 1 / n), jac=lambda x: 2 * s @ x, bounds=[(0, 1)] * n, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
                           constraints=[{"type": "eq", "fun": lambda x: x.sum() - 1}, {"type": "ineq", "fun": lambda x: x @ m - level}])
        assert p @ s @ p <= general.fun + 1e-6
    m, s = against(RISKY, 0.9)
    np.testing.assert_allclose(rae.least_variance(m, s, 8.0), [1, 0], atol=1e-9)
    np.testing.assert_allclose(rae.least_variance(m, s, -100.0), rae.best_response(0 * m, s, 1.0), atol=1e-9)
    with pytest.raises(UserError, match="level=8.1: the largest expected payoff here is 8"):
        rae.least_variance(m, s, 8.1)


def test_stable_range_against_scanning():
    rng = np.random.default_rng(9)
    seen = 0
    for _ in range(30):
        game, floor = random_game((3, 3), rng), 0.03
        for cell in itertools.product(range(3), range(3)):
            low, high = rae.stable_range(game, cell, floor)
            profile = [tremble(np.eye(3)[a], floor) for a in cell]
            for gamma in (0.0, 0.01, 0.05, 0.2, 1.0):
                stable = rae.gains(game, profile, gamma, floor).max() < 1e-10
                assert stable == (low - 1e-9 <= gamma <= high + 1e-9)
                seen += stable
    assert seen > 50


def test_wrong_numbers_are_refused():
    with pytest.raises(UserError, match="gamma=-1"):
        rae.best_response(np.zeros(2), np.zeros((2, 2)), -1)
    with pytest.raises(UserError, match="restarts=2"):
        rae.solve(STAG, 1.0, restarts=2)
    with pytest.raises(UserError, match="floor=0.6"):
        rae.solve(STAG, 1.0, 0.6)
