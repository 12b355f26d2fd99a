"""The parkour: contexts shape the walls, hands hold and let go, limbs are as long as asked, and control methods train on it."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from signposts import SMALL

import volvelle
from volvelle.control.methods.ppo import ppo_continuous
from volvelle.core.errors import UserError
from volvelle.curriculum.bodies import GROUND, ROOF, STEP
from volvelle.curriculum.parkour import ID, OPENING, WIDTH, parkour
from volvelle.curriculum.taught import Taught

pytest.importorskip("Box2D")
HANG, DROP = np.array([0.0] * 6 + [1, 1]), np.zeros(8)


def make(body="walker", gap=5.0, spacing=4.0, seed=0, **kwargs):
    env = gym.make(ID, body=body, **kwargs).unwrapped
    env.gap, env.spacing = gap, spacing
    env.reset(seed=seed)
    return env


def play(env, action, steps):
    """Heights of the trunk, and the last step's results."""
    heights = []
    for _ in range(steps):
        last = env.step(action)
        heights.append(env.body.trunk.position.y)
        if last[2]:
            break
    return np.array(heights), last


@pytest.mark.parametrize("body, actions, senses", [("walker", 4, 24), ("chimpanzee", 8, 32)])
def test_gymnasiums_checker_finds_nothing(body, actions, senses):
    env = gym.make(ID, body=body, render_mode="rgb_array").unwrapped
    assert env.action_space.shape == (actions,) and env.observation_space.shape == (senses,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*infinity.*")  # speeds have no bound
        check_env(env)


@pytest.mark.parametrize("gap", [2.5, 4.0, 5.0, 6.5])
def test_the_opening_is_five_metres_high_around_the_gap(gap):
    env = make(gap=gap, spacing=0.0)
    bottom, top = env.floor[:, 3] - GROUND, env.hanging[:, 1] - GROUND
    assert len(bottom) > 150  # walls on every step: means are within 5 standard errors
    assert bottom.mean() == pytest.approx(max(gap - OPENING / 2, 0.05), abs=0.05) and top.mean() == pytest.approx(gap + OPENING / 2, abs=0.1)


def test_walls_are_as_far_apart_as_the_context_says():
    def pitch(spacing):
        found = np.diff(make(spacing=spacing).floor[:, 0])
        assert np.ptp(found) < 1e-9
        return found[0] / STEP

    assert [pitch(s) for s in (0.0, 0.4, 0.5, 3 * STEP, 6.0)] == pytest.approx([1, 1, 2, 3, 13])
    env = make(spacing=6.0)
    assert env.floor[0, 0] >= 8 and env.floor[:, 2] - env.floor[:, 0] == pytest.approx(WIDTH)


def test_a_wall_stops_the_ray_and_the_body():
    low, high = make(gap=2.5, spacing=6.0), make(gap=6.5, spacing=6.0)
    for env in (low, high):
        env.body.trunk.position = (7.0, GROUND + 2.0)
    assert high._distances()[-1] == pytest.approx(1.4 / (160 / 30) / np.sin(1.35), rel=0.01) and low._distances()[-1] == 1.0
    for env in (low, high):
        for _ in range(150):
            for limb, _colour in env.body.limbs:
                limb.linearVelocity = (3.0, limb.linearVelocity.y)
            env.step(np.zeros(4))
    assert low.body.trunk.position.x > 10 and high.body.trunk.position.x < 8.1


def test_a_seed_repeats_the_walls_and_the_episode():
    def episode(env, seed):
        rng, first = np.random.default_rng(0), env.reset(seed=seed)[0]
        return np.stack([first, *(env.step(rng.uniform(-1, 1, 8))[0] for _ in range(60))]), env.floor.copy()

    env = make("chimpanzee")
    (one, walls), (other, different), (again, same) = episode(env, 3), episode(env, 4), episode(env, 3)
    assert np.array_equal(one, again) and np.array_equal(walls, same)
    assert not np.array_equal(one, other) and not np.array_equal(walls, different)
    env.reset()
    assert not np.array_equal(env.floor, different)  # an episode without a seed has walls of its own


def test_hands_hold_the_body_up_and_letting_go_drops_it():
    env = make("chimpanzee")
    heights, last = play(env, HANG, 200)
    assert np.ptp(heights) < 0.3 and not last[2] and last[0][-14:-10].tolist() == [1, 1, 1, 1]  # a grip and a hold, each hand
    heights, last = play(env, DROP, 200)
    assert heights[0] - heights[-1] > 4 and last[2] and last[1] == -100  # chest on the ground: the end
    assert last[0][-14:-10].tolist() == [0, 0, 0, 0]


def test_one_hand_is_enough_and_hands_that_close_in_the_air_hold_nothing():
    env = make("chimpanzee")
    heights, last = play(env, np.array([0.0] * 6 + [1, 0]), 100)
    assert np.ptp(heights) < 0.5 and last[0][-13] == 1 and last[0][-11] == 0
    play(env, DROP, 30)
    heights, last = play(env, HANG, 200)
    assert last[2] and last[0][-14:-10].tolist() == [0, 0, 0, 0]


def test_a_hand_takes_hold_again_around_a_hanging_wall():
    env = make("chimpanzee", gap=5.0, spacing=6.0)
    left, bottom, right, _ = env.grips[1]
    assert (left, right) == pytest.approx((env.hanging[0, 0] - WIDTH, env.hanging[0, 2] + WIDTH)) and bottom == pytest.approx(env.hanging[0, 1] - WIDTH)
    env.step(DROP)
    tip = env.body.hands()[0][0]
    for limb, _colour in env.body.limbs:  # carried below the first wall that hangs down
        limb.position = (limb.position.x + (left + right) / 2 - tip[0], limb.position.y + bottom + 0.2 - tip[1])
        limb.linearVelocity = (0, 0)
    env.step(HANG)
    heights, last = play(env, HANG, 60)
    assert all(held for _, held in env.body.hands()) and np.ptp(heights) < 0.5 and not last[2]


def test_arms_that_take_turns_climb_along_the_ceiling():
    env = make("chimpanzee", gap=7.5, spacing=6.0)
    start = env.body.trunk.position.x
    for t in range(300):
        turns = 2 * np.pi * t / 75 + np.array([0, np.pi])
        motors = np.stack([np.cos(turns), np.sin(turns), [0, 0]], 1).ravel()
        assert not env.step(np.concatenate([motors, np.where(np.sin(turns) > -0.4, 1, -1)]))[2]
    assert env.body.trunk.position.x > start + 5


def test_limbs_scale_and_trunks_do_not():
    def size(env, part):
        return float(np.ptp(np.array(env.body.limbs[part][0].fixtures[0].shape.vertices)[:, 1]))

    for body, limbs, length in (("walker", (1, 2, 3, 4), 34 / 30), ("chimpanzee", (2, 3, 5, 6), 28 / 30)):
        for scale in (0.5, 1.0):
            assert [size(make(body, scale=scale), i) for i in limbs] == pytest.approx([scale * length] * 4, rel=1e-4)
        assert size(make(body, scale=0.5), 0) == size(make(body), 0)
    assert make(scale=0.5).body.trunk.position.y < make().body.trunk.position.y - 0.9
    assert make("chimpanzee", scale=0.5).body.trunk.position.y > make("chimpanzee").body.trunk.position.y + 0.8


def test_motors_turn_the_way_of_their_action_with_its_share_of_the_torque():
    def turned(body, action, joint):
        env = make(body)
        env.step(np.array(action))
        return env.body.joints[joint].motorSpeed, env.body.joints[joint].GetMotorTorque(50)

    assert turned("chimpanzee", [-0.1, 0, 0, 0, 0, 0, 1, 1], 0) == pytest.approx((-4, -10), rel=1e-3)
    assert turned("chimpanzee", [0, 0, 0.01, 0, 0, 0, 1, 1], 2) == pytest.approx((8, 1), rel=1e-3)
    assert turned("walker", [0, 0.1, 0, 0], 1) == pytest.approx((6, 8), rel=1e-3)


def test_the_reward_is_progress_less_effort_and_tilt():
    env = make()
    for action in (np.zeros(4), np.ones(4)):
        before = env.body.trunk.position.x, abs(env.body.trunk.angle)
        reward = env.step(action)[1]
        moved, tilted = env.body.trunk.position.x - before[0], abs(env.body.trunk.angle) - before[1]
        assert reward == pytest.approx(130 / 30 * moved - 5 * tilted - 0.028 * action.sum(), abs=1e-4)
    for limb, _colour in env.body.limbs:
        limb.position = (limb.position.x + 90, limb.position.y)
    assert env.step(np.zeros(4))[2]  # past the end


def test_the_walker_may_fall_and_leaving_at_the_left_ends_it():
    env = make()
    heights, last = play(env, np.array([0.0, -1, 0, -1]), 400)
    assert heights[-1] < GROUND + 1.6 and not last[2]
    here = env.body.trunk.position.x
    for limb, _colour in env.body.limbs:
        limb.position = (limb.position.x - here - 0.5, limb.position.y)
    assert env.step(np.zeros(4))[1:3] == (-100.0, True)


def test_a_picture_shows_ground_walls_and_body():
    picture = make("chimpanzee", render_mode="rgb_array").render()
    assert picture.shape == (430, 600, 3) and picture.dtype == np.uint8
    colours = {tuple(c) for c in picture.reshape(-1, 3)}
    assert {(102, 153, 76), (134, 178, 122), (242, 242, 242), (128, 102, 230)} <= colours


@pytest.mark.parametrize("kwargs, words", [({"body": "fish"}, "body=fish: accepted: walker, chimpanzee"), ({"scale": 9}, "scale=9: accepted: 0.2 to 2")])
def test_what_it_cannot_be_made_of_is_refused(kwargs, words):
    with pytest.raises(UserError, match=words):
        gym.make(ID, **kwargs)


def test_a_gap_outside_the_hall_is_refused():
    with pytest.raises(UserError, match="gap=1, spacing=4; expected gap from 2.5"):
        make(gap=1.0)
    assert ROOF == 10


def test_a_teacher_draws_parkours_for_a_control_method(tmp_path):
    assert parkour.grid().shape == (36, 2) and parkour.score(np.array([-200.0, 100.0, 350.0])) == pytest.approx([0, 0.5, 1])
    task = parkour.replace(points=2)
    task = task.replace(base=task.base.replace(time_limit=60, kwargs={"body": "chimpanzee", "scale": 0.7}))
    recipe = Taught(recipe=ppo_continuous.override(*SMALL[2:], "envs=2", "length=120"), episodes=1)
    made = volvelle.train(recipe, task=task, folder=tmp_path / "run", steps=1)
    contexts = made.learner.teacher.contexts
    assert len(contexts) >= 2 and (contexts >= [2.5, 0]).all() and (contexts <= [7.5, 6]).all()


@pytest.mark.slow
def test_a_chimpanzee_learns_to_hang_on(tmp_path):
    task = parkour.replace(points=2)
    task = task.replace(base=task.base.replace(kwargs={"body": "chimpanzee", "scale": 0.7}))
    made = volvelle.train(Taught(recipe=ppo_continuous.override("evaluation.episodes=1"), episodes=1), task=task, folder=tmp_path / "run", steps=10)
    assert made.result["start"]["return"] < 0.15 and made.result["metrics"]["return"] > 0.2  # falls at once; stays up for all 2,000 steps
