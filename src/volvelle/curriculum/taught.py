"""A control method whose training contexts a teacher draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from volvelle.control.learner import ControlRecipe
from volvelle.core.errors import UserError
from volvelle.core.files import write_text
from volvelle.core.parts import Recipe, part
from volvelle.core.state import save_state

from .families import Family, OverContexts, varying
from .pictures import coverage_map, zero_shot_picture
from .teachers import AlpGmm, Teacher


@part("taught")
class Taught(Recipe):
    """`recipe` trains on a family as it always does, but `teacher` draws the context of every training episode and hears its score.

    episodes: per context of the grid in an evaluation; mastered: a context counts as mastered from this score on.
    """

    wing: ClassVar[str] = "curriculum"
    recipe: Recipe = None  # type: ignore[assignment]
    teacher: Teacher = AlpGmm()
    episodes: Annotated[int, Field(gt=0)] = 2
    mastered: Annotated[float, Field(gt=0, le=1)] = 0.75

    def validate(self, task=None):
        super().validate(task)
        if not isinstance(task, Family) or task.context:
            raise UserError(f"taught: task {task.label() if task else None} has no contexts to draw; accepted: a family such as family:CartPole-v1?length=0.1..4")
        if not isinstance(self.recipe, ControlRecipe) or self.recipe.seeds != 1 or self.recipe.workers:
            raise UserError("taught: recipe must be a control recipe with seeds=1 and workers=0: one teacher draws for one learner, in this process")
        task.score(np.zeros(1))
        self.recipe.validate(task)

    def start(self, run):
        return TaughtLearner(self, run)


class TaughtLearner:
    """Steps the control learner inside; stands between its environments and the teacher, turning returns into scores."""

    def __init__(self, part: Taught, run):
        self.part, self.run, self.family = part, run, run.config.task
        self.inner = run.start("recipe", part.recipe)
        self.size = getattr(self.inner, "size", 0)
        self.teacher = part.teacher.live(self.family.bounds, run.rng("teacher"))
        for wrapper in varying(self.inner.envs):
            wrapper.teacher = self
        self.grid = self.family.grid()
        self.tests: OverContexts | None = None

    def sample(self):
        return self.teacher.sample()

    def update(self, context, result):
        self.teacher.update(context, float(self.family.score(result)))

    def step(self):
        return self.inner.step() | self.teacher.metrics()

    def test(self) -> np.ndarray:
        """Scores [N] of the policy over the grid."""
        self.tests = self.tests or OverContexts(self.family, self.grid, self.part.episodes, self.run.reporter)
        return self.family.score(self.tests.returns(self.inner.policy(), self.run.seed))

    def evaluate(self):
        """return: mean score over the grid; mastered: share of its contexts; episodes: of training."""
        scores = self.test()
        return {"return": float(scores.mean()), "mastered": float((scores >= self.part.mastered).mean()), "episodes": float(len(self.teacher.results))}

    def before_checkpoint(self):
        self.inner.before_checkpoint()

    def product(self) -> dict[str, Any]:
        return self.inner.product() | {"curriculum": Lessons(self.family, self.teacher, self.test())}

    def state_dict(self):
        return {"teacher": self.teacher.state_dict()}

    def load_state_dict(self, state):
        self.teacher.load_state_dict(state["teacher"])


@dataclass
class Lessons:
    """What was practised and what came of it; saved with its pictures."""

    family: Family
    teacher: Any
    scores: np.ndarray

    def save(self, folder) -> None:
        names, grid = list(self.family.ranges), self.family.grid()
        save_state(folder, {"names": names, "grid": grid, "scores": self.scores, **self.teacher.state_dict()})
        write_text(folder / "zero-shot.svg", zero_shot_picture(grid, names, {"score": self.scores}, "Score over the contexts"))
        if len(self.teacher.contexts):
            write_text(folder / "coverage.svg", coverage_map(self.teacher.contexts, self.family.bounds, names))
