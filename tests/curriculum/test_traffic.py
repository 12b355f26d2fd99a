"""Traffic lights: the context changes the traffic, seeds repeat it, control methods and teachers train on it. Needs volvelle[traffic]."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from signposts import SMALL

import volvelle
from volvelle.control.methods.ppo import ppo
from volvelle.core.errors import UserError
from volvelle.core.tasks import Task
from volvelle.curriculum.methods.mbtl import mbtl
from volvelle.curriculum.taught import Taught
from volvelle.curriculum.traffic import ID, traffic_signals

MISSING = [p for p in ("sumo", "sumo_rl") if importlib.util.find_spec(p) is None]
simulated = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install volvelle[traffic]")
FAMILY = Task.from_text(f"family:{ID}?demand=0.3..1.5").replace(points=2, worst=0.0, best=12.0)
FAMILY = FAMILY.replace(base=FAMILY.base.replace(time_limit=12))


@pytest.fixture(scope="module")
def light():
    env = gym.make(ID).unwrapped
    yield env
    env.close()


def drive(env, seed=0, decisions=60, policy=lambda i: i // 4 % 2, **context):
    """(rewards, vehicles on the road per decision) under a signal that changes every 20 seconds."""
    for name, value in {"demand": 1.0, "speed": 1.0, "green": 5.0, "yellow": 2.0, **context}.items():
        setattr(env, name, value)
    env.reset(seed=seed)
    steps = [env.step(policy(i)) for i in range(decisions)]
    return np.array([s[1] for s in steps]), np.array([s[4]["vehicles"] for s in steps])


@pytest.mark.skipif(not MISSING, reason="SUMO is installed")
def test_without_sumo_one_line_says_what_to_install():
    with pytest.raises(UserError, match=r"needs the package sumo(_rl)?; pip install volvelle\[traffic\]"):
        gym.make(ID)


def test_naming_the_family_imports_no_simulator():
    code = f"import sys; from volvelle.core.tasks import Task; Task.from_text('family:{ID}?demand=0.3..1.5'); print({{'sumo', 'sumo_rl', 'traci'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
    assert traffic_signals.grid().shape == (6, 1) and traffic_signals.score(np.array([0.0, 60.0, 120.0])) == pytest.approx([0, 0.5, 1])


@simulated
def test_gymnasiums_checker_finds_nothing(light):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(light, skip_render_check=True, skip_close_check=True)


@simulated
def test_a_seed_repeats_the_traffic_and_episodes_without_one_differ(light):
    first, other, again = drive(light, 3), drive(light, 4), drive(light, 3)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    light.reset(seed=3)
    starts = []
    for _ in range(2):
        starts.append([light.step(0)[4]["vehicles"] for _ in range(20)])
        light.reset()
    assert starts[0] != starts[1]


@simulated
def test_every_context_parameter_changes_what_happens(light):
    usual, vehicles = drive(light)
    assert drive(light, demand=0.0)[1].sum() == 0
    assert drive(light, demand=0.3)[1].sum() < 0.5 * vehicles.sum() < vehicles.sum() < drive(light, demand=1.5)[1].sum()
    assert drive(light, speed=0.5)[1].sum() > 1.3 * vehicles.sum()  # at half the speed they stay longer
    often = {"policy": lambda i: i % 2}
    assert not np.array_equal(drive(light, **often)[0], drive(light, green=30.0, **often)[0])
    assert drive(light, yellow=4.0, **often)[0].sum() < drive(light, yellow=1.0, **often)[0].sum()


@simulated
def test_half_speed_limits_do_not_stay_for_the_next_episode(light):
    usual = drive(light)
    drive(light, speed=0.5)
    assert np.array_equal(drive(light), usual)


@simulated
def test_the_worst_signal_scores_below_a_changing_one(light):
    assert drive(light, policy=lambda i: 1)[0].mean() < 0.7 * drive(light)[0].mean() and (drive(light)[0] <= 1).all()


@simulated
def test_an_intersection_of_your_own():
    nets = Path(importlib.util.find_spec("sumo_rl").origin).parent / "nets"
    mine = {"net": f"{nets}/2way-single-intersection/single-intersection.net.xml", "routes": f"{nets}/2way-single-intersection/single-intersection-vhvh.rou.xml"}
    env = gym.make(ID, **mine, reward="queue", interval=10)
    assert env.action_space.n == 4 and env.observation_space.shape == (21,)
    assert env.reset(seed=0)[1]["seconds"] == 0 and env.step(2)[4]["seconds"] == 10
    env.close()
    for kwargs, words in [({"net": mine["net"]}, "routes"), ({"net": "none.xml", "routes": mine["routes"]}, "net=none.xml"), ({"interval": 0}, "interval=0"),
                          ({"reward": "fun"}, "average-speed"), ({"render_mode": "human"}, "render_mode=human"), ({"interval": 2}, "yellow from 1 to 1"),
                          ({**mine, "net": f"{nets}/4x4-Lucas/4x4.net.xml", "routes": f"{nets}/4x4-Lucas/4x4c1.rou.xml"}, "16 traffic signals"),
                          ({**mine, "net": f"{nets}/single-intersection/single-intersection.net.xml"}, "cannot load")]:
        with pytest.raises(UserError, match=words), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gym.make(ID, **kwargs)


@simulated
def test_an_unknown_parameter_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="demand") as error:
        Task.from_text(f"family:{ID}?wind=0..1").make()
    assert all(name in str(error.value) for name in ("green", "speed", "yellow"))


@simulated
def test_a_teacher_and_mbtl_train_on_it_in_silence(tmp_path, capfd):
    small = ppo.override("envs=2", "length=12", *SMALL[2:])
    made = volvelle.train(Taught(recipe=small, episodes=1), task=FAMILY, folder=tmp_path / "taught", steps=1)
    assert len(made.learner.teacher.contexts) >= 2 and (np.array(made.learner.teacher.contexts) <= 1.5).all()
    made = volvelle.train(mbtl(recipe=small, child_steps=1).override("evaluation.episodes=1"), task=FAMILY, folder=tmp_path / "mbtl", steps=1)
    row = made.learner.history.rows[0]
    assert row.shape == (2,) and row[0] > row[1] > 0  # less demand, faster traffic
    assert not any(word in capfd.readouterr().out for word in ("Retrying", "Simulation", "Step #", "Loading"))
