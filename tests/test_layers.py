"""The import contracts of pyproject.toml hold, and each of them would notice a violation."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SOURCE, child_environment

ROOT = Path(__file__).parents[1]
NAMES = ["Wings stand on what is below them", "Methods are imported by methods only", "Planning does without language", "Offline does without language",
         "Curriculum does without language", "Planning outside its methods is arrays only"]


def lint(source: Path, cwd: Path) -> subprocess.CompletedProcess:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd,
                          env=child_environment() | {"PYTHONPATH": str(source)})


def test_contracts_hold():
    found = lint(SOURCE, ROOT)
    assert found.returncode == 0, found.stdout
    assert [n for n in NAMES if f"{n} KEPT" in found.stdout] == NAMES


@pytest.mark.parametrize("module, line, broken", [
    ("core/files.py", "from volvelle.language import records", NAMES[0]),
    ("core/errors.py", "from volvelle import cli", NAMES[0]),
    ("language/records.py", "from volvelle import control", NAMES[0]),
    ("language/loop.py", "from volvelle.language.methods import grpo", NAMES[1]),
    ("planning/tasks.py", "from volvelle.language import slots", NAMES[2]),
    ("offline/tasks.py", "from volvelle.language import slots", NAMES[3]),
    ("planning/tasks.py", "import torch", NAMES[5]),
    ("curriculum/tasks.py", "from volvelle.language import slots", NAMES[4]),
    ("control/tasks.py", "from volvelle.curriculum import families", NAMES[0]),
])
def test_contract_notices(tmp_path, module, line, broken):
    shutil.copytree(SOURCE / "volvelle", tmp_path / "volvelle", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "volvelle" / module
    path.write_text(path.read_text() + f"\n{line}\n")
    found = lint(tmp_path, tmp_path)
    assert found.returncode == 1
    assert f"{broken} BROKEN" in found.stdout
