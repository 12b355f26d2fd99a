"""Files appear whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from volvelle.core import files
from volvelle.core.files import directory, read_lines, write_json, write_text

WRITER = f"""
import importlib.util, itertools, resource, sys
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})  # by itself: it starts faster than the whole library
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
"""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_write_and_replace(tmp_path):
    path = write_text(tmp_path / "deep" / "a.txt", "one")
    assert path.read_text() == "one" and write_text(path, "two").read_text() == "two"
    assert names(path.parent) == ["a.txt"]
    assert os.stat(path).st_mode & 0o777 == 0o644


def test_failure_in_the_middle_leaves_the_old_file(tmp_path):
    """The disk really refuses: the process may write no file longer than 64 KiB."""
    path = write_text(tmp_path / "a.txt", "old")
    code = WRITER + """
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
files.write_text(sys.argv[1], "x" * 1_000_000)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 1 and "OSError" in done.stderr
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "fine until here \ud800")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1, "a": [1.5, None]}


def test_a_directory_appears_when_the_block_ends_well(tmp_path):
    target = tmp_path / "runs" / "best"
    with directory(target) as folder:
        (folder / "w").write_text("1")
        assert not target.exists()
    assert (target / "w").read_text() == "1"
    with pytest.raises(RuntimeError):
        with directory(target) as folder:
            (folder / "w").write_text("2")
            raise RuntimeError
    assert (target / "w").read_text() == "1" and names(tmp_path / "runs") == ["best"]
    with directory(target) as folder:
        (folder / "v").write_text("3")
    assert names(target) == ["v"] and names(tmp_path / "runs") == ["best"]


def test_a_kill_while_replacing_a_directory_does_not_block_the_next_time(tmp_path):
    """Killed after the old folder was moved aside, once with and once without the new one in place."""
    target, aside = tmp_path / "best", tmp_path / ".best.old"
    aside.mkdir()
    (aside / "w").write_text("0")
    for content in ("1", "2"):
        with directory(target) as folder:
            (folder / "w").write_text(content)
        assert (target / "w").read_text() == content
        assert names(tmp_path) == ["best"]
        aside.mkdir()
        (aside / "w").write_text("left over")


def test_readers_see_the_old_or_the_new_file_while_a_writer_is_killed(tmp_path):
    path = write_text(tmp_path / "a.txt", "a" * 100_000)
    code = WRITER + """
print("ready", flush=True)
for i in itertools.count():
    files.write_text(sys.argv[1], "ab"[i % 2] * 100_000)
"""
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            text = path.read_text()
            assert len(text) == 100_000 and len(set(text)) == 1
        child.send_signal(signal.SIGKILL)
        child.wait()
        text = path.read_text()
        assert len(text) == 100_000 and len(set(text)) == 1


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "text": "a\u2028b"}\n{"step": 3, "los')
    assert read_lines(path) == [{"step": 1}, {"step": 2, "text": "a\u2028b"}]

