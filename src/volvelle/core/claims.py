"""Claims: a paper's effect as something anyone can run, with a verdict that is computed and never typed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .comparing import Comparison, compare_arms
from .errors import UserError
from .files import read_json, write_json, write_text
from .launch import Job, run_jobs
from .parts import Recipe, coerce
from .run import RunConfig
from .statistics import Expectation, Outcome, combine, verdict
from .tasks import Model, Task


@dataclass(frozen=True)
class Arm:
    """One side of a comparison, where it differs from the claim in more than its recipe."""

    recipe: Recipe
    task: Any = None
    model: Any = None
    steps: int | None = None


@dataclass(frozen=True)
class Claim:
    """What a paper says, as arms to run and expectations to hold.

    says: the claim in words; arms: name -> Recipe (or Arm); task, model, steps: shared by all arms;
    expects: such as "ngrpo > grpo on pass@1", all of which must hold; seeds: how many, paired, from `first_seed`
    on (fresh ones where earlier seeds helped to choose a setting); equal: what the arms share ("samples",
    "steps", "environment steps"); minutes: of the whole claim on 2 CPU cores; prepare: a recipe run once per seed whose products every arm
    takes (`take`: field of the run configuration -> product), on the first arm's task or on prepare_task; quick: smaller numbers for the tests; paper: the paper's own setting.
    """

    says: str
    arms: Mapping[str, Any]
    expects: tuple[str, ...]
    task: Any = None
    model: Any = None
    steps: int = 100
    seeds: int = 5
    first_seed: int = 0
    equal: str = "samples"
    minutes: float = 10.0
    prepare: Recipe | None = None
    prepare_steps: int = 100
    prepare_task: Any = None
    take: Mapping[str, str] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=lambda: {"steps": 2, "seeds": 2})
    paper: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for text in self.expects:
            found = Expectation.parse(text)
            for arm in (found.left, found.right):
                if arm is not None and arm not in self.arms:
                    raise UserError(f"claim: expectation {text!r} names the arm {arm!r}; the arms are {', '.join(self.arms)}")

    @property
    def metrics(self) -> list[str]:
        """The metrics that the expectations speak of."""
        return list(dict.fromkeys(Expectation.parse(text).metric for text in self.expects))

    def scaled(self, scale: str) -> "Claim":
        """The claim with the numbers of "quick" or "paper" put in; "cpu" is the claim as it stands."""
        if scale == "cpu":
            return self
        if scale not in ("quick", "paper"):
            raise UserError(f"scale={scale!r}: accepted are cpu, quick, paper")
        return dataclasses.replace(self, **getattr(self, scale))

    def config(self, arm: str, method: str) -> RunConfig:
        made = self.arms[arm]
        made = made if isinstance(made, Arm) else Arm(made)
        task = coerce(Task | None, made.task if made.task is not None else self.task, "task")
        model = coerce(Model | None, made.model if made.model is not None else self.model, "model")
        if model is None and task is not None and getattr(task, "default_model", None) is not None:
            model = coerce(Model, task.default_model, "model")
        return RunConfig(recipe=made.recipe, task=task, model=model, method=arm, steps=self.steps if made.steps is None else made.steps, **self.run)


@dataclass
class Reproduction:
    """A finished claim: verdict, its outcomes, the comparison behind it, and the record that goes to reproductions/."""

    verdict: str
    outcomes: list[Outcome]
    comparison: Comparison
    record: dict
    report: Path


def run_claim(name: str, claim: Claim, folder: str | Path, scale: str = "cpu", backend: str = "local", workers: int = 1,
              progress: Callable | None = None) -> Reproduction:
    """Run every arm of a claim with paired seeds and hold the expectations against the results."""
    claim, folder = claim.scaled(scale), Path(folder)
    seeds = [claim.first_seed + i for i in range(claim.seeds)]
    arms = {arm: claim.config(arm, name) for arm in claim.arms}
    if claim.prepare is not None:
        comparison = _with_preparation(name, claim, arms, seeds, folder, backend, workers, progress)
    else:
        comparison = compare_arms(arms, seeds, folder, backend, workers, progress)
    outcomes = [verdict(text, comparison.values) for text in claim.expects]
    settled = combine(outcomes)
    report = comparison.write(name, _reported(claim, comparison), claim.says, outcomes)
    return Reproduction(settled, outcomes, comparison, _record(name, claim, scale, settled, outcomes, comparison), report)


def _with_preparation(name, claim, arms, seeds, folder, backend, workers, progress) -> Comparison:
    first = next(iter(arms.values()))
    base = first.replace(recipe=claim.prepare, steps=claim.prepare_steps, method="prepare")
    if claim.prepare_task is not None:
        base = base.replace(task=coerce(Task, claim.prepare_task, "prepare_task"))
    jobs = [Job(f"prepare, seed {s}", base.replace(seed=s), folder / "prepare" / f"seed-{s}") for s in seeds]
    for job, _ in run_jobs(jobs, backend, workers):
        if progress:
            progress(0, len(seeds) * len(arms), job.name)
    results: dict[str, list] = {arm: [] for arm in arms}
    for i, seed in enumerate(seeds):
        taken = {field: str((jobs[i].folder / product).resolve()) for field, product in claim.take.items()}
        here = {arm: config.override(**taken) for arm, config in arms.items()}
        part = compare_arms(here, [seed], folder, backend, workers)
        for arm in arms:
            results[arm] += part.results[arm]
        if progress:
            progress((i + 1) * len(arms), len(seeds) * len(arms), f"seed {seed}")
    return Comparison(arms, seeds, folder, results)


def _reported(claim: Claim, comparison: Comparison) -> list[str]:
    shared = set.intersection(*(set(v) for v in comparison.values.values()))
    return [*claim.metrics, *(m for m in sorted(shared) if m not in claim.metrics and not m.endswith(("_low", "_high")))]


def _record(name, claim, scale, settled, outcomes, comparison) -> dict:
    runs = [r for results in comparison.results.values() for r in results]
    path = comparison.run_folder(next(iter(comparison.arms)), comparison.seeds[0]) / "environment.json"
    return {
        "method": name, "says": claim.says, "verdict": settled, "scale": scale, "seeds": comparison.seeds, "equal": claim.equal,
        "expectations": [{"text": o.expectation, "verdict": o.verdict, "mean": o.interval.mean, "low": o.interval.low, "high": o.interval.high,
                          "threshold": o.threshold} for o in outcomes],
        "arms": {arm: {"steps": config.steps, "task": config.task.label() if config.task else None, "recipe_digest": config.recipe.digest,
                       "metrics": {m: comparison.values[arm][m].tolist() for m in _reported(claim, comparison) if m in comparison.values[arm]}}
                 for arm, config in comparison.arms.items()},
        "seconds": round(sum(r["seconds"] for r in runs), 1), "environment": read_json(path) if path.exists() else {},
    }


def save_reproduction(made: Reproduction, folder: str | Path) -> tuple[Path, Path]:
    """Write <method>.json and <method>.svg: the only way a verdict gets into reproductions/."""
    from .plots import final_values

    folder, name = Path(folder), made.record["method"]
    metric = Expectation.parse(made.record["expectations"][0]["text"]).metric
    values = {arm: v[metric] for arm, v in made.comparison.values.items() if metric in v}
    picture = final_values(values, metric=metric, title=f"{name}: {made.verdict}")
    return write_json(folder / f"{name}.json", made.record), write_text(folder / f"{name}.svg", picture)
