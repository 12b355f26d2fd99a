"""Distributions of grid worlds, and the tasks made of them: random grids of several sizes, and five worlds made by hand."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.errors import UserError, unknown
from volvelle.core.parts import Part, part, preset
from volvelle.core.registry import registry
from volvelle.core.tasks import Task, task_reader

from .gridworlds import Levels, join

Whole = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
Interval = tuple[float, float]


class LevelSource(Part):
    """Slot: draws levels, all of one shape (`cells`, `objects`). `longest`: the longest lifetime it draws."""

    slot: ClassVar[str] = "levels"
    longest: int

    def draw(self, count: int, generator: torch.Generator) -> Levels:
        raise NotImplementedError


def uniform(low: float, high: float, shape, generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def log_uniform(low: float, high: float, shape, generator) -> Tensor:
    return torch.exp(uniform(math.log(low), math.log(high), shape, generator))


def whole(low: int, high: int, count: int, generator) -> Tensor:
    return torch.randint(low, high + 1, (count,), generator=generator)


@part("random-grids")
class RandomGrids(LevelSource):
    """Size, number of objects and rewards uniform (the first object's reward at least 0), lengths, lifetimes and probabilities log-uniform.

    walls: cells of the largest square made walls; those beyond a smaller level's own square fall away. Walls spare the start and the objects; nothing
    makes sure that an object can be reached.
    """

    size: Whole = (5, 5)
    walls: Annotated[int, Field(ge=0)] = 4
    objects: Whole = (1, 2)
    reward: Interval = (-1.0, 1.0)
    ends: Interval = (0.01, 1.0)
    returns: Interval = (0.001, 0.1)
    limit: Whole = (20, 50)
    lifetime: Whole = (60, 60)

    def __post_init__(self):
        super().__post_init__()
        for name in ("size", "objects", "reward", "ends", "returns", "limit", "lifetime"):
            low, high = getattr(self, name)
            floor = -math.inf if name == "reward" else 1e-12
            if not floor <= low <= high < math.inf or (name in ("ends", "returns") and high > 1):
                raise UserError(f"levels.{name}=[{low}, {high}]: expected low <= high" + (", both in (0, 1]" if name in ("ends", "returns") else "" if name == "reward" else ", both positive"))
        if self.reward[1] <= 0:
            raise UserError(f"levels.reward={list(self.reward)}: nothing to gain; expected an upper end above 0")
        room = self.size[0] ** 2
        if self.objects[1] + 1 > room or self.walls + self.objects[1] + 1 > self.size[1] ** 2:
            raise UserError(f"levels: {self.objects[1]} objects, a start and {self.walls} walls do not fit; the smallest square has {room} cells, the largest {self.size[1] ** 2}")

    @property
    def longest(self):
        return self.lifetime[1]

    def draw(self, count, generator):
        C, O = self.size[1] ** 2, self.objects[1]
        size = whole(*self.size, count, generator)
        order = torch.rand(count, C, generator=generator).masked_fill(torch.arange(C) >= size[:, None] ** 2, -1.0)
        spots = order.topk(O + 1).indices
        order = torch.rand(count, C, generator=generator).scatter(1, spots, -1.0)
        walls = torch.zeros(count, C, dtype=torch.bool)
        if self.walls:
            walls.scatter_(1, order.topk(self.walls).indices, True)
        reward = uniform(*self.reward, (count, O), generator)
        reward[:, 0] = uniform(max(0.0, self.reward[0]), self.reward[1], (count,), generator)
        return Levels(size, walls & (torch.arange(C) < size[:, None] ** 2), spots[:, 0].contiguous(), spots[:, 1:].contiguous(),
                      torch.arange(O) < whole(*self.objects, count, generator)[:, None], reward, log_uniform(*self.ends, (count, O), generator),
                      log_uniform(*self.returns, (count, O), generator), log_uniform(*self.limit, (count,), generator).round().long(),
                      log_uniform(*self.lifetime, (count,), generator).round().long())


preset("small", RandomGrids(size=(4, 6), walls=7, objects=(1, 3), limit=(20, 100), lifetime=(250, 250)))
preset("medium", RandomGrids(size=(6, 8), walls=10, objects=(2, 4), limit=(100, 250), lifetime=(2500, 2500)))
preset("large", RandomGrids(size=(8, 10), walls=15, objects=(2, 5), limit=(250, 750), lifetime=(2500, 2500)))
preset("all", RandomGrids(size=(4, 10), walls=15, objects=(1, 5), limit=(20, 750), lifetime=(250, 250)))
preset("tiny", RandomGrids())
preset("mixed", RandomGrids(size=(4, 6), walls=8, objects=(1, 3), limit=(20, 60)))

# name: side, walled cells, objects (reward, probability of ending, probability of coming back), steps
HANDMADE = {
    "dense": (11, (), [(1.0, 0.0, 0.05)] * 2 + [(-1.0, 0.5, 0.1), (-1.0, 0.0, 0.5)], 500),
    "sparse": (13, (), [(1.0, 1.0, 0.0), (-1.0, 1.0, 0.0)], 50),
    "long": (11, (), [(1.0, 0.0, 0.01)] * 2 + [(-1.0, 0.5, 1.0)] * 2, 1000),
    "longer": (9, [r * 9 + 4 for r in range(9) if r not in (1, 7)], [(1.0, 0.1, 0.01)] * 2 + [(-1.0, 0.8, 1.0)] * 3, 2000),
    "long-dense": (11, [r * 11 + 5 for r in range(11) if r not in (0, 7)] + [4 * 11 + c for c in range(11) if c not in (2, 8)], [(1.0, 0.0, 0.005)] * 4, 2000),
}


@part("handmade-grids")
class HandmadeGrids(LevelSource):
    """The five kinds of world that LPG was first trained on, in turn; where things lie is drawn. `longer` has three bad objects, not the five of arXiv 2007.08794."""

    kinds: tuple[str, ...] = tuple(HANDMADE)
    lifetime: Annotated[int, Field(gt=0)] = 2500

    def __post_init__(self):
        super().__post_init__()
        for kind in self.kinds:
            if kind not in HANDMADE:
                raise unknown("world", kind, HANDMADE)
        if not self.kinds:
            raise UserError("levels.kinds=[]: expected at least one of " + ", ".join(HANDMADE))

    @property
    def longest(self):
        return self.lifetime

    def draw(self, count, generator):
        C, O = (max(HANDMADE[k][0] for k in self.kinds)) ** 2, max(len(HANDMADE[k][2]) for k in self.kinds)
        return join([self._one(self.kinds[i % len(self.kinds)], C, O, generator) for i in range(count)])

    def _one(self, kind: str, C: int, O: int, generator) -> Levels:
        side, walled, objects, limit = HANDMADE[kind]
        walls = torch.zeros(1, C, dtype=torch.bool)
        walls[0, list(walled)] = True
        free = torch.nonzero(~walls[0, : side**2])[:, 0]
        spots = free[torch.randperm(len(free), generator=generator)[: O + 1]]
        table = torch.tensor(objects + [(0.0, 0.0, 0.0)] * (O - len(objects)))
        return Levels(torch.tensor([side]), walls, spots[:1], spots[None, 1:], torch.arange(O)[None] < len(objects), table[None, :, 0], table[None, :, 1],
                      table[None, :, 2], torch.tensor([limit]), torch.tensor([self.lifetime]))


@part("grids")
class Grids(Task):
    """Grid worlds from a distribution. tests: held-out levels, the same for every run, drawn with `seed`."""

    wing: ClassVar[str] = "curriculum"
    metric: ClassVar[str] = "score"
    levels: LevelSource = RandomGrids()
    tests: Annotated[int, Field(gt=0)] = 64
    seed: Annotated[int, Field(ge=0)] = 0

    def held_out(self) -> Levels:
        return self.levels.draw(self.tests, torch.Generator().manual_seed(2**40 + self.seed))

    def label(self):
        named = (n for n, value in registry.table(LevelSource).items() if not isinstance(value, type) and value == self.levels)
        return f"grids-{next(named, self.levels.part_name)}"


preset("handmade", HandmadeGrids())


@task_reader("grids")
def _grids(text: str) -> Grids:
    """Batched grid worlds: grids:tiny, grids:mixed, grids:small, grids:medium, grids:large, grids:all, grids:handmade, grids:dense (sparse, long, longer, long-dense)"""
    if text in HANDMADE:
        return Grids(levels=HandmadeGrids(kinds=(text,)), tests=8)
    return Grids(levels=text, tests=10 if text == "handmade" else 64)
