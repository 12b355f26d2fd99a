"""Offline learning here and in d3rlpy: the same recorded steps, networks, batch size and optimiser settings.

    python benchmarks/offline.py [speed|seeds|scores ...] [--rounds 3] [--threads 1,2] [--seeds 5] [--only iql,cql] [--json FILE]

speed: gradient updates per second at batch 256, drawing the batch included, on 20,000 random steps of HalfCheetah-v5. seeds: what five seeds as one model
cost, against five runs of one. scores: returns after equal updates on 20,000 recorded steps of Pendulum-v1 (medium-replay; 20 greedy episodes, mean over
seeds with its 95 % t interval); a side that is in the file already is not run again. d3rlpy gets an environment of its own (made on the first call, under
the user's cache). Both sides run in turn, each in a fresh process, at every thread count given; each side's best thread count is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

from control import told
from volvelle.control.tasks import Gym
from volvelle.offline.behaviours import PendulumSwing, Random
from volvelle.offline.data.collect import collect
from volvelle.offline.data.files import write_dataset

HERE = Path(__file__).resolve().parent
SIDES = ("volvelle", "d3rlpy")
SPEED = {"iql": 300, "td3-bc": 300, "cql": 30}
SCORES = {"iql": 5000, "td3-bc": 5000, "cql": 1000}
DATA = {
    "speed": ("HalfCheetah-v5", Random(), "random"),
    "scores": ("Pendulum-v1", PendulumSwing(), "medium-replay"),
}


def peer_python() -> Path:
    """The interpreter of d3rlpy's own environment: it asks for an older Gymnasium than ours."""
    home = Path(os.environ.get("VOLVELLE_CACHE") or Path.home() / ".cache" / "volvelle") / "benchmark-d3rlpy"
    python = home / "bin" / "python"
    if not (home / "ready-1").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0", "d3rlpy==2.8.1"], check=True)
        (home / "ready-1").touch()
    return python


def recorded(part: str, folder: Path) -> dict[str, str]:
    """The same steps twice: a dataset for volvelle, plain arrays for d3rlpy."""
    name, behaviour, quality = DATA["scores" if part == "scores" else "speed"]
    data = collect(Gym(id=name), behaviour, quality, 20_000, seed=0)
    rows = data.rows
    np.savez(folder / "arrays.npz", observations=data.fields["obs"][rows], actions=data.fields["actions"][rows], rewards=data.fields["rewards"][rows],
             terminals=data.fields["terminated"][rows], timeouts=data.fields["truncated"][rows], low=data.action_space.low, high=data.action_space.high)
    return {"env": name, "data": str(folder / "arrays.npz"), "folder": str(write_dataset(data, folder / f"{name}.hdf5"))}


def run(side: str, job: dict) -> dict:
    program = [sys.executable, str(HERE / "_offline_volvelle.py")] if side == "volvelle" else [str(peer_python()), str(HERE / "_offline_d3rlpy.py")]
    env = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([*program, json.dumps(job)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed on {job}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def speed(method: str, job: dict, rounds: int, threads: list[int]) -> dict:
    found: dict[tuple[str, int], list[dict]] = {}
    for n in range(rounds):
        for count in threads:
            for side in SIDES if n % 2 == 0 else reversed(SIDES):
                row = run(side, job | {"what": "speed", "threads": count})
                found.setdefault((side, count), []).append(row)
                print(f"{method} round {n + 1}  {side:9} {count} threads  {row['per_second']:9.1f} per second  {row['per_cpu_second']:9.1f} per CPU second", flush=True)
    best = {}
    for side in SIDES:
        medians = {t: {k: statistics.median(r[k] for r in found[side, t]) for k in ("per_second", "per_cpu_second")} for t in threads}
        count = max(medians, key=lambda t: medians[t]["per_second"])
        best[side] = {"threads": count, **medians[count], "best_per_cpu_second": max(m["per_cpu_second"] for m in medians.values())}
    ratio = best["volvelle"]["per_second"] / best["d3rlpy"]["per_second"]
    cpu = best["volvelle"]["best_per_cpu_second"] / best["d3rlpy"]["best_per_cpu_second"]
    print(f"{method}: {best['volvelle']['per_second']:.0f} against {best['d3rlpy']['per_second']:.0f} updates per second: {ratio:.2f}x ({cpu:.2f}x per CPU second)\n", flush=True)
    return {"best": best, "ratio": ratio, "cpu_ratio": cpu, "runs": [{"side": s, "threads": t, **r} for (s, t), rows in found.items() for r in rows]}


def seeds(method: str, job: dict, rounds: int) -> dict:
    found: dict[int, list[float]] = {1: [], 5: []}
    for _ in range(rounds):
        for k in found:
            found[k].append(1 / run("volvelle", job | {"what": "speed", "threads": 1, "seeds": k})["per_cpu_second"])
    ratio = statistics.median(found[5]) / statistics.median(found[1])
    print(f"{method}: five seeds as one model cost {ratio:.2f} times one run (five runs: 5)", flush=True)
    return {"ratio": ratio}


def scores(method: str, job: dict, numbers: int, kept: dict, keep) -> dict:
    """Returns per seed of both sides; what `kept` (an earlier result) holds is taken over."""
    kept |= {"method": method, "env": job["env"], "updates": job["count"]}
    if not kept.get("volvelle"):
        made = run("volvelle", job | {"what": "score", "threads": 1, "seeds": numbers})
        kept |= {"volvelle": made["returns"], "volvelle_seconds": made["seconds"]}
        keep(kept)
    kept.setdefault("d3rlpy", [])
    for seed in range(len(kept["d3rlpy"]), numbers):
        made = run("d3rlpy", job | {"what": "score", "threads": 1, "seed": seed})
        kept["d3rlpy"].append(made["return"])
        kept["d3rlpy_seconds"] = kept.get("d3rlpy_seconds", 0.0) + made["seconds"]
        keep(kept)
    print(f"{method} after {job['count']} updates: volvelle {told(kept['volvelle'])}, d3rlpy {told(kept['d3rlpy'])}", flush=True)
    return kept


def table(rows: dict[str, dict]) -> str:
    lines = ["| recipe | data | updates | volvelle | d3rlpy |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {r['method']} | {r['env']}, medium-replay | {r['updates']:,} | {told(r['volvelle'])} | {told(r['d3rlpy'])} |" for r in rows.values()])


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("parts", nargs="*", default=["speed", "seeds"])
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--threads", default="1,2")
    ask.add_argument("--seeds", type=int, default=5, help="of scores")
    ask.add_argument("--only", help="names, separated by commas")
    ask.add_argument("--json", type=Path, help="where results are kept, and found again")
    args = ask.parse_args()
    wanted = args.only.split(",") if args.only else list(SPEED)
    threads = [int(t) for t in args.threads.split(",")]
    made: dict[str, dict] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}

    def keep(key: str, value: dict) -> None:
        made[key] = value
        if args.json:
            args.json.write_text(json.dumps(made, indent=2) + "\n")

    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            data = recorded(part, Path(folder))
            for method in wanted:
                key, job = f"{part}/{method}", {"method": method, "count": (SCORES if part == "scores" else SPEED)[method], **data}
                if part == "scores":
                    keep(key, scores(method, job, args.seeds, made.get(key, {}), lambda value, key=key: keep(key, value)))
                else:
                    keep(key, speed(method, job, args.rounds, threads) if part == "speed" else seeds(method, job, args.rounds))
    if rows := {k: v for k, v in made.items() if k.startswith("scores/")}:
        print(table(rows))


if __name__ == "__main__":
    main()
