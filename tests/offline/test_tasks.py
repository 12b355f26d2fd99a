"""Datasets as tasks, environments with goals, collecting at levels of quality, and the `data` verb."""

import json

import numpy as np
import pytest

from volvelle import cli
from volvelle.control.envs import open_env
from volvelle.core.errors import UserError
from volvelle.core.parts import coerce
from volvelle.core.tasks import Task
from volvelle.offline.behaviours import CartPoleBalance, PendulumSwing, Random, Walker
from volvelle.offline.commands import Maze, OGBench
from volvelle.offline.data.collect import collect, parse
from volvelle.offline.data.files import write_dataset
from volvelle.offline.mazes import MAZES, PointMaze, distances
from volvelle.offline.tasks import Generated, Recorded
from volvelle.control.tasks import Gym

PENDULUM = Gym(id="Pendulum-v1")


# ---- mazes

@pytest.mark.parametrize("name", MAZES)
def test_every_task_of_a_maze_can_be_solved(name):
    rows, tasks = MAZES[name]
    assert len({len(r) for r in rows}) == 1 and len(tasks) == 5
    assert all(distances(name, goal)[start] > 0 for start, goal in tasks)


def test_the_point_cannot_leave_its_corridor():
    env = PointMaze("medium")
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(3000):
        place, *_ = env.step(rng.uniform(-1, 1, 2) * 3)
        assert env.free[env.cell(place)]


def test_commanded_goals_stand_behind_the_state():
    env, spec = open_env(Maze(maze="small", goal=2))
    obs, info = env.reset(seed=3)
    again, _ = env.reset(seed=3)
    assert spec.observations.goal == 2 and obs.shape == (4,) and np.array_equal(obs[2:], info["goal"]) and np.array_equal(obs, again)
    start, goal = MAZES["small"][1][1]
    assert np.abs(obs[:2] - np.array(start) - 0.5).max() <= 0.25 and np.abs(obs[2:] - np.array(goal) - 0.5).max() <= 0.25
    with pytest.raises(UserError, match="accepted: 1 to 5"):
        open_env(Maze(goal=6))


def test_ogbench_resets_alike_from_a_seed_and_leaves_global_numbers_alone():
    pytest.importorskip("ogbench")
    env, spec = open_env(OGBench(id="pointmaze-medium-v0", goal=1))
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first, _ = env.reset(seed=5)
    second, _ = env.reset(seed=5)
    assert spec.observations.goal == 2 and np.array_equal(first[2:], second[2:]) and np.array_equal(np.random.get_state()[1], before)
    with pytest.raises(UserError, match="nowhere"):
        OGBench(id="nowhere-v0").make()


# ---- collecting

def test_levels_are_ordered_and_the_same_arguments_give_the_same_data():
    found = {q: collect(PENDULUM, PendulumSwing(), q, 4000, seed=1) for q in ("random", "medium", "medium-replay", "expert")}
    means = {q: d.returns().mean() for q, d in found.items()}
    middle = (means["expert"] - means["medium"]) / (means["expert"] - means["random"])
    assert means["random"] < means["medium-replay"] < means["medium"] < means["expert"] > -250 and 0.2 < middle < 0.8, means
    assert all(d.steps == 4000 for d in found.values())
    again = collect(PENDULUM, PendulumSwing(), "expert", 4000, seed=1)
    assert np.array_equal(again.fields["obs"], found["expert"].fields["obs"]) and np.array_equal(again.fields["actions"], found["expert"].fields["actions"])


def test_mixtures_hold_their_shares():
    data = collect(Gym(id="CartPole-v1"), CartPoleBalance(), "expert:0.25+random:0.75", 2000, seed=0)
    assert data.steps == 2000 and data.spec.actions.kind == "discrete"
    assert 450 <= data.lengths[data.lengths > 150].sum() <= 550    # the driver balances long, random actions do not


def test_goal_data_of_every_level():
    found = {q: collect(Maze(maze="medium"), Walker(), q, 2000) for q in ("navigate", "stitch", "explore", "random")}
    assert all("rewards" not in d.fields and d.fields["terminated"].sum() == 0 for d in found.values())
    assert found["navigate"].lengths.tolist() == [200] * 10 and found["stitch"].lengths.tolist() == [50] * 40
    seen = {q: len({tuple(c) for c in d.fields["obs"].astype(int)}) for q, d in found.items()}
    assert seen["navigate"] > seen["random"]


def test_walker_drives_through_ogbenchs_maze():
    pytest.importorskip("ogbench")
    data = collect(OGBench(id="pointmaze-medium-v0"), Walker(), "navigate", 600, length=300)
    assert np.ptp(data.fields["obs"], 0).max() > 8 and data.lengths.tolist() == [300, 300]


@pytest.mark.parametrize("quality, goals", [("best", False), ("navigate", False), ("expert", True), ("expert:0.5+random:0.2", False), ("expert:x", False)])
def test_unknown_qualities_are_refused(quality, goals):
    with pytest.raises(UserError, match=f"quality='{quality.replace('+', '.')}'"):
        parse(quality, goals)


def test_drivers_refuse_what_they_cannot_drive():
    with pytest.raises(UserError, match="pushes a point through a maze; Pendulum-v1 is none"):
        collect(PENDULUM, Walker(), "expert", 100)


# ---- tasks

def test_a_generated_dataset_is_made_once_and_knows_its_references():
    task = Generated(quality="expert", steps=600)
    data = task.dataset()
    assert data is task.dataset() and data.steps == 600 and data.meta["ref_min_score"] < data.meta["ref_max_score"] and task.metric == "return"
    assert Generated(env=Maze(), behaviour=Walker(), quality="stitch", steps=100).metric == "success"


def test_recorded_datasets_name_their_environment(tmp_path):
    write_dataset(collect(PENDULUM, Random(), "random", 50), tmp_path / "pend")
    write_dataset(collect(Maze(maze="small"), Walker(), "stitch", 50), tmp_path / "maze")
    write_dataset(collect(Maze(maze="small"), Walker(), "stitch", 50), tmp_path / "maze.npz")
    assert coerce(Task, f"offline:{tmp_path / 'pend'}", "task").world() == PENDULUM.replace(time_limit=None) or coerce(Task, f"offline:{tmp_path / 'pend'}", "task").world().id == "Pendulum-v1"
    assert Recorded(path=str(tmp_path / "maze")).world() == Maze(maze="small")
    silent = Recorded(path=str(tmp_path / "maze.npz"))
    assert silent.world() is None and silent.replace(env="maze:small").world() == Maze(maze="small")
    with pytest.raises(UserError, match="give one, for example task.env=Pendulum-v1"):
        silent.make()
    with pytest.raises(UserError, match="expected an environment"):
        silent.replace(env="pendulum-random")
    with pytest.raises(UserError, match="not there"):
        coerce(Task, "offline:/nowhere/at/all", "task")


# ---- the verb

def test_the_data_verb(tmp_path, capsys, monkeypatch):
    def verb(*words):
        monkeypatch.setattr("sys.argv", ["volvelle", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    code, told, wrong = verb("data", "collect", "CartPole-v1", "--by", "cartpole-balance", "-q", "random", "--steps", 300, "-o", tmp_path / "a")
    assert code == 0 and "300 steps" in told, wrong
    assert verb("data", "mix", f"{tmp_path / 'a'}:0.5", tmp_path / "a", "-o", tmp_path / "b.npz")[0] == 0
    found = json.loads(verb("data", "info", tmp_path / "a", "--json")[1])
    assert found["steps"] == 300 and found["fields"]["obs"]["shape"] == [4]
    assert verb("data", "check", tmp_path / "b.npz")[0] == 0
    with np.load(tmp_path / "b.npz") as file:
        arrays = {k: file[k] for k in file.files}
    arrays["observations"][7, 1] = np.nan
    np.savez(tmp_path / "bad.npz", **arrays)
    code, told, _ = verb("data", "check", tmp_path / "bad.npz")
    assert code == 1 and "field 'observations': holds nan at step" in told
    code, _, wrong = verb("train", "bc", "--task", f"offline:{tmp_path / 'bad.npz'}")
    assert code == 2 and "field 'observations'" in wrong and wrong.count("\n") == 1
    code, _, wrong = verb("data", "collect", "CartPole-v1", "-q", "superb", "-o", tmp_path / "c")
    assert code == 2 and "'superb' is not a level" in wrong and not (tmp_path / "c").exists()
