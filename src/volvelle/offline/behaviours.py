"""Who acts while data are collected: random actions, scripted drivers, the policy of a run, or one trained for the purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from pydantic import Field

from volvelle.control.policy import Policy
from volvelle.control.slots import ControlTask
from volvelle.control.spaces import Spec
from volvelle.core.errors import UserError
from volvelle.core.files import cache_folder
from volvelle.core.parts import Part, Recipe, part

from .commands import GoalTask
from .mazes import PointMaze

Pilot = Callable[[np.ndarray], np.ndarray]  # encoded observation -> its best action, as the environment takes it


class Behaviour(Part):
    """Slot. `pilot(task, env, spec, rng)` gives the function that acts in one encoded environment; `begin`, if it has one, is called at every reset."""

    slot: ClassVar[str] = "behaviour"

    def pilot(self, task: ControlTask, env: gym.Env, spec: Spec, rng: np.random.Generator) -> Pilot:
        raise NotImplementedError


def random_action(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """Uniform within the bounds."""
    actions = spec.actions
    if actions.kind == "continuous":
        if not actions.bounded:
            raise UserError("random actions need finite bounds; these have none")
        return rng.uniform(actions.low, actions.high).astype(np.float32)
    codes = np.array([rng.integers(c) for c in actions.codes], np.int64)
    return codes[0] if actions.plain else codes


@part("random")
class Random(Behaviour):
    """Uniform random actions."""

    def pilot(self, task, env, spec, rng):
        return lambda obs: random_action(spec, rng)


@part("run")
class FromRun(Behaviour):
    """The policy of a run of the control or offline wing (RUN, RUN/policy or RUN/best/policy); `member`: which of its seeds."""

    path: str
    member: Annotated[int, Field(ge=0)] = 0

    def policy(self, spec: Spec, where: str) -> Policy:
        folder = Path(self.path)
        return Policy.load(folder / "policy" if (folder / "policy").is_dir() else folder, spec, where)

    def pilot(self, task, env, spec, rng):
        policy = self.policy(spec, task.label())
        if self.member >= policy.seeds:
            raise UserError(f"behaviour.member={self.member}: {self.path} holds {policy.seeds} seeds")
        return lambda obs: policy.act(_rows(obs, policy.seeds)).actions[self.member, 0].numpy()


def _rows(obs: Any, seeds: int) -> Any:
    """One observation as [S, 1, ...] tensors, the same for every seed."""
    if isinstance(obs, dict):
        return {k: _rows(v, seeds) for k, v in obs.items()}
    array = np.asarray(obs)
    tensor = torch.as_tensor(array.astype(np.float32) if array.dtype.kind == "f" else array)
    return tensor.expand(seeds, 1, *tensor.shape)


@part("trained")
class Trained(Behaviour):
    """A control recipe trained on the task with a fixed seed; the run is kept in the cache and made once."""

    recipe: Recipe = None  # type: ignore[assignment]
    steps: Annotated[int, Field(gt=0)] = 20
    seed: Annotated[int, Field(ge=0)] = 0

    def pilot(self, task, env, spec, rng):
        from volvelle.core.run import RunConfig
        from volvelle.core.trainer import train_config

        config = RunConfig(recipe=self.recipe, task=task, steps=self.steps, seed=self.seed, device="cpu")
        folder = cache_folder() / "behaviours" / f"{task.label()}-{config.digest}"
        if not (folder / "result.json").is_file():
            train_config(config, folder, resume=(folder / "config.yaml").is_file())
        return FromRun(path=str(folder)).pilot(task, env, spec, rng)


@part("pendulum-swing")
class PendulumSwing(Behaviour):
    """A scripted driver for Pendulum-v1: pumps energy until the pendulum is nearly up, then holds it there."""

    def pilot(self, task, env, spec, rng):
        def act(obs):
            cos, sin, speed = map(float, obs)
            angle = np.arctan2(sin, cos)
            energy = 0.5 * speed**2 / 3 + 5.0 * (cos - 1)  # of a rod: zero when upright and at rest
            push = -12.0 * angle - 3.0 * speed if cos > 0.85 else -2.0 * np.sign(energy * speed if speed else 1.0)
            return np.clip(np.array([push], np.float32), -2.0, 2.0)

        return act


@part("cartpole-balance")
class CartPoleBalance(Behaviour):
    """A scripted driver for CartPole-v1: pushes towards where the pole falls."""

    def pilot(self, task, env, spec, rng):
        return lambda obs: np.int64(float(obs @ np.array([0.05, 0.2, 1.0, 0.7])) > 0)


@part("walker")
class Walker(Behaviour):
    """A scripted driver for point mazes, ours and OGBench's: heads for a goal cell along the shortest way, then draws another.

    hops: at most so many cells from here to the goal (None: any); wander: instead of goals, a new random direction every so many steps.
    """

    hops: Annotated[int, Field(gt=0)] | None = None
    wander: Annotated[int, Field(gt=0)] | None = None

    def pilot(self, task, env, spec, rng):
        inner = env.unwrapped
        maze = _OurMaze(inner, rng) if isinstance(inner, PointMaze) else _TheirMaze(inner, rng) if hasattr(inner, "get_oracle_subgoal") else None
        if maze is None or spec.actions.continuous != 2 or not isinstance(task, GoalTask):
            raise UserError(f"behaviour=walker pushes a point through a maze; {task.label()} is none; accepted: maze:…, ogbench:pointmaze-…")
        return _Walk(self, maze, rng)


class _Walk:
    def __init__(self, part: Walker, maze: Any, rng: np.random.Generator):
        self.part, self.maze, self.rng, self.goal, self.count, self.way = part, maze, rng, None, 0, np.zeros(2)

    def begin(self) -> None:
        self.goal, self.count = None, 0

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        if self.part.wander:
            if self.count % self.part.wander == 0:
                angle = self.rng.uniform(0, 2 * np.pi)
                self.way = np.array([np.cos(angle), np.sin(angle)])
            self.count += 1
            return self.way.astype(np.float32)
        if self.goal is None or np.linalg.norm(self.maze.place() - self.goal) < self.maze.near:
            self.goal = self.maze.draw(self.part.hops)
        way = self.maze.waypoint(self.goal) - self.maze.place()
        return (way / max(float(np.linalg.norm(way)), self.maze.step)).astype(np.float32)


class _OurMaze:
    near = 0.35

    def __init__(self, env: PointMaze, rng):
        self.env, self.rng, self.step = env, rng, env.speed

    def place(self):
        return self.env.place

    def waypoint(self, goal):
        return self.env.waypoint(goal)

    def draw(self, hops):
        from .mazes import distances

        far = distances(self.env.maze, self.env.cell())
        cells = [c for c in self.env.cells if far[c] > 0 and (hops is None or far[c] <= hops)]
        return np.array(cells[self.rng.integers(len(cells))]) + 0.5 + self.rng.uniform(-0.25, 0.25, 2)


class _TheirMaze:
    near, step = 0.6, 0.2

    def __init__(self, env, rng):
        self.env, self.rng = env, rng
        self.cells = [tuple(c) for c in np.argwhere(env.maze_map == 0)]

    def place(self):
        return np.asarray(self.env.get_xy(), np.float64)

    def waypoint(self, goal):
        if self.env.xy_to_ij(self.place()) == self.env.xy_to_ij(goal):
            return goal
        return np.asarray(self.env.get_oracle_subgoal(self.place(), goal)[0], np.float64)

    def draw(self, hops):
        _, far = self.env.get_oracle_subgoal(self.place(), self.place())
        cells = [c for c in self.cells if far[c] > 0 and (hops is None or far[c] <= hops)]
        return np.asarray(self.env.ij_to_xy(cells[self.rng.integers(len(cells))]), np.float64) + self.rng.uniform(-1, 1, 2)
