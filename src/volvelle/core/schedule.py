"""Numbers that change with the step. A field typed `float | Schedule` takes a number or one of these parts."""

from __future__ import annotations

import bisect
import math
from dataclasses import field
from typing import Annotated

from pydantic import Field

from .errors import UserError
from .parts import Part, part


class Schedule(Part):
    slot = "schedule"

    def at(self, step: int) -> float:
        raise NotImplementedError


def at(value: "float | Schedule", step: int) -> float:
    """The number that holds at `step` (counted from 0)."""
    return value.at(step) if isinstance(value, Schedule) else value


@part("linear")
class Linear(Schedule):
    """From `start` to `end` in a straight line over `steps` steps, then constant."""

    start: float = 0.0
    end: float = 1.0
    steps: Annotated[int, Field(gt=0)] = 100

    def at(self, step):
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@part("cosine")
class Cosine(Schedule):
    """Half a cosine from `start` to `end` over `period` steps, then again from the start when `restart` is on."""

    start: float = 1.0
    end: float = 0.0
    period: Annotated[int, Field(gt=0)] = 100
    restart: bool = False

    def at(self, step):
        phase = (step % self.period) / self.period if self.restart else min(step / self.period, 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * phase))


@part("exponential")
class Exponential(Schedule):
    """`start` times `rate` to the power of the step, never below `floor`."""

    start: float = 1.0
    rate: Annotated[float, Field(gt=0, le=1)] = 0.99
    floor: float = 0.0

    def at(self, step):
        return max(self.start * self.rate**step, self.floor)


@part("table")
class Table(Schedule):
    """Piecewise constant: `values[i]` from step `steps[i]` on; `steps` starts at 0 and rises."""

    steps: tuple[int, ...] = (0,)
    values: tuple[float, ...] = field(default=(0.0,))

    def __post_init__(self):
        super().__post_init__()
        if len(self.steps) != len(self.values) or self.steps[:1] != (0,) or list(self.steps) != sorted(set(self.steps)):
            raise UserError(f"table: steps {self.steps} must start at 0, rise, and match values {self.values} one to one")

    def at(self, step):
        return self.values[bisect.bisect_right(self.steps, step) - 1]
