"""Environments with commanded goals: our maze and those of OGBench, as tasks whose observation is state and goal side by side."""

from __future__ import annotations

import contextlib
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from pydantic import Field

from volvelle.control.envs import first_line
from volvelle.control.slots import ControlTask
from volvelle.core.errors import UserError
from volvelle.core.parts import part
from volvelle.core.tasks import task_reader

from .mazes import MAZES, PointMaze

Goal = Annotated[int, Field(ge=1)]


@contextlib.contextmanager
def own_numbers(rng: np.random.Generator):
    """Run code that draws from NumPy's global numbers on numbers of ours, and leave the global ones as they were."""
    kept = np.random.get_state()
    np.random.seed(int(rng.integers(2**32)))
    try:
        yield
    finally:
        np.random.set_state(kept)


class Commanded(gym.Wrapper):
    """[observation | goal] as one vector; every episode begins with task `goal`, or with one drawn from the environment's own numbers.

    The environment must take reset(options={"task_id": n}) and give info["goal"], as OGBench's do.
    """

    def __init__(self, env: gym.Env, goal: int | None):
        super().__init__(env)
        space = env.observation_space
        if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
            raise UserError(f"goals for observations of {space} are not supported; accepted: one vector (state observations)")
        self.goal, self.tasks = goal, int(env.unwrapped.num_tasks)
        if goal is not None and goal > self.tasks:
            raise UserError(f"goal={goal}: the environment has {self.tasks} tasks; accepted: 1 to {self.tasks}")
        self.numbers, self.target = np.random.default_rng(0), np.zeros(space.shape, np.float32)
        self.goal_width = space.shape[0]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2 * space.shape[0],), np.float32)

    def both(self, observation) -> np.ndarray:
        return np.concatenate([observation, self.target]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.numbers = np.random.default_rng(seed)
        number = self.goal if self.goal is not None else int(self.numbers.integers(self.tasks)) + 1
        with own_numbers(self.numbers):
            observation, info = self.env.reset(seed=seed, options={**(options or {}), "task_id": number})
        self.target = np.asarray(info["goal"], np.float32)
        return self.both(observation), info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self.both(observation), reward, terminated, truncated, info


class GoalTask(ControlTask):
    """An environment in which goals are commanded. `goal`: always that one of its tasks; None: any of them.

    `bare()` makes the environment without commands, for collecting data; `goals()` names the tasks that evaluation goes through.
    """

    metric: ClassVar[str] = "success"

    def bare(self, steps: int | None = None) -> gym.Env:
        raise NotImplementedError

    def goals(self) -> int:
        raise NotImplementedError


@part("maze")
class Maze(GoalTask):
    """Our point maze: small, medium, large or corridor, with five start-goal tasks each. time_limit: steps per evaluation episode."""

    maze: Literal["small", "medium", "large", "corridor"] = "medium"
    goal: Goal | None = None
    time_limit: Annotated[int, Field(gt=0)] = 200
    speed: Annotated[float, Field(gt=0, lt=1)] = 0.4
    noise: Annotated[float, Field(ge=0)] = 0.05

    def label(self):
        return f"maze-{self.maze}" + (f"-{self.goal}" if self.goal else "")

    def bare(self, steps=None):
        env = PointMaze(self.maze, self.speed, self.noise)
        return gym.wrappers.TimeLimit(env, steps) if steps else env

    def goals(self):
        return len(MAZES[self.maze][1])

    def make(self, render=None, training=False):
        if render is not None:
            raise UserError(f"task {self.label()}: its environment draws no pictures")
        return Commanded(self.bare(self.time_limit), self.goal)


@part("ogbench")
class OGBench(GoalTask):
    """A goal-conditioned environment of OGBench (arXiv 2410.20092) by its id, with state observations: pointmaze-medium-v0, antmaze-large-v0, cube-single-v0."""

    id: str = "pointmaze-medium-v0"
    goal: Goal | None = None
    time_limit: Annotated[int, Field(gt=0)] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def label(self):
        return self.id + (f"-{self.goal}" if self.goal else "")

    def open(self, **options) -> gym.Env:
        try:
            import ogbench  # noqa: F401  (registers its environments)
        except ImportError:
            raise UserError(f"task {self.label()} needs the package 'ogbench'; pip install 'volvelle[offline]'") from None
        try:
            return gym.make(self.id, disable_env_checker=True, **self.kwargs, **options)
        except (gym.error.Error, TypeError) as error:
            raise UserError(f"task {self.label()}: {first_line(error)}") from error

    def bare(self, steps=None):
        return self.open(terminate_at_goal=False, max_episode_steps=steps)

    def goals(self):
        env = self.open()
        count = int(env.unwrapped.num_tasks)
        env.close()
        return count

    def make(self, render=None, training=False):
        options = {} if self.time_limit is None else {"max_episode_steps": self.time_limit}
        return Commanded(self.open(**options, **({"render_mode": render} if render else {})), self.goal)


@task_reader("maze")
def read_maze(name: str) -> Maze:
    """A point maze of ours with commanded goals: maze:small, maze:medium, maze:large, maze:corridor"""
    if name not in MAZES:
        raise UserError(f"task 'maze:{name}': accepted: {', '.join(f'maze:{m}' for m in MAZES)}")
    return Maze(maze=name)


@task_reader("ogbench")
def read_ogbench(name: str) -> OGBench:
    """An environment of OGBench with commanded goals: ogbench:pointmaze-medium-v0, ogbench:antmaze-large-v0"""
    return OGBench(id=name)
