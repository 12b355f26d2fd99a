"""The one trainer: it drives every wing's Learner and knows nothing else.

It logs, evaluates, checkpoints, keeps the best, resumes exactly, and stops with a named cause.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import RunStopped, UserError
from .files import directory, read_lines, write_json
from .processes import alone, processes
from .run import Run, RunConfig, append
from .state import fingerprint, load_state, save_state
from .tracking import clients, open_trackers


class Learner(Protocol):
    """What a recipe's `start(run)` returns. `size` (number of trained parameters) decides the default thread count; `in_processes`: its
    work can be dealt to several processes."""

    def step(self) -> dict[str, float]:
        """One period; returns metrics (undefined ones left out). May leave the policy as it is."""

    def evaluate(self, task=None) -> dict[str, float]:
        """Metrics on held-out data of the run's task, or of another task of its wing. Changes no state."""

    def product(self) -> dict[str, Any]:
        """What the run makes, by name ("policy", "actor", "reward"); each has `save(folder)`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Trained:
    """A finished run: its folder, its result (as in result.json) and its learner."""

    folder: Path
    result: dict
    learner: Any


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
SMALL = 2_000_000  # parameters below which one thread is fastest


@contextlib.contextmanager
def threads(count: int | None, learner: Any):
    before = torch.get_num_threads()
    wanted = count or (1 if getattr(learner, "size", 0) < SMALL else before)
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start(config: RunConfig, folder: Path, reporter: Callable[[str], None] | None = None) -> tuple[Run, Any]:
    """Check the configuration and start its learner; nothing is written."""
    config.recipe.validate(config.task)
    clients(config)
    run = Run(config, folder)
    run.reporter = reporter or run.reporter
    run.learner = config.recipe.start(run)
    if config.compile and not run.compiles:
        run.reporter(f"note: compile=true changes nothing: {config.recipe.part_name} has no compiled form")
    if not getattr(run.learner, "in_processes", False):
        alone(f"a recipe of the {config.recipe.wing} wing")
    return run, run.learner


def train_config(config: RunConfig, folder: str | Path, resume: bool = False, progress: Callable | None = None,
                 reporter: Callable[[str], None] | None = None) -> Trained:
    """Train what `config` describes in `folder`. `progress(step, steps, metrics)` is called after every step."""
    folder = Path(folder)
    if processes().same(not resume and (folder / "config.yaml").exists()):
        raise UserError(f"{folder}: holds a run already; resume it, or name another folder")
    run, learner = start(config, folder, reporter)
    with threads(config.threads, learner):
        return _fit(run, learner, resume, progress or (lambda step, steps, metrics: None))


def checkpoints(folder: Path) -> list[Path]:
    return sorted((Path(folder) / "checkpoints").glob("step-*"))


def load_checkpoint(run: Run, learner: Learner, path: Path) -> None:
    state = load_state(path)
    run.load_state_dict(state["run"])
    learner.load_state_dict(state["learner"])


def _state(run: Run, learner: Learner) -> dict:
    return {"run": run.state_dict(), "learner": learner.state_dict()}


def save_checkpoint(run: Run, learner: Learner) -> Path:
    """Write checkpoints/step-NNNNNN and drop older ones once it is in place. RunStopped if several processes no longer hold the same."""
    if hasattr(learner, "before_checkpoint"):
        learner.before_checkpoint()
    path = run.folder / "checkpoints" / f"step-{run.step:06d}"
    if run.processes.count > 1 and len(set(run.processes.gather([fingerprint(_state(run, learner))]))) > 1:
        raise RunStopped("the processes no longer hold the same state; a part that draws or counts for itself must do so from gathered batches")
    if run.processes.first:
        _write_checkpoint(run, learner, path)
    run.processes.same(None)  # nobody goes on before it is there
    return path


def _write_checkpoint(run: Run, learner: Learner, path: Path) -> None:
    with directory(path) as folder:
        save_state(folder, _state(run, learner))
    for old in checkpoints(run.folder):
        if old != path:
            shutil.rmtree(old)


def _evaluate(run: Run, learner: Learner) -> dict[str, float]:
    before = fingerprint(_state(run, learner)) if run.config.strict else None
    metrics = learner.evaluate()
    if before is not None and fingerprint(_state(run, learner)) != before:
        raise RunStopped("evaluation changed the state of the run; it must leave parts, models and random numbers as they were")
    return _finite({f"eval/{k}": float(v) for k, v in metrics.items()})


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    if bad := next((k for k, v in metrics.items() if not math.isfinite(v)), None):
        raise RunStopped(f"{bad} is {metrics[bad]}")
    return metrics


def _fit(run: Run, learner: Learner, resume: bool, progress: Callable) -> Trained:
    config, began, first = run.config, time.monotonic(), run.processes.first
    metric = f"eval/{config.task.metric}" if config.task else None
    last: Path | None = None
    now = 0  # the step that is being made
    try:
        if resume and checkpoints(run.folder):
            last = checkpoints(run.folder)[-1]
            load_checkpoint(run, learner, last)
            now = run.step
            if first:
                run.resume()
        else:
            fingerprint(_state(run, learner))  # state that no checkpoint can hold is told before anything is written
            if first:
                run.begin()
            last = save_checkpoint(run, learner)
            if fingerprint(load_state(last)) != fingerprint(_state(run, learner)):
                raise RunStopped("the checkpoint written at step 0 does not read back as it was")
        if run.processes.same(not read_lines(run.folder / "metrics.jsonl")):
            _log(run, _evaluate(run, learner))
        with open_trackers(config if first else config.replace(track=()), run.folder) as track:
            while run.step < config.steps and not getattr(learner, "finished", False):
                clock, now = time.monotonic(), run.step + 1
                metrics = _finite({k: float(v) for k, v in learner.step().items()}) | {"time/step": time.monotonic() - clock}
                run.step = now
                done = run.step == config.steps or getattr(learner, "finished", False)
                if done or (config.evaluate_every and run.step % config.evaluate_every == 0):
                    metrics |= _evaluate(run, learner)
                    _keep_best(run, learner, metric, metrics)
                _log(run, metrics)
                track(metrics, run.step)
                if done or (config.checkpoint_every and run.step % config.checkpoint_every == 0):
                    last = save_checkpoint(run, learner)
                progress(run.step, config.steps, metrics)
        result = run.processes.same(_result(run, time.monotonic() - began) if first else None)
        if not first:
            return Trained(run.folder, result, learner)
        for name, made in learner.product().items():
            if hasattr(made, "save"):
                with directory(run.folder / name) as folder:
                    made.save(folder)
        write_json(run.folder / "result.json", result)
    except RunStopped as error:
        with contextlib.suppress(OSError):
            run.flush_samples(now)
            if error.intact and first:
                last = run.folder / "checkpoints" / f"step-{run.step:06d}"
                if hasattr(learner, "before_checkpoint"):
                    learner.before_checkpoint()
                _write_checkpoint(run, learner, last)
        raise RunStopped(f"step {now}: {error}; last good checkpoint: {last or 'none'}") from error
    except Exception as error:  # safetensors tells of a full disk in an exception of its own
        cause = next((e for e in DISK if getattr(error, "errno", None) == e or f"os error {e})" in str(error)), None)
        if cause is None:
            raise
        raise RunStopped(f"step {now}: could not write {getattr(error, 'filename', None) or f'below {run.folder}'}: {os.strerror(cause)}; "
                         f"last good checkpoint: {last or 'none'}") from error
    return Trained(run.folder, result, learner)


def _log(run: Run, metrics: dict[str, float]) -> None:
    if run.processes.first:
        append(run.folder / "metrics.jsonl", [{"step": run.step, **metrics}])
    run.flush_samples(run.step)


def _keep_best(run: Run, learner: Learner, metric: str | None, metrics: dict[str, float]) -> None:
    """Export the product to best/ when the task's metric is higher than in every earlier evaluation."""
    earlier = [r[metric] for r in read_lines(run.folder / "metrics.jsonl") if metric in r]
    if not run.processes.first or metric not in metrics or not earlier or metrics[metric] <= max(earlier):
        return
    with directory(run.folder / "best") as folder:
        for name, made in learner.product().items():
            if hasattr(made, "save"):
                (folder / name).mkdir()
                made.save(folder / name)
        write_json(folder / "result.json", {"step": run.step, "metrics": _plain(metrics)})


def _plain(metrics: dict[str, float]) -> dict[str, float]:
    return {k.removeprefix("eval/"): v for k, v in metrics.items() if k.startswith("eval/")}


def _result(run: Run, seconds: float) -> dict:
    rows = [r for r in read_lines(run.folder / "metrics.jsonl") if any(k.startswith("eval/") for k in r)]
    return {"method": run.config.method, "task": run.config.task.label() if run.config.task else None, "seed": run.seed, "steps": run.step,
            "start": _plain(rows[0]), "metrics": _plain(rows[-1]), "seconds": round(seconds, 3)}
