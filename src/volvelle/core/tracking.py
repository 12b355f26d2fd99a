"""Experiment trackers through their own clients. metrics.jsonl is always written; these come on request."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

from .errors import RunStopped, UserError
from .run import config_data


def clients(config) -> dict:
    """The client module of every tracker asked for; a missing one is refused by name."""
    found = {}
    for name in config.track:
        try:
            found[name] = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            raise UserError(f"track={name}: the package {name!r} is not installed ({error})") from None
    return found


@contextlib.contextmanager
def open_trackers(config, folder: Path):
    """Yield `track(metrics, step)`, which writes to every tracker named in `config.track`."""
    sinks, closers = [], []

    def track(metrics: dict[str, float], step: int) -> None:
        for sink in sinks:
            sink(metrics, step)

    try:
        for name, client in clients(config).items():
            try:
                sink, close = _OPEN[name](client, config, folder)
            except Exception as error:
                raise RunStopped(f"track={name}: the tracker did not start: {type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
            sinks.append(sink)
            closers.append(close)
        yield track
    finally:
        for close in closers:
            close()


def _tensorboard(client, config, folder):
    writer = client.SummaryWriter(str(folder / "tensorboard"))

    def sink(metrics, step):
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)

    return sink, writer.close


def _wandb(client, config, folder):
    run = client.init(project="volvelle", name=folder.name, dir=str(folder), config=config_data(config))
    return (lambda metrics, step: run.log(metrics, step=step)), run.finish


def _trackio(client, config, folder):
    client.init(project="volvelle", name=folder.name, config=config_data(config))
    return (lambda metrics, step: client.log(metrics, step=step)), client.finish


def _mlflow(client, config, folder):
    client.set_experiment("volvelle")
    client.start_run(run_name=folder.name)
    client.log_dict(config_data(config), "config.yaml")
    clean = str.maketrans({"@": "_at_"})
    return (lambda metrics, step: client.log_metrics({k.translate(clean): v for k, v in metrics.items()}, step=step)), client.end_run


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}
