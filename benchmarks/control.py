"""Control here and in Stable-Baselines3: the same environments, networks, batch sizes and optimiser settings.

    python benchmarks/control.py [speed|seeds|score ...] [--rounds 3] [--threads 1,2] [--only ppo-cartpole,sac]

speed: environment steps per second of PPO (8 environments), gradient updates per second of SAC and DQN (batch 256).
seeds: what five seeds as one model cost, against five runs of one. score: returns after equal environment steps, same settings.
Stable-Baselines3 gets an environment of its own (made on the first call, under the user's cache). Both sides run in turn, each in a fresh process, at
every thread count given; each side's best thread count is reported. On a shared machine look at the CPU-second ratio as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPEED = {
    "ppo-cartpole": {"method": "ppo", "env": "CartPole-v1", "count": 16384, "unit": "environment steps"},
    "ppo-halfcheetah": {"method": "ppo", "env": "HalfCheetah-v5", "count": 8192, "unit": "environment steps"},
    "sac": {"method": "sac", "env": "HalfCheetah-v5", "count": 300, "unit": "gradient updates"},
    "dqn": {"method": "dqn", "env": "CartPole-v1", "count": 2000, "unit": "gradient updates"},
}
SCORE = {
    "ppo-cartpole": {"method": "ppo", "env": "CartPole-v1", "count": 61440},
    "dqn-cartpole": {"method": "dqn", "env": "CartPole-v1", "count": 50_000},
    "sac-pendulum": {"method": "sac", "env": "Pendulum-v1", "count": 6000},
}


def peer_python() -> Path:
    """The interpreter of Stable-Baselines3's own environment."""
    home = Path(os.environ.get("VOLVELLE_CACHE") or Path.home() / ".cache" / "volvelle") / "benchmark-sb3"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "stable-baselines3==2.9.2", "gymnasium[classic-control,mujoco]", "mujoco==4.0.0", "mujoco-core==4.0.0"], check=True)
        (home / "ready").touch()
    return python


def run(side: str, job: dict) -> dict:
    program = [sys.executable, str(HERE / "_control_volvelle.py")] if side == "volvelle" else [str(peer_python()), str(HERE / "_control_sb3.py")]
    env = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([*program, json.dumps(job)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed on {job}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def speed(name: str, job: dict, rounds: int, threads: list[int]) -> dict:
    found: dict[tuple[str, int], list[dict]] = {}
    for n in range(rounds):
        for count in threads:
            for side in (("volvelle", "sb3") if n % 2 == 0 else ("sb3", "volvelle")):
                row = run(side, job | {"what": "speed", "threads": count})
                found.setdefault((side, count), []).append(row)
                print(f"{name} round {n + 1}  {side:9} {count} threads  {row['per_second']:9.1f} per second  {row['per_cpu_second']:9.1f} per CPU second", flush=True)
    best = {}
    for side in ("volvelle", "sb3"):
        medians = {t: {k: statistics.median(r[k] for r in found[side, t]) for k in ("per_second", "per_cpu_second")} for t in threads}
        count = max(medians, key=lambda t: medians[t]["per_second"])
        best[side] = {"threads": count, **medians[count], "best_per_cpu_second": max(m["per_cpu_second"] for m in medians.values())}
    ratio = best["volvelle"]["per_second"] / best["sb3"]["per_second"]
    cpu = best["volvelle"]["best_per_cpu_second"] / best["sb3"]["best_per_cpu_second"]
    print(f"{name}: {best['volvelle']['per_second']:.0f} against {best['sb3']['per_second']:.0f} {job['unit']} per second: {ratio:.2f}x ({cpu:.2f}x per CPU second)\n", flush=True)
    return {"best": best, "ratio": ratio, "cpu_ratio": cpu, "runs": [{"side": s, "threads": t, **r} for (s, t), rows in found.items() for r in rows]}


def seeds(name: str, job: dict, rounds: int) -> dict:
    found: dict[int, list[float]] = {1: [], 5: []}
    for _ in range(rounds):
        for k in found:
            found[k].append(1 / run("volvelle", job | {"what": "speed", "threads": 1, "seeds": k})["per_cpu_second"])
    ratio = statistics.median(found[5]) / statistics.median(found[1])
    print(f"{name}: five seeds as one model cost {ratio:.2f} times one run (five runs: 5)", flush=True)
    return {"ratio": ratio}


def score(name: str, job: dict, numbers: int) -> dict:
    found: dict[str, list[dict]] = {"volvelle": [], "sb3": []}
    for seed in range(numbers):
        for side in found:
            found[side].append(run(side, job | {"what": "score", "threads": 1, "seed": seed}))
    told = {s: ", ".join(f"{r['return']:.0f}" for r in rows) for s, rows in found.items()}
    print(f"{name} after {job['count']} steps, {numbers} seeds: volvelle {told['volvelle']}; sb3 {told['sb3']}", flush=True)
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("parts", nargs="*", default=["speed", "seeds"])
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--threads", default="1,2")
    ask.add_argument("--only", help="names, separated by commas")
    ask.add_argument("--json", type=Path)
    args = ask.parse_args()
    wanted = args.only.split(",") if args.only else None
    made: dict[str, dict] = {}
    for part in args.parts:
        for name, job in (SCORE if part == "score" else SPEED).items():
            if wanted is None or name in wanted:
                threads = [int(t) for t in args.threads.split(",")]
                made[f"{part}/{name}"] = speed(name, job, args.rounds, threads) if part == "speed" else seeds(name, job, args.rounds) if part == "seeds" else score(name, job, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(made, indent=2))


if __name__ == "__main__":
    main()
