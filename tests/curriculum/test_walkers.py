"""The walkers' ground has stumps as the context says, and their legs are as long as the learner's."""

import gymnasium as gym
import numpy as np
import pytest
from signposts import SMALL

import volvelle
from volvelle.control.methods.ppo import ppo_continuous
from volvelle.core.errors import UserError
from volvelle.core.tasks import Task
from volvelle.curriculum.taught import Taught
from volvelle.curriculum.walkers import ID, stump_walkers

pytest.importorskip("Box2D")


def walker(legs=1.0, height=0.0, spacing=6.0, seed=0):
    env = gym.make(ID, legs=legs).unwrapped
    env.height, env.spacing = height, spacing
    env.reset(seed=seed)
    return env


def test_stumps_have_the_height_and_spacing_of_the_context():
    from gymnasium.envs.box2d.bipedal_walker import TERRAIN_STEP

    def stumps(env):
        shapes = [np.array(b.fixtures[0].shape.vertices) for b in env.terrain]
        return sorted((s for s in shapes if len(s) == 4), key=lambda s: s[:, 0].min())

    assert stumps(walker()) == []
    high = stumps(walker(height=2.0, spacing=4.0))
    assert all(np.ptp(s[:, 1]) == pytest.approx(2 * TERRAIN_STEP, rel=1e-4) for s in high)
    assert np.diff([s[:, 0].min() for s in high]) == pytest.approx(5 * TERRAIN_STEP, rel=1e-3)
    assert len(stumps(walker(height=1.0, spacing=1.0))) > 2 * len(high)


def test_legs_are_scaled_and_gymnasium_is_left_alone():
    def leg(env):
        return float(np.ptp(np.array(env.legs[0].fixtures[0].shape.vertices)[:, 1]))

    ordinary = gym.make("BipedalWalker-v3").unwrapped
    ordinary.reset(seed=0)
    assert leg(walker(0.5)) == pytest.approx(0.5 * leg(ordinary), rel=1e-4) and leg(walker()) == pytest.approx(leg(ordinary), rel=1e-4)
    ordinary.reset(seed=0)
    assert leg(ordinary) == pytest.approx(34 / 30, rel=1e-3)
    with pytest.raises(UserError, match="legs=9"):
        gym.make(ID, legs=9)


def test_the_flat_walker_is_gymnasiums_to_the_last_number():
    ours, theirs = walker(), gym.make("BipedalWalker-v3").unwrapped
    theirs.reset(seed=0)
    ours_first, theirs_first = ours.reset(seed=3)[0], theirs.reset(seed=3)[0]
    assert ours_first[:14] == pytest.approx(theirs_first[:14], abs=0.05) and ours.observation_space == theirs.observation_space


def test_a_teacher_draws_grounds_for_a_control_method(tmp_path):
    task = Task.from_text(f"family:{ID}?height=0..3&spacing=0..6").replace(points=2, worst=-150.0, best=350.0)
    recipe = Taught(recipe=ppo_continuous.override(*SMALL[2:], "envs=2", "length=120"), episodes=1)
    task = task.replace(base=task.base.replace(time_limit=60, kwargs={"legs": 0.7}))
    made = volvelle.train(recipe, task=task, folder=tmp_path / "run", steps=1)
    contexts = made.learner.teacher.contexts
    assert len(contexts) >= 2 and (contexts >= 0).all() and (contexts <= [3, 6]).all()
    assert stump_walkers.grid().shape == (36, 2) and stump_walkers.score(np.array([-200.0, 100.0, 350.0])) == pytest.approx([0, 0.5, 1])
