"""Small things that many tests need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import volvelle
from volvelle.core.files import read_lines
from volvelle.core.state import fingerprint, load_state
from volvelle.core.trainer import checkpoints

SOURCE = Path(volvelle.__file__).parents[1]
TESTS = Path(__file__).parent


def child_environment(**changes) -> dict[str, str]:
    """The environment for a fresh Python that sees this source tree and the test helpers."""
    paths = [str(SOURCE), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"} | changes


def python(code: str, *arguments: str, cwd: Path | None = None, **environment) -> subprocess.CompletedProcess:
    """Run code in a fresh Python and wait for it."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
                          env=child_environment(**environment))


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a run's log without what depends on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_lines(Path(folder) / name)]


def last_state(folder: Path) -> dict:
    """Everything in the last checkpoint."""
    return load_state(checkpoints(Path(folder))[-1])


def final_state(folder: Path) -> str:
    """A digest of everything in the last checkpoint."""
    return fingerprint(last_state(folder))


def stop_at(number: int):
    """A progress callback that breaks a run off at a step, as a user's Ctrl-C does."""

    def stop(step, steps, metrics):
        if step == number:
            raise KeyboardInterrupt

    return stop


def same_run(one: Path, other: Path) -> None:
    """Two finished runs are equal: every weight, optimiser moment, part state and random state, every metric and every sample, bit for bit."""
    assert rows(one) == rows(other)
    assert rows(one, "samples.jsonl") == rows(other, "samples.jsonl")
    assert fingerprint(last_state(one)) == fingerprint(last_state(other))
    a, b = (json.loads((f / "result.json").read_text()) for f in (Path(one), Path(other)))
    assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
