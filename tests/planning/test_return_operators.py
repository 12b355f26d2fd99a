import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.distributions import combine, diracs, expectation, wasserstein
from volvelle.planning.functionals import mean
from volvelle.planning.mdp import MDP, backup, policy_evaluation, unroll
from volvelle.planning.return_operators import bellman, evaluate, greedy, lookahead, scores, start_laws
from volvelle.planning.stock import Augmented, augment
from volvelle.planning.worlds import random_mdp


def random_laws(rng, n):
    return combine(np.repeat(np.arange(n), 3), rng.normal(size=3 * n) * 4, rng.dirichlet(np.ones(3), size=n).ravel(), n)


def test_every_policy_operator_contracts():
    """sup w_1 after one application is at most the discount times what it was; the end of an episode has no law to compare."""
    ratio = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        pairs = augment(random_mdp(rng, 3, 2, horizon=3, discount=0.7), np.arange(3), np.zeros(3))
        policy = rng.integers(2, size=len(pairs.state)) if seed % 2 else rng.dirichlet(np.ones(2), size=len(pairs.state))
        one, two = (random_laws(rng, len(pairs.state)) for _ in range(2))
        before, after = wasserstein(one, two).max(), wasserstein(bellman(pairs, policy, one), bellman(pairs, policy, two)).max()
        assert after <= 0.7 * before + 1e-12
        ratio.append(after / before)
    assert max(ratio) > 0.69


def test_operator_is_the_law_of_reward_plus_discounted_return():
    rng = np.random.default_rng(0)
    pairs = augment(random_mdp(rng, 2, 2, horizon=2, discount=0.5), [0], [0.0])
    laws = random_laws(rng, len(pairs.state))
    m, pair, action = pairs.mdp, 0, 1
    atoms, weights = [], []
    for o in range(m.offsets[2 * pair + action], m.offsets[2 * pair + action + 1]):
        x, w = laws[m.next_state[o]]
        atoms += list(m.reward[o] + 0.5 * x)
        weights += list(m.probability[o] * w)
    expected = combine(np.zeros(len(atoms), int), np.array(atoms), np.array(weights), 1)
    np.testing.assert_allclose(lookahead(pairs, laws)[2 * pair + action], expected[0])
    both = bellman(pairs, np.full((len(pairs.state), 2), 0.5), laws)
    assert expectation(both)[0] == pytest.approx(np.mean([expectation(bellman(pairs, np.full(len(pairs.state), a), laws))[0] for a in (0, 1)]))


def test_means_follow_the_classical_operator():
    rng = np.random.default_rng(1)
    pairs = augment(random_mdp(rng, 3, 3, horizon=2, discount=0.9), np.arange(3), np.zeros(3))
    laws = start_laws(pairs, random_laws(rng, len(pairs.state)))
    q = backup(pairs.mdp, expectation(laws))
    np.testing.assert_allclose(scores(pairs, mean(), lookahead(pairs, laws)), q + pairs.stock[:, None], atol=1e-12)
    policy, after = greedy(pairs, mean(), laws)
    np.testing.assert_allclose(expectation(after), q.max(1), atol=1e-12)
    np.testing.assert_array_equal(policy[~pairs.mdp.absorbing], q.argmax(1)[~pairs.mdp.absorbing])


def test_evaluation_finds_the_fixed_point():
    rng = np.random.default_rng(2)
    pairs = augment(unroll(random_mdp(rng, 3, 2, horizon=4, discount=0.8)), np.arange(3), np.ones(3))
    policy = rng.integers(2, size=len(pairs.state))
    laws = evaluate(pairs, policy)
    assert wasserstein(bellman(pairs, policy, laws), laws).max() < 1e-12
    np.testing.assert_allclose(expectation(laws), policy_evaluation(pairs.mdp.with_(horizon=None), policy), atol=1e-9)


def test_evaluation_of_an_endless_loop_is_refused():
    loop = MDP.from_outcomes(1, 1, [0], [0], [0], [1], [1.0], horizon=5)
    with pytest.raises(UserError, match="still move after 20 sweeps"):
        evaluate(Augmented(loop, np.zeros(1, int), np.zeros(1), 5, {}), np.zeros(1, int), max_sweeps=20)


def test_start_laws_rest_where_the_episode_is_over():
    pairs = augment(random_mdp(np.random.default_rng(0), 2, 2, horizon=1), [0], [0.0])
    laws = start_laws(pairs, diracs(np.full(len(pairs.state), 7.0)))
    np.testing.assert_allclose(laws.atoms, np.where(pairs.mdp.absorbing, 0, 7))
