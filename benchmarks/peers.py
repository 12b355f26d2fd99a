"""What the benchmarks share: a peer's environment of its own, one job in a fresh process, sides in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Peer:
    """`name` of the peer's side; `ours`, `theirs`: the programs beside this file that run a job; `installs`: pip's words, one call each; `made`: file that says
    the environment is complete (a new name makes it anew)."""

    name: str
    ours: str
    theirs: str
    installs: Sequence[Sequence[str]]
    made: str

    @property
    def sides(self) -> tuple[str, str]:
        return "volvelle", self.name

    def python(self) -> Path:
        """The interpreter of the peer's own environment, made on the first call under the user's cache."""
        home = Path(os.environ.get("VOLVELLE_CACHE") or Path.home() / ".cache" / "volvelle") / f"benchmark-{self.name}"
        python = home / "bin" / "python"
        if not (home / self.made).exists():
            venv.create(home, with_pip=True, clear=True)
            for words in self.installs:
                subprocess.run([python, "-m", "pip", "install", "-q", *words], check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
            (home / self.made).touch()
        return python

    def run(self, side: str, job: dict) -> dict:
        """The job in a fresh process of that side; what its last line of output says."""
        program = [sys.executable, str(HERE / self.ours)] if side == "volvelle" else [str(self.python()), str(HERE / self.theirs)]
        waiting = "ACTIVE" if job["threads"] > 1 else "PASSIVE"  # threads that spin are the fastest where nothing else runs; on a shared machine give --threads 1
        env = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "OMP_WAIT_POLICY": waiting}
        done = subprocess.run([*program, json.dumps(job)], env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{side} failed on {job}:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def speed(self, name: str, job: dict, unit: str, rounds: int, threads: list[int]) -> dict:
        """Medians over rounds of both sides, each at its best thread count, and their ratios."""
        found: dict[tuple[str, int], list[dict]] = {}
        for n in range(rounds):
            for count in threads:
                for side in self.sides if n % 2 == 0 else reversed(self.sides):
                    row = self.run(side, job | {"what": "speed", "threads": count})
                    found.setdefault((side, count), []).append(row)
                    print(f"{name} round {n + 1}  {side:9} {count} threads  {row['per_second']:9.1f} per second  {row['per_cpu_second']:9.1f} per CPU second", flush=True)
        best = {}
        for side in self.sides:
            medians = {t: {k: statistics.median(r[k] for r in found[side, t]) for k in ("per_second", "per_cpu_second")} for t in threads}
            count = max(medians, key=lambda t: medians[t]["per_second"])
            best[side] = {"threads": count, **medians[count], "best_per_cpu_second": max(m["per_cpu_second"] for m in medians.values())}
        ours, theirs = (best[side] for side in self.sides)
        ratio, cpu = ours["per_second"] / theirs["per_second"], ours["best_per_cpu_second"] / theirs["best_per_cpu_second"]
        print(f"{name}: {ours['per_second']:.0f} against {theirs['per_second']:.0f} {unit} per second: {ratio:.2f}x ({cpu:.2f}x per CPU second)\n", flush=True)
        return {"best": best, "ratio": ratio, "cpu_ratio": cpu, "runs": [{"side": s, "threads": t, **r} for (s, t), rows in found.items() for r in rows]}

    def seeds(self, name: str, job: dict, rounds: int) -> dict:
        """What five seeds as one model cost, in runs of one."""
        found: dict[int, list[float]] = {1: [], 5: []}
        for _ in range(rounds):
            for k in found:
                found[k].append(1 / self.run("volvelle", job | {"what": "speed", "threads": 1, "seeds": k})["per_cpu_second"])
        ratio = statistics.median(found[5]) / statistics.median(found[1])
        print(f"{name}: five seeds as one model cost {ratio:.2f} times one run (five runs: 5)", flush=True)
        return {"ratio": ratio}
