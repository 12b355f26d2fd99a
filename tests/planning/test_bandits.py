"""Multitask bandits, linear decision processes, the eluder dimension."""

import itertools

import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.bandits import Bandits, digits, eluder_dimension, fourier, linear_mdps, play, synthetic


def test_regret_and_rewards():
    bandits = Bandits([[1.0, 2, 3], [0, 0, 5]], 0.0, 2)
    shown = np.array([[0, 1], [2, 0]])
    np.testing.assert_allclose(bandits.regret(shown, np.array([0, 2])), [1, 0])
    np.testing.assert_allclose(bandits.pull(np.array([0, 2]), np.random.default_rng(0)), [1, 5])
    noisy = Bandits([[1.0]], 0.5, 1)
    rng = np.random.default_rng(1)
    draws = np.array([noisy.pull(np.array([0]), rng)[0] for _ in range(4000)])
    assert abs(draws.mean() - 1) < 5 * 0.5 / np.sqrt(4000)  # false alarm: below 1e-6
    assert draws.std() == pytest.approx(0.5, rel=0.06)


def test_shown_inputs_differ_within_a_task():
    bandits = synthetic(3, np.random.default_rng(0))[0]
    rng, seen = np.random.default_rng(1), set()
    for _ in range(200):
        shown = bandits.show(rng)
        assert shown.shape == (3, 6) and all(len(set(row)) == 6 for row in shown)
        seen |= set(shown.ravel().tolist())
    assert seen == set(range(30))


@pytest.mark.parametrize("shared", [True, False])
def test_synthetic_means_are_linear_in_the_true_map(shared):
    bandits, features, truth = synthetic(4, np.random.default_rng(2), maps=8, rank=3, shared=shared)
    assert features.shape == (8, 30, 3) and (len(set(truth)) == 1) == shared
    np.testing.assert_allclose(np.linalg.norm(features, axis=2), 1)
    for means, k in zip(bandits.means, truth):
        for candidate in range(8):
            residual = np.linalg.lstsq(features[candidate], means, rcond=None)[1][0]
            assert (residual < 1e-20) == (candidate == k)
    assert np.abs(bandits.means).max() <= 1


def test_equal_generators_show_players_equal_inputs():
    class Fixed:
        def __init__(self, place):
            self.place, self.seen = place, []

        def choose(self, shown):
            self.seen.append(shown)
            return shown[:, self.place]

        def observe(self, inputs, rewards):
            pass

    bandits = synthetic(2, np.random.default_rng(0))[0]
    players = [Fixed(0), Fixed(3)]
    lost = [play(player, bandits, 20, np.random.default_rng(5)) for player in players]
    np.testing.assert_array_equal(players[0].seen, players[1].seen)
    assert all(x.shape == (2, 20) and (x >= 0).all() for x in lost) and not np.array_equal(*lost)


def test_digits_and_fourier_features():
    pytest.importorskip("sklearn")
    bandits, images = digits(3, np.random.default_rng(0))
    assert images.shape == (1797, 64) and 0 <= images.min() and images.max() <= 1
    assert all(len(np.unique(row)) == 10 for row in bandits.means)
    features = fourier(images[:50], 4, 6, [1, 2, 4, 8], np.random.default_rng(0))
    assert features.shape == (4, 50, 6) and np.linalg.norm(features, axis=2).max() <= 1
    spread = features.std(1).mean(1)
    assert spread[0] > spread[3]  # wider bandwidths make flatter maps


def test_linear_values_against_every_policy():
    world = linear_mdps(2, np.random.default_rng(3), states=2, actions=2, horizon=3)
    best = np.full(2, -np.inf)
    for policy in itertools.product(range(2), repeat=6):
        actions = np.reshape(policy, (3, 2))
        value = np.zeros((2, 2))
        for h in reversed(range(3)):
            inputs = np.arange(2) * 2 + actions[h]
            value = world.rewards[:, inputs] + np.einsum("mxs,ms->mx", world.transitions[:, inputs], value)
        best = np.maximum(best, value[:, 0])
    np.testing.assert_allclose(world.values()[0, :, 0].max(1), best, atol=1e-12)


def test_all_values_are_linear_in_the_true_map_only():
    world = linear_mdps(3, np.random.default_rng(4), rank=2)
    np.testing.assert_allclose(world.transitions.sum(2), 1)
    for values in world.values().reshape(-1, world.states * world.actions):
        assert np.linalg.lstsq(world.features[0], values, rcond=None)[1][0] < 1e-20
        assert np.linalg.lstsq(world.features[1], values, rcond=None)[1][0] > 1e-6


def test_eluder_dimension_by_hand():
    for n in (1, 3, 5):
        assert eluder_dimension(np.vstack([np.zeros(n), np.eye(n)]), 0.5) == n  # zero and the indicators
    assert eluder_dimension(np.vstack([np.zeros(3), np.eye(3)]), 1.0) == 0  # no gap exceeds 1
    assert eluder_dimension(np.ones((4, 3)), 0.1) == 0
    assert eluder_dimension(np.array([[0.0, 0, 0], [1, 1, 1]]), 0.5) == 1  # one look settles it


def test_eluder_dimension_of_linear_classes_grows_slowly():
    rng = np.random.default_rng(5)
    for rank in (1, 2):
        heads = rng.normal(size=(15, rank))
        heads /= np.linalg.norm(heads, axis=1, keepdims=True)
        inputs = rng.normal(size=(rank, 5))
        inputs /= np.linalg.norm(inputs, axis=0)
        found = [eluder_dimension(heads @ inputs, eps) for eps in (1.0, 0.3, 0.1)]
        assert found == sorted(found)
        for eps, dimension in zip((1.0, 0.3, 0.1), found):
            # Russo and Van Roy (2013), proposition 6, with |theta| <= 1, |x| <= 1
            assert dimension <= 3 * rank * np.e / (np.e - 1) * np.log(3 + 3 * (2 / eps) ** 2) + 1


def test_eluder_dimension_against_the_definition():
    def independent(pairs, before, x, eps):
        return any(np.sqrt(sum((f[y] - g[y]) ** 2 for y in before)) <= eps < abs(f[x] - g[x]) for f, g in pairs)

    rng = np.random.default_rng(6)
    for _ in range(20):
        values, eps = rng.integers(0, 3, (4, 4)).astype(float), 0.9
        pairs = list(itertools.combinations(values, 2))
        radii = {eps} | {r for size in range(4) for ys in itertools.combinations(range(4), size) for f, g in pairs
                         if (r := np.sqrt(sum((f[y] - g[y]) ** 2 for y in ys))) >= eps}
        longest = max(k for size in range(5) for order in itertools.permutations(range(4), size) for r in radii
                      for k in [size] if all(independent(pairs, order[:j], order[j], r) for j in range(size)))
        assert eluder_dimension(values, eps) == longest


def test_wrong_numbers_are_refused():
    for arguments, text in (((np.zeros(3), 0.1, 1), "means of shape"), ((np.zeros((2, 3)), 0.1, 4), "shown=4"), ((np.zeros((2, 3)), -1, 1), "noise=-1")):
        with pytest.raises(UserError, match=text):
            Bandits(*arguments)
    with pytest.raises(UserError, match="maps=2: 3 tasks"):
        synthetic(3, np.random.default_rng(0), maps=2, shared=False)
    with pytest.raises(UserError, match="eps=0"):
        eluder_dimension(np.zeros((2, 2)), 0)
