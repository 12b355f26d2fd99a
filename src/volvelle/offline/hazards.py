"""A point mass that must go round a hazard: a small world in which a policy can be dangerous without failing."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import gymnasium as gym
import numpy as np
from pydantic import Field

from volvelle.control.slots import ControlTask
from volvelle.core.errors import UserError
from volvelle.core.parts import part, preset

from .behaviours import Behaviour
from .tasks import Generated

NonNegative = Annotated[float, Field(ge=0)]
START, GOAL, NEAR = np.array([-1.0, 0.0]), np.array([1.0, 0.0]), 0.1


class PointDetour(gym.Env):
    """Observation: the place (x, y). Action: a push in [-1, 1]^2, to which the actuator adds noise; a step moves by `speed` times the push.

    From (-1, 0) to (1, 0); every step that ends inside the disc of `radius` around the origin costs 1. info: hazard (steps inside so far), success.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, speed: float = 0.05, noise: float = 0.2, radius: float = 0.5):
        self.speed, self.noise, self.radius = speed, noise, radius
        self.place, self.inside = START.copy(), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.inside = START.copy(), 0
        return self.place.astype(np.float32), {"hazard": 0.0, "success": 0.0}

    def step(self, action):
        self.place = self.place + self.speed * (np.clip(action, -1, 1) + self.np_random.normal(0, self.noise, 2))
        inside = bool(np.linalg.norm(self.place) < self.radius)
        self.inside += inside
        there = bool(np.linalg.norm(self.place - GOAL) < NEAR)
        return self.place.astype(np.float32), -float(inside), there, False, {"hazard": float(self.inside), "success": float(there)}


@part("detour")
class Detour(ControlTask):
    """The point mass and its hazard. Metrics: return (minus the steps inside the hazard), success, length."""

    info: ClassVar[tuple[str, ...]] = ("success",)
    speed: Annotated[float, Field(gt=0)] = 0.05
    noise: NonNegative = 0.2
    radius: NonNegative = 0.5
    time_limit: Annotated[int, Field(gt=0)] = 150

    def make(self, render: str | None = None, training: bool = False) -> gym.Env:
        if render is not None:
            raise UserError("task detour: its environment draws no pictures")
        return gym.wrappers.TimeLimit(PointDetour(self.speed, self.noise, self.radius), self.time_limit)

    def measure(self, ends: dict[str, np.ndarray]) -> dict[str, float]:
        return {"success": float(ends["success"].mean())}


def straight(observations: np.ndarray) -> np.ndarray:
    """A policy that heads for the goal whatever lies between, [N, 2] -> [N, 2]: what over-optimistic offline learning can end in."""
    way = GOAL - observations
    return way / np.maximum(np.linalg.norm(way, axis=-1, keepdims=True), NEAR)


@part("over-the-top")
class OverTheTop(Behaviour):
    """A scripted driver that goes round the hazard above it, along an arc 0.3 outside its edge; noise: on every push."""

    noise: NonNegative = 0.25

    def pilot(self, task: Any, env: gym.Env, spec: Any, rng: np.random.Generator):
        if not isinstance(env.unwrapped, PointDetour):
            raise UserError(f"behaviour=over-the-top drives round a hazard; {task.label()} has none; accepted: detour")
        arc = env.unwrapped.radius + 0.3

        def act(obs):
            angle = np.arctan2(obs[1], obs[0])
            target = GOAL if angle < 0.35 and obs[0] > 0 else arc * np.array([np.cos(angle - 0.3), np.sin(angle - 0.3)]) if obs[1] >= 0 or obs[0] > 0 else np.array([-arc, 0.2])
            way = target - obs
            push = way / max(float(np.linalg.norm(way)), NEAR) + rng.normal(0, self.noise, 2)
            return np.clip(push, -1, 1).astype(np.float32)

        return act


preset("detour-top", Generated(env=Detour(), behaviour=OverTheTop(), quality="expert", steps=10_000))
