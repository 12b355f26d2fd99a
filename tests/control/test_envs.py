"""Vectorised environments: same-step resets with the true last observation, encodings, and one clear line for every fault."""

import gymnasium as gym
import numpy as np
import pytest
from toy_envs import Counter, Endless, Faulty, Reach, Target, Zoo

from volvelle.control.encoding import Vocabulary, encoded
from volvelle.control.envs import Envs, Serial, numbers_for, open_env, probe, time_limit
from volvelle.control.normalise import Moments, ObservationNormaliser, RewardNormaliser
from volvelle.control.tasks import Gym
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import coerce
from volvelle.core.tasks import Task


def task(make):
    return coerce(Task, make, "task")


def envs(make, seeds=1, count=1, **options):
    made = Envs(task(make), seeds, count, **options)
    made.reset(list(range(seeds * count)))
    return made


# ---- same-step resets

def test_every_step_is_a_real_transition_and_the_final_observation_is_kept():
    made = envs(lambda: Counter(3))
    seen = []
    for _ in range(7):
        obs, rewards, terminated, _truncated = made.step(np.array([0]))
        seen.append((obs[0].tolist(), float(rewards[0]), bool(terminated[0]), [(row, o.tolist()) for row, o in made.finals]))
    # step 3 ends episode 0: its observation is in finals, the returned one already belongs to episode 1
    assert [s[0][:2] for s in seen] == [[1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [0, 2], [1, 2]]
    assert [s[1] for s in seen] == [1, 2, 3, 1, 2, 3, 1]
    assert seen[2][2:] == (True, [(0, [3.0, 0.0, 0.0])]) and seen[3][3] == []
    assert made.finished == [(0, 6.0, 3), (0, 6.0, 3)]


def test_no_reward_is_lost_or_invented_next_to_gymnasiums_own_default():
    ours, theirs = envs(lambda: Counter(3), count=2), gym.vector.SyncVectorEnv([lambda: Counter(3)] * 2)
    theirs.reset()
    total, dummy = 0.0, 0
    for _ in range(9):
        total += ours.step(np.array([0, 0]))[1].sum()
        dummy += (theirs.step(np.array([0, 0]))[1] == 0).sum()
    assert total == 2 * 3 * (1 + 2 + 3) and dummy == 4  # the default inserts meaningless steps; ours has none


def test_cuts_and_terminations_are_told_apart():
    made = envs(lambda: Counter(2, ends=False))
    made.step(np.array([0]))
    _, _, terminated, truncated = made.step(np.array([0]))
    assert not terminated[0] and truncated[0] and made.finals[0][1].tolist() == [2, 0, 0]


def test_rows_are_seed_major_and_reset_seeds_are_a_function_of_seed_and_step():
    assert numbers_for(3, 7, 4) == numbers_for(3, 7, 4) and len(set(numbers_for(3, 7, 4) + numbers_for(4, 7, 4) + numbers_for(3, 8, 4))) == 12
    assert numbers_for(3, 7, 2) == numbers_for(3, 7, 4)[:2] and numbers_for(3, 7, 2, "evaluation") != numbers_for(3, 7, 2)
    a, b = Envs(Gym(), 2, 2), Envs(Gym(), 1, 2)
    both = a.reset(numbers_for(0, 0, 2) + numbers_for(1, 0, 2))
    assert np.array_equal(both[2:], b.reset(numbers_for(1, 0, 2)))


def test_resting_environments_are_left_alone():
    made = envs(lambda: Counter(3), count=2)
    made.base.resting[1] = True
    assert made.step(np.array([0, 0]))[0][:, 0].tolist() == [1, 0]


def test_async_workers_give_the_same_transitions():
    alone, apart = Envs(Gym(id="Pendulum-v1", time_limit=3), 1, 2), Envs(Gym(id="Pendulum-v1", time_limit=3), 1, 2, workers=1)
    try:
        assert np.array_equal(alone.reset([1, 2]), apart.reset([1, 2]))
        for _ in range(4):
            a, b = (e.step(np.full((2, 1), 3.0, np.float32)) for e in (alone, apart))
            assert all(np.allclose(x, y) for x, y in zip(a, b))
            assert [f[0] for f in alone.finals] == [f[0] for f in apart.finals]
            assert all(np.allclose(x[1], y[1]) for x, y in zip(alone.finals, apart.finals))
    finally:
        apart.close()


def test_continuous_actions_are_clipped_at_the_environment_only():
    seen = []

    class Spy(Reach):
        def step(self, action):
            seen.append(float(action[0]))
            return super().step(action)

    made, actions = envs(Spy), np.array([[5.0]], np.float32)
    made.step(actions)
    assert seen == [1.0] and actions[0, 0] == 5.0


def test_actions_in_units_are_stretched_to_the_bounds():
    plain, unit = (gym_task.make() for gym_task in (Gym(id="Pendulum-v1"), Gym(id="Pendulum-v1", unit_actions=True)))
    assert unit.action_space.low.tolist() == [-1.0] and unit.action_space.high.tolist() == [1.0]
    firsts = [env.reset(seed=3)[0] for env in (plain, unit)]
    assert np.array_equal(*firsts) and np.allclose(plain.step(np.float32([1.5]))[0], unit.step(np.float32([0.75]))[0], atol=1e-6)
    with pytest.raises(UserError, match="unit_actions=true: needs continuous actions"):
        Gym(id="CartPole-v1", unit_actions=True).make()


def test_declared_info_is_gathered_and_missing_info_is_named():
    made = envs(lambda: Counter(3), count=2, keys=("factor",))
    made.step(np.array([0, 0]))
    assert made.infos["factor"].tolist() == [10, 10]
    with pytest.raises(RunStopped, match="its info holds no 'speed', which a relabel needs"):
        envs(lambda: Counter(3), keys=("speed",)).step(np.array([0]))


# ---- encodings

def test_a_zoo_of_observations_and_actions():
    vocabulary = Vocabulary()
    env, spec = encoded(Zoo(), vocabulary)
    obs, _ = env.reset(seed=0)
    leaves = dict(zip(["bits", "choice", "nested/0", "nested/1", "numbers", "pair", "word"], [2, 3, 1, 2, 4, 5, 1]))
    assert spec.observations.vector == sum(leaves.values()) == 18
    names = [name for name, _ in env.get_wrapper_attr("env").leaves]
    found, place = {}, 0
    for name in names:
        if name != "camera":
            found[name] = obs["vector"][place : place + leaves[name]].tolist()
            place += leaves[name]
    assert found == {"bits": [0, 1], "choice": [0, 1, 0], "nested/0": [0.5], "nested/1": [0, 1], "numbers": [1, 2, 3, 4], "pair": [0, 1, 0, 0, 1], "word": [0]}
    assert obs["camera"].shape == (3, 6, 5) and obs["camera"][1, 0, 0] == 1
    assert spec.observations.images == {"camera": (3, 6, 5)} and len(spec.observations.categorical) == 1
    assert spec.actions.kind == "mixed" and spec.actions.codes == (2, 2, 3) and spec.actions.low == (-2.0, -2.0)
    obs, *_ = env.step(np.array([0.5, -1.5, 1, 0, 2], np.float32))
    last = env.unwrapped.last
    assert last["move"].tolist() == [0.5, -1.5] and last["keys"].tolist() == [1, 0] and last["press"] == 7
    assert vocabulary.codes == {"red": 0, "blue": 1} and obs["vector"][spec.observations.categorical[0]] == 1


def test_a_closed_vocabulary_marks_unknown_words():
    vocabulary = Vocabulary()
    assert [vocabulary(w) for w in "aba"] == [0, 1, 0]
    closed = vocabulary.copy()
    assert closed("b") == 1 and closed("c") == -1 and vocabulary("c") == 2


def test_discrete_observations_are_one_hot_and_images_channels_first():
    made = envs(Target)
    assert made.spec.observations.vector == 3 and made.reset([0]).sum() == 1
    assert probe(coerce(Task, "MinAtar/Breakout-v1", "task")).observations.images == {"image": (4, 10, 10)}
    assert probe(Gym(id="CarRacing-v3")).observations.images == {"image": (3, 96, 96)}


def test_an_unsupported_space_is_refused_in_one_line():
    class Odd(Counter):
        def __init__(self):
            super().__init__()
            self.observation_space = gym.spaces.Sequence(gym.spaces.Discrete(2))

    with pytest.raises(UserError, match="observation space Sequence is not supported; accepted: Box, ") as error:
        probe(task(Odd))
    assert "\n" not in str(error.value)


# ---- faults

@pytest.mark.parametrize("fault, says", [
    ("nan observation", "returned an observation of nan"), ("inf reward", "returned a reward of inf"), ("no reward", "returned a reward of nan"),
    ("shape", r"returned an observation that has shape \(4,\); the space says \(3,\)"), ("raises", "step raised ValueError: the motor"),
])
def test_a_fault_in_an_episode_is_one_line_that_says_where(fault, says):
    made = envs(lambda: Faulty(fault), seeds=2, count=2)
    with pytest.raises(RunStopped, match=says) as error:
        for _ in range(20):
            made.step(np.zeros(4, np.int64))
    text = str(error.value)
    assert "\n" not in text and text.startswith("environment ")
    assert "copy 0 of seed 0, step 2 of its episode" in text and error.value.intact


class Wrong(Counter):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def reset(self, *, seed=None, options=None):
        found = super().reset(seed=seed)
        if self.what == "reset raises":
            raise OSError("no such file")
        return found[0] if self.what == "reset value" else (np.zeros(9, np.float32), {}) if self.what == "reset shape" else (
            np.full(3, np.nan, np.float32), {}) if self.what == "reset nan" else found

    def step(self, action):
        found = super().step(action)
        return found[:4] if self.what == "old step" else (found[0], "much", *found[2:]) if self.what == "reward" else (
            found[0], float("nan"), *found[2:]) if self.what == "nan reward" else found


@pytest.mark.parametrize("what, says", [
    ("reset raises", "reset\\(seed=0\\) raised OSError: no such file"), ("reset value", "reset returned ndarray; expected \\(observation, info\\)"),
    ("reset shape", r"the first observation has shape \(9,\); the space says \(3,\)"), ("reset nan", "the first observation holds nan"),
    ("old step", "step returned 4 values; expected"), ("reward", "returned the reward 'much'; expected one number"), ("nan reward", "the reward nan"),
])
def test_a_broken_environment_is_refused_before_anything_is_written(what, says):
    with pytest.raises(UserError, match=says) as error:
        probe(task(lambda: Wrong(what)))
    assert "\n" not in str(error.value)


def test_things_that_are_no_environments():
    with pytest.raises(UserError, match="makes a int; expected a gymnasium.Env"):
        probe(task(lambda: 3))
    with pytest.raises(UserError, match="making the environment raised ZeroDivisionError"):
        probe(task(lambda: 1 / 0))


def test_an_endless_episode_is_told_once():
    lines = []
    made = envs(Endless, report=lines.append)
    for _ in range(10_050):
        made.step(np.array([0]))
    assert len(lines) == 1 and "declares no time limit; set task.time_limit" in lines[0]


# ---- tasks

def test_names_of_tasks():
    assert coerce(Task, "CartPole-v1", "task") == Gym()
    assert coerce(Task, "env:toy_envs:make_counter", "task").make().length == 3
    assert coerce(Task, "env:toy_envs:Counter", "task").make().length == 3
    changed = coerce(Task, "env:toy_envs:make_counter", "task").override("make_env.length=5")
    assert changed.make().length == 5 and changed.label() == "make_counter"
    for text, says in (("CartPole-v9", "version `v9`"), ("CartPol-v1", "did you mean CartPole-v1"), ("Taxi-v3", "Taxi-v4"), ("env:toy_envs", "expected env:module:function")):
        with pytest.raises(UserError, match=says) as error:
            coerce(Task, text, "task")
        assert "\n" not in str(error.value)


def test_objects_become_tasks():
    assert coerce(Task, gym.make("Pendulum-v1", g=9.0), "task") == Gym(id="Pendulum-v1", kwargs={"g": 9.0}, time_limit=200)
    assert coerce(Task, Counter, "task").make().length == 3
    own = Counter(7)
    copy = coerce(Task, own, "task").make()
    assert copy.length == 7 and copy is not own
    assert coerce(Task, lambda: Counter(4), "task").make().length == 4


def test_time_limits():
    assert time_limit(open_env(Gym())[0]) == 500 and time_limit(open_env(Gym(time_limit=7))[0]) == 7 and time_limit(Counter()) is None


# ---- normalisation

def test_moments_are_those_of_all_the_data_per_seed():
    rng = np.random.default_rng(0)
    data, made = rng.normal([3.0, -1.0], [2.0, 0.5], (2, 300, 2)), Moments(2, 2)
    for start in range(0, 300, 30):
        made.update(data[:, start : start + 30])
    assert np.allclose(made.mean, data.mean(1), atol=1e-4) and np.allclose(made.var, data.var(1), atol=1e-3)


def test_observations_are_normalised_and_only_training_moves_the_statistics():
    made, rng = ObservationNormaliser(1, 2), np.random.default_rng(0)
    for _ in range(50):
        made(rng.normal(5, 3, (1, 20, 2)).astype(np.float32), update=True)
    state = made.state_dict()
    found = made(rng.normal(5, 3, (1, 4000, 2)).astype(np.float32))
    assert abs(found.mean()) < 0.1 and abs(found.std() - 1) < 0.1 and found.dtype == np.float32
    assert np.array_equal(state["mean"], made.state_dict()["mean"])
    assert made(np.full((1, 1, 2), 1e9, np.float32)).max() == 10
    other = ObservationNormaliser(1, 2)
    other.load_state_dict(state)
    assert np.array_equal(other(found), made(found))


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    made, gamma = RewardNormaliser(1, 1, 0.5), 0.5
    rewards, running, returns = [1.0, 2.0, 4.0], 0.0, []
    for r in rewards:
        running = running * gamma + r
        returns.append(running)
        found = made(np.array([[r]]), np.array([[False]]))
    assert found[0, 0] == pytest.approx(4.0 / np.std(returns), rel=1e-2)
    made(np.array([[1.0]]), np.array([[True]]))
    assert made.returns[0, 0] == 0


def test_serial_is_a_gymnasium_vector_environment():
    made = Serial([lambda: Counter()] * 2)
    assert isinstance(gym.wrappers.vector.RecordEpisodeStatistics(made), gym.vector.VectorEnv)
    assert made.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
