"""Grids: their rules, the datasets that drivers and drifters make of them, and tables as networks."""

import numpy as np
import pytest
import torch

from volvelle.control.spaces import Layout
from volvelle.core.errors import UserError
from volvelle.offline.behaviours import Random
from volvelle.offline.data.collect import collect
from volvelle.offline.grids import Drift, Grid, GridDriver, GridTask, Rooms, RoomsTask, Table


def test_the_grid_pays_a_step_and_the_goal_and_keeps_one_inside():
    env = Grid(3, "corner", True, 0.0)
    assert env.reset(seed=0)[0] == 0
    assert env.step(0)[:2] == (0, pytest.approx(-0.1)) and [env.step(a)[0] for a in (1, 1, 2)] == [1, 2, 5]
    assert env.step(2) == (8, pytest.approx(9.9), True, False, {"success": 1.0})
    on = Grid(2, "anywhere", False, 0.0)
    assert {on.reset(seed=s)[0] for s in range(30)} == {0, 1, 2}
    assert not on.step(1)[2]


def test_rewards_are_heavy_tailed_and_right_on_average():
    env = Grid(4, "corner", True, 1.0)
    env.reset(seed=0)
    paid = np.array([env.step(0)[1] for _ in range(20_000)]) + 0.1
    assert abs(paid.mean()) < 0.06 and np.abs(paid).max() > 8              # standard error 0.012; a Gaussian of this deviation reaches 8 once in 10^6


def test_the_driver_goes_from_corner_to_corner():
    data = collect(GridTask(start="corner", ends=False, time_limit=14), GridDriver(), "expert", 14)
    assert len(data) == 1 and data.fields["obs"].argmax(1).tolist() == [*range(8), *range(15, 64, 8)] and not data.fields["terminated"].any()
    assert collect(GridTask(), Random(), "random", 300).steps == 300


def test_rooms_have_a_wall_with_one_gap_and_tasks_command_every_third_cell():
    env = Rooms(7)
    assert len(env.cells) == 43 and env.num_tasks == 15 and [j for i, j in env.cells if j == 3] == [3]
    _, info = env.reset(seed=0, options={"task_id": 2})
    assert info["goal"].argmax() == 3 and env.at != 3 and not env.reset(seed=0)[1]
    env.at, env.goal = env.index[(1, 2)], env.index[(1, 4)]
    assert not env.step(1)[2] and env.step(1)[1:3] == (1.0, True)
    env.at = env.index[(2, 2)]
    assert env.step(1)[0].argmax() == env.index[(2, 2)]
    task = RoomsTask(goal=2)
    obs, _ = task.make().reset(seed=0)
    assert obs.shape == (86,) and obs[43:].argmax() == 3 and task.goals() == 15


def test_drifting_keeps_its_direction():
    data = collect(RoomsTask(), Drift(again=0.6), "explore", 4000, length=50)
    same = np.concatenate([e["actions"][1:] == e["actions"][:-1] for e in data])
    assert set(data.lengths) == {50} and same.mean() == pytest.approx(0.7, abs=0.035)      # .6 + .4 / 4; five standard errors


def test_tables_tell_every_combination_apart():
    states, goals = torch.eye(3).repeat_interleave(2, 0).repeat(2, 1), torch.eye(2).repeat(3, 1).repeat(2, 1)
    actions = torch.eye(2).repeat_interleave(6, 0)
    x = torch.cat([states, goals, actions], 1)[None]
    crossed = Table().build(Layout(5, goal=2), 1, 2)
    assert crossed.width == 12 and torch.equal(crossed(x)[0].sum(0), torch.ones(12)) and (crossed(x).sum(-1) == 1).all()
    looked = Table(features=4).build(Layout(5, goal=2), 2, 2)
    looked.reset([torch.Generator().manual_seed(i) for i in range(2)])
    made = looked(x.expand(2, -1, -1))
    assert made.shape == (2, 12, 4) and len({tuple(r) for r in made.flatten(0, 1).tolist()}) == 24


def test_refusals():
    with pytest.raises(UserError, match="draws no pictures"):
        GridTask().make("human")
    with pytest.raises(UserError, match="network=table needs one-hot"):
        Table().build(Layout(images={"image": (1, 8, 8)}, dtypes={"image": "uint8"}), 1)
    with pytest.raises(UserError, match="drives through a grid"):
        collect(RoomsTask(), GridDriver(), "navigate", 50)
