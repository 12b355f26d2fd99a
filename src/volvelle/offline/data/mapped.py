"""A layout for data larger than memory: one .npy file per field, mapped and never read as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from volvelle.control.spaces import Spec
from volvelle.core.errors import UserError
from volvelle.core.files import directory

from .dataset import Dataset
from .source import Raw, Source
from .spaces import restore_space, space_data

INDEX = "dataset.json"


def write(data: Dataset, path: Path) -> Path:
    with directory(path) as folder:
        for i, (name, values) in enumerate(data.fields.items()):
            np.save(folder / f"field-{i}.npy", values)
        np.save(folder / "lengths.npy", data.lengths)
        (folder / INDEX).write_text(json.dumps({
            "fields": list(data.fields), "states": sorted(data.states), "spec": data.spec.data(), "meta": data.meta,
            "observation_space": space_data(data.observation_space), "action_space": space_data(data.action_space)}, indent=2), encoding="utf-8")
    return path


def open_mapped(path: Path) -> Dataset:
    """The dataset with its fields mapped copy-on-write: rows are read from disk as they are sampled, and nothing is written back.

    Episodes are not read here, so they are not checked again: they were when the folder was made, and `volvelle data check` reads them all.
    """
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    try:
        lengths = np.load(path / "lengths.npy", allow_pickle=False)
        fields = {name: np.load(path / f"field-{i}.npy", mmap_mode="c", allow_pickle=False) for i, name in enumerate(index["fields"])}
    except (OSError, ValueError) as error:
        raise UserError(f"dataset {path}: {error}") from None
    rows = int((lengths + 1).sum())
    for name, values in fields.items():
        if len(values) != rows:
            raise UserError(f"dataset {path}: field {name!r} has {len(values)} rows; the episodes have {rows}")
    return Dataset(fields, lengths, Spec.from_data(index["spec"]), frozenset(index["states"]), restore_space(index["observation_space"]),
                   restore_space(index["action_space"]), index["meta"] | {"path": str(path), "layout": "mapped"}, mapped=True)


def source(path: Path) -> Source:
    data = open_mapped(path)

    def episodes():
        for episode in data:
            parts = {n.partition("/")[2]: episode.pop(n) for n in data.observation_names}
            raw: Raw = {"observations": parts[""] if "" in parts else parts, "actions": episode.pop("actions") + int(getattr(data.action_space, "start", 0) if data.spec.actions.plain else 0),
                        "rewards": episode.pop("rewards", None), "terminations": episode.pop("terminated") > 0, "truncations": episode.pop("truncated") > 0}
            yield raw | {"extras": episode}

    return Source(str(path), "mapped", data.observation_space, data.action_space, episodes, {k: v for k, v in data.meta.items() if k not in ("path", "layout")})
