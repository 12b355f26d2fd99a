"""Several processes, one run: data parallelism over torch.distributed.

Every process holds the whole learner and takes the same steps. What is dealt out is work: sampling, rewards, forward and backward passes;
what comes back is gathered, so that parts see the whole batch in every process and need no distributed code. Only the first process writes.
Start it with `volvelle train … --processes 2`, or on several machines with `torchrun -m volvelle.cli train …`.
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError

BUCKET = 1 << 23  # numbers that one reduction of gradients carries


class Processes:
    """The processes of a run, seen from one of them. `rank` of `count`; alone, every method returns what it was given."""

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0):
        self.rank, self.count, self.local_rank = rank, count, local_rank

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The consecutive part of `count` things that is this process's own; parts differ by one at most."""
        return slice(self.rank * count // self.count, (self.rank + 1) * count // self.count)

    def gather(self, rows: list) -> list:
        """The rows of all processes, in the order of the processes; rows that are shared within a process stay shared."""
        if self.count == 1:
            return rows
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, rows)
        return [row for part in found for row in part]

    def same(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if self.count == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes, where the loss was dealt out. A process without a gradient adds zeros."""
        if self.count == 1:
            return
        for bucket in _buckets(list(parameters)):
            flat = self.total(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]))
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.grad = part.view_as(p).clone()

    def merge(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics of work that was dealt out: sums, and the greatest of those whose name ends in _max."""
        out: dict[str, float] = {}
        for name, value in self.gather(list(metrics.items())):
            out[name] = max(out[name], value) if name in out and name.endswith("_max") else out.get(name, 0.0) + value
        return out


def _buckets(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    out, size = [], BUCKET
    for p in parameters:
        if size >= BUCKET or out[-1][0].dtype != p.dtype:
            out.append([])
            size = 0
        out[-1].append(p)
        size += p.numel()
    return out


@functools.cache
def processes() -> Processes:
    """The processes this one belongs to, as the launcher's environment (RANK, WORLD_SIZE, …) says; joined on the first call."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    # both back ends where there is a GPU: gradients travel between GPUs, rollouts between processors
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2))
    atexit.register(dist.destroy_process_group)
    return Processes(rank, count, local)


def alone(what: str) -> None:
    """UserError where several processes do what one must do."""
    if processes().count > 1:
        raise UserError(f"{what} cannot be dealt to {processes().count} processes; accepted: training of language recipes")


def launch(arguments: list[str], count: int) -> int:
    """Run this command line in `count` processes on this machine and return the exit code; where one fails, the others are ended."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with tempfile.TemporaryFile("w+") as aside:  # the other processes' words: told only where the first has none
        workers = [subprocess.Popen([sys.executable, "-m", "volvelle.cli", *arguments], env=common | {"RANK": str(i), "LOCAL_RANK": str(i)},
                                    stdout=None if i == 0 else subprocess.DEVNULL, stderr=None if i == 0 else aside) for i in range(count)]
        try:
            while any(w.poll() is None for w in workers) and not any(w.poll() for w in workers):
                time.sleep(0.05)
            failed = [w for w in workers if w.poll()]
            if failed and failed[0] is not workers[0]:
                try:
                    workers[0].wait(10)  # it may be about to say the same
                except subprocess.TimeoutExpired:
                    aside.seek(0)
                    print(aside.read(), end="", file=sys.stderr)
        finally:
            for w in workers:
                w.terminate() if w.poll() is None else None
    codes = [w.wait() for w in workers]
    return next((c for c in [codes[0], *codes] if c > 0), max(map(abs, codes)))
