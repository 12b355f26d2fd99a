"""Tasks of the control wing: any Gymnasium id, Atari games, and environments made by the user."""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import re
from dataclasses import field
from typing import Annotated, Any, ClassVar

import gymnasium as gym
import numpy as np
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import Call, Part, part
from volvelle.core.tasks import Task, task_fallback, task_reader

from .envs import first_line
from .slots import ControlTask

# namespace -> package that registers it; MinAtar must be told to
PACKAGES = {"MinAtar": "minatar", "ALE": "ale_py", "MiniGrid": "minigrid", "BabyAI": "minigrid"}


def register(name: str) -> None:
    """Import the package that registers the ids of a namespace ("MinAtar/Breakout-v1")."""
    space = name.partition("/")[0] if "/" in name else name.partition("-")[0]
    package = PACKAGES.get(space)
    if package is None:
        return
    if importlib.util.find_spec(package) is None:
        raise UserError(f"task {name!r} needs the package {package!r}, which is not installed")
    module = importlib.import_module(package)
    if package == "minatar":
        if not any(i.startswith("MinAtar/") for i in gym.registry):
            importlib.import_module("minatar.gym").register_envs()
    elif package == "ale_py":
        gym.register_envs(module)


@part("gym")
class Gym(ControlTask):
    """An environment of Gymnasium's registry, by its id.

    kwargs: passed to gymnasium.make; time_limit: steps per episode (None: what the id declares); frames: stack that many last images;
    unit_actions: the policy's continuous actions lie in [-1, 1] and are stretched to the environment's bounds.
    """

    id: str = "CartPole-v1"
    kwargs: dict[str, Any] = field(default_factory=dict)
    time_limit: Annotated[int, Field(gt=0)] | None = None
    frames: Annotated[int, Field(ge=1)] = 1
    unit_actions: bool = False

    def label(self):
        return self.id.rpartition(":")[2]

    def make(self, render=None, training=False):
        register(self.id)
        try:
            env = gym.make(self.id, render_mode=render, max_episode_steps=self.time_limit, disable_env_checker=True, **self.kwargs)
        except gym.error.DependencyNotInstalled as error:
            raise UserError(f"task {self.label()}: {first_line(error)}") from error
        except gym.error.Error as error:
            raise UserError(f"task {self.label()}: {first_line(error)}") from error
        except TypeError as error:
            raise UserError(f"task.kwargs={self.kwargs}: {first_line(error)}") from error
        env = self.stretched(env)
        return gym.wrappers.FrameStackObservation(env, self.frames) if self.frames > 1 else env

    def stretched(self, env: gym.Env) -> gym.Env:
        """With unit_actions, the environment behind actions in [-1, 1]."""
        if not self.unit_actions:
            return env
        space = env.action_space
        if not isinstance(space, gym.spaces.Box) or not space.is_bounded():
            raise UserError(f"task.unit_actions=true: needs continuous actions with finite bounds; {self.label()} has {space}")
        return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


@part("atari")
class Atari(Gym):
    """An Atari game with the usual preprocessing: up to 30 no-ops, every 4th frame (maximum of the last two), 84x84 grey, 4 frames.

    FIRE is pressed where the game waits for it. While training, an episode is a life and rewards are cut to their sign.
    """

    id: str = "ALE/Pong-v5"
    frames: Annotated[int, Field(ge=1)] = 4

    def make(self, render=None, training=False):
        register(self.id)
        try:
            env = gym.make(self.id, render_mode=render, frameskip=1, repeat_action_probability=0.0, disable_env_checker=True, **self.kwargs)
            env = gym.wrappers.AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=84, grayscale_obs=True)
        except gym.error.Error as error:
            raise UserError(f"task {self.label()}: {first_line(error)}") from error
        if self.time_limit:
            env = gym.wrappers.TimeLimit(env, self.time_limit)
        env = self.stretched(env)
        if training:
            env = gym.wrappers.TransformReward(Lives(env), np.sign)
        if "FIRE" in env.unwrapped.get_action_meanings():
            env = FireReset(env)
        return gym.wrappers.FrameStackObservation(env, self.frames)


class Lives(gym.Wrapper):
    """Ends an episode at the loss of a life; the game itself goes on until it is over."""

    over, lives = True, 0

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        left = self.env.unwrapped.ale.lives()
        self.over, lost, self.lives = terminated or truncated, 0 < left < self.lives, left
        return observation, reward, terminated or lost, truncated, info

    def reset(self, *, seed=None, options=None):
        if self.over or seed is not None:
            observation, info = self.env.reset(seed=seed, options=options)
        else:
            observation, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                observation, info = self.env.reset(seed=seed, options=options)
        self.over, self.lives = False, self.env.unwrapped.ale.lives()
        return observation, info


class FireReset(gym.Wrapper):
    """Presses FIRE after a reset and after the loss of a life, for games that wait for it."""

    lives = 0

    def fire(self):
        return self.env.step(self.env.unwrapped.get_action_meanings().index("FIRE"))

    def reset(self, *, seed=None, options=None):
        self.env.reset(seed=seed, options=options)
        observation, _, terminated, truncated, info = self.fire()
        if terminated or truncated:
            observation, info = self.env.reset(seed=seed, options=options)
        self.lives = self.env.unwrapped.ale.lives()
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        left = self.env.unwrapped.ale.lives()
        if left < self.lives and not (terminated or truncated):
            observation, more, terminated, truncated, info = self.fire()
            reward += more
        self.lives = left
        return observation, reward, terminated, truncated, info


# ---------------------------------------------------------------------------------------------- environments made by the user

class Maker(Part):
    """Slot: a function without required arguments that makes a Gymnasium environment."""

    slot: ClassVar[str] = "maker"
    call: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_function(cls, function, call):
        return function


@part("env")
class Made(ControlTask):
    """An environment made by a function or class of yours: `env:module:function`.

    make_env: the function, with its keyword-only arguments as fields; time_limit: steps per episode (None: only the environment ends it).
    """

    make_env: Maker = None  # type: ignore[assignment]
    time_limit: Annotated[int, Field(gt=0)] | None = None

    def label(self):
        return self.make_env.part_name.rpartition(":")[2].replace("<", "").replace(">", "")

    def make(self, render=None, training=False):
        maker = self.make_env.start(None)
        try:
            env = maker()
        except Exception as error:
            raise UserError(f"task {self.label()}: making the environment raised {type(error).__name__}: {first_line(error)}") from error
        if render is not None and getattr(env, "render_mode", None) != render:
            raise UserError(f"task {self.label()}: its environment has render_mode={getattr(env, 'render_mode', None)!r}; "
                            f"to watch or record it, make it with render_mode={render!r}")
        return gym.wrappers.TimeLimit(env, self.time_limit) if self.time_limit and isinstance(env, gym.Env) else env


@task_reader("env")
def read_env(text: str) -> Made:
    """An environment made by your function: env:my_module:make (a function or class without required arguments)"""
    if ":" not in text:
        raise UserError(f"task 'env:{text}': expected env:module:function")
    return Made(make_env=Call(text).bound(Maker))


@task_fallback("a Gymnasium id: CartPole-v1, HalfCheetah-v5, MinAtar/Breakout-v1, ALE/Pong-v5, module:Name-v0")
def read_id(text: str) -> Gym | None:
    """Any environment of Gymnasium's registry, by its id (MinAtar, MiniGrid and ALE are registered when installed)"""
    try:
        register(text)
        module, sign, name = text.rpartition(":")
        if sign:
            if module.split(".")[0] and importlib.util.find_spec(module.split(".")[0]) is None:
                return None
            importlib.import_module(module)
        gym.spec(name)
    except (gym.error.NameNotFound, gym.error.NamespaceNotFound):
        if not re.search(r"-v\d+$", text):
            return None
        near = difflib.get_close_matches(text, list(gym.registry), n=3, cutoff=0.75)
        if near:
            raise UserError(f"unknown task {text!r}; did you mean {' or '.join(near)}? accepted: {read_id.accepts}") from None
        return None
    except gym.error.Error as error:
        raise UserError(f"task {text!r}: {first_line(error)}") from error
    except ImportError:
        return None
    return (Atari if text.startswith("ALE/") else Gym)(id=text)


def from_environment(value: Any) -> ControlTask | None:
    """A task from an environment object or class: a registered one by its id, any other by copies of it."""
    if isinstance(value, type) and issubclass(value, gym.Env):
        return Made(make_env=_named(lambda: value(), value.__qualname__))
    if callable(value) and not isinstance(value, (type, Part, gym.Env)):
        return Made(make_env=value)
    if not isinstance(value, gym.Env):
        return None
    if value.spec is not None and value.spec.id in gym.registry and not value.spec.additional_wrappers:
        return Gym(id=value.spec.id, kwargs={k: v for k, v in value.spec.kwargs.items() if k != "render_mode"}, time_limit=value.spec.max_episode_steps)
    return Made(make_env=_named(lambda: copy.deepcopy(value), type(value.unwrapped).__name__))


def _named(function, name: str):
    """A function that exists only inside the program, called by what it makes."""
    function.__qualname__ = f"<{name}>"
    return function


Task.converters.append(from_environment)
