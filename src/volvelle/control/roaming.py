"""Continuous tasks paid for where an episode has been: a point or MuJoCo's Ant that covers a square, and a car on a track (progress, not a set)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import part

from .slots import ControlTask
from .tasks import Gym

HALF, CELLS, PATCH = 20.0, 100, 2  # the square [-20, 20]^2 as 100 x 100 marks; every step marks the 5 x 5 patch around the cell


class Ground:
    """The marks on the square; `mark(x, y)` returns how many are new, None outside the square."""

    def __init__(self):
        self.marks = np.zeros((CELLS, CELLS), bool)

    def mark(self, x: float, y: float) -> int | None:
        column, row = (math.floor((p + HALF) / (2 * HALF) * CELLS) for p in (x, y))
        if not (0 <= row < CELLS and 0 <= column < CELLS):
            return None
        patch = self.marks[max(row - PATCH, 0) : row + PATCH + 1, max(column - PATCH, 0) : column + PATCH + 1]
        fresh = patch.size - int(patch.sum())
        patch[:] = True
        return fresh


class Covered(gym.Wrapper):
    """Replaces the reward by coverage / 10 of the place that `where(env, info)` gives; leaving the square ends the episode.

    pays: "marginal" new marks; "cumulative" all marks so far at every step (additive: the authors' modular arm); "modular" a patch's 25.
    """

    def __init__(self, env: gym.Env, where, pays: str = "marginal"):
        super().__init__(env)
        self.where, self.pays = where, pays

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        self.ground = Ground()
        self.total = float(self.ground.mark(*self.where(self.env, info)) or 0)
        return observation, info | {"value": self.total}

    def step(self, action):
        observation, _, terminated, truncated, info = self.env.step(action)
        fresh = self.ground.mark(*self.where(self.env, info))
        self.total += fresh or 0
        paid = 0.0 if fresh is None else {"marginal": float(fresh), "cumulative": self.total, "modular": (2 * PATCH + 1.0) ** 2}[self.pays]
        return observation, paid / 10, terminated or fresh is None, truncated, info | {"value": self.total}


class PointEnv(gym.Env):
    """A point with velocity: actions accelerate it by at most 0.5 in each direction, drag 0.9, speed at most 2. Observation: place / 20, velocity, time."""

    def __init__(self, horizon: int = 200):
        self.observation_space, self.action_space = spaces.Box(-np.inf, np.inf, (5,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
        self.horizon = horizon

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.velocity, self.t = self.np_random.uniform(-0.5, 0.5, 2), np.zeros(2), 0
        return self._observation(), {}

    def _observation(self):
        return np.array([*self.place / HALF, *self.velocity, 2 * self.t / self.horizon - 1], np.float32)

    def step(self, action):
        self.velocity = np.clip(0.9 * self.velocity + 0.5 * np.asarray(action, float), -2, 2)
        self.place, self.t = self.place + self.velocity, self.t + 1
        return self._observation(), 0.0, self.t >= self.horizon, False, {}


@dataclass(frozen=True, eq=False)
class Roaming(ControlTask):
    """pays: what training is paid (see Covered); evaluation always counts new marks. `value`: marks in all."""

    info: ClassVar[tuple[str, ...]] = ("value",)
    pays: Literal["marginal", "cumulative", "modular"] = "marginal"
    horizon: Annotated[int, Field(gt=0)] = 200

    def base(self, render) -> tuple[gym.Env, object]:
        raise NotImplementedError

    def make(self, render=None, training=False):
        env, where = self.base(render)
        return Covered(env, where, self.pays if training else "marginal")

    def measure(self, ends):
        return {"value": float(ends["value"].mean())}


@part("roam")
class Roam(Roaming):
    """A point that covers a square of 40 x 40."""

    def base(self, render):
        if render is not None:
            raise UserError("task roam draws no pictures; accepted: watching without a video")
        return PointEnv(self.horizon), lambda env, info: env.unwrapped.place


@part("ant-coverage")
class AntCoverage(Roaming):
    """MuJoCo's Ant, paid for the ground its torso has been over. Needs gymnasium[mujoco]; long runs."""

    horizon: Annotated[int, Field(gt=0)] = 400

    def base(self, render):
        env = Gym(id="Ant-v5", kwargs={"exclude_current_positions_from_observation": False}, time_limit=self.horizon).make(render)
        return env, lambda env, info: env.unwrapped.data.qpos[:2]


class TrackEnv(gym.Env):
    """A car on a ring of radius 10 and half width 1, from rest. Actions: steering and acceleration; observation: offset from the middle, heading error
    (sine, cosine), speed, angle travelled, time.

    Reward: progress along the track (1 for a lap) times 10, -1 where it leaves the track (which ends the episode), -0.01 per step, +1 for a lap.
    """

    RADIUS, WIDTH = 10.0, 1.0

    def __init__(self, horizon: int = 200):
        self.observation_space, self.action_space = spaces.Box(-np.inf, np.inf, (6,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
        self.horizon = horizon

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.heading = np.array([self.RADIUS + self.np_random.uniform(-0.1, 0.1), 0.0]), math.pi / 2
        self.speed, self.angle, self.t = 0.0, 0.0, 0
        return self._observation(), {"progress": 0.0}

    def _observation(self):
        error = self.heading - math.atan2(self.place[1], self.place[0]) - math.pi / 2
        return np.array([np.linalg.norm(self.place) - self.RADIUS, math.sin(error), math.cos(error), self.speed, self.angle / (2 * math.pi), self.t / self.horizon],
                        np.float32)

    def step(self, action):
        before = math.atan2(self.place[1], self.place[0])
        self.heading += 0.2 * float(action[0])
        self.speed = float(np.clip(0.95 * self.speed + 0.1 * float(action[1]), 0, 1))
        self.place = self.place + self.speed * np.array([math.cos(self.heading), math.sin(self.heading)])
        moved = (math.atan2(self.place[1], self.place[0]) - before + math.pi) % (2 * math.pi) - math.pi
        self.angle, self.t = self.angle + moved, self.t + 1
        off, lap = abs(np.linalg.norm(self.place) - self.RADIUS) > self.WIDTH, self.angle >= 2 * math.pi
        reward = 10 * moved / (2 * math.pi) - 0.01 - float(off) + float(lap and not off)
        return self._observation(), reward, bool(off or lap or self.t >= self.horizon), False, {"progress": self.angle / (2 * math.pi)}


@part("track")
class Track(ControlTask):
    """A car on a ring; the trajectory's reward is progress, which is not a set function. `progress`: laps at the end."""

    info: ClassVar[tuple[str, ...]] = ("progress",)
    horizon: Annotated[int, Field(gt=0)] = 200

    def make(self, render=None, training=False):
        return TrackEnv(self.horizon)

    def measure(self, ends):
        return {"progress": float(ends["progress"].mean())}
