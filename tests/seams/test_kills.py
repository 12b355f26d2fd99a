"""Killed for real: a process that gets SIGKILL at a random moment, resumed by another process, ends as one that was never killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback

import numpy as np
import pytest
import toys  # noqa: F401
from helpers import child_environment, same_run

TABULAR = dict(task="tree", steps=40, checkpoint_every=3, evaluate_every=4,
               overrides=["prompts=8", "task.prompts=24", "task.vocabulary=3", "updates.minibatch=4", "updates.optimiser.lr=0.05",
                          "terms.entropy=entropy", "filter.refill=off"])
CAUSAL = dict(task="toy-letters", model="tiny", steps=20, checkpoint_every=2, evaluate_every=5,
              overrides=["model.layers=1", "model.width=16", "model.heads=2", "model.context=24", "model.warmup=0", "prompts=3", "critic=value",
                         "advantage=gae", "kl=kl", "kl.place=reward", "kl.coefficient=adaptive", "reward=toy-window", "sampler.group=4",
                         "updates.epochs=2", "updates.minibatch=2", "updates.optimiser.lr=0.01", "evaluation.samples=2", "evaluation.ks=[1]"])


def lines(folder) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_at_a_random_moment(pid: int, folder, rng) -> None:
    """SIGKILL, up to a tenth of a second after some further rows of the log."""
    after, until = lines(folder) + int(rng.integers(1, 8)), time.monotonic() + 120
    while lines(folder) < after and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(float(rng.uniform(0, 0.1)))
    os.kill(pid, signal.SIGKILL)


def train_here(arguments: dict, folder, resume: bool) -> None:
    import torch
    import volvelle

    torch.set_num_threads(1)
    try:
        volvelle.train(resume=folder) if resume else volvelle.train("grpo", folder=folder, **arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.fixture(scope="module")
def processes():
    """Fresh processes that have the library imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toys", "volvelle.core.verbs", "volvelle.language.loop", "transformers"])
    return context


@pytest.mark.slow
def test_a_killed_causal_run(tmp_path, processes):
    import volvelle

    rng = np.random.default_rng()  # other moments every time, on purpose: any moment must do
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    volvelle.train("grpo", folder=whole, **CAUSAL)
    for i in range(2):
        child = processes.Process(target=train_here, args=(CAUSAL, broken, i > 0))
        child.start()
        kill_at_a_random_moment(child.pid, broken, rng)
        child.join()
        assert child.exitcode == -signal.SIGKILL
    child = processes.Process(target=train_here, args=(CAUSAL, broken, True))
    child.start()
    child.join()
    assert child.exitcode == 0
    same_run(whole, broken)


@pytest.mark.slow
def test_a_killed_tabular_run_on_the_command_line(tmp_path):
    import volvelle

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    volvelle.train("dapo", folder=whole, **TABULAR)
    command = [sys.executable, "-m", "volvelle.cli", "train"]
    words = [*TABULAR["overrides"], "--task", "tree", "--steps", "40", "--checkpoint-every", "3", "--evaluate-every", "4", "--out", str(broken)]
    child = subprocess.Popen([*command, "dapo", *words], env=child_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    kill_at_a_random_moment(child.pid, broken, np.random.default_rng())
    assert child.wait() == -signal.SIGKILL, child.stderr.read()
    child.stderr.close()
    done = subprocess.run([*command, "--resume", str(broken)], env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same_run(whole, broken)
