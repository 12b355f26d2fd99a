"""Running many runs: in this process, in local processes, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .errors import RunStopped, UserError, unknown
from .files import read_json, read_yaml
from .parts import annotations_of, from_config, walk
from .processes import alone
from .registry import registry
from .run import RunConfig, config_data, read_config, unportable
from .trainer import train_config

BACKENDS = ("local", "ray")


@dataclass
class Job:
    """One run to make: a name for messages, its configuration and its folder."""

    name: str
    config: RunConfig
    folder: Path


def finished(job: Job) -> dict | None:
    """The result of a job that an earlier call has completed. UserError if the folder holds a different run."""
    if not (job.folder / "config.yaml").is_file():
        return None
    wanted = config_data(job.config)
    if read_yaml(job.folder / "config.yaml") != wanted and config_data(read_config(job.folder, look=True)) != wanted:
        raise UserError(f"{job.folder}: holds a run with another configuration; name another folder, or delete it")
    done = job.folder / "result.json"
    return read_json(done) if done.is_file() else None


def execute(job: Job, threads: int | None = None, progress: Callable | None = None) -> dict:
    """Make one run, or go on with it where it was broken off, or read its result."""
    if threads:
        torch.set_num_threads(threads)
    found = finished(job)
    return found if found is not None else train_config(job.config, job.folder, (job.folder / "config.yaml").is_file(), progress).result


def _run_in_process(data: tuple[str, dict, str, tuple[str, ...], tuple[str, ...]], threads: int) -> dict:
    """The same from plain data, for a fresh process."""
    name, config, folder, paths, modules = data
    sys.path[:0] = [p for p in paths if p not in sys.path]
    registry.load()
    for module in modules:
        importlib.import_module(module)
    hints = annotations_of(RunConfig)
    return execute(Job(name, RunConfig(**{k: from_config(hints[k], v, k) for k, v in config.items()}), Path(folder)), threads)


def run_jobs(jobs: list[Job], backend: str = "local", workers: int = 1, progress: Callable | None = None) -> Iterator[tuple[Job, dict]]:
    """Yield (job, result) as they end. workers=1 on the local backend runs in this process, in order.

    A failing job stops everything with its name and cause; finished ones stay on disk and are read back next time.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    alone("a comparison")
    if backend == "local" and workers == 1:
        for job in jobs:
            with _named(job):
                yield job, execute(job, progress=progress)
        return
    if odd := [name for job in jobs for name in unportable(job.config)]:
        raise UserError(f"function {odd[0]!r} exists only inside this program and cannot be sent to other processes; use workers=1")
    homes = [sorted({type(p).__module__ for _, p in walk(job.config)}) for job in jobs]
    if any("__main__" in modules for modules in homes):
        raise UserError("a part that is defined in the running program cannot be sent to other processes; put it into a module, or use workers=1")
    threads = max(1, (os.cpu_count() or 1) // max(workers, 1))
    data = [(job.name, config_data(job.config), str(job.folder.resolve()), tuple(p for p in sys.path if p), tuple(modules))
            for job, modules in zip(jobs, homes)]
    yield from (_local if backend == "local" else _ray)(jobs, data, workers, threads)


def _local(jobs, data, workers, threads):
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_run_in_process, d, threads): job for job, d in zip(jobs, data)}
        try:
            for future in as_completed(futures):
                with _named(futures[future]):
                    yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _ray(jobs, data, workers, threads):
    try:
        import ray
    except ImportError:
        raise UserError("backend=ray needs the package ray; install volvelle[ray]") from None
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        local: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 200_000_000}
        ray.init(address=address, log_to_driver=False, logging_level="error", **local)
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(_run_in_process)
        waiting = {remote.remote(d, threads): job for job, d in zip(jobs, data)}
        while waiting:
            ready, _ = ray.wait(list(waiting))
            job = waiting.pop(ready[0])
            with _named(job):
                try:
                    result = ray.get(ready[0])
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, (RunStopped, UserError)) else error
                yield job, result
    finally:
        if started:
            ray.shutdown()


@contextlib.contextmanager
def _named(job: Job):
    try:
        yield
    except RunStopped as error:
        raise RunStopped(f"{job.name}: {error}") from error
    except UserError as error:
        raise UserError(f"{job.name}: {error}") from error
