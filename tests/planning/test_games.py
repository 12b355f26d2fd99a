"""Matrix games: solvers against brute force, measures against loops."""

import warnings

import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.games import (
    Game,
    action_values,
    expected_payoffs,
    exploitability,
    fictitious_play,
    judge,
    moments,
    nash,
    nash_equilibria,
    others,
    outcomes,
    pure_equilibria,
    quantal_response,
    random_game,
    risk_dominance,
    solve_zero_sum,
    symmetric,
    tremble,
    zero_sum,
)

STAG = [[4, 0], [3, 3]]


def test_linear_programming_agrees_with_support_enumeration():
    rng = np.random.default_rng(0)
    for _ in range(200):
        matrix = rng.normal(size=rng.integers(1, 5, 2))
        p, q, value = solve_zero_sum(matrix)
        assert (matrix @ q).max() - (p @ matrix).min() < 1e-8
        found = nash_equilibria(zero_sum(matrix))
        assert any(abs(a @ matrix @ b - value) < 1e-8 for a, b in found)


def test_integer_program_finds_equilibria():
    rng = np.random.default_rng(1)
    for i in range(200):
        game = random_game(rng.integers(2, 4, 2), rng, crashes=int(rng.integers(3)))
        assert exploitability(game, nash(game)) < 1e-8 * np.ptp(game.payoffs)
        if i < 40:
            best, every = nash(game, "welfare"), nash_equilibria(game)
            welfare = [sum(expected_payoffs(game, x) / np.ptp(game.payoffs, (1, 2))) for x in [best, *every]]
            assert exploitability(game, best) < 1e-8 * np.ptp(game.payoffs) and welfare[0] == pytest.approx(max(welfare), abs=1e-5)


def test_random_games_have_an_odd_number_of_equilibria():
    rng = np.random.default_rng(7)  # Wilson (1971); not one may be missed by rounding
    counts = [len(nash_equilibria(random_game((3, 3), rng))) for _ in range(200)]
    assert all(count % 2 for count in counts) and max(counts) > 1


def test_support_enumeration_agrees_with_nashpy_on_whole_numbers():
    nashpy = pytest.importorskip("nashpy")
    rng = np.random.default_rng(6)
    for _ in range(50):
        a, b = rng.integers(0, 50, (2, 3, 3)).astype(float)
        with warnings.catch_warnings():  # degenerate games are met on purpose
            warnings.simplefilter("ignore")
            theirs = list(nashpy.Game(a, b).support_enumeration())
        ours = nash_equilibria(Game(np.stack([a, b])))
        for p, q in theirs:
            assert min(np.abs(p - x).max() + np.abs(q - y).max() for x, y in ours) < 1e-8


def test_integer_program_on_degenerate_games():
    rng = np.random.default_rng(2)
    for _ in range(20):
        base = random_game((3, 3), rng).payoffs
        doubled = Game(np.repeat(np.repeat(base, 2, 1), 2, 2))
        assert exploitability(doubled, nash(doubled)) < 1e-8
    flat = Game(np.stack([np.ones((3, 3)), np.eye(3)]))
    assert exploitability(flat, nash(flat)) < 1e-8
    assert exploitability(random_game((12, 12), rng), nash(random_game((12, 12), np.random.default_rng(9)))) > 0  # of another game


def test_nash_of_three_players_is_refused():
    with pytest.raises(UserError, match="this game has 3; use rae.solve"):
        nash(random_game((2, 2, 2), np.random.default_rng(0)))


def test_moments_of_three_players_against_a_loop():
    rng = np.random.default_rng(3)
    game = random_game((2, 3, 2), rng)
    profile = [rng.dirichlet(np.ones(n)) for n in game.sizes]
    mean, covariance = moments(game, profile, 1)
    rows = [(profile[0][a] * profile[2][c], game.payoffs[1, a, :, c]) for a in range(2) for c in range(2)]
    expected = sum(w * r for w, r in rows)
    np.testing.assert_allclose(mean, expected)
    np.testing.assert_allclose(covariance, sum(w * np.outer(r - expected, r - expected) for w, r in rows), atol=1e-12)
    np.testing.assert_allclose(action_values(game, profile, 1), expected)
    assert others(profile, 1).sum() == pytest.approx(1)
    found = outcomes(game, profile)
    assert found["mean"] == pytest.approx(expected_payoffs(game, profile))
    assert found["variance"][1] == pytest.approx(profile[1] @ covariance @ profile[1])


def test_outcomes_when_others_err():
    game = symmetric(STAG)
    both = [np.array([1.0, 0])] * 2
    assert judge(game, both) == {"mean": 4, "variance": 0, "worst": 4}
    found = judge(game, both, 0.2)  # the other hunts the hare with probability .1
    assert found["mean"] == pytest.approx(3.6) and found["variance"] == pytest.approx(16 * 0.09) and found["worst"] == 0


def test_logit_equilibrium_is_a_fixed_point_and_uniform_at_zero():
    rng = np.random.default_rng(4)
    for sizes in ((3, 3), (2, 2, 3)):
        game = random_game(sizes, rng)
        np.testing.assert_allclose(np.concatenate(quantal_response(game, 0.0)), np.concatenate(game.uniform()))
        profile = quantal_response(game, 0.4)
        for i, p in enumerate(profile):
            wanted = np.exp(0.4 * action_values(game, profile, i))
            np.testing.assert_allclose(p, wanted / wanted.sum(), atol=1e-8)


def test_fictitious_play_approaches_a_zero_sum_equilibrium():
    game = zero_sum([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    start = [np.eye(3)[0], np.eye(3)[1]]
    profile, _, steps = fictitious_play(lambda x, i: np.eye(3)[action_values(game, x, i).argmax()], start, 2000)
    assert steps == 2000 and exploitability(game, profile) < 0.05


def test_pure_equilibria_and_risk_dominance_of_the_stag_hunt():
    game = symmetric(STAG)
    assert pure_equilibria(game) == [(0, 0), (1, 1)]
    assert risk_dominance(game) == {(0, 0): [], (1, 1): [(0, 0)]}  # losses 1 * 1 against 3 * 3
    safe = symmetric([[9, 0], [3, 3]])
    assert risk_dominance(safe) == {(0, 0): [(1, 1)], (1, 1): []}
    assert pure_equilibria(zero_sum([[1, -1], [-1, 1]])) == []
    assert pure_equilibria(symmetric([[1, 1], [1, 1]]), strict=True) == []


def test_risk_dominance_ignores_constants_per_opponent_action():
    rng = np.random.default_rng(5)
    for _ in range(50):
        matrix = np.diag(rng.uniform(1, 3, 2))
        shifted = matrix + rng.normal(size=2)[None]  # adds the same to both own actions
        assert risk_dominance(symmetric(matrix)) == risk_dominance(symmetric(shifted))


@pytest.mark.parametrize("payoffs, text", [
    (np.zeros((2, 3)), r"payoffs of shape \(2, 3\)"), (np.zeros((2, 2, 2, 2)), "payoffs of shape"), ([[1, 2], [3]], "full array"),
    (np.full((2, 2, 2), np.inf), "must be finite"), (np.zeros((2, 0, 2)), "payoffs of shape")])
def test_wrong_payoffs_are_refused(payoffs, text):
    with pytest.raises(UserError, match=text):
        Game(payoffs, "mine")


def test_tremble():
    np.testing.assert_allclose(tremble(np.array([1.0, 0, 0]), 0.1), [0.8, 0.1, 0.1])
    with pytest.raises(UserError, match="symmetric game needs a square"):
        symmetric([[1, 2]])
