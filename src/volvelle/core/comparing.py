"""Arms with paired seeds: every arm runs with every seed, and differences are taken seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import together
from .errors import UserError, unknown
from .files import read_json, read_lines, write_text
from .launch import Job, run_jobs
from .run import RunConfig, config_data
from .statistics import Outcome, mean_interval, paired


@dataclass
class Comparison:
    """What came of a comparison. values[arm][metric] is [seeds]; results[arm] the runs' result.json in the order of `seeds`."""

    arms: dict[str, RunConfig]
    seeds: list[int]
    folder: Path
    results: dict[str, list[dict]]
    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self):
        for arm, runs in self.results.items():
            shared = [m for m in runs[0]["metrics"] if all(m in r["metrics"] for r in runs)]
            self.values[arm] = {m: np.array([r["metrics"][m] for r in runs]) for m in shared}

    def run_folder(self, arm: str, seed: int) -> Path:
        return self.folder / arm.replace("/", "-") / f"seed-{seed}"

    def table(self, metric: str) -> list[dict]:
        """Per arm: mean with interval, and the paired difference to the first arm."""
        first, rows = next(iter(self.arms)), []
        for arm in self.arms:
            values = self.values[arm][metric]
            row = {"arm": arm, "metric": metric, "mean": float(values.mean()), "values": values.tolist()}
            if len(values) > 1:
                interval = mean_interval(values)
                row |= {"low": interval.low, "high": interval.high}
                if arm != first:
                    gap = paired(values, self.values[first][metric])
                    row["difference"] = {"mean": gap.mean, "low": gap.low, "high": gap.high}
            rows.append(row)
        return rows

    def curves(self, arm: str) -> dict[str, tuple[list[int], np.ndarray]]:
        """metric -> (steps [T], values [S, T]) for what every seed logged at the same steps."""
        logs = [read_lines(self.run_folder(arm, s) / "metrics.jsonl") for s in self.seeds]
        out = {}
        for metric in dict.fromkeys(k for row in logs[0] for k in row):
            if metric == "step" or metric.startswith("time/") or metric.endswith(("_low", "_high")):
                continue
            series = [[(row["step"], row[metric]) for row in log if metric in row] for log in logs]
            steps = [s for s, _ in series[0]]
            if len(steps) > 1 and all([s for s, _ in one] == steps for one in series):
                out[metric] = (steps, np.array([[v for _, v in one] for one in series]))
        return out

    def samples(self, arm: str) -> list:
        """The last evaluated completions of the first seed, as report.Sample."""
        from .report import Sample

        rows = [r for r in read_lines(self.run_folder(arm, self.seeds[0]) / "samples.jsonl") if r.get("split") != "train"]
        last = max((r["step"] for r in rows), default=0)
        return [Sample(_text(r["prompt"]), r["response"], r.get("solved"), r["reward"]) for r in rows if r["step"] == last]

    def write(self, title: str, metrics: Sequence[str] | None = None, says: str | None = None, outcomes: Sequence[Outcome] = ()) -> Path:
        """report.html in the comparison's folder, and curves.svg, its first picture of an evaluated metric: that of `metrics` or the task's.

        metrics: those of the final table (all when not given).
        """
        from .plots import learning_curves
        from .report import ArmData, write_report  # the plotting library takes a second to import: only who draws waits for it

        arms = []
        for name, config in self.arms.items():
            wanted = [m for m in self.values[name] if not m.endswith(("_low", "_high"))]
            final = {m: self.values[name][m] for m in (metrics or wanted) if m in self.values[name]}
            arms.append(ArmData(name, self.seeds, final, _main_curves(self.curves(name), metrics), self.samples(name), config_data(config)))
        first = next(iter(self.arms.values()))
        setting = {"task": first.task.label() if first.task else "", "model": " ".join((first.model.part_name, getattr(first.model, "path", ""))).strip() if first.model else "", "steps": first.steps}
        setting = {k: v for k, v in setting.items() if v != ""}
        path = self.run_folder(next(iter(self.arms)), self.seeds[0]) / "environment.json"
        environment = read_json(path) if path.exists() else {}
        main = metrics[0] if metrics else first.task.metric if first.task else None
        if drawn := {a.name: a.curves[f"eval/{main}"] for a in arms if f"eval/{main}" in a.curves}:
            write_text(self.folder / "curves.svg", learning_curves(drawn, metric=main, rng=np.random.default_rng(0), title=title))
        return write_report(self.folder / "report.html", title, arms, setting=setting, says=says, outcomes=outcomes, environment=environment)


def _text(prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _main_curves(curves: dict, metrics: Sequence[str] | None) -> dict:
    """Evaluation curves first (all or those asked for), then reward and length."""
    chosen = [m for m in curves if m.startswith("eval/") and (metrics is None or m.removeprefix("eval/") in metrics)]
    return {m: curves[m] for m in [*chosen, *(m for m in ("reward", "length", "return", "loss") if m in curves)]}


def compare_arms(arms: dict[str, RunConfig], seeds: Sequence[int], folder: str | Path, backend: str = "local", workers: int = 1,
                 progress: Callable | None = None, metric: str | None = None) -> Comparison:
    """Run every arm with every seed (seed by seed, so that a broken comparison has complete pairs) and gather the results.

    With one local worker, an arm whose recipe can train several seeds as one model does so (see together.py). Runs that are there already
    are read back, broken ones resumed. UserError on no arms or repeated seeds, and as soon as a run's result lacks `metric`.
    """
    if not arms:
        raise UserError("compare: no arms; give at least one method")
    if len(set(seeds)) != len(seeds) or not len(seeds):
        raise UserError(f"compare: seeds {list(seeds)}; expected one or more different numbers")
    folder = Path(folder)
    places = {arm: folder / arm.replace("/", "-") for arm in arms}
    whole = {arm for arm, config in arms.items() if backend == "local" and workers == 1 and together.possible(config, seeds, places[arm])}
    planned = [(arm, 0, together.job(arm, arms[arm], seeds, places[arm])) for arm in arms if arm in whole]
    planned += [(arm, i, Job(f"{arm}, seed {seed}", config.replace(seed=seed), places[arm] / f"seed-{seed}"))
                for i, seed in enumerate(seeds) for arm, config in arms.items() if arm not in whole]
    jobs, where = [job for *_, job in planned], {id(job): (arm, i) for arm, i, job in planned}
    results: dict[str, list] = {arm: [None] * len(seeds) for arm in arms}
    for n, (job, result) in enumerate(run_jobs(jobs, backend, workers)):
        arm, i = where[id(job)]
        if metric is not None and metric not in result["metrics"]:
            raise unknown("metric", metric, result["metrics"], f" of {arm}")
        if arm in whole:
            results[arm] = together.split(job, arms[arm], seeds, places[arm])
        else:
            results[arm][i] = result
        if progress:
            progress(n + 1, len(jobs), job.name)
    return Comparison(arms, list(seeds), folder, results)
