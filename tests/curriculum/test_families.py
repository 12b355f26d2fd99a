"""Families of environments: contexts reach the environment, are drawn from their ranges, held fixed, tested side by side, and refused by name."""

import numpy as np
import pytest
import torch
from signposts import SIGNPOST, SMALL, Told

import volvelle
from volvelle.control.envs import Envs
from volvelle.control.slots import Act
from volvelle.core.errors import UserError
from volvelle.core.parts import coerce
from volvelle.core.tasks import Task
from volvelle.curriculum.families import Family, OverContexts, varying

def test_text_names_a_family():
    family = coerce(Task, "family:Pendulum-v1?l=.3..2.2&m=0.5..2e0", "task")
    assert family.ranges == {"l": (0.3, 2.2), "m": (0.5, 2.0)} and family.base.id == "Pendulum-v1"
    assert family.grid().shape == (24 * 24, 2) and family.grid()[1].tolist() == [0.3, pytest.approx(0.5 + 1.5 / 23)]


@pytest.mark.parametrize("text, words", [
    ("family:Pendulum-v1?l=0.3..inf", "context 'l': the range [0.3, inf] must be finite"),
    ("family:Pendulum-v1?l=2..1", "context 'l': the range [2.0, 1.0]"),
    ("family:Pendulum-v1", "no ranges"),
    ("family:Pendulum-v1?l=3", "'l=3' is no range"),
    ("family:tree?l=1..2", "unknown task|belongs to the language wing"),
])
def test_a_family_that_makes_no_sense_is_refused_by_name(text, words):
    with pytest.raises(UserError) as caught:
        coerce(Task, text, "task")
    assert any(w in str(caught.value) for w in words.split("|")) and "\n" not in str(caught.value)


def test_an_unknown_parameter_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="unknown parameter 'lenght' of Pendulum-v1.*accepted: .*max_torque"):
        coerce(Task, "family:Pendulum-v1?lenght=1..2", "task").make()


def test_the_context_decides_how_the_environment_moves():
    """CartPole against its own equations: a long heavy pole falls slower; what CartPole derives from its parameters follows them."""
    env = Family(base="CartPole-v1", ranges={"length": (0.1, 3.0), "masspole": (0.05, 2.0)}).task((2.0, 1.0)).make()
    env.reset(seed=0)
    inner = env.unwrapped
    assert (inner.length, inner.masspole, inner.polemass_length, inner.total_mass) == (2.0, 1.0, 2.0, 2.0)
    inner.state = (0.0, 0.0, 0.1, 0.0)
    env.step(1)
    temp = 10.0 / 2.0
    acceleration = (9.8 * np.sin(0.1) - np.cos(0.1) * temp) / (2.0 * (4 / 3 - np.cos(0.1) ** 2 / 2.0))
    assert inner.state[3] == pytest.approx(0.02 * acceleration)


def test_episodes_draw_contexts_from_the_ranges_and_the_seed_decides_them():
    def drawn(seed):
        env = SIGNPOST.make()
        return [env.reset(seed=seed if i == 0 else None)[1]["context"][0] for i in range(200)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert -1 <= min(drawn(3)) < -0.9 and 0.9 < max(drawn(3)) <= 1


def test_revealed_contexts_join_the_observation_scaled():
    env = SIGNPOST.replace(reveal=True).task({"place": 0.5}).make()
    assert env.observation_space.shape == (2,) and env.reset(seed=0)[0].tolist() == [0.0, 0.5]


def test_an_environment_may_take_its_context_itself():
    family = Family(base=lambda: Told(), ranges={"far": (-100.0, 100.0)})
    env = family.task((50,)).make()
    env.reset(seed=0)
    assert env.step(np.array([0.5]))[1] == 0.0


class Always:
    def __init__(self, action):
        self.action = action

    def act(self, observations, memory=None, explore=False):
        return Act(torch.full((*observations.shape[:2], 1), self.action))


def test_one_policy_is_tested_in_every_context():
    contexts = SIGNPOST.grid()
    assert OverContexts(SIGNPOST, contexts, episodes=3).returns(Always(0.5), 0) == pytest.approx([-1.5, -1.0, -0.5, 0.0, -0.5])


def test_a_teacher_draws_contexts_and_hears_the_returns():
    class Teacher:
        heard = []

        def sample(self):
            return np.array([0.25])

        def update(self, context, result):
            self.heard.append((context.tolist(), result))

    envs, teacher = Envs(SIGNPOST, 1, 2), Teacher()
    for wrapper in varying(envs):
        wrapper.teacher = teacher
    envs.reset([0, 1])
    envs.step(np.array([[0.0], [0.25]]))
    assert teacher.heard == [([0.25], -0.25), ([0.25], 0.0)]


def test_a_family_is_a_task_of_any_control_method(tmp_path):
    made = volvelle.train("ppo", task=SIGNPOST, folder=tmp_path / "run", overrides=SMALL, steps=2)
    assert made.result["metrics"]["return"] <= 0


def test_scores_need_worst_and_best():
    with pytest.raises(UserError, match="task.worst and task.best"):
        SIGNPOST.score(np.zeros(2))
    assert SIGNPOST.replace(worst=-2.0, best=0.0).score(np.array([-3, -1, 1])).tolist() == [0.0, 0.5, 1.0]
