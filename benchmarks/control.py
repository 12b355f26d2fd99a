"""Control here and in Stable-Baselines3: the same environments, networks, batch sizes and optimiser settings.

    python benchmarks/control.py [speed|seeds|scores ...] [--rounds 3] [--threads 1,2] [--seeds 5] [--only ppo-cartpole,sac] [--json FILE]

speed: environment steps per second of PPO (8 environments), gradient updates per second of SAC and DQN (batch 256); compiled
rows: volvelle with --compile, compiling not counted.
seeds: what five seeds as one model cost, against five runs of one. scores: the table of returns of the base recipes after equal environment steps and
with the same settings (20 greedy episodes, mean over seeds with its 95 % t interval); a side that is in the file already is not run again.
Stable-Baselines3 gets an environment of its own (made on the first call, under the user's cache). Both sides run in turn, each in a fresh process, at
every thread count given; each side's best thread count is reported. On a shared machine look at the CPU-second ratio as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peers import Peer
from volvelle.core.statistics import mean_interval

SB3 = Peer("sb3", "_control_volvelle.py", "_control_sb3.py", made="ready-3", installs=(
    ("torch==2.13.0",),
    ("stable-baselines3==2.9.2", "sb3-contrib==2.9.2", "gymnasium[classic-control,mujoco]", "mujoco==4.0.0", "mujoco-core==4.0.0", "box2d==2.3.10", "minatar==1.0.15")))
SPEED = {
    "ppo-cartpole": {"method": "ppo", "env": "CartPole-v1", "count": 16384, "unit": "environment steps"},
    "ppo-halfcheetah": {"method": "ppo", "env": "HalfCheetah-v5", "count": 8192, "unit": "environment steps"},
    "sac": {"method": "sac", "env": "HalfCheetah-v5", "count": 300, "unit": "gradient updates"},
    "sac-compiled": {"method": "sac", "env": "HalfCheetah-v5", "count": 300, "unit": "gradient updates", "compile": True},
    "dqn": {"method": "dqn", "env": "CartPole-v1", "count": 2000, "unit": "gradient updates"},
    "dqn-compiled": {"method": "dqn", "env": "CartPole-v1", "count": 2000, "unit": "gradient updates", "compile": True},
}
SCORES = {
    "ppo-cartpole": {"method": "ppo", "env": "CartPole-v1", "count": 61_440},
    "a2c-cartpole": {"method": "a2c", "env": "CartPole-v1", "count": 60_000},
    "dqn-cartpole": {"method": "dqn", "env": "CartPole-v1", "count": 50_000},
    "c51-cartpole": {"method": "c51", "env": "CartPole-v1", "count": 50_000, "peer": False},
    "qr-dqn-cartpole": {"method": "qr-dqn", "env": "CartPole-v1", "count": 50_000},
    "sac-discrete-cartpole": {"method": "sac-discrete", "env": "CartPole-v1", "count": 30_000, "peer": False},
    "reinforce-cartpole": {"method": "reinforce", "env": "CartPole-v1", "count": 100, "peer": False},
    "ppo-acrobot": {"method": "ppo", "env": "Acrobot-v1", "count": 61_440},
    "dqn-acrobot": {"method": "dqn", "env": "Acrobot-v1", "count": 50_000},
    "sac-pendulum": {"method": "sac", "env": "Pendulum-v1", "count": 6000},
    "td3-pendulum": {"method": "td3", "env": "Pendulum-v1", "count": 6000},
    "a2c-acrobot": {"method": "a2c", "env": "Acrobot-v1", "count": 120_000},
    "c51-acrobot": {"method": "c51", "env": "Acrobot-v1", "count": 50_000, "peer": False, "more": ["value.low=-100", "value.high=0"]},
    "qr-dqn-acrobot": {"method": "qr-dqn", "env": "Acrobot-v1", "count": 50_000},
    "a2c-lunarlander": {"method": "a2c", "env": "LunarLander-v3", "count": 120_000},
    "dqn-lunarlander": {"method": "dqn", "env": "LunarLander-v3", "count": 100_000},
    "qr-dqn-lunarlander": {"method": "qr-dqn", "env": "LunarLander-v3", "count": 100_000},
    "ppo-lunarlander": {"method": "ppo", "env": "LunarLander-v3", "count": 122_880},
    "dqn-breakout": {"method": "dqn", "env": "MinAtar/Breakout-v1", "count": 100_000},
    "ppo-hopper": {"method": "ppo", "env": "Hopper-v5", "count": 102_400},
    "a2c-hopper": {"method": "a2c", "env": "Hopper-v5", "count": 102_400},
    "sac-hopper": {"method": "sac", "env": "Hopper-v5", "count": 10_000},
    "td3-hopper": {"method": "td3", "env": "Hopper-v5", "count": 10_000},
    "ppo-halfcheetah": {"method": "ppo", "env": "HalfCheetah-v5", "count": 102_400},
    "a2c-halfcheetah": {"method": "a2c", "env": "HalfCheetah-v5", "count": 102_400},
    "ppo-halfcheetah-long": {"method": "ppo", "env": "HalfCheetah-v5", "count": 1_001_472},
    "sac-halfcheetah": {"method": "sac", "env": "HalfCheetah-v5", "count": 10_000},
    "td3-halfcheetah": {"method": "td3", "env": "HalfCheetah-v5", "count": 10_000},
}


def scores(name: str, job: dict, numbers: int, kept: dict) -> dict:
    """Returns per seed of both sides; what `kept` (an earlier result) holds is taken over."""
    if not kept.get("volvelle"):
        kept["volvelle"] = SB3.run("volvelle", job | {"what": "score", "threads": 1, "seeds": numbers})["returns"]
        print(f"{name} after {job['count']} steps: volvelle {told(kept['volvelle'])}", flush=True)
    if job.get("peer", True) and not kept.get("sb3"):
        kept["sb3"] = [SB3.run("sb3", job | {"what": "score", "threads": 1, "seed": seed})["return"] for seed in range(numbers)]
        print(f"{name} after {job['count']} steps: sb3 {told(kept['sb3'])}", flush=True)
    return kept | {"method": job["method"], "env": job["env"], "steps": job["count"]}


def told(values: list[float]) -> str:
    """Mean with its 95 % t interval, as a table shows it."""
    found = mean_interval(values)
    return f"{found.mean:.0f} [{found.low:.0f}, {found.high:.0f}]"


def table(rows: dict[str, dict]) -> str:
    lines = ["| recipe | task | environment steps | volvelle | Stable-Baselines3 |", "|---|---|---|---|---|"]
    for row in rows.values():
        steps = "100 rounds of 8 episodes" if row["method"] == "reinforce" else f"{row['steps']:,}"
        lines.append(f"| {row['method']} | {row['env']} | {steps} | {told(row['volvelle'])} | {told(row['sb3']) if row.get('sb3') else '–'} |")
    return "\n".join(lines)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("parts", nargs="*", default=["speed", "seeds"])
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--threads", default="1,2")
    ask.add_argument("--seeds", type=int, default=5, help="of scores")
    ask.add_argument("--only", help="names, separated by commas")
    ask.add_argument("--json", type=Path, help="where results are kept, and found again")
    args = ask.parse_args()
    wanted = args.only.split(",") if args.only else None
    threads = [int(t) for t in args.threads.split(",")]
    made: dict[str, dict] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for part in args.parts:
        for name, job in (SCORES if part == "scores" else SPEED).items():
            if wanted is not None and name not in wanted:
                continue
            key = f"{part}/{name}"
            if part == "scores":
                made[key] = scores(name, job, args.seeds, made.get(key, {}))
            else:
                made[key] = SB3.speed(name, job, job["unit"], args.rounds, threads) if part == "speed" else SB3.seeds(name, job, args.rounds)
            if args.json:
                args.json.write_text(json.dumps(made, indent=2) + "\n")
    if rows := {k: v for k, v in made.items() if k.startswith("scores/")}:
        print(table(rows))


if __name__ == "__main__":
    main()
