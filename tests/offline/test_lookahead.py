"""Looking ahead: scores by hand, illegal actions, costs, and that it mends errors of Q in tabular worlds."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from volvelle.offline.lookahead import MCTS, Beam, beam, greedy


@dataclass
class Node:
    state: torch.Tensor
    q: torch.Tensor


class Table:
    """A deterministic world: following [S, A], rewards [S, A], action values [S, A]."""

    def __init__(self, following, rewards, q):
        self.following, self.rewards, self.q, self.asked = torch.as_tensor(following), torch.as_tensor(rewards).float(), torch.as_tensor(q).float(), []

    def root(self, states):
        states = torch.as_tensor(states)
        return Node(states, self.q[states])

    def advance(self, node, rows, actions, streams=None):
        state = node.state[rows]
        self.asked += list(zip(state.tolist(), actions.tolist()))
        there = self.following[state, actions]
        return Node(there, self.q[there]), self.rewards[state, actions]


CHAIN = Table([[1, 0], [2, 1], [2, 2]], [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [[1.0, 0.5], [1.0, 0.5], [2.0, 1.0]])


def test_the_score_by_hand():
    plan = beam(CHAIN, CHAIN.root([0]), 1, 2, 0.99)
    assert plan.score.item() == pytest.approx(0.99 + 0.9801 * 2, abs=1e-5) and plan.score.item() == pytest.approx(2.9502, abs=1e-4)
    assert plan.actions.tolist() == [[0, 0]] and plan.rewards.tolist() == [[0, 1]]
    assert [(node.state[rows].tolist()) for node, rows in plan.path] == [[1], [2]]
    only = beam(CHAIN, CHAIN.root([1]), 2, 1, 0.5)
    assert only.score.item() == pytest.approx(1 + 0.5 * 2)                       # the reward at the root is not discounted


def test_no_steps_ahead_is_greedy():
    world = random_world(0)
    root = world.root(range(12))
    for plan in (beam(world, root, 3, 0, 0.9), Beam(depth=0).plan(world, root, 0.9), MCTS(depth=0).plan(world, root, 0.9)):
        assert plan.action.tolist() == greedy(root).action.tolist() == root.q.argmax(-1).tolist()
    assert not world.asked


def random_world(seed, states=12, actions=3, noise=0.0):
    rng = np.random.default_rng(seed)
    following, rewards = rng.integers(states, size=(states, actions)), rng.integers(-1, 2, size=(states, actions))
    q = np.zeros((states, actions))
    for _ in range(300):
        q = rewards + 0.9 * q.max(1)[following]
    return Table(following, rewards, q + noise * rng.standard_normal(q.shape))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_beam_wide_enough_finds_the_best_of_all_paths(depth):
    for seed in range(5):
        world = random_world(seed, noise=1.0)
        plan = beam(world, world.root(range(12)), 27, depth, 0.9)
        for start in range(12):
            best = -math.inf
            for path in itertools.product(range(3), repeat=depth):
                state, total = start, 0.0
                for i, a in enumerate(path):
                    total, state = total + 0.9**i * float(world.rewards[state, a]), int(world.following[state, a])
                best = max(best, total + 0.9**depth * float(world.q[state].max()))
            assert plan.score[start].item() == pytest.approx(best, abs=1e-4)


def test_cost_and_the_actions_tried_are_the_best_by_q_not_by_score():
    world = random_world(3)
    beam(world, world.root([0]), 2, 3, 0.9)
    assert len(world.asked) == 2 + 2 * 4                                         # K + (H - 1) K^2
    assert {a for s, a in world.asked[:2]} == set(world.q[0].topk(2).indices.tolist())


@pytest.mark.parametrize("planner", [Beam(width=3, depth=2), MCTS(width=3, depth=2, simulations=30)])
def test_illegal_actions_are_never_taken(planner):
    world = random_world(1)
    world.rewards[:, 2], world.q[:, 2] = 1.0, -math.inf                          # tempting, but illegal everywhere
    world.q[0, 1] = -math.inf                                                    # one legal action in state 0
    plan = planner.plan(world, world.root(range(12)), 0.9)
    assert (plan.action != 2).all() and plan.action[0] == 0 and torch.isfinite(plan.score).all()
    assert plan.actions is None or (plan.actions != 2).all()


@pytest.mark.parametrize("planner", [Beam(width=3, depth=3), MCTS(width=3, depth=3, simulations=60)])
def test_planning_mends_errors_of_q(planner):
    """The true best action, from Q with Gaussian errors, more often than greedily: 20 worlds of 12 states; chance alone would fail by far more than 5 deviations."""
    plain = planned = 0
    for seed in range(20):
        truth, world = random_world(seed), random_world(seed, noise=1.0)
        best = truth.q.amax(-1, keepdim=True) - 1e-6 <= truth.q
        rows = torch.arange(12)
        plain += int(best[rows, greedy(world.root(rows)).action].sum())
        planned += int(best[rows, planner.plan(world, world.root(rows), 0.9).action].sum())
    assert planned > plain + 20, (plain, planned)


def test_success_rises_with_depth():
    counts = []
    for depth in (0, 1, 2, 4):
        right = 0
        for seed in range(40):
            truth, world = random_world(seed), random_world(seed, noise=1.0)
            best = truth.q.amax(-1, keepdim=True) - 1e-6 <= truth.q
            right += int(best[torch.arange(12), beam(world, world.root(range(12)), 9, depth, 0.9).action].sum())
        counts.append(right)
    assert counts == sorted(counts) and counts[-1] > counts[0] + 40, counts


def test_tree_search_counts_what_it_is_told():
    world = random_world(5)
    tree = MCTS(width=2, depth=2)
    tree.plan(world, world.root([0, 1, 2]), 0.9)
    assert len(world.asked) <= 3 * (2 + 4) and len(world.asked) >= 3 * 2         # the beam's cost at most
    leaf = MCTS(width=2, depth=1, simulations=3, leaf="mean", choose="visits").plan(CHAIN, CHAIN.root([1]), 1.0)
    assert leaf.action.item() == 0
