"""Classrooms: what is on record of learners that were taught before."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part
from volvelle.core.state import load_state, save_state

from .students import ToyStudents
from .teachers import AlpGmm, Teacher

Count = Annotated[int, Field(gt=0)]


@dataclass(eq=False)
class Record:
    """One taught learner. tests [E, N]: its scores on every test context, test after test; parameters [p]: what tells it from others, if known; results [n] and
    origins [n, 3] of its episodes; trajectory: (episode, means [k, d + 1], covariances) of every mixture that taught it."""

    name: str
    tests: np.ndarray
    parameters: np.ndarray
    contexts: np.ndarray
    results: np.ndarray
    origins: np.ndarray
    trajectory: list

    def save(self, folder, names, grid) -> None:
        save_state(Path(folder), {"names": list(names), "grid": grid, "tests": self.tests, "parameters": self.parameters, "contexts": self.contexts,
                                  "results": self.results, "origins": self.origins, "trajectory": [list(t) for t in self.trajectory]})

    @classmethod
    def of(cls, name: str, tests: list[np.ndarray], parameters, teacher: Any) -> "Record":
        return cls(name, np.array(tests), np.asarray(parameters, float), **teacher.record())


class Classroom(Part):
    """Slot: `records(task, seed)` gives the earlier learners from which an expert for a learner of that task, in a run of that seed, may be chosen."""

    slot: ClassVar[str] = "classroom"

    def records(self, task: Any, seed: int) -> list[Record]:
        raise NotImplementedError


@part("runs")
class Runs(Classroom):
    """Earlier runs of `taught` (teacher=alp-gmm, with test_every). folders: of the runs, or a folder whose subfolders are runs."""

    folders: tuple[str, ...] = ()

    def records(self, task, seed):
        return [read_record(f, task) for f in self.found()]

    def found(self) -> list[Path]:
        found = []
        for name in self.folders:
            here = Path(name)
            inside = [p.parent for p in [here / "curriculum", *sorted(here.rglob("curriculum"))] if (p.parent / "config.yaml").is_file() and p.is_dir()]
            if not inside:
                raise UserError(f"classroom.folders={name}: no finished run of taught there (config.yaml beside a folder curriculum)")
            found += dict.fromkeys(inside)
        if not found:
            raise UserError("classroom.folders: empty; give the folders of earlier runs of taught with teacher=alp-gmm, for example classroom.folders=[runs/class]")
        return found


def read_record(folder: Path, task: Any) -> Record:
    """UserError unless the run was taught by mixtures, tested, and in the same contexts as `task`."""
    state = load_state(folder / "curriculum")
    if "tests" not in state:
        raise UserError(f"classroom: {folder} holds no record of a taught learner")
    if not np.array_equal(state["grid"], task.grid()):
        raise UserError(f"classroom: {folder} was tested in other contexts ({state['names']}, {len(state['grid'])} of them) than {task.label()}; accepted: the same ranges and points")
    if not len(state["tests"]) or not state["trajectory"]:
        raise UserError(f"classroom: {folder} has {len(state['tests'])} tests and {len(state['trajectory'])} mixtures; expected a run with teacher=alp-gmm and test_every set")
    fields = ("tests", "parameters", "contexts", "results", "origins", "trajectory")
    return Record(str(folder), **{k: state[k] for k in fields})


@part("toy")
class Toy(Classroom):
    """Simulated students (task toy-students), taught on the spot by `teacher`: of every kind in turn. tests: of each, evenly spread, every task.episodes.
    seed: None takes another classroom for every round of kinds, so that a run of each kind shares one."""

    students: Count = 8
    steps: Count = 20
    teacher: Teacher = AlpGmm(random=0.1, components=6)
    seed: Annotated[int, Field(ge=0)] | None = None

    def records(self, task, seed):
        if not isinstance(task, ToyStudents):
            raise UserError(f"classroom=toy: has students of task toy-students; for {task.label()} give classroom.folders (classroom=runs)")
        return list(_toy(self, task.replace(kind=None), seed // task.kinds if self.seed is None else self.seed))


@functools.lru_cache(maxsize=16)
def _toy(room: Toy, task: ToyStudents, seed: int) -> tuple[Record, ...]:
    return tuple(taught_student(room.teacher, task, i % task.kinds, room.steps, np.random.default_rng([seed, i, 77])) for i in range(room.students))


def taught_student(teacher: Teacher, task: ToyStudents, kind: int, steps: int, rng: np.random.Generator) -> Record:
    """One student, taught from scratch with a test after every task.episodes episodes."""
    student, tests = task.replace(kind=kind).student(0), []
    live = teacher.live(task.bounds, rng, None, student.parameters)
    for _ in range(steps):
        for _ in range(task.episodes):
            context = live.sample()
            live.update(context, student.episode(context))
        tests.append(student.test())
    return Record.of(f"student of kind {kind}", tests, student.parameters, live)
