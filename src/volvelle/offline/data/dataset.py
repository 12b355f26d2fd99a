"""Recorded episodes in memory, or mapped from disk: named fields, one row per observation.

An episode of T steps has T + 1 rows, because it has T + 1 observations; row t holds observation, action and reward of step t, and the last
row only the final observation. So the observation after row t is always row t + 1, and a goal or a subgoal is a row number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np

from volvelle.control.spaces import Spec
from volvelle.core.errors import UserError
from volvelle.core.files import digest

STANDARD = ("obs", "actions", "rewards", "terminated", "truncated")


@dataclass(eq=False)
class Dataset:
    """Episodes one behind the other.

    fields: name -> [N, ...], N = steps + episodes. "obs" (or "obs/PART" for observations of several parts), "actions", "terminated", "truncated"
    are always there, "rewards" if recorded; any other name is a field of the user's. states: the fields whose last row of an episode means
    something (observations). lengths: steps per episode. meta: where the data come from (plain values only).
    """

    fields: dict[str, np.ndarray]
    lengths: np.ndarray
    spec: Spec
    states: frozenset[str]
    observation_space: gym.Space
    action_space: gym.Space
    meta: dict[str, Any] = field(default_factory=dict)
    mapped: bool = False

    # ---- rows

    @cached_property
    def firsts(self) -> np.ndarray:
        """The first row of every episode, [E]."""
        return self.lasts - self.lengths

    @cached_property
    def lasts(self) -> np.ndarray:
        """The row of every episode's final observation, [E]."""
        return np.cumsum(self.lengths + 1) - 1

    @cached_property
    def episode_of(self) -> np.ndarray:
        """The episode of every row, [N]."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int64), self.lengths + 1)

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows that are steps (all but the final ones), [steps]."""
        steps = np.ones(self.lasts[-1] + 1, bool)
        steps[self.lasts] = False
        return np.flatnonzero(steps)

    @property
    def steps(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        """Episodes."""
        return len(self.lengths)

    # ---- fields

    @property
    def observation_names(self) -> list[str]:
        return [n for n in self.fields if n == "obs" or n.startswith("obs/")]

    @property
    def extras(self) -> list[str]:
        return [n for n in self.fields if n not in STANDARD and not n.startswith("obs/")]

    def require(self, who: str, *names: str) -> None:
        """UserError if a field is missing."""
        for name in names:
            if name not in self.fields:
                raise UserError(f"{who} needs the field {name!r}; dataset {self.label()} has {', '.join(self.fields)}")

    def label(self) -> str:
        return str(self.meta.get("dataset_id") or self.meta.get("path") or "in memory")

    def episode(self, i: int) -> dict[str, np.ndarray]:
        """One episode: fields that describe states with T + 1 rows, the others with T."""
        first, last = int(self.firsts[i]), int(self.lasts[i])
        return {name: values[first : last + 1 if name in self.states else last] for name, values in self.fields.items()}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.episode(i) for i in range(len(self)))

    def returns(self) -> np.ndarray:
        """Sum of rewards of every episode, [E]."""
        self.require("the return", "rewards")
        sums = np.concatenate([[0.0], np.cumsum(self.fields["rewards"], dtype=np.float64)])
        return sums[self.lasts] - sums[self.firsts]

    def take(self, episodes: np.ndarray) -> Dataset:
        """The given episodes, in that order."""
        rows = np.concatenate([np.arange(self.firsts[i], self.lasts[i] + 1) for i in episodes])
        return Dataset({k: np.asarray(v[rows]) for k, v in self.fields.items()}, self.lengths[episodes], self.spec, self.states,
                       self.observation_space, self.action_space, dict(self.meta))

    @cached_property
    def fingerprint(self) -> str:
        """A digest that tells datasets apart: sizes, field shapes, and up to 4096 rows of every field."""
        pick = np.linspace(0, self.lasts[-1], min(4096, self.lasts[-1] + 1)).astype(np.int64)
        words = [str(len(self)), str(self.steps)]
        for name in sorted(self.fields):
            values = self.fields[name]
            words += [name, str(values.dtype), str(values.shape), digest(np.ascontiguousarray(values[pick]).tobytes().hex())]
        return digest(" ".join(words))

    # ---- statistics

    def moments(self, name: str, block: int = 65536) -> tuple[np.ndarray, np.ndarray]:
        """Mean and (population) standard deviation over the steps of a field, float64; reads the rows in blocks."""
        values, total, squares = self.fields[name], 0.0, 0.0
        shift = np.asarray(values[0], np.float64)
        for start in range(0, len(self.rows), block):
            part = np.asarray(values[self.rows[start : start + block]], np.float64) - shift
            total, squares = total + part.sum(0), squares + np.square(part).sum(0)
        mean = total / self.steps
        return mean + shift, np.sqrt(np.maximum(squares / self.steps - np.square(mean), 0.0))

    def statistics(self) -> dict[str, Any]:
        """Sizes, lengths, returns, ends, and mean, deviation and range of every field, as plain numbers."""
        found: dict[str, Any] = {"episodes": len(self), "steps": self.steps, "length": _spread(self.lengths)}
        if "rewards" in self.fields:
            found["return"] = _spread(self.returns())
        found["terminated"] = int(self.fields["terminated"][self.rows].sum())
        found["truncated"] = int(self.fields["truncated"][self.rows].sum())
        table = {}
        for name, values in self.fields.items():
            if values.dtype.kind not in "fiu" or name in ("terminated", "truncated") or values.ndim > 2:
                table[name] = {"shape": list(values.shape[1:]), "dtype": str(values.dtype)}
                continue
            mean, std = self.moments(name)
            low, high = np.min(values[self.rows], 0), np.max(values[self.rows], 0)
            table[name] = {"shape": list(values.shape[1:]), "dtype": str(values.dtype), "mean": _numbers(mean), "std": _numbers(std), "min": _numbers(low), "max": _numbers(high)}
        return found | {"fields": table}


def _numbers(x: Any) -> Any:
    return json.loads(json.dumps(np.round(np.asarray(x, np.float64), 6).tolist()))


def _spread(x: np.ndarray) -> dict[str, float]:
    return {"mean": float(np.mean(x)), "min": float(np.min(x)), "median": float(np.median(x)), "max": float(np.max(x))}


def mix(parts: list[tuple[Dataset, float]], rng: np.random.Generator) -> Dataset:
    """Whole episodes of several datasets, shuffled. The number with each is the share of its episodes that is taken (drawn without return).

    UserError when observations, actions (also their bounds), rewards or extra fields differ.
    """
    first = parts[0][0]
    names = set(first.fields)
    taken = []
    for data, share in parts:
        if not 0 < share <= 1:
            raise UserError(f"mix: the share {share} of {data.label()} must be in (0, 1]")
        if (data.spec.observations, data.spec.actions) != (first.spec.observations, first.spec.actions):
            raise UserError(f"mix: {data.label()} has {data.spec.describe()}{_bounds(data)}; {first.label()} has {first.spec.describe()}{_bounds(first)}")
        if odd := set(data.fields) ^ names:
            raise UserError(f"mix: the field {min(odd)!r} is in one of {first.label()} and {data.label()} only")
        count = max(1, round(share * len(data)))
        taken.append(data.take(np.sort(rng.permutation(len(data))[:count])))
    lengths = np.concatenate([t.lengths for t in taken])
    whole = Dataset({k: np.concatenate([t.fields[k] for t in taken]) for k in first.fields}, lengths, first.spec, first.states,
                    first.observation_space, first.action_space, {k: v for k, v in first.meta.items() if k in ("env_spec", "env", "ref_min_score", "ref_max_score")})
    whole.meta["mixed_from"] = [f"{d.label()} x {s:g}" for d, s in parts]
    return whole.take(rng.permutation(len(whole)))


def _bounds(data: Dataset) -> str:
    a = data.spec.actions
    return f" in [{min(a.low):g}, {max(a.high):g}]" if a.low else ""
