import itertools

import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.lookahead import (
    greedy_actions,
    guaranteed_return,
    optimal_q,
    q_iteration,
    random_q,
    reachable,
    reward_q,
    sticky,
    worst_q,
)
from volvelle.planning.mdp import MDP, backward_induction, policy_evaluation
from volvelle.planning.worlds import enumerate_states, random_mdp


def instance(seed, **kwargs):
    rng = np.random.default_rng(seed)
    return random_mdp(rng, 2, 2, successors=int(rng.integers(1, 3)), **{"horizon": 3, **kwargs})


def policies(mdp):
    return [np.array(p).reshape(mdp.horizon, mdp.states) for p in itertools.product(range(mdp.actions), repeat=mdp.horizon * mdp.states)]


def test_extreme_and_random_q_agree_with_all_policies():
    for seed in range(200):
        mdp = instance(seed)
        returns = [mdp.initial @ policy_evaluation(mdp, p)[0] for p in policies(mdp)]
        assert mdp.initial @ optimal_q(mdp)[0].max(-1) == pytest.approx(max(returns), abs=1e-8)
        assert mdp.initial @ worst_q(mdp)[0].min(-1) == pytest.approx(min(returns), abs=1e-8)
        random = policy_evaluation(mdp, np.full((2, 2), 0.5))[0]
        np.testing.assert_allclose(random_q(mdp)[0].mean(-1), random, atol=1e-8)


def test_iteration_reaches_the_optimum_after_horizon_steps_and_keeps_the_last_row():
    for seed in range(200):
        mdp = instance(seed, horizon=5, discount=0.9)
        for q in (random_q(mdp), reward_q(mdp)):
            last = q[-1]
            for _ in range(mdp.horizon - 1):
                q = q_iteration(mdp, q)
                np.testing.assert_array_equal(q[-1], last)
            np.testing.assert_array_equal(q, optimal_q(mdp))
        np.testing.assert_array_equal(optimal_q(mdp), backward_induction(mdp).q)


def test_worst_greedy_return_and_reachability_agree_with_all_greedy_policies():
    for seed in range(200):
        mdp = random_mdp(np.random.default_rng(seed), 2, 2, successors=1 + seed % 2, rewards=(0.0, 0.0, 1.0), horizon=3)  # many ties
        greedy = greedy_actions(random_q(mdp))
        allowed = [p for p in policies(mdp) if all(greedy[t, s, p[t, s]] for t in range(3) for s in range(2))]
        returns = [mdp.initial @ policy_evaluation(mdp, p)[0] for p in allowed]
        assert guaranteed_return(mdp, greedy) == pytest.approx(min(returns), abs=1e-8)
        met = np.zeros((3, 2), bool)
        for p in allowed:
            now = mdp.initial > 0
            for t in range(3):
                met[t] |= now
                now = np.array([any(now[s] and mdp.dense()[0][s, p[t, s], n] > 0 for s in range(2)) for n in range(2)])
        np.testing.assert_array_equal(reachable(mdp, greedy), met)


def test_the_worst_of_tied_actions_counts():
    """Q^1 of the start ties at .25: a sure .25, or a way to a choice between .5 and 0."""
    mdp = MDP.from_successors([[[(1.0, 0, 0.25, True)], [(1.0, 1, 0.0, False)]], [[(1.0, 0, 0.5, True)], [(1.0, 0, 0.0, True)]]], horizon=2)
    assert guaranteed_return(mdp, greedy_actions(random_q(mdp))) == 0.25
    assert reachable(mdp, greedy_actions(random_q(mdp)))[1, 1]


def test_ties_are_told_by_one_tolerance():
    q = np.array([[[1.0, 1.0 - 1e-13, 0.5]]])
    assert greedy_actions(q).tolist() == [[[True, True, False]]]
    assert greedy_actions(q, 0.0).tolist() == [[[True, False, False]]]


def lock(length):
    """Action 1 goes on, action 0 ends the episode; the last step pays 1."""
    return enumerate_states(0, 2, lambda s, a: (s + 1, float(s == length - 1), s == length - 1) if a else (0, 0.0, True), horizon=length)[0]


def test_sticky_actions_by_hand():
    """In a lock of length 3 the plan 'always 1' is unharmed; 'random' succeeds with 1/2 * (.75/2 + .25)^2, since after a 1 another 1 may stick."""
    mdp = sticky(lock(3), 0.25)
    assert mdp.initial @ optimal_q(mdp)[0].max(-1) == pytest.approx(1)
    assert mdp.initial @ random_q(mdp)[0].mean(-1) == pytest.approx(0.5 * 0.625**2)


def test_sticky_actions_never_repeat_at_the_first_step():
    mdp = lock(3)
    rows = sticky(mdp, 0.25)
    first = np.flatnonzero(rows.initial)[0]
    counts = np.diff(rows.offsets).reshape(-1, 2)
    assert rows.absorbing.sum() == 1  # an ended episode stays one state
    assert (counts[first] == 1).all() and (counts[:mdp.states * 2] >= 1).all() and counts[1].max() == 2


def test_without_stickiness_nothing_changes():
    for seed in range(50):
        mdp = instance(seed)
        glued = sticky(mdp, 0.0)
        np.testing.assert_allclose(glued.initial @ random_q(glued)[0].mean(-1), mdp.initial @ random_q(mdp)[0].mean(-1), atol=1e-12)
        np.testing.assert_allclose(random_q(glued)[0, mdp.states * 2:], random_q(mdp)[0], atol=1e-12)


def test_refusals():
    with pytest.raises(UserError, match="repeat 1.5"):
        sticky(lock(2), 1.5)
    with pytest.raises(UserError, match="finite horizon"):
        random_q(lock(2).with_(horizon=None, discount=0.9))
    with pytest.raises(UserError, match="2 components"):
        random_q(random_mdp(np.random.default_rng(0), 2, 2, components=2, horizon=2))
