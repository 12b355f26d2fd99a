"""Datasets by their path: which layout it is, reading, writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from volvelle.core.errors import UserError, unknown

from . import hdf5, mapped, minari, npz
from .dataset import Dataset
from .source import Source, read

LAYOUTS = {"minari": "a folder with metadata.json and main_data.hdf5", "d4rl": "an .hdf5 file", "ogbench": "an .npz file", "mapped": "a folder with dataset.json"}


def open_source(path: str | Path) -> Source:
    """The raw episodes that stand at a path, in whatever layout. UserError if there is no dataset."""
    path = Path(path).expanduser()
    if path.is_dir():
        if (path / mapped.INDEX).is_file():
            return mapped.source(path)
        if minari.home(path) is not None:
            return minari.source(path)
    elif path.is_file() and path.suffix in (".hdf5", ".h5"):
        return hdf5.source(path)
    elif path.is_file() and path.suffix == ".npz":
        return npz.source(path)
    raise UserError(f"dataset {str(path)!r}: " + ("not there" if not path.exists() else "not a dataset") + f"; accepted: {', '.join(LAYOUTS.values())}")


def open_dataset(path: str | Path, report: Callable[[str], None] = lambda line: None) -> Dataset:
    """The checked dataset at a path, in memory (mapped from disk in the mapped layout). `report` hears what the reader had to assume."""
    path = Path(path).expanduser()
    if path.is_dir() and (path / mapped.INDEX).is_file():
        return mapped.open_mapped(path)
    found = open_source(path)
    for note in found.notes:
        report(f"note: {path}: {note}")
    return read(found)


def layout_for(path: Path) -> str:
    """The layout that a name asks for by its ending: .npz, .hdf5, or a folder in Minari's layout."""
    return {".npz": "ogbench", ".hdf5": "d4rl", ".h5": "d4rl"}.get(path.suffix, "minari")


def write_dataset(data: Dataset, path: str | Path, layout: str | None = None) -> Path:
    """Write atomically; refuses to overwrite."""
    path = Path(path).expanduser()
    layout = layout_for(path) if layout is None else layout
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if path.exists():
        raise UserError(f"{path}: exists already; name another path, or delete it")
    writer = {"minari": minari.write, "d4rl": hdf5.write, "ogbench": npz.write, "mapped": mapped.write}[layout]
    return writer(data, path)
