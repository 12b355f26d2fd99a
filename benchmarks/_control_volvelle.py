"""volvelle's side of benchmarks/control.py: one process, one job, one JSON line."""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])

import volvelle  # noqa: E402
from volvelle.core.trainer import start  # noqa: E402
from volvelle.core.verbs import configure  # noqa: E402

# the settings of Stable-Baselines3's defaults, in volvelle's words
SAME = {
    "ppo": ["envs=8", "length=256", "minibatches=32", "epochs=10", "anneal=false", "entropy=0", "value_weight=0.5", "value_clip=none", "optimiser.lr=3e-4"],
    "sac": ["delay=1", "alpha_fresh=false", "alpha_loss=log", "critic_weight=0.5", "head.low=-20", "head.smooth=false", "critic_optimiser.lr=3e-4",
            "alpha_optimiser.lr=3e-4", "warmup=1000", "replay.capacity=1000000", "replay.batch=256"],
    "dqn": ["network.hidden=[64,64]", "value=huber", "optimiser.clip=10", "optimiser.lr=1e-4", "warmup=1000", "replay.capacity=1000000", "replay.batch=256", "copy_every=10000"],
}
DQN_SCORE = ["network.hidden=[64,64]", "value=huber", "optimiser.clip=10", "optimiser.lr=1e-3", "warmup=1000", "replay.capacity=50000", "replay.batch=64", "every=4",
             "copy_every=250", "epsilon_share=0.3", "epsilon_end=0.04"]


def timed(function, count: int) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"per_second": count / wall, "per_cpu_second": count / cpu}


def learner(*more: str):
    config = configure(f"control/{job['method']}", job["env"], overrides=[*SAME[job["method"]], *more], steps=1000, compile=job.get("compile", False))
    return start(config, Path(tempfile.mkdtemp()))[1]


def repeat(function, times: int) -> None:
    for _ in range(times):
        function()


def speed() -> dict:
    made = learner(f"seeds={job.get('seeds', 1)}", *(["period=1020"] if job["method"] != "ppo" else []))
    made.step()
    if job["method"] == "ppo":
        return timed(lambda: repeat(made.step, job["count"] // 2048), job["count"])
    repeat(made.learn, 20)
    return timed(lambda: repeat(made.learn, job["count"]), job["count"])


def score() -> dict:
    overrides = DQN_SCORE if job["method"] == "dqn" else SAME[job["method"]]
    period = 2048 if job["method"] == "ppo" else 1000
    made = volvelle.train(f"control/{job['method']}", task=job["env"], steps=-(-job["count"] // period), seed=job["seed"], folder=Path(tempfile.mkdtemp()) / "run",
                          overrides=[*overrides, "evaluation.episodes=20"], checkpoint_every=0)
    return {"return": made.result["metrics"]["return"], "seconds": made.result["seconds"]}


print(json.dumps(score() if job["what"] == "score" else speed()))
