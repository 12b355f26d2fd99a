"""A learner whose training contexts a teacher draws: a control method, or a simulated student."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from volvelle.control.learner import ControlRecipe
from volvelle.core.errors import UserError
from volvelle.core.files import write_text
from volvelle.core.parts import Recipe, part

from .classrooms import Record
from .families import Family, OverContexts, varying
from .pictures import coverage_map, zero_shot_picture
from .students import StudentTask
from .teachers import AlpGmm, Teacher


@part("taught")
class Taught(Recipe):
    """`recipe` trains on a family as it always does, but `teacher` draws the context of every training episode and hears its score. On a task that brings its own
    learner (toy-students) there is no recipe.

    test_every: learner steps between tests in all contexts of the grid, of which the teacher hears and which stay on record (0: at the end only).
    episodes: per context in a test; mastered: a context counts as mastered above this score; parameters: numbers that tell this learner from others
    (a limb's length, a network's width), kept on record.
    """

    wing: ClassVar[str] = "curriculum"
    recipe: Recipe | None = None
    teacher: Teacher = AlpGmm()
    test_every: Annotated[int, Field(ge=0)] = 0
    episodes: Annotated[int, Field(gt=0)] = 2
    mastered: Annotated[float, Field(gt=0, le=1)] = 0.75
    parameters: tuple[float, ...] = ()

    def validate(self, task=None):
        super().validate(task)
        self.teacher.check_task(task, self.test_every)
        if isinstance(task, StudentTask):
            if self.recipe is not None:
                raise UserError(f"taught: task {task.label()} brings its own learner; leave recipe out")
            return
        if not isinstance(task, Family) or task.context:
            raise UserError(f"taught: task {task.label() if task else None} has no contexts to draw; accepted: a family such as family:CartPole-v1?length=0.1..4, or toy-students")
        if not isinstance(self.recipe, ControlRecipe) or self.recipe.seeds != 1 or self.recipe.workers:
            raise UserError("taught: recipe must be a control recipe (for example recipe=ppo) with seeds=1 and workers=0: one teacher draws for one learner, in this process")
        task.score(np.zeros(1))
        self.recipe.validate(task)

    def start(self, run):
        return TaughtLearner(self, run)


class SimulatedStudent:
    """A learner that its task brings along."""

    size = 0

    def __init__(self, part: Taught, run):
        self.task = run.config.task
        self.live = self.task.student(run.seed)
        self.names, self.parameters = self.task.names, self.live.parameters
        self.test, self.restart = self.live.test, self.live.restart
        self.state_dict, self.load_state_dict = self.live.state_dict, self.live.load_state_dict

    def begin(self, teacher):
        self.teacher = teacher

    def step(self):
        results = []
        for _ in range(self.task.episodes):
            context = self.teacher.sample()
            results.append(self.live.episode(context))
            self.teacher.update(context, results[-1])
        return {"result": float(np.mean(results))}

    def before_checkpoint(self):
        pass

    def product(self):
        return {}


class ControlStudent:
    """A control learner; its environments ask the teacher for contexts, and it turns their returns into scores."""

    def __init__(self, part: Taught, run):
        self.part, self.run, self.task = part, run, run.config.task
        self.names, self.parameters = tuple(self.task.ranges), part.parameters
        self.inner = run.start("recipe", part.recipe)
        self.size = getattr(self.inner, "size", 0)
        self.first = copy.deepcopy({k: m.state_dict() for k, m in run.models.items()})
        self.tests: OverContexts | None = None

    def begin(self, teacher):
        self.teacher = teacher
        for wrapper in varying(self.inner.envs):
            wrapper.teacher = self

    def sample(self):
        return self.teacher.sample()

    def update(self, context, result):
        self.teacher.update(context, float(self.task.score(result)))

    def step(self):
        return self.inner.step()

    def test(self):
        self.tests = self.tests or OverContexts(self.task, self.task.grid(), self.part.episodes, self.run.reporter)
        return self.task.score(self.tests.returns(self.inner.policy(), self.run.seed))

    def restart(self):
        """Networks and optimisers as they were at first; schedules over environment steps go on, and so does a replay buffer."""
        for name, state in self.first.items():
            self.run.models[name].load_state_dict(copy.deepcopy(state))
        self.inner.before_checkpoint()

    def before_checkpoint(self):
        self.inner.before_checkpoint()

    def product(self):
        return self.inner.product()

    def state_dict(self):
        return {}  # the run keeps the inner learner's

    def load_state_dict(self, state):
        pass


class TaughtLearner:
    """Steps the learner inside, tests it, and tells the teacher."""

    def __init__(self, part: Taught, run):
        self.part, self.run, self.task = part, run, run.config.task
        self.student = (SimulatedStudent if isinstance(self.task, StudentTask) else ControlStudent)(part, run)
        self.size = self.student.size
        self.teacher = part.teacher.live(self.task.bounds, run.rng("teacher"), run, self.student.parameters)
        self.student.begin(self.teacher)
        self.tests: list[np.ndarray] = []

    def step(self):
        metrics = self.student.step()
        every = self.part.test_every
        if every and (self.run.step + 1) % every == 0:
            self.tests.append(self.student.test())
            if self.teacher.tested(self.tests[-1]):
                self.student.restart()
                self.teacher.forget_open()
        return metrics | self.teacher.metrics()

    def share(self, scores: np.ndarray) -> float:
        return float((scores > self.part.mastered).mean())

    def evaluate(self, task=None):
        """return: mean score over the grid; mastered: share of its contexts; mean_mastered: over the tests so far; half_mastered: at the middle one of them;
        episodes: of training."""
        scores = self.student.test()
        found = {"return": float(scores.mean()), "mastered": self.share(scores), "episodes": float(self.teacher.count)}
        if self.tests:
            shares = [self.share(s) for s in self.tests]
            found |= {"mean_mastered": float(np.mean(shares)), "half_mastered": shares[(len(shares) - 1) // 2]}
        return found

    def before_checkpoint(self):
        self.student.before_checkpoint()
        if not isinstance(self.task, StudentTask):
            self.teacher.forget_open()

    def product(self) -> dict[str, Any]:
        tests = self.tests or [self.student.test()]
        record = Record.of(str(self.run.folder), tests, self.student.parameters, self.teacher)
        return self.student.product() | {"curriculum": Lessons(self.task, self.student.names, record)}

    def state_dict(self):
        return {"teacher": self.teacher.state_dict(), "student": self.student.state_dict(), "tests": [t.copy() for t in self.tests]}

    def load_state_dict(self, state):
        self.teacher.load_state_dict(state["teacher"])
        self.student.load_state_dict(state["student"])
        self.tests = [t.copy() for t in state["tests"]]


@dataclass
class Lessons:
    """What was practised and what came of it: a record for classrooms, with its pictures."""

    task: Any
    names: tuple[str, ...]
    record: Record

    def save(self, folder) -> None:
        record, grid = self.record, self.task.grid()
        record.save(folder, self.names, grid)
        write_text(folder / "zero-shot.svg", zero_shot_picture(grid, self.names, {"score": record.tests[-1]}, "Score over the contexts"))
        if len(record.contexts):
            write_text(folder / "coverage.svg", coverage_map(record.contexts, self.task.bounds, self.names))
