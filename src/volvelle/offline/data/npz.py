"""OGBench's layout: one .npz of flat arrays in which every episode's last row is its final observation, marked in `terminals`."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np

from volvelle.core.errors import UserError

from .dataset import Dataset
from .hdf5 import bounds_of
from .source import Raw, Source


def source(path: Path) -> Source:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"dataset {path}: cannot be read as an .npz file of plain arrays ({error})") from None
    if lost := [k for k in ("observations", "actions", "terminals") if k not in arrays]:
        raise UserError(f"dataset {path}: field {lost[0]!r} is missing; OGBench's layout has observations, actions and terminals")
    rows = len(arrays["observations"])
    for name, value in arrays.items():
        if np.shape(value)[:1] != (rows,):
            raise UserError(f"dataset {path}: field {name!r} has shape {np.shape(value)}; observations has {rows} rows")
    ends = np.flatnonzero(arrays["terminals"] > 0)
    if not len(ends) or ends[-1] != rows - 1:
        raise UserError(f"dataset {path}: episode {len(ends)}, field 'terminals': the last row of the file is not marked as an end")
    observations = arrays["observations"]
    images = observations.dtype == np.uint8
    space = gym.spaces.Box(0 if images else -np.inf, 255 if images else np.inf, observations.shape[1:], np.uint8 if images else np.float32)
    action_space, measured = bounds_of(arrays["actions"])
    extras = [k for k in arrays if k not in ("observations", "actions", "terminals", "rewards", "terminated")]

    def episodes() -> Iterator[Raw]:
        for first, end in zip(np.concatenate([[0], ends[:-1] + 1]), ends):
            last = np.arange(end - first) == end - first - 1
            over = arrays["terminated"][first:end] > 0 if "terminated" in arrays else np.zeros(end - first, bool)
            yield {"observations": observations[first : end + 1], "actions": arrays["actions"][first:end],
                   "rewards": arrays["rewards"][first:end] if "rewards" in arrays else None, "terminations": over, "truncations": last & ~over,
                   "extras": {k: arrays[k][first : end + 1] for k in extras}}

    return Source(str(path), "ogbench", space, action_space, episodes, {}, [], measured)


def write(data: Dataset, path: Path) -> Path:
    """Flat arrays. OGBench's loader reads observations, actions, terminals (and qpos, qvel, button_states); rewards and the rest are added beside them."""
    if not data.spec.observations.single:
        raise UserError(f"{path}: OGBench's layout holds one observation array; this dataset has {data.spec.observations.describe()}; accepted: minari")
    terminals = np.zeros(len(data.fields["obs"]), bool)
    terminals[data.lasts] = True
    fields = {k: v for k, v in data.fields.items() if k not in ("obs", "truncated", "terminated")}
    if data.fields["terminated"].any():
        fields["terminated"] = data.fields["terminated"]
    temporary = path.with_name(f".{path.name}.tmp.npz")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(temporary, observations=data.fields["obs"], terminals=terminals, **fields)
    temporary.replace(path)
    return path
