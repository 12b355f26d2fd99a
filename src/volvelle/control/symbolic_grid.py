"""A small room with a key, a locked door and a goal, told in symbols: a task whose observation is categories."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from pydantic import Field

from volvelle.core.parts import part

from .categories import Categories
from .slots import ControlTask

MOVES = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])  # right, down, left, up
FREE, WALL, KEY, DOOR, GOAL = range(5)


class KeyDoorGoal(gym.Env):
    """size x size cells cut in two by a wall with one door. Walking onto the key takes it, the door opens to who has it, the goal ends the episode
    with 1 - 0.9 t / limit. Key, door, goal and start are drawn anew every episode.

    Observation (MultiDiscrete): what is in the four cells around (5 kinds), on which side key, door and goal lie (before, same, after; rows and
    columns), whether the key is held, on which side the decoration lies, and `noise` columns of 4 random symbols.
    decoration, a spurious cue: "beside" (under the goal, above it in the last row), "goal" (in its very cell, so that its sides are a copy of the
    goal's), "random" (in any cell). alternate: it is in any cell in every second episode. info: `paid`, the reward; `moved`, whether the decoration
    was in any cell.
    """

    def __init__(self, size: int = 6, limit: int = 60, decoration: str = "beside", noise: int = 0, alternate: bool = False):
        self.size, self.limit, self.decoration, self.noise, self.alternate = size, limit, decoration, noise, alternate
        self.observation_space = spaces.MultiDiscrete([5] * 4 + [3] * 6 + [2] + [3] * 2 + [4] * noise)
        self.action_space = spaces.Discrete(4)
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        rng, n = self.np_random, self.size
        self.episode = 0 if seed is not None else self.episode + 1
        self.moved = self.decoration == "random" or (self.alternate and self.episode % 2 == 1)
        wall = n // 2
        self.cells = np.full((n, n), FREE)
        self.cells[:, wall] = WALL
        self.door = np.array([rng.integers(n), wall])
        left = rng.permutation(n * wall)[:2]
        self.at, self.key = (np.array(divmod(int(i), wall)) for i in left)
        self.goal = np.array(divmod(int(rng.integers(n * (n - wall - 1))), n - wall - 1)) + (0, wall + 1)
        under = self.goal + ((1, 0) if self.goal[0] < n - 1 else (-1, 0))
        self.mark = rng.integers(n, size=2) if self.moved else self.goal if self.decoration == "goal" else under
        for place, kind in ((self.door, DOOR), (self.key, KEY), (self.goal, GOAL)):
            self.cells[tuple(place)] = kind
        self.held, self.t = False, 0
        return self._observation(), {}

    def _around(self, move):
        place = self.at + move
        return WALL if (place < 0).any() or (place >= self.size).any() else self.cells[tuple(place)]

    def _observation(self):
        sides = np.sign([self.key - self.at, self.door - self.at, self.goal - self.at]).reshape(-1) + 1
        seen = [*(self._around(m) for m in MOVES), *sides, int(self.held), *(np.sign(self.mark - self.at) + 1)]
        return np.array(seen + (self.np_random.integers(4, size=self.noise).tolist() if self.noise else []), np.int64)

    def step(self, action):
        kind = self._around(MOVES[action])
        if kind in (FREE, KEY, GOAL) or (kind == DOOR and self.held):
            self.at = self.at + MOVES[action]
        if kind == KEY:
            self.held, self.cells[tuple(self.at)] = True, FREE
        self.t += 1
        won = kind == GOAL
        paid = (1 - 0.9 * self.t / self.limit) if won else 0.0
        return self._observation(), paid, won, self.t >= self.limit and not won, {"paid": paid, "moved": float(self.moved)}


@part("symbolic-grid")
class SymbolicGrid(ControlTask):
    """Key, door and goal in a small grid, told in symbols. decoration: where a spurious cue lies while training; test: where it lies in evaluation;
    coded: kinds and sides as categories (for trees) instead of one-hot columns.

    With test=both, it lies as in training in half of the evaluated episodes and anywhere in the others: `kept` and `moved` are the returns, `drop`
    their difference.
    """

    info: ClassVar[tuple[str, ...]] = ("paid", "moved")
    size: Annotated[int, Field(ge=4)] = 6
    limit: Annotated[int, Field(gt=0)] = 60
    decoration: Literal["beside", "goal", "random"] = "beside"
    test: Literal["beside", "goal", "random", "both"] = "beside"
    noise: Annotated[int, Field(ge=0)] = 0
    coded: bool = False

    def make(self, render=None, training=False):
        where = self.decoration if training or self.test == "both" else self.test
        env = KeyDoorGoal(self.size, self.limit, where, self.noise, alternate=not training and self.test == "both")
        return Categories(env) if self.coded else env

    def measure(self, ends):
        if self.test != "both":
            return {}
        kept, moved = (float(ends["paid"][ends["moved"] == m].mean()) for m in (0, 1))
        return {"kept": kept, "moved": moved, "drop": kept - moved}
