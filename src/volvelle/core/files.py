"""Atomic files: everything is written under a temporary name and renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml


def cache_folder() -> Path:
    """Where things that can be made again are kept: $VOLVELLE_CACHE, or volvelle in the user's cache."""
    return Path(os.environ.get("VOLVELLE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "volvelle")


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON with sorted keys; NaN and infinity are refused, since JSON has no word for them."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def write_yaml(path: str | Path, value: Any) -> Path:
    return write_text(path, to_yaml(value))


def to_yaml(value: Any) -> str:
    """YAML in the order given, one field a line."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def read_yaml(path: str | Path) -> Any:
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


class directory:
    """Context manager: a folder that appears under its name only when the block ended well."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.aside = self.path.with_name(f".{self.path.name}.old")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.aside.exists():  # left by a kill
            shutil.rmtree(self.aside) if self.path.exists() else os.replace(self.aside, self.path)
        self.temporary = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}."))
        os.chmod(self.temporary, 0o755)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        if self.path.exists():
            os.replace(self.path, self.aside)
            os.replace(self.temporary, self.path)
            shutil.rmtree(self.aside)
        else:
            os.replace(self.temporary, self.path)


def read_lines(path: str | Path) -> list[dict]:
    """Read JSON lines. A last line cut off by a kill is left out: it was never completely written."""
    rows: list[dict] = []
    if not Path(path).exists():
        return rows
    text = Path(path).read_text(encoding="utf-8")
    for line in text.split("\n")[:-1]:  # not splitlines: a text may hold other line separators
        rows.append(json.loads(line))
    return rows


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
