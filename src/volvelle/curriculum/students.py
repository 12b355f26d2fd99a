"""Learners that are simulated by a rule, so that teachers can be compared in seconds: the cubes of AGAIN's toy experiments (arXiv 2011.08463)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import part
from volvelle.core.tasks import Task

FULL, ENOUGH = 100, 75  # competence at most; from which on it unlocks


class StudentTask(Task):
    """A task that brings its own learner: `student(seed)` gives one with `episode(context) -> result between 0 and 1`, `test() -> scores [N]`, `restart()`,
    `parameters` (numbers that tell it from others) and `state_dict`. names, bounds [2, d], grid() [N, d]: its contexts."""

    wing: ClassVar[str] = "curriculum"
    metric: ClassVar[str] = "mastered"
    names: ClassVar[tuple[str, ...]] = ()
    episodes: int

    @property
    def bounds(self) -> np.ndarray:
        raise NotImplementedError

    def grid(self) -> np.ndarray:
        raise NotImplementedError

    def student(self, seed: int) -> Any:
        raise NotImplementedError


@part("toy-students")
class ToyStudents(StudentTask):
    """n x n cubes over the unit square, each with a competence from 0 to 100. Practice in a cube raises it by one, if the cube is where the student starts or
    one of its forerunners has reached 75; the result is the competence after.

    version 1: four kinds of student, one per corner; forerunners are the neighbours (also diagonally) on the way to the corner. version 2: as many kinds as
    cubes, each starting in its own; forerunners are the four neighbours. kind: which student (None: the run's seed, in turn). episodes: per learner step.
    """

    names: ClassVar[tuple[str, ...]] = ("x", "y")
    cubes: Annotated[int, Field(gt=1)] = 20
    version: Literal[1, 2] = 1
    kind: Annotated[int, Field(ge=0)] | None = None
    episodes: Annotated[int, Field(gt=0)] = 600

    def __post_init__(self):
        super().__post_init__()
        if self.kind is not None and self.kind >= self.kinds:
            raise UserError(f"task.kind={self.kind}: version {self.version} has {self.kinds} kinds of student; accepted: 0 to {self.kinds - 1}")

    @property
    def kinds(self) -> int:
        return 4 if self.version == 1 else self.cubes**2

    @property
    def bounds(self):
        return np.array([[0.0, 0.0], [1.0, 1.0]])

    def grid(self):
        middle = (np.arange(self.cubes) + 0.5) / self.cubes
        return np.stack([a.ravel() for a in np.meshgrid(middle, middle, indexing="ij")], -1)

    def label(self):
        return f"toy-students-{self.cubes}"

    def student(self, seed):
        return ToyStudent(self, seed % self.kinds if self.kind is None else self.kind)


class ToyStudent:
    """competence [n, n] by the cubes of the unit square."""

    def __init__(self, task: ToyStudents, kind: int):
        self.task, self.kind, self.n = task, kind, task.cubes
        n = self.n
        where = np.zeros((n, n), bool)
        if task.version == 1:
            where[0, 0] = True
            where = np.rot90(where, kind)
            self.back = [int(s) for s in np.where(np.argwhere(where)[0] == 0, -1, 1)]  # towards the start
        else:
            where[divmod(kind, n)] = True
        self.start = tuple(int(i) for i in np.argwhere(where)[0])
        self.parameters = tuple((i + 0.5) / n for i in self.start)
        self.restart()

    def restart(self) -> None:
        self.competence = np.zeros((self.n, self.n), np.int64)

    def forerunners(self, i: int, j: int) -> list[tuple[int, int]]:
        if self.task.version == 1:
            (a, b), n = self.back, self.n
            found = [(i + a, j), (i, j + b), (i + a, j + b)]
        else:
            n, found = self.n, [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
        return [(x, y) for x, y in found if 0 <= x < n and 0 <= y < n]

    def episode(self, context: np.ndarray) -> float:
        i, j = (min(int(c * self.n), self.n - 1) for c in context)
        if (i, j) == self.start or any(self.competence[f] >= ENOUGH for f in self.forerunners(i, j)):
            self.competence[i, j] = min(self.competence[i, j] + 1, FULL)
        return float(self.competence[i, j]) / FULL

    def test(self) -> np.ndarray:
        return (self.competence / FULL).ravel()

    def state_dict(self) -> dict[str, Any]:
        return {"competence": self.competence.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.competence = state["competence"].copy()
