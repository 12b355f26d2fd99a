"""Steps per second of batched grid worlds and of whole agents, and meta-updates per second; one thread per process, on this machine, CPU time as well as wall time.

    python benchmarks/curriculum.py

No peer is measured: the released code of arXiv 2310.02782 is written in JAX for an accelerator.
"""
import os
import time
from multiprocessing import get_context

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from volvelle.core.registry import registry
from volvelle.core.run import RunConfig
from volvelle.core.trainer import start
from volvelle.curriculum.gridtasks import Grids, RandomGrids
from volvelle.curriculum.gridworlds import ACTIONS, Worlds
from volvelle.curriculum.tabular import Tabular, actor_critic, play

SIZES = ((16, 16), (64, 64), (512, 64))  # levels, copies of each


def timed(work, seconds: float = 2.0) -> tuple[float, float]:
    """(wall, CPU) seconds per call."""
    work()
    calls, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        work()
        calls += 1
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def stepping(size) -> tuple[float, float]:
    """Million steps per second (wall, CPU) with random actions, random numbers and observations included."""
    torch.set_num_threads(1)
    levels, workers = size
    generator = torch.Generator().manual_seed(0)
    worlds = Worlds(RandomGrids().draw(levels, generator), workers)

    def work():
        for _ in range(10):
            worlds.step(torch.randint(ACTIONS, (levels, workers), generator=generator), torch.rand(levels, workers, 3, generator=generator))
            worlds.states()

    return tuple(levels * workers * 10 / s / 1e6 for s in timed(work))


def main():
    torch.set_num_threads(1)
    registry.load()
    print("environment steps, millions per second: one process (per CPU second), two processes together")
    for size in SIZES:
        with get_context("spawn").Pool(2) as pool:
            one, (a, b) = pool.map(stepping, [size])[0], pool.map(stepping, [size, size], chunksize=1)
        print(f"  {size[0]:4d} levels x {size[1]} copies: {one[0]:.2f} ({one[1]:.2f}), {a[0] + b[0]:.2f}")
    generator = torch.Generator().manual_seed(0)
    levels, agent = Grids().held_out(), Tabular()
    worlds, actor = Worlds(levels, agent.workers), agent.fresh(len(levels), levels.states, ACTIONS)
    wall, cpu = timed(lambda: play(actor, worlds, agent.length, generator))
    count = len(levels) * agent.workers * agent.length / 1e6
    print(f"acting with tabular policies, {len(levels)} levels x {agent.workers}: {count / wall:.2f} ({count / cpu:.2f}) million steps per second")
    wall, cpu = timed(lambda: actor_critic(levels, agent, 2, generator))
    print(f"learning by A2C as well: {2 * count / wall:.2f} ({2 * count / cpu:.2f})")
    from volvelle.curriculum.methods.groove import small

    _, learner = start(RunConfig(recipe=small, task=Grids()), "/nowhere")
    wall, cpu = timed(learner.step)
    print(f"meta-updates of the small recipe (16 lifetimes x 16 x 10, 3 updates): {1 / wall:.1f} ({1 / cpu:.1f}) per second")


if __name__ == "__main__":
    main()
