"""The README's table of methods is the registry's, with the verdicts that lie in reproductions/."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent


def test_the_method_table_is_generated():
    made = subprocess.run([sys.executable, "-m", "volvelle.cli", "methods", "--markdown"], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    assert made in (HERE / "README.md").read_text(), "run `volvelle methods --markdown` and put its output between the README's markers"
