"""volvelle's side of benchmarks/offline.py: one process, one job, one JSON line."""

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

# d3rlpy's settings, in volvelle's words; the defaults agree in the rest
SAME = {
    "iql": ["decay=false", "network.init=torch", "value_network.init=torch"],
    "bc": ["head=none", "optimiser.lr=1e-3"],
    "td3-bc": [],
    "awac": [],
    "cql": ["actor_optimiser.lr=1e-4", "alpha_optimiser.lr=1e-4"],
}


def repeat(function, times: int) -> None:
    for _ in range(times):
        function()


def speed() -> dict:
    config = configure(f"offline/{job['method']}", f"offline:{job['folder']}", overrides=[*SAME[job["method"]], f"seeds={job.get('seeds', 1)}"], steps=1000,
                       compile=job.get("compile", False), device="cpu")
    made = start(config, Path(tempfile.mkdtemp()))[1]
    repeat(made.learn, 20)
    wall, cpu = time.perf_counter(), time.process_time()
    repeat(made.learn, job["count"])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"per_second": job["count"] / wall, "per_cpu_second": job["count"] / cpu}


PARTS = {  # of every recipe: its networks, its optimisers
    "bc": (["network"], ["optimiser"]),
    "td3-bc": (["network"], ["actor_optimiser", "critic_optimiser"]),
    "iql": (["network", "value_network"], ["actor_optimiser", "critic_optimiser", "value_optimiser"]),
    "awac": (["network"], ["actor_optimiser", "critic_optimiser"]),
    "cql": (["network"], ["actor_optimiser", "critic_optimiser", "alpha_optimiser"]),
}


def small() -> list[str]:
    """The sizes of the score runs in place of the defaults."""
    networks, optimisers = PARTS[job["method"]]
    made = [f"{n}.hidden={job['small']['hidden']}" for n in networks] + [f"{n}.lr={job['small']['lr']}" for n in optimisers]
    return [*(w for w in SAME[job["method"]] if ".lr=" not in w), *made, f"batch={job['small']['batch']}"]


def score() -> dict:
    alike = ["task.env.unit_actions=true", "mode_target=true"] if job.get("alike") else []
    folder = job["unit_folder" if alike else "folder"]
    made = volvelle.train(f"offline/{job['method']}", task=f"offline:{folder}", steps=1, seed=0, folder=Path(tempfile.mkdtemp()) / "run", device="cpu",
                          overrides=[*small(), f"task.env={job['env']}", *alike, f"seeds={job['seeds']}", f"period={job['count']}", "evaluation.episodes=20"], checkpoint_every=0)
    return {"returns": [made.result["metrics"][f"return@{s}"] for s in range(job["seeds"])], "seconds": made.result["seconds"]}


print(json.dumps(score() if job["what"] == "score" else speed()))
