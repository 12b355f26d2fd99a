"""Small continuous tasks with several good ways to act: one where the wide way is the worse one, one where two are equally good."""

from __future__ import annotations

import math
from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from volvelle.core.parts import part

from .slots import ControlTask


def deceptive_reward(action: float) -> float:
    """0.6 exp(-((a + 0.35) / 0.35)^2) + exp(-((a - 0.8) / 0.08)^2): a wide hill of 0.6, a narrow one of 1."""
    return 0.6 * math.exp(-(((action + 0.35) / 0.35) ** 2)) + math.exp(-(((action - 0.8) / 0.08) ** 2))


class DeceptiveBanditEnv(gym.Env):
    """One step, one action in [-1, 1], always the same observation."""

    observation_space, action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        reward = deceptive_reward(float(action[0]))
        return np.ones(1, np.float32), reward, True, False, {"found": float(reward > 0.9)}


@part("deceptive-bandit")
class DeceptiveBandit(ControlTask):
    """One continuous action; the best hill is narrow and a wide one of 60 % lies elsewhere. `found`: share of episodes on the best hill."""

    info: ClassVar[tuple[str, ...]] = ("found",)

    def make(self, render=None, training=False):
        return DeceptiveBanditEnv()

    def measure(self, ends):
        return {"found": float(ends["found"].mean())}


class TwoGoalsEnv(gym.Env):
    """A point walks at most 0.25 a step in each direction. Goals of radius 0.3 at (1, 1) and (1, -1); a wall of radius 0.45 around (0.6, 0) stops it.

    Every step costs 0.1 times the distance to the nearer goal; a bump into the wall costs 0.2; a goal pays 1 and ends the episode.
    """

    GOALS, WALL, RADIUS = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([0.6, 0.0]), 0.45

    def __init__(self):
        self.observation_space, self.action_space = spaces.Box(-2, 2, (2,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
        self.place = np.zeros(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-0.02, 0.02, 2)
        return self.place.astype(np.float32), {}

    def step(self, action):
        wanted = np.clip(self.place + 0.25 * np.asarray(action, float), -2, 2)
        bump = bool(np.linalg.norm(wanted - self.WALL) < self.RADIUS)
        self.place = self.place if bump else wanted
        distance = np.linalg.norm(self.place - self.GOALS, axis=1)
        there = bool(distance.min() < 0.3)
        goal = float(1 - 2 * int(distance.argmin())) if there else 0.0
        return self.place.astype(np.float32), float(there) - 0.1 * float(distance.min()) - 0.2 * bump, there, False, {"goal": goal}


@part("two-goals")
class TwoGoals(ControlTask):
    """Two goals of equal value behind a wall. `goals`: how many are reached in the evaluated episodes; `reached`: share of episodes that reach one;
    `balance`: the rarer goal's share, times 2.
    """

    info: ClassVar[tuple[str, ...]] = ("goal",)

    def make(self, render=None, training=False):
        return gym.wrappers.TimeLimit(TwoGoalsEnv(), 20)

    def measure(self, ends):
        counts = [(ends["goal"] == side).sum() for side in (1, -1)]
        return {"goals": float(sum(c > 0 for c in counts)), "reached": float(sum(counts) / len(ends["goal"])), "balance": 2 * float(min(counts)) / max(1, sum(counts))}
