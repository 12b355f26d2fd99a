import gymnasium
import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.mdp import backward_induction
from volvelle.planning.worlds import enumerate_environment, enumerate_states, grid_world


def test_grid_world_shortest_path_and_walls():
    mdp, cells = grid_world(["S.#", "#..", "..G"], step_reward=-1, horizon=10)
    assert len(cells) == 6 and mdp.states == 7 and mdp.deterministic  # the goal ends the episode and is never a state of its own
    assert backward_induction(mdp).values[0, 0] == -4 + 1
    blocked, _ = grid_world(["S#G"], step_reward=-1, horizon=4)
    assert backward_induction(blocked).values[0, 0] == -4


def test_slip_matches_frozen_lake():
    import volvelle.planning.mdp as m
    lake = m.MDP.from_gymnasium("FrozenLake-v1", horizon=50)
    ours, _ = grid_world(["SFFF", "FHFH", "FFFH", "HFFG"], ends="GH", slip=2 / 3, horizon=50)
    assert backward_induction(ours).values[0, 0] == pytest.approx(backward_induction(lake).values[0, 0], abs=1e-12)


def test_lotteries_are_outcomes():
    mdp, _ = grid_world(["SL"], rewards={"L": [(0.5, 0.0), (0.5, 3.0)]}, ends="L", horizon=1)
    east = slice(mdp.offsets[1], mdp.offsets[2])
    assert sorted(mdp.reward[east]) == [0, 3] and mdp.expected_reward[0, 1] == 1.5


def test_enumerated_environment_is_the_table_of_the_environment():
    env = gymnasium.make("FrozenLake-v1", is_slippery=False)
    mdp, keys = enumerate_environment(env, key=lambda e: int(e.s), horizon=20)
    assert keys[0] == 0 and backward_induction(mdp).values[0, 0] == 1
    assert sorted(keys) == [0, 1, 2, 3, 4, 6, 8, 9, 10, 13, 14]


def test_minigrid_enumerates():
    minigrid = pytest.importorskip("minigrid")
    assert minigrid
    env = gymnasium.make("MiniGrid-Empty-5x5-v0")
    mdp, keys = enumerate_environment(env, key=lambda e: (*map(int, e.agent_pos), int(e.agent_dir)), horizon=10)
    assert len(keys) == 8 * 4  # nine free cells in four directions, less the goal, which ends the episode
    assert (backward_induction(mdp).values[:, 0] > 0).sum() == 6  # the goal is five moves away


def test_refusals():
    with pytest.raises(UserError, match="no 'S'"):
        grid_world(["..G"], horizon=3)
    with pytest.raises(UserError, match=r"lengths \[2, 3\]"):
        grid_world(["S.", "..G"], horizon=3)
    with pytest.raises(UserError, match="slip 1.5"):
        grid_world(["SG"], slip=1.5, horizon=3)
    with pytest.raises(UserError, match="more than max_states=10"):
        enumerate_states(0, 1, lambda s, a: (s + 1, 0.0, False), horizon=3, max_states=10)
    with pytest.raises(UserError, match="action space"):
        enumerate_environment(gymnasium.make("Pendulum-v1"), key=lambda e: 0, horizon=3)


def test_several_starts_are_equally_likely():
    mdp, cells = grid_world(["S.G", "S.."], horizon=5)
    np.testing.assert_allclose(mdp.initial[[cells.index((0, 0)), cells.index((1, 0))]], 0.5)
