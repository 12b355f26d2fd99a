import gymnasium
import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.mdp import MDP
from volvelle.planning.sampling import EnvironmentSampler, Episodes, TabularSampler
from volvelle.planning.worlds import random_mdp


def test_outcomes_come_with_their_probabilities():
    """200,000 first steps against the transition matrix: each of 24 cells within 5 standard errors (false alarm below 1.4e-5)."""
    mdp = random_mdp(np.random.default_rng(0), 4, 2, successors=3, horizon=1)
    rng = np.random.default_rng(1)
    data = TabularSampler(mdp)(200_000, lambda t, s: rng.integers(2, size=len(s)), rng)
    start = data.observations[:, 0]
    assert np.abs(np.bincount(start, minlength=4) / 200_000 - mdp.initial).max() < 5 * 0.5 / np.sqrt(200_000)
    P, r = mdp.dense()
    for s in range(4):
        for a in range(2):
            mine = (start == s) & (data.actions[:, 0] == a)
            freq = np.bincount(data.observations[mine, 1], minlength=4) / mine.sum()
            assert (np.abs(freq - P[s, a]) <= 5 * np.sqrt(np.maximum(P[s, a] * (1 - P[s, a]), 1e-9) / mine.sum())).all()
            assert abs(data.rewards[mine, 0].mean() - r[s, a]) < 5 * 3 / np.sqrt(mine.sum())


def test_episodes_end_in_absorbing_states():
    mdp = MDP.from_successors([[[(0.5, 0, 1.0, True), (0.5, 0, 1.0, False)]]], horizon=6)
    data = TabularSampler(mdp)(2000, lambda t, s: np.zeros(len(s), int), np.random.default_rng(0))
    assert (data.rewards == data.alive).all() and (np.diff(data.alive.astype(int)) <= 0).all()
    assert data.steps == data.alive.sum() and 0.4 < data.alive[:, 1].mean() < 0.6
    assert (data.observations[:, -1][~data.alive[:, -1]] == 1).all()


def test_returns_to_go():
    data = Episodes(np.zeros((1, 4)), np.zeros((1, 3), int), np.array([[1.0, 2.0, 4.0]]), np.ones((1, 3), bool))
    np.testing.assert_allclose(data.returns_to_go(0.5), [[3, 4, 4]])


def test_environment_and_table_tell_the_same_story():
    """FrozenLake driven by one fixed policy: mean returns of 3000 episodes each differ by less than 5 standard errors (false alarm below 1e-6)."""
    env = gymnasium.make("FrozenLake-v1")
    policy = np.array([0, 3, 3, 3, 0, 0, 0, 0, 3, 1, 0, 0, 0, 2, 1, 0, 0])
    act, rng = (lambda t, s: policy[s]), np.random.default_rng(0)
    one = EnvironmentSampler(env, 30)(3000, act, rng)
    two = TabularSampler(MDP.from_gymnasium("FrozenLake-v1", horizon=30))(3000, act, rng)
    means = [d.rewards.sum(1).mean() for d in (one, two)]
    assert abs(means[0] - means[1]) < 5 * np.sqrt(2 * 0.25 / 3000)
    assert one.observations.shape == two.observations.shape and one.rewards.sum() == (one.rewards > 0).sum() > 0


def test_refusals():
    with pytest.raises(UserError, match="Discrete from 0"):
        EnvironmentSampler(gymnasium.make("Pendulum-v1"), 3)
    with pytest.raises(UserError, match="horizon and a scalar reward"):
        TabularSampler(random_mdp(np.random.default_rng(0), 2, 2, discount=0.5))
