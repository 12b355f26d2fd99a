"""Families of environments: one Gymnasium environment whose parameters (its context) vary over ranges.

A family is a control task like any other: trained on as it is, every episode draws a context uniformly (the multi-task baseline). A teacher
may draw instead, `task(context)` holds one fixed, and `OverContexts` plays one policy in many of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, Protocol

import gymnasium as gym
import numpy as np
from pydantic import Field

from volvelle.control.envs import Envs
from volvelle.control.evaluation import Evaluator
from volvelle.control.slots import ControlTask
from volvelle.control.tasks import Gym
from volvelle.core.errors import UserError, unknown
from volvelle.core.parts import part
from volvelle.core.tasks import Task, TaskFamily, task_reader


class Chooses(Protocol):
    """Who draws the contexts of training episodes and hears how they went."""

    def sample(self) -> np.ndarray: ...

    def update(self, context: np.ndarray, result: float) -> None: ...


@part("family")
class Family(ControlTask, TaskFamily):
    """An environment whose parameters vary.

    ranges: parameter -> (low, high); a parameter is a number the environment keeps under that name (dots and list indices lead further:
    model.opt.gravity.2), or anything, if the environment has a method set_context(dict). points: contexts per parameter on the grid where
    policies are tested. worst, best: returns that count as 0 and 1. reveal: the context, scaled to [-1, 1], joins the observation. context:
    parameters held fixed; empty, every episode draws them.
    """

    base: Task = Gym()
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    points: Annotated[int, Field(gt=1)] = 24
    worst: float | None = None
    best: float | None = None
    reveal: bool = False
    context: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.base, ControlTask):
            raise UserError(f"task.base={self.base.label()}: belongs to the {self.base.wing} wing; expected an environment, for example Pendulum-v1")
        if not self.ranges:
            raise UserError(f"family of {self.base.label()}: no ranges; give at least one parameter, for example family:Pendulum-v1?l=0.3..2.2")
        self.check_space()
        for name in self.context:
            if name not in self.ranges:
                raise unknown("context", name, self.ranges)
        if (self.worst is None) != (self.best is None) or (self.worst is not None and self.worst >= self.best):
            raise UserError(f"family of {self.base.label()}: worst={self.worst}, best={self.best}; expected both, with worst < best, or none")

    def space(self):
        return self.ranges

    def label(self):
        fixed = ",".join(f"{k}={v:.4g}" for k, v in self.context.items())
        return f"{self.base.label()}({fixed or ','.join(self.ranges)})"

    @property
    def bounds(self) -> np.ndarray:
        """[2, d]: lows, highs."""
        return np.array(list(self.ranges.values())).T

    def grid(self) -> np.ndarray:
        """[points ** d, d]: the contexts where policies are tested; the first parameter varies slowest."""
        axes = [np.linspace(low, high, self.points) for low, high in self.ranges.values()]
        return np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], -1)

    def task(self, context: Any) -> "Family":
        """The family with its context fixed: a dict, or numbers [d] in the order of the ranges."""
        named = dict(context) if isinstance(context, dict) else dict(zip(self.ranges, map(float, context), strict=True))
        return self.replace(context=named)

    def score(self, returns: np.ndarray) -> np.ndarray:
        """Returns scaled so that worst is 0 and best is 1, cut to that range. UserError without worst and best."""
        if self.worst is None:
            raise UserError(f"family {self.label()}: needs returns that count as 0 and 1; give task.worst and task.best")
        return np.clip((np.asarray(returns) - self.worst) / (self.best - self.worst), 0.0, 1.0)

    def make(self, render=None, training=False):
        return Varying(self.base.make(render, training), self)


class Varying(gym.Wrapper):
    """Sets the context before every reset: the fixed one, the teacher's, or a uniform draw. `info["context"]` says which."""

    def __init__(self, env: gym.Env, family: Family):
        super().__init__(env)
        self.family, self.rng, self.teacher, self.total = family, None, None, 0.0
        self.names = list(family.ranges)
        self.low, self.high = family.bounds
        self.fixed = {self.names.index(k): v for k, v in family.context.items()}
        self.current = (self.low + self.high) / 2
        for name in self.names:
            if not hasattr(env.unwrapped, "set_context"):
                _find(env.unwrapped, name, family.base.label())
        if family.reveal:
            space = env.observation_space
            if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
                raise UserError(f"task.reveal=true: joins the context to a vector of numbers; {family.base.label()} has {space}")
            ends = np.ones(len(self.names), space.dtype)
            self.observation_space = gym.spaces.Box(np.concatenate([space.low, -ends]), np.concatenate([space.high, ends]), dtype=space.dtype)

    def fix(self, context: Sequence[float]) -> None:
        self.fixed = dict(enumerate(map(float, context)))

    def _seen(self, observation):
        if not self.family.reveal:
            return observation
        return np.concatenate([observation, 2 * (self.current - self.low) / (self.high - self.low) - 1]).astype(self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        if seed is not None or self.rng is None:
            self.rng = np.random.default_rng(None if seed is None else [seed, 1])
        if self.teacher is not None:
            self.current = np.asarray(self.teacher.sample(), float)
        elif len(self.fixed) < len(self.names):
            self.current = self.rng.uniform(self.low, self.high)
        for i, value in self.fixed.items():
            self.current[i] = value
        set_context(self.env.unwrapped, dict(zip(self.names, self.current.tolist())), self.family.base.label())
        self.total = 0.0
        observation, info = self.env.reset(seed=seed, options=options)
        return self._seen(observation), {**info, "context": self.current.copy()}

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.total += float(reward)
        if self.teacher is not None and (terminated or truncated):
            self.teacher.update(self.current.copy(), self.total)
        return self._seen(observation), reward, terminated, truncated, info


def _find(env: Any, path: str, label: str) -> tuple[Any, str | int]:
    """The object (or array) that holds the number called `path`, and its key there."""
    *way, last = path.split(".")
    at = env
    try:
        for word in way:
            at = at[int(word)] if word.isdigit() else getattr(at, word)
        key = int(last) if last.isdigit() else last
        number = at[key] if isinstance(key, int) else getattr(at, key)
        float(number)
    except (AttributeError, IndexError, TypeError, ValueError):
        held = [k for k in dir(env) if not k.startswith("_") and type(getattr(env, k, None)) in (int, float)]
        raise unknown("parameter", path, held, f" of {label}") from None
    return at, key


def set_context(env: Any, context: dict[str, float], label: str) -> None:
    """Give an (unwrapped) environment its parameters, and recompute what it derives from them."""
    if hasattr(env, "set_context"):
        env.set_context(context)
        return
    for name, value in context.items():
        at, key = _find(env, name, label)
        if isinstance(key, int):
            at[key] = value
        else:
            setattr(at, key, value)
    if hasattr(env, "polemass_length"):  # CartPole computes these once, when it is made
        env.total_mass, env.polemass_length = env.masspole + env.masscart, env.masspole * env.length


def varying(envs: Envs) -> list[Varying]:
    """The wrappers that set contexts, one per environment copy."""
    if not hasattr(envs.base, "envs"):
        raise UserError("workers: contexts are set from this process; accepted: workers=0")
    found = []
    for env in envs.base.envs:
        while not isinstance(env, Varying):
            env = env.env
        found.append(env)
    return found


class OverContexts(Evaluator):
    """Plays `episodes` in each of the contexts [N, d] with an actor's best actions; `returns` gives the mean return in each, [N]."""

    def __init__(self, family: Family, contexts: np.ndarray, episodes: int = 4, report=lambda line: None):
        super().__init__(family, 1, episodes * len(contexts), report=report, copies=len(contexts))
        for wrapper, context in zip(varying(self.envs), contexts, strict=True):
            wrapper.fix(context)

    def returns(self, actor: Any, seed: int) -> np.ndarray:
        """The same seed meets the same episodes."""
        self(actor, seed)
        rows = np.array([row for row, *_ in self.envs.finished])
        return np.bincount(rows, [r for _, r, _ in self.envs.finished], self.envs.rows) / np.bincount(rows, minlength=self.envs.rows)


@task_reader("family")
def read_family(text: str) -> Family:
    """One environment with parameters that vary: family:Pendulum-v1?l=0.3..2.2&m=0.5..2 (then task.worst and task.best for scores)"""
    name, sign, query = text.partition("?")
    ranges = {}
    for piece in query.split("&") if sign else ():
        found = re.fullmatch(r"([\w.]+)=([^.\s]*(?:\.\d+)?(?:e[+-]?\d+)?)\.\.(\S+)", piece)
        try:
            ranges[found[1]] = (float(found[2]), float(found[3]))
        except (TypeError, ValueError):
            raise UserError(f"task family:{text}: {piece!r} is no range; expected parameter=low..high, for example l=0.3..2.2") from None
    return Family(base=name, ranges=ranges)
