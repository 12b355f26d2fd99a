"""Minari's layout on disk: a folder with metadata.json and main_data.hdf5, read and written with h5py alone.

What is written loads with the `minari` package (0.5); what it or anybody else wrote in the HDF5 form is read. Neither needs the package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from volvelle.core.errors import UserError
from volvelle.core.files import directory

from .dataset import Dataset
from .hdf5 import h5py_module
from .source import Raw, Source
from .spaces import restore_space, space_data

VERSION = "0.5.4"
METADATA, DATA = "metadata.json", "main_data.hdf5"
STRUCTURE = ("total_episodes", "total_steps", "data_format", "jpeg_encoding", "minari_version", "observation_space", "action_space", "dataset_size", "rewards_recorded")


def home(path: Path) -> Path | None:
    """The folder that holds the metadata: `path`, or `path`/data as Minari's own store has it."""
    return next((p for p in (path, path / "data") if (p / METADATA).is_file()), None)


def source(path: Path) -> Source:
    folder = home(path)
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"dataset {path}: {METADATA} is not JSON ({error})") from None
    if metadata.get("data_format", "hdf5") != "hdf5":
        raise UserError(f"dataset {path}: data_format={metadata['data_format']!r}; accepted: hdf5 (minari converts others: minari.load_dataset, then create_dataset_from_buffers)")
    if not (folder / DATA).is_file():
        raise UserError(f"dataset {path}: {DATA} is missing beside {METADATA}")
    spaces = [_space(metadata, kind, path) for kind in ("observation_space", "action_space")]
    jpeg = bool(metadata.get("jpeg_encoding", True))
    meta = {k: v for k, v in metadata.items() if k not in STRUCTURE and v is not None}

    def episodes() -> Iterator[Raw]:
        with h5py_module().File(folder / DATA, "r") as file:
            names = sorted((n for n in file if n.startswith("episode_")), key=lambda n: int(n.partition("_")[2]))
            for name in names:
                raw = _episode(file[name], spaces[0], spaces[1], jpeg)
                yield raw if metadata.get("rewards_recorded", True) else raw | {"rewards": None}

    return Source(str(path), "minari", *spaces, episodes, meta)


def _space(metadata: dict, kind: str, path: Path) -> gym.Space:
    if kind in metadata:
        text = metadata[kind]
        return restore_space(json.loads(text) if isinstance(text, str) else text)
    if "env_spec" not in metadata:
        raise UserError(f"dataset {path}: {METADATA} declares neither {kind} nor env_spec")
    return getattr(gym.make(gym.envs.registration.EnvSpec.from_json(metadata["env_spec"])), kind)


def _value(node: Any, space: gym.Space, jpeg: bool) -> Any:
    if isinstance(space, gym.spaces.Dict):
        return {k: _value(node[k], s, jpeg) if k in node else None for k, s in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(_value(node[f"_index_{i}"], s, jpeg) if f"_index_{i}" in node else None for i, s in enumerate(space.spaces))
    if jpeg and _is_image(space):
        import io

        from PIL import Image

        return np.stack([np.asarray(Image.open(io.BytesIO(np.asarray(frame, np.uint8).tobytes()))) for frame in node[()]])
    return node[()]


def _is_image(space: gym.Space) -> bool:
    """What Minari stores as JPEG: byte images of 32 by 32 and more."""
    return (isinstance(space, gym.spaces.Box) and len(space.shape) in (2, 3) and min(space.shape[:2]) >= 32 and space.dtype == np.uint8
            and bool((space.low == 0).all() and (space.high == 255).all()))


def _infos(group: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for key in group:
        if hasattr(group[key], "keys"):
            yield from _infos(group[key], f"{prefix}{key}/")
        elif group[key].dtype.kind in "fiub" and group[key].ndim:
            yield f"{prefix}{key}", group[key][()]


def _episode(group: Any, observations: gym.Space, actions: gym.Space, jpeg: bool) -> Raw:
    raw: Raw = {"observations": _value(group["observations"], observations, jpeg) if "observations" in group else None,
                "actions": _value(group["actions"], actions, jpeg) if "actions" in group else None}
    raw |= {k: group[k][()] if k in group else None for k in ("rewards", "terminations", "truncations")}
    extras = {name: value for name, value in _infos(group["infos"], "")} if "infos" in group else {}
    return raw | {"extras": extras}


# ---------------------------------------------------------------------------------------------- writing

def write(data: Dataset, path: Path, dataset_id: str | None = None) -> Path:
    """Write the layout; extra fields become `infos`. A dataset without rewards is written with zeros, and says so in its metadata."""
    h5py = h5py_module()
    meta = {k: v for k, v in data.meta.items() if k not in ("path", "layout")}
    with directory(path) as folder:
        with h5py.File(folder / DATA, "w", track_order=True) as file:
            for i, episode in enumerate(data):
                group = file.create_group(f"episode_{i}")
                group.attrs["id"], group.attrs["total_steps"] = i, int(data.lengths[i])
                for name, value in _stored(episode, data).items():
                    group.create_dataset(name, data=value, chunks=True, maxshape=(None, *value.shape[1:]))
        size = (folder / DATA).stat().st_size / 1e6
        known = {"total_episodes": len(data), "total_steps": data.steps, "data_format": "hdf5", "jpeg_encoding": False, "minari_version": VERSION,
                 "observation_space": json.dumps(space_data(data.observation_space)), "action_space": json.dumps(space_data(data.action_space)),
                 "dataset_id": dataset_id or meta.get("dataset_id") or f"volvelle/{path.name.lower()}-v0", "dataset_size": round(size, 3), "rewards_recorded": "rewards" in data.fields}
        (folder / METADATA).write_text(json.dumps(meta | known, indent=2), encoding="utf-8")
    return path


def _stored(episode: dict[str, np.ndarray], data: Dataset) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in episode.items():
        if name == "obs" or name.startswith("obs/"):
            found["observations" + name[3:]] = value
        elif name == "actions":
            start = int(data.action_space.start) if isinstance(data.action_space, gym.spaces.Discrete) else 0
            found["actions"] = value + start
        elif name in ("terminated", "truncated"):
            found[{"terminated": "terminations", "truncated": "truncations"}[name]] = value.astype(bool)
        elif name == "rewards":
            found["rewards"] = value
        else:
            found[f"infos/{name}"] = value
    found.setdefault("rewards", np.zeros(len(found["terminations"]), np.float32))
    return found
