"""Collecting datasets: a behaviour acts in a task at a named level of quality.

Tasks with rewards (levels in the sense of D4RL, arXiv 2004.07219): "random", "expert" (the behaviour as it is), "medium" (so often random that the
return lies half-way between the two), "medium-replay" (every episode with its own share of random actions, from medium's to one, as a replay
buffer would hold), "mixed" (the same, from a tenth to one), and mixtures of them by share of steps: "expert:0.1+random:0.9", with "medium-expert" for half and half.
Tasks with goals (OGBench, arXiv 2410.20092): "navigate" and "play" (one goal after the other, noisy), "stitch" (short episodes to near goals), "explore"
(random directions, strong noise); "random" too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from volvelle.control.encoding import encoded
from volvelle.control.envs import UNKNOWN_LIMIT, open_env, time_limit
from volvelle.control.slots import ControlTask
from volvelle.control.spaces import Spec
from volvelle.core.errors import UserError

from ..behaviours import Behaviour, Walker, random_action
from ..commands import GoalTask, own_numbers
from .dataset import Dataset, mix

LEVELS = ("random", "medium", "medium-replay", "mixed", "expert", "medium-expert")
GOAL_LEVELS = ("navigate", "play", "stitch", "explore", "random")


@dataclass
class Setting:
    """How an episode is played: the share of steps that are random, Gaussian noise in units of half the action range, and its length."""

    share: float = 0.0
    noise: float = 0.0
    length: int | None = None


def parse(quality: str, goals: bool) -> list[tuple[str, float]]:
    """The levels of a quality with their shares of the steps."""
    quality = {"medium-expert": "medium:0.5+expert:0.5"}.get(quality, quality)
    accepted = GOAL_LEVELS if goals else LEVELS
    found = []
    for word in quality.split("+"):
        level, _, share = word.partition(":")
        if level not in accepted or level == "medium-expert":
            raise UserError(f"quality={quality!r}: {level!r} is not a level of {'goal ' if goals else ''}tasks; accepted: {', '.join(accepted)}, and mixtures such as {accepted[-2]}:0.1+random:0.9")
        try:
            found.append((level, float(share) if share else 1.0))
        except ValueError:
            raise UserError(f"quality={quality!r}: {share!r} is not a share; expected LEVEL:SHARE, for example expert:0.1+random:0.9") from None
    if len(found) > 1 and abs(sum(s for _, s in found) - 1) > 1e-6 or any(s <= 0 for _, s in found):
        raise UserError(f"quality={quality!r}: the shares must be positive and add up to 1")
    return found


def collect(task: ControlTask, behaviour: Behaviour, quality: str = "expert", steps: int = 10_000, seed: int = 0, length: int | None = None,
            noise: float | None = None) -> Dataset:
    """About `steps` steps (whole episodes, the last one cut) of a behaviour at a quality.

    length: steps per episode of goal data [200, stitch 50]; noise: their action noise [0.2, explore 1.0]. The same arguments give the same data.
    """
    goals = isinstance(task, GoalTask)
    rng = np.random.default_rng([seed, *b"collect"])
    parts = parse(quality, goals)
    made = []
    for level, share in parts:
        count = round(steps * (share if len(parts) > 1 else 1.0))
        made.append(_goal_level(task, behaviour, level, count, rng, length, noise) if goals else _level(task, behaviour, level, count, rng))
    data = made[0] if len(made) == 1 else mix([(d, 1.0) for d in made], rng)
    data.meta = {k: v for k, v in made[0].meta.items() if k not in ("quality", "noise")} | {"quality": quality, "seed": seed}
    return data


def _goal_level(task, behaviour, level, steps, rng, length, noise) -> Dataset:
    setting = Setting(0.0, 0.2 if noise is None else noise, length or 200)
    if level == "random":
        setting = Setting(1.0, 0.0, length or 200)
    elif isinstance(behaviour, Walker) and level == "stitch":
        behaviour, setting.length = Walker(hops=behaviour.hops or 4), length or 50
    elif isinstance(behaviour, Walker) and level == "explore":
        behaviour, setting.noise = Walker(wander=behaviour.wander or 10), 1.0 if noise is None else noise
    elif level == "stitch":
        setting.length = length or 50
    elif level == "explore":
        setting.noise = 1.0 if noise is None else noise
    env, spec = encoded(task.bare())
    return play(task, env, spec, behaviour, lambda: setting, steps, rng)


def _level(task, behaviour, level, steps, rng) -> Dataset:
    env, spec = open_env(task)
    choose = lambda: Setting(0.0)  # noqa: E731
    if level == "random":
        choose = lambda: Setting(1.0)  # noqa: E731
    elif level == "mixed":
        choose = lambda: Setting(float(rng.uniform(0.1, 1.0)))  # noqa: E731
    elif level != "expert":
        medium = calibrate(task, env, spec, behaviour, rng)
        choose = (lambda: Setting(medium)) if level == "medium" else (lambda: Setting(float(rng.uniform(medium, 1.0))))
    return play(task, env, spec, behaviour, choose, steps, rng)


def calibrate(task: ControlTask, env: gym.Env, spec: Spec, behaviour: Behaviour, rng: np.random.Generator, episodes: int = 10, rounds: int = 6) -> float:
    """The share of random actions whose mean return lies half-way between that of the behaviour and of random actions (bisection)."""
    def mean(share: float) -> float:
        return float(play(task, env, spec, behaviour, lambda: Setting(share), None, rng, episodes).returns().mean())

    best, worst = mean(0.0), mean(1.0)
    low, high = 0.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        if (mean(middle) - worst) / (best - worst or 1.0) > 0.5:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def play(task: ControlTask, env: gym.Env, spec: Spec, behaviour: Behaviour, choose, steps: int | None, rng: np.random.Generator, episodes: int | None = None) -> Dataset:
    """Episodes until there are `steps` steps (the last one is cut there) or `episodes` episodes. `choose()` gives every episode's setting.

    A pilot may have random actions of its own (`random(obs)`); else they are uniform over the action space.
    """
    limit, columns, lengths = time_limit(env), _Columns(spec), []
    pilot = behaviour.pilot(task, env, spec, rng)
    chance = getattr(pilot, "random", lambda obs: random_action(spec, rng))
    left = steps if steps is not None else np.inf
    scale = (np.array(spec.actions.high) - np.array(spec.actions.low)) / 2 if spec.actions.low and spec.actions.bounded else 1.0
    while left > 0 and (episodes is None or len(lengths) < episodes):
        setting, t = choose(), 0
        if hasattr(pilot, "begin"):
            pilot.begin()
        with own_numbers(rng):
            obs, _ = env.reset(seed=int(rng.integers(2**31)))
        over = cut = False
        while not (over or cut):
            action = chance(obs) if rng.random() < setting.share else pilot(obs)
            if setting.noise and spec.actions.low:
                action = np.clip(action + rng.normal(0, setting.noise, np.shape(action)) * scale, spec.actions.low, spec.actions.high).astype(np.float32)
            following, reward, over, cut, _ = env.step(action if np.ndim(action) else int(action))
            t, left = t + 1, left - 1
            cut = not over and bool(cut or left <= 0 or (setting.length is not None and t >= setting.length) or (limit is None and setting.length is None and t >= UNKNOWN_LIMIT))
            columns.step(obs, action, reward, over, cut)
            obs = following
        columns.final(obs)
        lengths.append(t)
    if limit is None and lengths and max(lengths) >= UNKNOWN_LIMIT:
        raise UserError(f"task {task.label()}: an episode did not end in {UNKNOWN_LIMIT} steps; set task.time_limit")
    return columns.dataset(lengths, env, spec, task, behaviour)


class _Columns:
    """Rows of a dataset in the making."""

    def __init__(self, spec: Spec):
        self.obs: list[Any] = []
        self.rest: dict[str, list] = {k: [] for k in ("actions", "rewards", "terminated", "truncated")}
        self.spec = spec

    def step(self, obs, action, reward, over, cut) -> None:
        self.obs.append({k: np.copy(v) for k, v in obs.items()} if isinstance(obs, dict) else np.copy(obs))
        for name, value in zip(self.rest, (action, reward, over, cut), strict=True):
            self.rest[name].append(value)

    def final(self, obs) -> None:
        self.obs.append({k: np.copy(v) for k, v in obs.items()} if isinstance(obs, dict) else np.copy(obs))
        for name, values in self.rest.items():
            values.append(np.zeros(self.spec.actions.shape, self.spec.actions.dtype) if name == "actions" else 0)

    def dataset(self, lengths, env, spec, task, behaviour) -> Dataset:
        from volvelle.core.parts import to_config

        if isinstance(self.obs[0], dict):
            fields = {f"obs/{k}": np.stack([o[k] for o in self.obs]) for k in self.obs[0]}
        else:
            fields = {"obs": np.stack(self.obs)}
        fields = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in fields.items()}
        fields["actions"] = np.stack(self.rest["actions"]).astype(spec.actions.dtype)
        fields |= {k: np.array(self.rest[k], np.float32) for k in ("rewards", "terminated", "truncated")}
        if isinstance(task, GoalTask):
            del fields["rewards"]  # nothing was commanded
        space, actions = env.observation_space, env.action_space
        if isinstance(space, gym.spaces.Box) and space.dtype == np.float64:
            space = gym.spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
        if isinstance(actions, gym.spaces.Box) and actions.dtype != np.float32:
            actions = gym.spaces.Box(actions.low.astype(np.float32), actions.high.astype(np.float32), dtype=np.float32)
        meta: dict[str, Any] = {"env": to_config(task), "collected": to_config(behaviour)}
        if env.spec is not None and not isinstance(task, GoalTask):
            meta["env_spec"] = env.spec.to_json()
        return Dataset(fields, np.array(lengths, np.int64), spec, frozenset(k for k in fields if k.startswith("obs")), space, actions, meta)
