"""Offline learning here and in d3rlpy: the same recorded steps, networks, batch size and optimiser settings.

    python benchmarks/offline.py [speed|seeds|scores ...] [--rounds 3] [--threads 1,2] [--seeds 5] [--only iql,cql] [--json FILE]

speed: gradient updates per second at batch 256, drawing the batch included, on 20,000 random steps of HalfCheetah-v5; compiled rows: volvelle with
--compile, compiling not counted. seeds: what five seeds as one model
cost, against five runs of one. scores: returns after equal updates on 20,000 recorded steps of Pendulum-v1, once each of several qualities (two layers of
64, batches of 128, learning rates of 1e-3; 20 greedy episodes, mean over seeds with its 95 % t interval); a side that is in the file already is not run again; cql-alike: with d3rlpy's units of actions and its mode in the target. d3rlpy gets an environment of its own (made on the first call, under
the user's cache). Both sides run in turn, each in a fresh process, at every thread count given; each side's best thread count is reported.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from control import told
from gymnasium.spaces import Box
from peers import Peer
from volvelle.control.tasks import Gym
from volvelle.offline.behaviours import Behaviour, PendulumSwing, Random
from volvelle.offline.data.collect import collect
from volvelle.offline.data.files import write_dataset

D3RLPY = Peer("d3rlpy", "_offline_volvelle.py", "_offline_d3rlpy.py", made="ready-1", installs=(("torch==2.13.0",), ("torch==2.13.0", "d3rlpy==2.8.1")))  # it asks for an older Gymnasium
SPEED = {"iql": {"count": 300}, "td3-bc": {"count": 300}, "cql": {"count": 30}, **{f"{m}-compiled": {"method": m, "count": n, "compile": True} for m, n in (("iql", 300), ("cql", 30))}}
SCORES = {"bc": {"count": 2000}, "td3-bc": {"count": 4000}, "iql": {"count": 4000}, "awac": {"count": 4000}, "cql": {"count": 1500}, "cql-alike": {"method": "cql", "count": 1500, "alike": True}}
SMALL = {"hidden": [64, 64], "batch": 128, "lr": 1e-3}
HALF_CHEETAH = ("HalfCheetah-v5", Random(), "random")
PENDULUM = [("Pendulum-v1", PendulumSwing(), quality) for quality in ("medium-replay", "medium-expert")]


def recorded(name: str, behaviour: Behaviour, quality: str, folder: Path) -> dict[str, str]:
    """The same steps twice: a dataset for volvelle, plain arrays for d3rlpy."""
    data = collect(Gym(id=name), behaviour, quality, 20_000, seed=0)
    rows = data.rows
    np.savez(folder / "arrays.npz", observations=data.fields["obs"][rows], actions=data.fields["actions"][rows], rewards=data.fields["rewards"][rows],
             terminals=data.fields["terminated"][rows], timeouts=data.fields["truncated"][rows], low=data.action_space.low, high=data.action_space.high)
    low, high = data.action_space.low, data.action_space.high
    unit = replace(data, action_space=Box(-1.0, 1.0, low.shape, np.float32), fields={**data.fields, "actions": (2 * (data.fields["actions"] - low) / (high - low) - 1).astype(np.float32)})
    return {"env": name, "quality": quality, "data": str(folder / "arrays.npz"), "folder": str(write_dataset(data, folder / f"{name}.hdf5")),
            "unit_folder": str(write_dataset(unit, folder / f"{name}-unit.hdf5"))}


def scores(method: str, job: dict, numbers: int, kept: dict, keep) -> dict:
    """Returns per seed of both sides; what `kept` (an earlier result) holds is taken over."""
    kept |= {"method": method, "env": job["env"], "quality": job["quality"], "updates": job["count"]}
    if not kept.get("volvelle"):
        made = D3RLPY.run("volvelle", job | {"what": "score", "threads": 1, "seeds": numbers})
        kept |= {"volvelle": made["returns"], "volvelle_seconds": made["seconds"]}
        keep(kept)
    kept.setdefault("d3rlpy", [])
    for seed in range(len(kept["d3rlpy"]), numbers):
        made = D3RLPY.run("d3rlpy", job | {"what": "score", "threads": 1, "seed": seed})
        kept["d3rlpy"].append(made["return"])
        kept["d3rlpy_seconds"] = kept.get("d3rlpy_seconds", 0.0) + made["seconds"]
        keep(kept)
    print(f"{method}, {job['quality']}, after {job['count']} updates: volvelle {told(kept['volvelle'])}, d3rlpy {told(kept['d3rlpy'])}", flush=True)
    return kept


def table(rows: dict[str, dict]) -> str:
    lines = ["| recipe | data | updates | volvelle | d3rlpy |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {r['method']} | {r['env']}, {r['quality']} | {r['updates']:,} | {told(r['volvelle'])} | {told(r['d3rlpy'])} |" for r in rows.values()])


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

    def keep(key: str, value: dict) -> None:
        made[key] = value
        if args.json:
            args.json.write_text(json.dumps(made, indent=2) + "\n")

    for part in args.parts:
        for about in PENDULUM if part == "scores" else [HALF_CHEETAH]:
            with tempfile.TemporaryDirectory() as folder:
                data = recorded(*about, Path(folder))
                for name, settings in (SCORES if part == "scores" else SPEED).items():
                    if wanted is not None and name not in wanted:
                        continue
                    job = {"method": name, "small": SMALL if part == "scores" else None, **settings, **data}
                    if part == "scores":
                        key, same = f"scores/{name}/{job['quality']}", made.get(f"scores/{job['method']}/{job['quality']}", {})
                        kept = made.get(key) or {k: same[k] for k in ("d3rlpy", "d3rlpy_seconds") if k in same}  # the peer's run is the same
                        keep(key, scores(name, job, args.seeds, kept, lambda value, key=key: keep(key, value)))
                    else:
                        keep(f"{part}/{name}", D3RLPY.speed(name, job, "updates", args.rounds, threads) if part == "speed" else D3RLPY.seeds(name, job, args.rounds))
    if rows := {k: v for k, v in made.items() if k.startswith("scores/")}:
        print(table(rows))


if __name__ == "__main__":
    main()
