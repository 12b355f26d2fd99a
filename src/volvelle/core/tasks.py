"""What is learnt on: `Task` (splits, a metric, a wing), `Suite` (named tasks with an aggregate), `TaskFamily` (contexts)."""

from __future__ import annotations

from typing import Any, ClassVar


from .errors import UserError, unknown
from .parts import Part
from .registry import registry


class Task(Part):
    """One thing to learn, in one wing. `metric` names what evaluation reports first; higher is better."""

    slot: ClassVar[str] = "task"
    wing: ClassVar[str] = ""
    metric: ClassVar[str] = "score"
    readers: ClassVar[dict[str, Any]] = {}
    fallback: ClassVar[list[Any]] = []
    converters: ClassVar[list[Any]] = []

    @classmethod
    def from_object(cls, value: Any) -> "Task | None":
        """The task made of an object of another library (a Gymnasium environment), or None; converters are added by the wings."""
        registry.load()
        return next((task for convert in Task.converters if (task := convert(value)) is not None), None)

    @classmethod
    def from_text(cls, text: str, path: str = "task") -> "Task":
        """`rg:gcd`, `file:mine.jsonl`, `CartPole-v1`: a prefix's reader, or the readers that take names without one."""
        registry.load()
        prefix, sign, rest = text.partition(":")
        if sign and prefix in Task.readers:
            return Task.readers[prefix](rest)
        for reader in Task.fallback:
            if (task := reader(text)) is not None:
                return task
        named = registry.table(Task)
        prefixes = [f"{p}:…" for p in Task.readers]
        raise unknown("task", text, [*(n for n in named if n not in Task.readers), *prefixes, *(r.accepts for r in Task.fallback)])

    def label(self) -> str:
        """A short name for tables and run directories."""
        return self.part_name


def task_reader(prefix: str):
    """Decorator for a function that reads what stands behind `prefix:`."""

    def wrap(function):
        Task.readers[prefix] = function
        return function

    return wrap


def task_fallback(accepts: str):
    """Decorator for a function that reads names without a prefix and returns None for those it does not know."""

    def wrap(function):
        function.accepts = accepts
        Task.fallback.append(function)
        return function

    return wrap


class Suite(Part):
    """Named tasks reported together. `aggregate` maps {task: score [seeds]} to one number (an interquartile mean, say)."""

    slot: ClassVar[str] = "suite"

    def tasks(self) -> dict[str, Task]:
        raise NotImplementedError

    def aggregate(self, scores: dict[str, Any]) -> float:
        raise NotImplementedError


class TaskFamily(Part):
    """Tasks that differ in a context vector. `space()` gives bounds per context dimension; `task(context)` one task."""

    slot: ClassVar[str] = "family"

    def space(self) -> dict[str, tuple[float, float]]:
        raise NotImplementedError

    def task(self, context: dict[str, float]) -> Task:
        raise NotImplementedError

    def check_space(self) -> None:
        import math

        for name, (low, high) in self.space().items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise UserError(f"context {name!r}: the range [{low}, {high}] must be finite with low < high")


class Model(Part):
    """Where a policy's weights come from. Language models live in language/models.py."""

    slot: ClassVar[str] = "model"

    @classmethod
    def from_text(cls, text: str, path: str = "model") -> "Model":
        registry.load()
        for reader in Model.readers:
            if (model := reader(text)) is not None:
                return model
        raise unknown("model", text, [*registry.table(Model), "a folder that transformers can read"])

    readers: ClassVar[list[Any]] = []
