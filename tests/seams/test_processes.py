"""Several processes, one run: the same updates as one process, alike in every process, exactly resumable, with one-line refusals."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import volvelle
from helpers import child_environment, last_state, rows, same_run
from safetensors.torch import load_file
from volvelle.core.state import encode_rng, own_numbers

CAUSAL = ["--task", "digit-sum", "--model", "tiny", "model.layers=1", "model.width=16", "model.heads=2", "model.context=48", "model.warmup=0",
          "prompts=5", "evaluation.samples=2", "evaluation.ks=[1]"]
CRITIC = [*CAUSAL, "critic=value", "advantage=gae", "kl=kl", "kl.place=reward", "kl.coefficient=adaptive", "sampler.group=3", "updates.epochs=2",
          "updates.minibatch=2", "updates.optimiser.lr=0.01"]


def command(*arguments) -> list[str]:
    return [sys.executable, "-c", "from volvelle.cli import main; main()", *map(str, arguments)]


def start(*arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment(**environment))


def pair(*arguments) -> list[tuple[int, str]]:
    """The command in two processes that find each other as under torchrun: (exit code, what it said) of each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    both = [start(*arguments, RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for i in range(2)]
    said = [p.communicate(timeout=120)[1] for p in both]
    return [(p.returncode, words) for p, words in zip(both, said)]


@pytest.mark.slow
def test_dealt_supervised_training_is_that_of_one_process(tmp_path):
    """Same rows in another order of addition: the weights agree to rounding after three steps of plain gradient descent."""
    given = ["sft", *CAUSAL, "updates.optimiser=sgd", "updates.optimiser.lr=0.3", "--steps", 3]
    volvelle.train("sft", task="digit-sum", model="tiny", folder=tmp_path / "one", steps=3, overrides=[*given[5:-2]])
    assert [code for code, _ in pair("train", *given, "-o", tmp_path / "two")] == [0, 0]
    one, two = (load_file(tmp_path / n / "policy" / "model.safetensors") for n in ("one", "two"))
    start_weights = volvelle.load(tmp_path / "one")["policy"].module.state_dict()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(start_weights[name], value)
    assert [r["loss"] for r in rows(tmp_path / "one") if "loss" in r] == pytest.approx([r["loss"] for r in rows(tmp_path / "two") if "loss" in r], rel=1e-5)


@pytest.mark.slow
def test_a_killed_run_of_two_processes_resumes_exactly(tmp_path):
    """Critic, KL in the reward, mini-batches: killed in the middle and resumed, it ends bit for bit as the unbroken one."""
    given = ["grpo", *CRITIC, "--steps", 8, "--checkpoint-every", 2, "--evaluate-every", 4]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert [code for code, _ in pair("train", *given, "-o", whole)] == [0, 0]
    child = subprocess.Popen(command("train", *given, "-o", broken, "--processes", 2), env=child_environment(), stderr=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 120
    while len(rows(broken)) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert 0 < len(rows(broken)) < 9
    assert [code for code, _ in pair("train", "--resume", broken)] == [0, 0]
    same_run(whole, broken)
    moved = last_state(whole)["run"]["models"]
    assert moved["policy"]["steps"] == moved["critic.model"]["steps"] == 8 * 2 * 3
    assert len([r for r in rows(whole) if "reward" in r]) == 8


@pytest.mark.slow
def test_refusals_are_one_line(tmp_path):
    for arguments, said in [(["train", "distributional-dp", "--task", "lottery-grid", "--processes", "2", "-o", tmp_path / "a", "--steps", "2"], "cannot be dealt to 2 processes"),
                            (["train", "grpo", "--task", "nowhere", "--processes", "2", "-o", tmp_path / "b"], "nowhere")]:
        found = start(*arguments)
        _, words = found.communicate(timeout=120)
        lines = [w for w in words.splitlines() if w.startswith("volvelle:")]
        assert found.returncode == 2 and len(lines) == 1 and said in lines[0], words
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_own_numbers_differ_between_processes_and_agree_afterwards():
    made, states = [], []
    for rank in range(2):
        generators = {"a": torch.Generator().manual_seed(1), "b": np.random.default_rng(1)}
        with own_numbers(generators, rank, 2):
            made.append((torch.rand(3 + rank, generator=generators["a"])[:3].tolist(), generators["b"].random(3 + rank)[:3].tolist()))
        states.append(json.dumps({k: encode_rng(g) for k, g in generators.items()}))
    assert made[0][0] != made[1][0] and made[0][1] != made[1][1]
    assert states[0] == states[1] != json.dumps({"a": encode_rng(torch.Generator().manual_seed(1)), "b": encode_rng(np.random.default_rng(1))})


def test_one_process_keeps_its_numbers():
    generators = {"a": torch.Generator().manual_seed(1)}
    with own_numbers(generators, 0, 1):
        pass
    assert encode_rng(generators["a"]) == encode_rng(torch.Generator().manual_seed(1))


def test_a_generator_made_while_dealt_out_is_refused():
    generators = {}
    with pytest.raises(RuntimeError, match="'late'"), own_numbers(generators, 0, 2):
        generators["late"] = np.random.default_rng(0)
