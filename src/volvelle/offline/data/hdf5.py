"""D4RL's layout: one HDF5 file with flat arrays, episodes ending where `terminals` or `timeouts` is set."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from volvelle.core.errors import UserError

from .dataset import Dataset
from .source import Raw, Source


@functools.cache
def h5py_module() -> Any:
    try:
        import h5py
    except ImportError:
        raise UserError("HDF5 datasets need the package h5py; pip install 'volvelle[offline]'") from None
    return h5py


def bounds_of(actions: np.ndarray) -> tuple[gym.Space, bool]:
    """An action space for arrays that come without one, and whether its bounds were measured: [-1, 1] if that holds all, else the data's own range."""
    if actions.dtype.kind in "iu":
        return gym.spaces.Discrete(int(actions.max()) + 1), True
    largest = np.nanmax(np.abs(actions), 0) if len(actions) else np.ones(actions.shape[1:])
    if (largest <= 1 + 1e-4).all():
        return gym.spaces.Box(-1, 1, actions.shape[1:], np.float32), False
    high = np.where(np.isfinite(largest), largest, np.inf).astype(np.float32)
    return gym.spaces.Box(-high, high, dtype=np.float32), True


def source(path: Path) -> Source:
    try:
        with h5py_module().File(path, "r") as file:
            arrays = {k: file[k][()] for k in ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations") if k in file}
            others = {k: v for k, v in file.items() if k not in arrays} | (dict(file["infos"].items()) if "infos" in file else {})
            extras = {k: v[()] for k, v in others.items() if hasattr(v, "dtype") and v.ndim}
    except OSError as error:
        raise UserError(f"dataset {path}: cannot be read as HDF5 ({error})") from None
    if lost := [k for k in ("observations", "actions", "terminals") if k not in arrays]:
        raise UserError(f"dataset {path}: field {lost[0]!r} is missing; D4RL's layout has observations, actions, rewards, terminals and timeouts")
    rows = len(arrays["observations"])
    for name, value in (arrays | extras).items():
        if len(value) != rows:
            raise UserError(f"dataset {path}: field {name!r} has {len(value)} rows; observations has {rows}")
    terminals = arrays["terminals"].astype(bool).reshape(-1)
    timeouts = arrays["timeouts"].astype(bool).reshape(-1) if "timeouts" in arrays else np.zeros(rows, bool)
    if not (terminals | timeouts).any():
        raise UserError(f"dataset {path}: field 'terminals': nothing marks an end of an episode (neither terminals nor timeouts)")
    notes = []
    if not (terminals | timeouts)[-1]:
        notes.append("the file ends within an episode; its end counts as a cut")
        timeouts[-1] = True
    ends = np.flatnonzero(terminals | timeouts)
    cut = int((~terminals[ends]).sum())
    if "next_observations" not in arrays and cut:
        notes.append(f"no next_observations: the last row of each of {cut} cut episodes gives the final observation only (as D4RL's own loaders do)")
    if "next_observations" not in arrays and len(ends) > cut:
        notes.append("no next_observations: the final observation of a terminated episode is unknown; its last one is repeated (it is never bootstrapped)")
    observations = arrays["observations"]
    space = gym.spaces.Box(-np.inf, np.inf, observations.shape[1:], np.float32)
    action_space, measured = bounds_of(arrays["actions"])

    def episodes() -> Iterator[Raw]:
        for first, end in zip(np.concatenate([[0], ends[:-1] + 1]), ends):
            known, over = "next_observations" in arrays, bool(terminals[end])
            steps = slice(first, end + 1 if known or over else end)
            final = arrays["next_observations"][end : end + 1] if known else observations[end : end + 1]
            count = steps.stop - steps.start
            last = np.arange(count) == count - 1
            yield {"observations": np.concatenate([observations[steps], final]), "actions": arrays["actions"][steps],
                   "rewards": arrays["rewards"][steps].reshape(-1) if "rewards" in arrays else None, "terminations": last & over, "truncations": last & (not over),
                   "extras": {k: v[steps] for k, v in extras.items()}}

    return Source(str(path), "d4rl", space, action_space, episodes, {}, notes, measured)


def write(data: Dataset, path: Path) -> Path:
    """Flat arrays with next_observations, so that no final observation is lost. Only for vector observations."""
    if not data.spec.observations.single:
        raise UserError(f"{path}: D4RL's layout holds one observation array; this dataset has {data.spec.observations.describe()}; accepted: minari")
    rows = data.rows
    names = {"obs": "observations", "terminated": "terminals", "truncated": "timeouts"}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with h5py_module().File(temporary, "w") as file:
        for name, values in data.fields.items():
            value = values[rows]
            key = names.get(name, name if name in ("actions", "rewards") else f"infos/{name}")
            file.create_dataset(key, data=value.astype(bool) if key in ("terminals", "timeouts") else value, compression="gzip")
        file.create_dataset("next_observations", data=data.fields["obs"][rows + 1], compression="gzip")
    temporary.replace(path)
    return path
