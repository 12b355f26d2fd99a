"""Grids small enough that tables learn them, to tell methods apart in seconds: one with heavy-tailed rewards, one with commanded goals."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from pydantic import Field
from torch import nn

from volvelle.control.networks import Initial, Network, flat
from volvelle.control.slots import ControlTask
from volvelle.core.errors import UserError
from volvelle.core.parts import part

from .behaviours import Behaviour
from .commands import Commanded, GoalTask

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # north, east, south, west


class Grid(gym.Env):
    """size x size cells, of which the last corner is the goal. A step pays -0.1, entering the goal 10 more, plus `noise` times a t-distributed number
    with 3 degrees of freedom. ends: the goal ends the episode, else one goes on from there. Moves against the edge stay.

    info["success"] is 1 once the goal has been entered. start: a random cell that is not the goal, or the first corner.
    """

    metadata = {"render_modes": []}

    def __init__(self, size: int, start: str, ends: bool, noise: float):
        self.size, self.start, self.ends, self.noise = size, start, ends, noise
        self.observation_space, self.action_space = spaces.Discrete(size * size), spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.found = int(self.np_random.integers(self.size**2 - 1)) if self.start == "anywhere" else 0, False
        return self.at, {"success": 0.0}

    def step(self, action):
        row, column = divmod(self.at, self.size)
        down, right = MOVES[int(action)]
        self.at = int(np.clip(row + down, 0, self.size - 1) * self.size + np.clip(column + right, 0, self.size - 1))
        goal = self.at == self.size**2 - 1
        self.found = self.found or goal
        reward = -0.1 + 10.0 * goal + self.noise * self.np_random.standard_t(3)
        return self.at, float(reward), bool(goal and self.ends), False, {"success": float(self.found)}


@part("grid")
class GridTask(ControlTask):
    """The square grid; success is the share of episodes that enter the goal."""

    metric: ClassVar[str] = "success"
    info: ClassVar[tuple[str, ...]] = ("success",)
    size: Annotated[int, Field(ge=2)] = 8
    start: Literal["anywhere", "corner"] = "anywhere"
    ends: bool = True
    noise: Annotated[float, Field(ge=0)] = 0.0
    time_limit: Annotated[int, Field(gt=0)] = 32

    def label(self):
        return f"grid-{self.size}"

    def make(self, render=None, training=False):
        if render is not None:
            raise UserError(f"task {self.label()}: its environment draws no pictures")
        return gym.wrappers.TimeLimit(Grid(self.size, self.start, self.ends, self.noise), self.time_limit)

    def measure(self, ends):
        return {"success": float(ends["success"].mean())}


@part("grid-driver")
class GridDriver(Behaviour):
    """A scripted driver for grids: east along the row, then south to the goal."""

    def pilot(self, task, env, spec, rng):
        if not isinstance(env.unwrapped, Grid):
            raise UserError(f"behaviour=grid-driver drives through a grid; {task.label()} is none; accepted: a task of the part grid")
        size = env.unwrapped.size
        return lambda obs: np.int64(1 if int(np.argmax(obs)) % size < size - 1 else 2)


# ---------------------------------------------------------------------------------------------- commanded goals

class Rooms(gym.Env):
    """size x size cells cut in two by a wall with one gap; observation and goal are one-hot. Task n commands goal 3 (n - 1), counted over the free cells
    row by row, from a random other cell. The reward is 1 at the goal, which ends the episode, else 0."""

    metadata = {"render_modes": []}

    def __init__(self, size: int):
        self.size, middle = size, size // 2
        self.cells = [(i, j) for i in range(size) for j in range(size) if j != middle or i == middle // 2]
        self.index = {cell: n for n, cell in enumerate(self.cells)}
        self.observation_space, self.action_space = spaces.Box(0, 1, (len(self.cells),), np.float32), spaces.Discrete(4)

    @property
    def num_tasks(self) -> int:
        return (len(self.cells) + 2) // 3

    def seen(self, n: int) -> np.ndarray:
        return np.eye(len(self.cells), dtype=np.float32)[n]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        number = (options or {}).get("task_id")
        self.goal = None if number is None else 3 * (number - 1)
        self.at = int(self.np_random.integers(len(self.cells) - 1))
        self.at += self.goal is not None and self.at >= self.goal
        return self.seen(self.at), {} if self.goal is None else {"goal": self.seen(self.goal)}

    def step(self, action):
        (row, column), (down, right) = self.cells[self.at], MOVES[int(action)]
        self.at = self.index.get((row + down, column + right), self.at)
        success = self.at == self.goal
        return self.seen(self.at), float(success), success, False, {"success": float(success)}


@part("rooms")
class RoomsTask(GoalTask):
    """Two rooms with commanded goals, small enough for tables; success is the share of episodes that reach the goal."""

    size: Annotated[int, Field(ge=3)] = 7
    goal: Annotated[int, Field(ge=1)] | None = None
    time_limit: Annotated[int, Field(gt=0)] = 40

    def label(self):
        return f"rooms-{self.size}" + (f"-{self.goal}" if self.goal else "")

    def bare(self, steps=None):
        return gym.wrappers.TimeLimit(Rooms(self.size), steps) if steps else Rooms(self.size)

    def goals(self):
        return Rooms(self.size).num_tasks

    def make(self, render=None, training=False):
        if render is not None:
            raise UserError(f"task {self.label()}: its environment draws no pictures")
        return Commanded(self.bare(self.time_limit), self.goal)


@part("drift")
class Drift(Behaviour):
    """Discrete actions at random that are kept for a while: the last one again with probability `again`."""

    again: Annotated[float, Field(ge=0, lt=1)] = 0.6

    def pilot(self, task, env, spec, rng):
        if spec.actions.kind != "discrete":
            raise UserError(f"behaviour=drift needs discrete actions; {task.label()} has {spec.actions.describe()}")
        return _Drifting(self.again, spec.actions.codes[0], rng)


class _Drifting:
    def __init__(self, again: float, count: int, rng: np.random.Generator):
        self.again, self.count, self.rng, self.last = again, count, rng, None

    def begin(self) -> None:
        self.last = None

    def __call__(self, obs):
        if self.last is None or self.rng.random() >= self.again:
            self.last = np.int64(self.rng.integers(self.count))
        return self.last


# ---------------------------------------------------------------------------------------------- tables as networks

class _Crossed(nn.Module):
    """The outer product of the one-hot groups: a linear layer behind it is a table."""

    def __init__(self, groups: list[int]):
        super().__init__()
        self.groups, self.width = groups, math.prod(groups)

    def forward(self, x):
        first, *rest = flat(x).split(self.groups, -1)
        for group in rest:
            first = (first[..., :, None] * group[..., None, :]).flatten(-2)
        return first


class _Looked(nn.Module):
    """A row of learnt features for every combination of the groups' codes."""

    def __init__(self, copies: int, groups: list[int], width: int):
        super().__init__()
        self.groups, self.width, self.rows = groups, width, math.prod(groups)
        self.features = nn.Parameter(torch.zeros(copies, self.rows, width))

    def reset(self, generators):
        with torch.no_grad():
            for features, generator in zip(self.features, generators, strict=True):
                features.normal_(generator=generator)

    def forward(self, x):
        index = 0
        for group in flat(x).split(self.groups, -1):
            index = index * group.shape[-1] + group.argmax(-1)
        start = torch.arange(len(index), device=index.device).unsqueeze(1) * self.rows
        return F.embedding(index + start, self.features.flatten(0, 1))


@part("table")
class Table(Network):
    """Every combination of state, goal and action has numbers of its own; for observations and actions that are one-hot codes.

    features: so many learnt numbers per combination under a linear layer, which is faster for many combinations; none: exactly a table.
    """

    init: Initial = "fan-avg"
    features: Annotated[int, Field(gt=0)] | None = None

    def build(self, layout, copies, extra=0):
        if layout.images:
            raise UserError(f"network=table needs one-hot codes; the observations are {layout.describe()}; accepted: mlp")
        groups = [g for g in (layout.vector - layout.goal, layout.goal, extra) if g]
        return _Crossed(groups) if self.features is None else _Looked(copies, groups, self.features)
