"""A square grid with heavy-tailed rewards, small enough that tables learn it: for telling methods apart in seconds."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from pydantic import Field
from torch import nn

from volvelle.control.networks import Initial, Network, flat
from volvelle.control.slots import ControlTask
from volvelle.core.errors import UserError
from volvelle.core.parts import part

from .behaviours import Behaviour

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


# ---------------------------------------------------------------------------------------------- tables as networks

class _Crossed(nn.Module):
    def __init__(self, states: int, extra: int):
        super().__init__()
        self.states, self.width = states, states * max(extra, 1)

    def forward(self, x):
        x = flat(x)
        if self.width == self.states:
            return x
        return (x[..., : self.states, None] * x[..., None, self.states :]).flatten(-2)


@part("table")
class Table(Network):
    """No hidden layer: every pair of a state and an action has a number of its own. For observations and actions that are one-hot codes."""

    init: Initial = "fan-avg"

    def build(self, layout, copies, extra=0):
        if layout.images:
            raise UserError(f"network=table needs one-hot codes; the observations are {layout.describe()}; accepted: mlp")
        return _Crossed(layout.vector, extra)
