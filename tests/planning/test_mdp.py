"""The MDP type: what it refuses, and its dynamic programming against linear programming and brute force on 200 random instances each."""
import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import linprog

from volvelle.core.errors import UserError
from volvelle.planning.mdp import MDP, backup, backward_induction, policy_evaluation, unroll, value_iteration
from volvelle.planning.worlds import random_mdp

INSTANCES = 200


def random_instance(seed, **kwargs):
    rng = np.random.default_rng(seed)
    return random_mdp(rng, states=int(rng.integers(2, 5)), actions=int(rng.integers(2, 4)), successors=int(rng.integers(1, 4)), **kwargs)


def linear_program(mdp):
    """The least v with v >= r + discount P v for every action and v = 0 in absorbing states, by scipy."""
    S, A = mdp.states, mdp.actions
    system = mdp.discount * mdp.transition - sp.kron(sp.identity(S), np.ones((A, 1)))
    found = linprog(np.ones(S), A_ub=system, b_ub=-mdp.expected_reward.ravel(),
                    bounds=[(0, 0) if quiet else (None, None) for quiet in mdp.absorbing], method="highs",
                    options={"dual_feasibility_tolerance": 1e-10, "primal_feasibility_tolerance": 1e-10})
    assert found.success
    return found.x


def test_value_iteration_agrees_with_linear_programming():
    for seed in range(INSTANCES):
        mdp = random_instance(seed, discount=0.8)
        solution = value_iteration(mdp, tolerance=1e-10)
        np.testing.assert_allclose(solution.values, linear_program(mdp), atol=1e-8)
        np.testing.assert_allclose(policy_evaluation(mdp, solution.policy), solution.values, atol=1e-8)


def test_value_iteration_keeps_its_tolerance():
    for seed in range(50):
        mdp = random_instance(seed, discount=0.95)
        rough, fine = value_iteration(mdp, tolerance=1e-2), value_iteration(mdp, tolerance=1e-11)
        assert np.abs(rough.values - fine.values).max() <= 1e-2
        assert rough.sweeps < fine.sweeps


def test_backward_induction_agrees_with_linear_programming_on_the_unrolled_problem():
    for seed in range(INSTANCES):
        mdp = random_instance(seed, horizon=3)
        solution = backward_induction(mdp)
        long = unroll(mdp)
        values = linear_program(long)[:3 * mdp.states].reshape(3, mdp.states)
        np.testing.assert_allclose(solution.values[:3], values, atol=1e-8)


def test_backward_induction_agrees_with_every_policy_tried():
    for seed in range(INSTANCES):
        mdp = random_mdp(np.random.default_rng(seed), 2, 2, horizon=3, discount=0.9)
        best = max(mdp.initial @ policy_evaluation(mdp, np.array(p).reshape(3, 2))[0] for p in itertools.product(range(2), repeat=6))
        assert mdp.initial @ backward_induction(mdp).values[0] == pytest.approx(best, abs=1e-8)


def test_policy_evaluation_agrees_with_dense_algebra():
    for seed in range(INSTANCES):
        rng = np.random.default_rng(seed)
        mdp = random_instance(seed, discount=0.9)
        policy = rng.dirichlet(np.ones(mdp.actions), size=mdp.states)
        P, r = mdp.dense()
        chain = np.einsum("sa,sat->st", policy, P)
        truth = np.linalg.solve(np.eye(mdp.states) - 0.9 * chain, (policy * r).sum(1))
        np.testing.assert_allclose(policy_evaluation(mdp, policy), truth, atol=1e-8)
        finite = mdp.with_(horizon=4)
        expected = sum(0.9**t * np.linalg.matrix_power(chain, t) @ (policy * r).sum(1) for t in range(4))
        np.testing.assert_allclose(policy_evaluation(finite, policy)[0], expected, atol=1e-8)


def test_dense_and_successor_lists_are_the_same_problem():
    rng = np.random.default_rng(0)
    P, r = rng.dirichlet(np.ones(4), size=(4, 3)), rng.normal(size=(4, 3, 4))
    P[0, 0] = [0, 1, 0, 0]
    dense = MDP.from_arrays(P, r, discount=0.9)
    s, a, t = np.nonzero(P)
    order = rng.permutation(len(s))
    flat = MDP.from_outcomes(4, 3, s[order], a[order], t[order], P[s, a, t][order], r[s, a, t][order], discount=0.9)
    assert len(flat.probability) == len(dense.probability) == 48 - 3
    np.testing.assert_allclose(flat.dense()[0], P)
    np.testing.assert_allclose(flat.expected_reward, (P * r).sum(-1))
    v = rng.normal(size=4)
    np.testing.assert_allclose(backup(dense, v), (P * (r + 0.9 * v)).sum(-1))


def test_vector_rewards_keep_their_components():
    mdp = random_mdp(np.random.default_rng(0), 3, 2, components=2, horizon=2)
    assert mdp.expected_reward.shape == (3, 2, 2)
    with pytest.raises(UserError, match="2 components"):
        backward_induction(mdp)


def test_toy_text_problems_load_with_an_absorbing_end():
    lake = MDP.from_gymnasium("FrozenLake-v1", horizon=100)
    assert (lake.states, lake.actions, lake.absorbing[-1]) == (17, 4, True)
    assert backward_induction(lake).values[0, 0] == pytest.approx(0.7442, abs=5e-5)
    cliff = MDP.from_gymnasium("CliffWalking-v1", horizon=30)
    assert cliff.initial @ backward_induction(cliff).values[0] == -13  # a table that lets the agent walk on from the goal gives more
    taxi = MDP.from_gymnasium("Taxi-v4", discount=0.99)
    assert taxi.initial.sum() == pytest.approx(1) and taxi.states == 501


def test_large_sparse_problem():
    S = 100_000
    s = np.arange(S)
    mdp = MDP.from_outcomes(S, 1, s, 0 * s, np.minimum(s + 1, S - 1), np.ones(S), np.where(s < S - 1, 1.0, 0.0), horizon=3)
    assert backward_induction(mdp).values[0, 0] == 3 and mdp.absorbing.sum() == 1


@pytest.mark.parametrize("change, words", [
    (dict(transition=np.full((2, 2, 2), 0.45)), "transition probabilities of state 0, action 0 sum to 0.9, not|must sum to one"),
    (dict(transition=np.ones((2, 2))), r"transition has shape \(2, 2\)"),
    (dict(transition=np.array([[[1.5, -0.5]] * 2] * 2)), "probability holds -0.5"),
    (dict(transition=np.zeros((2, 2, 2))), "state 0, action 0 has no outcome"),
    (dict(reward=np.ones((2, 3))), r"reward has shape \(2, 3\); accepted: \(2, 2\)"),
    (dict(reward=np.full((2, 2), np.nan)), "reward holds a value that is not finite"),
    (dict(initial=[0.5, 0.4]), "initial distribution sums to 0.9"),
    (dict(initial=2), "initial state 2; accepted: 0 to 1"),
    (dict(horizon=0), "horizon 0"),
    (dict(discount=1.1), "discount 1.1"),
    (dict(horizon=None), "horizon None with discount 1"),
])
def test_refusals_name_the_thing(change, words):
    good = dict(transition=np.full((2, 2, 2), 0.5), reward=np.ones((2, 2)), horizon=3)
    MDP.from_arrays(**good)
    with pytest.raises(UserError, match=words):
        MDP.from_arrays(**{**good, **change})


@pytest.mark.parametrize("change, words", [
    (dict(next_state=[0, 5]), "next_state runs from 0 to 5; accepted: 0 to 1"),
    (dict(action=[0, 1]), "action runs from 0 to 1; accepted: 0 to 0"),
    (dict(state=[0, 0.5]), "state cannot be read as an array of whole numbers"),
    (dict(reward=[1.0]), r"reward has shape \(1,\)"),
    (dict(state=[0]), r"state has shape \(1,\)"),
])
def test_successor_lists_are_checked(change, words):
    good = dict(states=2, actions=1, state=[0, 1], action=[0, 0], next_state=[1, 1], probability=[1, 1], reward=[1, 0], horizon=2)
    MDP.from_outcomes(**good)
    with pytest.raises(UserError, match=words):
        MDP.from_outcomes(**{**good, **change})


def test_environments_without_a_table_are_refused_by_name():
    with pytest.raises(UserError, match="'Blackjack-v1' has no transition table"):
        MDP.from_gymnasium("Blackjack-v1", horizon=3)
    with pytest.raises(UserError, match="'NoSuch-v0' cannot be made"):
        MDP.from_gymnasium("NoSuch-v0", horizon=3)


@pytest.mark.parametrize("policy, words", [
    (np.array([0, 5]), "actions 0 to 5; accepted: 0 to 1"),
    (np.array([0, 0, 0]), r"policy has shape \(3,\)"),
    (np.full((2, 2), 0.4), "do not sum to one"),
    (np.zeros((2, 2), int), r"policy has shape \(2, 2\)"),  # two time steps for a horizon of three
])
def test_policies_are_checked(policy, words):
    mdp = MDP.from_arrays(np.full((2, 2, 2), 0.5), np.ones((2, 2)), horizon=3)
    with pytest.raises(UserError, match=words):
        policy_evaluation(mdp, policy)
    with pytest.raises(UserError, match="does not contract"):
        value_iteration(mdp)
