import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.mdp import MDP
from volvelle.planning.stock import achievable_returns, augment, next_stock
from volvelle.planning.worlds import random_mdp


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.5])
def test_stock_plus_return_is_conserved(discount):
    """c_0 + G_0 = discount^t (C_t + G_t) along any trajectory."""
    rng = np.random.default_rng(0)
    rewards, start = rng.normal(size=(100, 12)), rng.normal(size=100)
    stock, total = start, start + rewards @ discount ** np.arange(12)
    for t in range(12):
        to_go = rewards[:, t:] @ discount ** np.arange(12 - t)
        np.testing.assert_allclose(discount**t * (stock + to_go), total, atol=1e-10)
        stock = next_stock(stock, rewards[:, t], discount)


@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_pairs_are_the_reachable_ones(discount):
    """Against walking every course of actions and outcomes."""
    for seed in range(30):
        mdp = random_mdp(np.random.default_rng(seed), 3, 2, horizon=3, discount=discount)
        frontier = {(s, 1.0) for s in range(3)}
        reached = set(frontier)
        for _ in range(3):
            frontier = {(int(mdp.next_state[o]), round(next_stock(c, mdp.reward[o], discount), 9)) for s, c in frontier
                        for o in range(mdp.offsets[2 * s], mdp.offsets[2 * s + 2])}
            reached |= frontier
        pairs = augment(mdp, np.arange(3), np.ones(3))
        assert {(int(s), round(c, 9)) for s, c in zip(pairs.state, pairs.stock)} == reached
        assert len(pairs.state) == len(reached)


def test_pairs_of_an_ended_episode_only_loop():
    mdp = MDP.from_successors([[[(1.0, 0, 2.0, True)], [(1.0, 0, 1.0, False)]]], horizon=5)
    pairs = augment(mdp, [0], [0.0])
    assert sorted(zip(pairs.state.tolist(), pairs.stock.tolist())) == sorted([(0, float(i)) for i in range(6)] + [(1, float(i)) for i in range(2, 7)])
    assert pairs.mdp.absorbing[pairs.state == 1].all()


def test_vector_stock():
    mdp = random_mdp(np.random.default_rng(0), 2, 2, horizon=2, components=3)
    pairs = augment(mdp, [0], np.zeros((1, 3)))
    assert pairs.stock.shape[1] == 3 and pairs.index(0, [0, 0, 0]) == 0
    with pytest.raises(UserError, match=r"stocks have shape \(1,\); accepted: \(1, 3\)"):
        augment(mdp, [0], [0.0])


def test_achievable_returns():
    mdp = MDP.from_outcomes(1, 2, [0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0.5, 0.5], [1, 0, 3], horizon=2, discount=0.5)
    np.testing.assert_allclose(achievable_returns(mdp), [0, 0.5, 1, 1.5, 2.5, 3, 3.5, 4.5])
    ends = MDP.from_successors([[[(0.5, 0, 2.0, True), (0.5, 0, 1.0, False)]]], horizon=2)
    np.testing.assert_allclose(achievable_returns(ends), [2, 3])


def test_refusals():
    mdp = random_mdp(np.random.default_rng(0), 4, 3, rewards=np.random.default_rng(1).normal(size=50), horizon=6)
    with pytest.raises(UserError, match="more than max_pairs=500"):
        augment(mdp, [0], [0.0], max_pairs=500)
    with pytest.raises(UserError, match="discount 0 leaves no stock"):
        augment(mdp.with_(discount=0.0), [0], [0.0])
    pairs = augment(mdp, [0], [0.0], depth=1)
    with pytest.raises(UserError, match="state 0 with stock 99.0 is not reached"):
        pairs.index(0, 99.0)
