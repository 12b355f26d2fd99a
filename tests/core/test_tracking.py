"""Trackers get every step's metrics through their own clients; one that does not start ends the run in one line."""

import importlib.util
import sqlite3

import pytest

import volvelle
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.files import read_lines
from volvelle.core.tracking import open_trackers


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [e.value for e in events.Scalars("env_steps")]


def trackio(folder):
    import json
    with sqlite3.connect(folder.parent / "trackio" / "volvelle.db") as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by step")]
    return [row["env_steps"] for row in rows]


def mlflow(folder):
    import mlflow as client
    run = client.search_runs(search_all_experiments=True, output_format="list")[0]
    return [m.value for m in client.MlflowClient().get_metric_history(run.info.run_id, "env_steps")]


def wandb(folder):
    """Its offline file has no public reader: the bytes of the last number's key and value are looked for."""
    found = next(folder.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()
    return [256.0 * i for i in (1, 2) if str(256 * i).encode() in found and b"env_steps" in found]


@pytest.mark.parametrize("name, read", [("tensorboard", tensorboard), ("trackio", trackio), ("mlflow", mlflow), ("wandb", wandb)])
def test_every_step_reaches_the_tracker(name, read, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the package {name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    volvelle.train("ppo", task="CartPole-v1", steps=2, folder=folder, track=(name,), overrides=["length=32", "envs=8", "evaluation.episodes=1"])
    written = [line["env_steps"] for line in read_lines(folder / "metrics.jsonl") if "env_steps" in line]
    assert written == [256.0, 512.0] and read(folder) == written


def test_a_package_that_is_missing_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="track"):
        volvelle.train("ppo", task="CartPole-v1", steps=2, folder=tmp_path / "run", track=("nothing",))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_ends_the_run_in_one_line(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where its folder should be")
    config = type("Config", (), {"track": ("tensorboard",)})
    with pytest.raises(RunStopped, match="track=tensorboard: the tracker did not start: ") as stopped, open_trackers(config, tmp_path):
        pass
    assert "\n" not in str(stopped.value)
