"""Observations as categories: what a tree should test for equality instead of order."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from volvelle.core.errors import UserError
from volvelle.core.parts import coerce, part
from volvelle.core.tasks import Task, task_reader

from .encoding import LARGEST, Coded
from .slots import ControlTask


def _whole(space: gym.Space) -> bool:
    return isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)) or (isinstance(space, spaces.Box) and space.dtype.kind in "iu")


def _coded(space: gym.Space, name: str = "observation") -> gym.Space:
    """The space with every whole-number part (Discrete, MultiDiscrete, MultiBinary, integer Box) as categories."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({k: _coded(s, f"{name}/{k}") for k, s in space.spaces.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_coded(s, f"{name}/{i}") for i, s in enumerate(space.spaces)])
    if not _whole(space):
        return space
    if isinstance(space, spaces.Box):
        spread = np.asarray(space.high, np.int64).reshape(-1) - np.asarray(space.low, np.int64).reshape(-1) + 1
        if spread.max() > LARGEST:
            raise UserError(f"{name} has {spread.max()} whole numbers per entry; as categories accepted: up to {LARGEST}")
        return Coded(spread)
    return Coded(np.atleast_1d(space.n) if isinstance(space, spaces.Discrete) else
                 space.nvec.reshape(-1) if isinstance(space, spaces.MultiDiscrete) else np.full(int(np.prod(space.shape)), 2))


def _codes(space: gym.Space, value: Any) -> Any:
    if isinstance(space, spaces.Dict):
        return {k: _codes(s, value[k]) for k, s in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_codes(s, v) for s, v in zip(space.spaces, value, strict=True))
    if not _whole(space):
        return value
    first = space.low if isinstance(space, spaces.Box) else getattr(space, "start", 0)
    return (np.asarray(value, np.int64) - np.asarray(first, np.int64)).reshape(-1)


class Categories(gym.ObservationWrapper):
    """Whole-number observations become categories, one column each. Strings are categories already; real numbers stay numbers.

    Learners see the codes as numbers in the columns that `Spec.observations.categorical` names; boosted trees test those for equality.
    UserError if nothing in the observation is a category.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = _coded(env.observation_space)
        if not (_has(self.observation_space, Coded) or _has(self.observation_space, spaces.Text)):
            raise UserError(f"categories: the observation {env.observation_space} holds only real numbers; accepted: Discrete, MultiDiscrete, MultiBinary, "
                            "boxes of whole numbers, Text")

    def observation(self, observation):
        return _codes(self.env.observation_space, observation)


def _has(space: gym.Space, kind: type) -> bool:
    inner = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces if isinstance(space, spaces.Tuple) else ()
    return isinstance(space, kind) or any(_has(s, kind) for s in inner)


@part("categories")
class CategoriesTask(ControlTask):
    """Another task, with its whole-number observations as categories: `categories:FrozenLake-v1`."""

    base: Task = None  # type: ignore[assignment]

    def label(self):
        return f"categories:{self.base.label()}"

    def make(self, render=None, training=False):
        return Categories(self.base.make(render, training))


@task_reader("categories")
def read_categories(text: str) -> CategoriesTask:
    """A control task with its whole-number observations as categories: categories:FrozenLake-v1"""
    base = coerce(Task, text, "task")
    if not isinstance(base, ControlTask):
        raise UserError(f"task categories:{text}: {base.label()} belongs to the {base.wing} wing; expected an environment")
    return CategoriesTask(base=base)
