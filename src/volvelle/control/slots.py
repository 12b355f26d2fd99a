"""The slots of the control wing: tasks, actors, agents, and the fittings that change rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from torch import Tensor

from volvelle.core.parts import Part
from volvelle.core.tasks import Task

from .spaces import Observation


class ControlTask(Task):
    """An environment to act in; higher returns are better.

    `make` gives one Gymnasium environment. render: None, "human" or "rgb_array"; training: with what only training should see (Atari's lives).
    info: names of numbers in the environment's `info` from which `measure` makes further metrics.
    """

    wing: ClassVar[str] = "control"
    metric: ClassVar[str] = "return"
    info: ClassVar[tuple[str, ...]] = ()

    def measure(self, ends: dict[str, np.ndarray]) -> dict[str, float]:
        """Further metrics of the evaluated episodes of one seed, from the numbers that `info` names, as they were at the episodes' ends ([episodes])."""
        return {}

    def make(self, render: str | None = None, training: bool = False) -> gym.Env:
        raise NotImplementedError


class Act(NamedTuple):
    """What an actor does: actions [S, N, ...], its memory, and what should be stored with the step, by name ([S, N, ...])."""

    actions: Tensor
    memory: Any = None
    extras: dict[str, Tensor] = {}


class Actor(Protocol):
    """Anything that acts. `memory` is the actor's own (None at the start); `explore` off means its best action."""

    def act(self, observations: Observation, memory: Any = None, explore: bool = False) -> Act: ...


class Agent(Actor, Protocol):
    """An actor that learns. `update(batch)` makes one gradient step of every part and returns numbers, still as tensors."""

    def update(self, batch: dict[str, Any]) -> dict[str, Tensor | float]: ...


@dataclass(frozen=True, eq=False)
class Relabel(Part):
    """Slot: changes stored transitions, for example their rewards.

    when: "store" (before a transition enters the buffer) or "sample" (on every sampled batch). The live object is called with the batch, a
    dict of named tensors [S, B, ...], and returns it; `update(buffer)` is called once per learner step and may learn from the buffer.
    info: names of numbers in the environment's `info` that it needs stored.
    """

    slot: ClassVar[str] = "relabel"
    call: ClassVar[tuple[str, ...]] = ("batch",)
    when: Literal["store", "sample"] = "sample"
    info: tuple[str, ...] = ()

    @classmethod
    def from_function(cls, function, call):
        return _FunctionRelabel(function)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


class _FunctionRelabel:
    """A plain function as a relabel of sampled batches."""

    when, info = "sample", ()

    def __init__(self, function):
        self.function = function

    def __call__(self, batch):
        return self.function(batch)


class Shaper(Part):
    """Slot: a wrapper of the vectorised environment, for shaping that remembers the episode. `wrap(envs)` returns a Gymnasium VectorWrapper.

    training_only: evaluation measures the unshaped return.
    """

    slot: ClassVar[str] = "shaper"
    training_only: ClassVar[bool] = True

    def wrap(self, envs: gym.vector.VectorEnv) -> gym.vector.VectorEnv:
        raise NotImplementedError
