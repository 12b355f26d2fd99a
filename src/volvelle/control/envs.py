"""Vectorised environments: stepping, same-step resets, the checks that turn a broken environment into one clear line.

Gymnasium's vector environments reset on the step after an end by default, which inserts a step with no meaning into every loop that does
not know it. Here every vector environment resets on the same step and hands out the true final observation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from volvelle.core.errors import RunStopped, UserError

from .encoding import Vocabulary, encoded
from .slots import ControlTask, Shaper
from .spaces import Spec

Arrays = np.ndarray | dict[str, np.ndarray]
UNKNOWN_LIMIT = 10_000  # steps after which an episode without any declared limit is suspected to have no end


def each(function, value: Any, *more: Any) -> Any:
    """Apply to an array, or to every entry of a dict of arrays."""
    if isinstance(value, dict):
        return {k: function(v, *(m[k] for m in more)) for k, v in value.items()}
    return function(value, *more)


def open_env(task: ControlTask, render: str | None = None, training: bool = False, vocabulary: Vocabulary | None = None) -> tuple[gym.Env, Spec]:
    """One encoded environment of a task, and what agents must know of it."""
    env = task.make(render, training)
    if not isinstance(env, gym.Env):
        raise UserError(f"task {task.label()}: makes a {type(env).__name__}; expected a gymnasium.Env")
    for name in ("observation_space", "action_space"):
        if not isinstance(getattr(env, name, None), gym.Space):
            raise UserError(f"task {task.label()}: its {name} is {getattr(env, name, None)!r}; expected a Gymnasium space")
    return encoded(env, vocabulary)


def probe(task: ControlTask, vocabulary: Vocabulary | None = None) -> Spec:
    """Open, reset and step once; returns the spec. UserError in one line if the environment breaks Gymnasium's contract."""
    env, spec = open_env(task, None, True, vocabulary)
    where = f"task {task.label()}"
    try:
        try:
            found = env.reset(seed=0)
        except Exception as error:
            raise UserError(f"{where}: reset(seed=0) raised {type(error).__name__}: {first_line(error)}") from error
        if not (isinstance(found, tuple) and len(found) == 2):
            raise UserError(f"{where}: reset returned {type(found).__name__}; expected (observation, info)")
        block = Blocks(env.observation_space, 1)
        try:
            block.put(0, found[0])
            if strange := block.strange():
                raise ValueError(f"holds {strange}")
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: the first observation {first_line(error)}") from None
        env.action_space.seed(0)
        try:
            found = env.step(env.action_space.sample())
        except Exception as error:
            raise UserError(f"{where}: step raised {type(error).__name__}: {first_line(error)}") from error
        if not (isinstance(found, tuple) and len(found) == 5):
            raise UserError(f"{where}: step returned {f'{len(found)} values' if isinstance(found, tuple) else type(found).__name__}; "
                            "expected (observation, reward, terminated, truncated, info)")
        try:
            reward = float(found[1])
        except (TypeError, ValueError):
            raise UserError(f"{where}: step returned the reward {found[1]!r}; expected one number") from None
        if not np.isfinite(reward):
            raise UserError(f"{where}: step returned the reward {reward}")
    finally:
        env.close()
    return spec


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Blocks:
    """One preallocated array per part of an observation, a row per environment; rows are checked when they are put."""

    def __init__(self, space: gym.Space, n: int):
        found = space.spaces if isinstance(space, gym.spaces.Dict) else {"": space}
        self.arrays = {k: np.zeros((n, *s.shape), np.float32 if s.dtype.kind == "f" else s.dtype) for k, s in found.items()}
        self.shapes = {k: s.shape for k, s in found.items()}
        self.plain = self.arrays.get("") if list(found) == [""] else None
        self.shape = self.shapes.get("")

    def put(self, i: int, value: Any) -> None:
        if self.plain is not None:
            if getattr(value, "shape", None) != self.shape:
                value = self._array(value, self.shape)
            self.plain[i] = value
            return
        for k, array in self.arrays.items():
            array[i] = self._array(value[k], self.shapes[k])

    @staticmethod
    def _array(value: Any, shape) -> np.ndarray:
        array = np.asarray(value)
        if array.shape != shape:
            raise ValueError(f"has shape {array.shape}; the space says {shape}")
        return array

    def strange(self) -> str:
        """"nan" or "inf" if a number is not finite, with the row it stands in; else empty."""
        for array in self.arrays.values():
            if array.dtype.kind == "f" and not np.isfinite(array.sum()) and not np.isfinite(array).all():
                return f"{array[~np.isfinite(array)][0]}"
        return ""

    @property
    def value(self) -> Arrays:
        return self.plain if self.plain is not None else self.arrays


class Serial(SyncVectorEnv):
    """Gymnasium's synchronous vector environment with same-step resets, on preallocated arrays.

    `keys` names numbers of the environments' info that `step` returns as arrays [n, ...]; other info is not gathered. The arrays it
    returns are overwritten by the next call. `resting` environments are not stepped.
    """

    def __init__(self, makers: Sequence, keys: Sequence[str] = ()):
        super().__init__(makers, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        self.keys, self.blocks, n = tuple(keys), Blocks(self.single_observation_space, len(self.envs)), len(self.envs)
        self.rewards, self.terminated, self.truncated = np.zeros(n, np.float32), np.zeros(n, bool), np.zeros(n, bool)
        self.resting = [False] * n
        self.at = 0

    def reset(self, *, seed=None, options=None):
        seeds = seed if isinstance(seed, list) else [None if seed is None else seed + i for i in range(self.num_envs)]
        for i, env in enumerate(self.envs):
            self.at = i
            self.blocks.put(i, env.reset(seed=seeds[i], options=options)[0])
        return self.blocks.value, {}

    def step(self, actions):
        put, rewards, terminated, truncated = self.blocks.put, self.rewards, self.terminated, self.truncated
        finals, seen = None, []
        for i, (env, action) in enumerate(zip(self.envs, actions)):
            if self.resting[i]:
                rewards[i], terminated[i], truncated[i] = 0.0, False, False
                seen.append([0.0] * len(self.keys))
                continue
            self.at = i
            observation, rewards[i], over, cut, info = env.step(action)
            terminated[i], truncated[i] = over, cut
            if self.keys:
                seen.append([info[k] for k in self.keys])
            if over or cut:
                if finals is None:
                    finals = np.full(self.num_envs, None, dtype=object)
                finals[i] = observation
                observation = env.reset()[0]
            put(i, observation)
        infos: dict[str, Any] = {k: np.array([s[j] for s in seen], np.float32) for j, k in enumerate(self.keys)}
        if finals is not None:
            infos["final_obs"] = finals
        return self.blocks.value, rewards, terminated, truncated, infos


class Envs:
    """S x N environments of a task with everything a learner asks of them. Rows are seed-major: seed s has rows s N ... s N + N - 1.

    `step` returns (observations, rewards, terminated, truncated); `finals` then holds (row, final observation) of every ended episode,
    `infos` the declared info arrays, and `finished` gathers (row, return, length) of ended episodes until somebody empties it.
    """

    def __init__(self, task: ControlTask, seeds: int, count: int, *, training: bool = False, keys: Sequence[str] = (), shapers: Sequence[Shaper] = (),
                 workers: int = 0, vocabulary: Vocabulary | None = None, report=lambda line: None):
        self.task, self.seeds, self.count, self.rows = task, seeds, count, seeds * count
        self.report, self.vocabulary = report, vocabulary if vocabulary is not None else Vocabulary()
        sample, self.spec = open_env(task, vocabulary=self.vocabulary)
        self.limit = time_limit(sample)
        sample.close()
        makers = [lambda: open_env(task, None, training, self.vocabulary)[0]] * self.rows
        try:
            if workers:
                self.check_workers(keys)
                self.vector = AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
            else:
                self.vector = Serial(makers, keys)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"task {task.label()}: {first_line(error)}") from error
        self.base = self.vector
        for shaper in shapers:
            self.vector = shaper.wrap(self.vector)
        self.keys = tuple(keys)
        actions = self.spec.actions
        self.low, self.high = (np.array(a, np.float32) for a in (actions.low, actions.high)) if actions.low else (None, None)
        self.checks = Blocks(self.base.single_observation_space, self.rows)
        self.finals: list[tuple[int, Any]] = []
        self.infos: dict[str, np.ndarray] = {}
        self.finished: list[tuple[int, float, int]] = []
        self.returns, self.lengths = np.zeros(self.rows), np.zeros(self.rows, np.int64)
        self.warned = False

    def check_workers(self, keys) -> None:
        if keys or self.spec.observations.categorical:
            raise UserError("workers > 0 cannot share string observations or gather info; accepted: workers=0")

    def _failed(self, error: Exception, what: str) -> RunStopped:
        row = getattr(self.base, "at", 0)
        place = f"copy {row % self.count} of seed {row // self.count}, step {int(self.lengths[row]) + 1} of its episode"
        if isinstance(error, KeyError) and self.keys and error.args and error.args[0] in self.keys:
            return RunStopped(f"environment {self.task.label()}: its info holds no {error.args[0]!r}, which a relabel needs ({place})", intact=True)
        verb = "returned an observation that" if isinstance(error, ValueError) and "the space says" in str(error) else f"{what} raised {type(error).__name__}:"
        return RunStopped(f"environment {self.task.label()}: {verb} {first_line(error)} ({place})", intact=True)

    def reset(self, numbers: Sequence[int]) -> Arrays:
        """Start new episodes everywhere; `numbers` seed the rows."""
        self.returns[:], self.lengths[:] = 0, 0
        self.finals, self.infos = [], {}
        try:
            observations, _ = self.vector.reset(seed=[int(n) for n in numbers])
        except Exception as error:
            raise self._failed(error, "reset") from error
        self._finite(observations, None)
        return observations

    def step(self, actions: np.ndarray) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray]:
        """actions: [rows, ...]; continuous parts are clipped to the bounds here, and only here."""
        if self.low is not None:
            d = len(self.low)
            if actions.shape[-1] == d:
                actions = np.clip(actions, self.low, self.high)
            else:
                actions = np.concatenate([np.clip(actions[:, :d], self.low, self.high), actions[:, d:]], -1)
        elif self.base is self.vector and actions.ndim == 1:
            actions = actions.tolist()
        try:
            observations, rewards, terminated, truncated, infos = self.vector.step(actions)
        except Exception as error:
            raise self._failed(error, "step") from error
        self._finite(observations, rewards)
        self.returns += rewards
        self.lengths += 1
        self.infos = {k: infos[k] for k in self.keys}
        self.finals = []
        if "final_obs" in infos:
            for row in np.flatnonzero(terminated | truncated):
                final = infos["final_obs"][row]
                self.finals.append((int(row), final))
                self.finished.append((int(row), float(self.returns[row]), int(self.lengths[row])))
                self.returns[row], self.lengths[row] = 0.0, 0
        elif self.limit is None and not self.warned and self.lengths[0] > UNKNOWN_LIMIT:
            self.warned = True
            self.report(f"note: an episode of {self.task.label()} has run for more than {UNKNOWN_LIMIT} steps and declares no time limit; set task.time_limit")
        return observations, rewards, terminated, truncated

    def _finite(self, observations: Arrays, rewards: np.ndarray | None) -> None:
        found = observations.values() if isinstance(observations, dict) else [observations]
        for array in found:
            if array.dtype.kind == "f" and not np.isfinite(array.sum()) and not np.isfinite(array).all():
                row = int(np.argwhere(~np.isfinite(array))[0][0])
                raise self._strange("an observation", array[row][~np.isfinite(array[row])][0], row)
        if rewards is not None and not np.isfinite(rewards.sum()):
            row = int(np.argwhere(~np.isfinite(rewards))[0][0])
            raise self._strange("a reward", rewards[row], row)

    def _strange(self, what: str, value: float, row: int) -> RunStopped:
        return RunStopped(f"environment {self.task.label()}: returned {what} of {value} (copy {row % self.count} of seed {row // self.count}, "
                          f"step {int(self.lengths[row]) + 1} of its episode)", intact=True)

    def rest(self, rows: np.ndarray | None = None) -> None:
        """Leave these rows ([rows] bool; None: no row) alone until told otherwise. Worker processes step them anyway."""
        if isinstance(self.base, Serial):
            self.base.resting = [False] * self.rows if rows is None else rows.tolist()

    def pull(self) -> tuple[dict[str, float], list[list[float]]]:
        """Metrics of the episodes that ended since the last call, and their returns per seed."""
        ended, self.finished = self.finished, []
        returns = [[r for row, r, _ in ended if row // self.count == s] for s in range(self.seeds)]
        if not ended:
            return {}, returns
        return {"return": float(np.mean([r for _, r, _ in ended])), "length": float(np.mean([n for _, _, n in ended])), "episodes": float(len(ended))}, returns

    def close(self) -> None:
        self.vector.close()


def time_limit(env: gym.Env) -> int | None:
    """The declared length of an episode, if there is one."""
    layer = env
    while layer is not None:
        if isinstance(layer, gym.wrappers.TimeLimit):
            return layer._max_episode_steps
        layer = getattr(layer, "env", None)
    return env.spec.max_episode_steps if env.spec is not None else None


def numbers_for(seed: int, step: int, rows: int, purpose: str = "training") -> list[int]:
    """Reset seeds of one seed's environments: a function of seed, step and purpose alone, so that a resumed run resets as an unbroken one."""
    return np.random.SeedSequence([seed, step, *purpose.encode()]).generate_state(rows).tolist()
