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
Q = ["network.hidden=[64,64]", "optimiser.clip=10", "optimiser.lr=1e-3", "warmup=1000", "replay.capacity=50000", "replay.batch=64", "every=4", "copy_every=250",
     "epsilon_share=0.3", "epsilon_end=0.04"]
SCORE = {
    "ppo": SAME["ppo"], "sac": SAME["sac"], "a2c": ["envs=16"], "dqn": [*Q, "value=huber"], "c51": [*Q, "value.low=0", "value.high=100", "value.bins=51"], "qr-dqn": [*Q, f"optimiser.eps={0.01 / 64}"],
    "td3": ["actor_optimiser.lr=1e-3", "critic_optimiser.lr=1e-3", "warmup=1000"], "sac-discrete": ["entropy_share=0.3"], "reinforce": [],
}
BREAKOUT = ["network.hidden=[128]", "replay.batch=32", "replay.capacity=100000", "optimiser.lr=2.5e-4", "copy_every=1000", "epsilon_share=0.1", "epsilon_end=0.01"]
PERIOD = {"ppo": 2048, "a2c": 80, "reinforce": 1}


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
    method = job["method"]
    chosen = {w.partition("=")[0]: w for w in [*SCORE[method], *(BREAKOUT if "Breakout" in job["env"] else []), *job.get("more", [])]}.values()  # the later ones count
    made = volvelle.train(f"control/{method}", task=job["env"], steps=-(-job["count"] // PERIOD.get(method, 1000)), seed=0, folder=Path(tempfile.mkdtemp()) / "run",
                          overrides=[*chosen, f"seeds={job['seeds']}", "evaluation.episodes=20"],
                          checkpoint_every=0)
    return {"returns": [made.result["metrics"][f"return@{s}"] for s in range(job["seeds"])], "seconds": made.result["seconds"]}


print(json.dumps(score() if job["what"] == "score" else speed()))
