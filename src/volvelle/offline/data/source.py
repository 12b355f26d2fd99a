"""From what stands on disk to a Dataset: raw episodes, the checks they must pass, and their encoding.

Every layout's reader yields raw episodes; the same checks serve `volvelle data check` (which lists every fault) and training (which refuses
at the first). A fault names the episode and the field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from volvelle.control.encoding import encode_rows
from volvelle.control.spaces import Actions, Layout, Spec
from volvelle.core.errors import UserError

from .dataset import Dataset

Raw = dict[str, Any]
"""observations (array [T + 1, ...] or a nest of them), actions, terminations, truncations [T, ...], rewards [T] if recorded, and "extras": name -> array
with T or T + 1 rows."""
MIXED = 10.0  # a gap of this factor between the largest actions of episodes says that they are in other units


@dataclass
class Source:
    """A dataset on disk. `episodes()` reads it once; `notes` tell what the reader had to assume; measured: the bounds of the
    actions were not declared but taken from the data."""

    path: str
    layout: str
    observation_space: gym.Space
    action_space: gym.Space
    episodes: Callable[[], Iterator[Raw]]
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    measured: bool = False


@dataclass(frozen=True)
class Fault:
    """Something wrong with an episode (None: with the whole) in a field."""

    episode: int | None
    field: str
    what: str

    def __str__(self) -> str:
        return ("" if self.episode is None else f"episode {self.episode}, ") + f"field {self.field!r}: {self.what}"


def leaves(space: gym.Space, value: Any, name: str) -> Iterator[tuple[gym.Space, Any, str]]:
    """The arrays of an observation or action with their spaces and names."""
    if isinstance(space, gym.spaces.Dict):
        for k, s in space.spaces.items():
            yield from leaves(s, value.get(k) if isinstance(value, dict) else None, f"{name}/{k}")
    elif isinstance(space, gym.spaces.Tuple):
        for k, s in enumerate(space.spaces):
            yield from leaves(s, value[k] if isinstance(value, (tuple, list)) and k < len(value) else None, f"{name}/{k}")
    else:
        yield space, value, name


def _array(space: gym.Space, value: Any, name: str, rows: int, episode: int) -> Iterator[Fault]:
    """Faults of one array of an episode."""
    if value is None:
        yield Fault(episode, name, "is missing")
        return
    shape = np.shape(value)
    wanted = () if space.shape is None else tuple(space.shape)
    if shape[:1] != (rows,):
        yield Fault(episode, name, f"has {shape[0] if shape else 'no'} rows; expected {rows}")
    elif not isinstance(space, gym.spaces.Text) and shape[1:] != wanted:
        yield Fault(episode, name, f"has rows of shape {shape[1:]}; expected {wanted}")
    else:
        yield from strange(value, name, episode)


def strange(value: Any, name: str, episode: int) -> Iterator[Fault]:
    """NaN and infinity."""
    array = np.asarray(value)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0]
        yield Fault(episode, name, f"holds {array[tuple(where)]} at step {int(where[0])}")


def episode_faults(raw: Raw, index: int, source: Source) -> Iterator[Fault]:
    """Everything wrong with one episode by itself."""
    steps = len(raw["terminations"]) if raw.get("terminations") is not None else None
    for key in ("terminations", "truncations"):
        if raw.get(key) is None:
            yield Fault(index, key, "is missing")
    if steps is None or raw.get("truncations") is None:
        return
    if not steps:
        yield Fault(index, "terminations", "the episode has no steps")
        return
    if np.shape(raw["truncations"]) != (steps,):
        yield Fault(index, "truncations", f"has shape {np.shape(raw['truncations'])}; expected ({steps},)")
        return
    ends = np.asarray(raw["terminations"], bool) | np.asarray(raw["truncations"], bool)
    if not ends[-1]:
        yield Fault(index, "terminations", "the last step neither terminates nor truncates the episode")
    if ends[:-1].any():
        yield Fault(index, "terminations", f"the episode goes on after its end at step {int(np.flatnonzero(ends)[0])}")
    for space, value, name in leaves(source.observation_space, raw["observations"], "observations"):
        yield from _array(space, value, name, steps + 1, index)
    for space, value, name in leaves(source.action_space, raw["actions"], "actions"):
        bad = list(_array(space, value, name, steps, index))
        yield from bad or _outside(space, np.asarray(value), name, index)
    if raw.get("rewards") is not None:
        if np.shape(raw["rewards"]) != (steps,):
            yield Fault(index, "rewards", f"has shape {np.shape(raw['rewards'])}; expected ({steps},)")
        else:
            yield from strange(raw["rewards"], "rewards", index)
    for name, value in raw.get("extras", {}).items():
        if np.shape(value)[:1] not in ((steps,), (steps + 1,)):
            yield Fault(index, name, f"has {np.shape(value)[0] if np.shape(value) else 'no'} rows; expected {steps} or {steps + 1}")
        else:
            yield from strange(value, name, index)


def _outside(space: gym.Space, value: np.ndarray, name: str, index: int) -> Iterator[Fault]:
    if isinstance(space, gym.spaces.Box):
        slack = 1e-4 * np.maximum(1.0, np.where(np.isfinite(space.high), np.abs(space.high), 1.0))
        out = (value < space.low - slack) | (value > space.high + slack)
        if out.any():
            where = tuple(np.argwhere(out)[0])
            yield Fault(index, name, f"holds {value[where]:.4g} at step {int(where[0])}, outside [{space.low.min():g}, {space.high.max():g}]: "
                                     "actions of another range are mixed in, or the bounds are wrong")
    elif isinstance(space, gym.spaces.Discrete):
        out = (value < space.start) | (value >= space.start + space.n)
        if out.any():
            yield Fault(index, name, f"holds {int(value[out][0])}; expected {space.start} to {space.start + space.n - 1}")


def _mixed(sizes: list[float]) -> Iterator[Fault]:
    """Two groups of episodes whose largest actions are an order of magnitude apart: a gap in their sorted sizes."""
    order = np.argsort(sizes)
    ranked = np.array(sizes)[order]
    ranked, order = ranked[ranked > 0], order[ranked > 0]
    gaps = ranked[1:] / ranked[:-1]
    if len(gaps) and gaps.max() > MIXED:
        cut = int(gaps.argmax()) + 1
        few, many = (order[:cut], order[cut:]) if cut <= len(order) - cut else (order[cut:], order[:cut])
        i = int(few.min())
        yield Fault(i, "actions", f"reaches {sizes[i]:.4g} where other episodes reach {sizes[int(many.min())]:.4g}: action ranges are mixed")


def unsure(source: Source) -> bool:
    """Whether nothing declares how large actions may be."""
    return isinstance(source.action_space, gym.spaces.Box) and (source.measured or not source.action_space.is_bounded())


def faults(source: Source) -> Iterator[Fault]:
    """Everything wrong with a dataset, episode by episode, then across episodes."""
    sizes, count, clean = [], 0, True
    for index, raw in enumerate(source.episodes()):
        count += 1
        found = list(episode_faults(raw, index, source))
        clean = clean and not found
        yield from found
        if not found and unsure(source):
            sizes.append(float(np.abs(raw["actions"]).max()))
    if not count:
        yield Fault(None, "terminations", "there are no episodes")
    elif clean and sizes:
        yield from _mixed(sizes)


def read(source: Source) -> Dataset:
    """The dataset in memory. UserError at the first fault: nothing is repaired or left out."""
    parts: dict[str, list[np.ndarray]] = {}
    lengths: list[int] = []
    sizes: list[float] = []
    observations, actions, spec, goal = _spaces(source)
    for index, raw in enumerate(source.episodes()):
        for fault in episode_faults(raw, index, source):
            raise UserError(f"dataset {source.path}: {fault}; see all with: volvelle data check {source.path}")
        steps = len(raw["terminations"])
        row: dict[str, np.ndarray] = {}
        found = encode_rows(observations, raw["observations"]["observation"] if goal else raw["observations"])
        row |= {"obs": found} if spec.observations.single else {f"obs/{k}": v for k, v in found.items()}
        row["actions"] = np.asarray(raw["actions"], spec.actions.dtype) - (int(actions.start) if isinstance(actions, gym.spaces.Discrete) else 0)
        if raw.get("rewards") is not None:
            row["rewards"] = np.asarray(raw["rewards"], np.float32)
        row["terminated"], row["truncated"] = (np.asarray(raw[k], np.float32) for k in ("terminations", "truncations"))
        if goal:
            row |= {k: np.asarray(raw["observations"][k], np.float32) for k in ("achieved_goal", "desired_goal")}
        for name, value in raw.get("extras", {}).items():
            value = np.asarray(value)
            row[name] = value.astype(np.float32) if value.dtype == np.float64 else value
        if parts and (odd := set(row) ^ set(parts)):
            raise UserError(f"dataset {source.path}: {Fault(index, min(odd), 'is there in some episodes only')}")
        for name, value in row.items():
            if name in parts and value.shape[1:] != parts[name][0].shape[1:]:
                raise UserError(f"dataset {source.path}: {Fault(index, name, f'has rows of shape {value.shape[1:]}; earlier episodes {parts[name][0].shape[1:]}')}")
            parts.setdefault(name, []).append(value)
        lengths.append(steps)
        if unsure(source):
            sizes.append(float(np.abs(row["actions"]).max()))
    if not lengths:
        raise UserError(f"dataset {source.path}: {Fault(None, 'terminations', 'there are no episodes')}")
    for fault in _mixed(sizes):
        raise UserError(f"dataset {source.path}: {fault}; see all with: volvelle data check {source.path}")
    states = frozenset(k for k, v in parts.items() if len(v[0]) == lengths[0] + 1)
    fields = {k: np.concatenate([x if k in states else np.concatenate([x, np.zeros((1, *x.shape[1:]), x.dtype)]) for x in parts.pop(k)]) for k in list(parts)}
    return Dataset(fields, np.array(lengths, np.int64), spec, states, observations, actions, {"path": source.path, "layout": source.layout, **source.meta})


def _spaces(source: Source) -> tuple[gym.Space, gym.Space, Spec, bool]:
    """The encoded observation space, the action space, the spec, and whether observations come with goals of Gymnasium-Robotics' form."""
    space = source.observation_space
    goal = isinstance(space, gym.spaces.Dict) and {"observation", "achieved_goal", "desired_goal"} <= set(space.spaces)
    space = space["observation"] if goal else space
    actions = source.action_space
    simple = isinstance(actions, gym.spaces.Discrete) or (isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1) or (
        isinstance(actions, gym.spaces.MultiDiscrete) and actions.nvec.ndim == 1 and not actions.start.any())
    if not simple:
        raise UserError(f"dataset {source.path}: actions of {actions} are not supported; accepted: Box with one axis, Discrete, MultiDiscrete")
    return space, actions, Spec(Layout.of(encode_rows(space, None)), Actions.of(actions)), goal
