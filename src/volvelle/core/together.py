"""Several seeds as one run: recipes with a field `seeds` train them as one batched model, for far less than the runs one by one.

The run lies in ARM/together; afterwards every seed gets the folder it would have had alone, with its own curves and result. A metric
`name@i` of the batched run is `name` of its i-th seed; metrics without an @ are means over the seeds and stay with the batched run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .errors import UserError
from .files import read_json, read_lines, write_json, write_text, write_yaml
from .launch import Job
from .run import RunConfig, config_data

SHARED = ("step", "env_steps")  # counted per seed already


def possible(config: RunConfig, seeds: Sequence[int], folder: Path) -> bool:
    """Whether an arm's seeds can train as one run: the recipe can, they follow one another, and none was begun alone."""
    if not any(f.name == "seeds" for f in fields(config.recipe)) or config.recipe.seeds != 1:
        return False
    try:
        config.recipe.replace(seeds=len(seeds)).validate(config.task)
    except UserError:
        return False
    follow = len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    begun = any((folder / f"seed-{s}" / "config.yaml").exists() for s in seeds) and not (folder / "together").exists()
    return follow and not begun


def job(name: str, config: RunConfig, seeds: Sequence[int], folder: Path) -> Job:
    return Job(f"{name}, seeds {seeds[0]} to {seeds[-1]}", config.replace(seed=seeds[0], recipe=config.recipe.replace(seeds=len(seeds))), folder / "together")


def _own(metrics: dict, i: int) -> dict:
    """What belongs to the i-th seed."""
    end = f"@{i}"
    return {k.removesuffix(end): v for k, v in metrics.items() if k.endswith(end) or k in SHARED}


def split(made: Job, config: RunConfig, seeds: Sequence[int], folder: Path) -> list[dict]:
    """Give every seed its folder (config.yaml, metrics.jsonl, result.json, environment.json); returns the results in order."""
    whole, rows = read_json(made.folder / "result.json"), read_lines(made.folder / "metrics.jsonl")
    results = []
    for i, seed in enumerate(seeds):
        place = folder / f"seed-{seed}"
        result = whole | {"seed": seed, "start": _own(whole["start"], i), "metrics": _own(whole["metrics"], i), "seconds": round(whole["seconds"] / len(seeds), 3)}
        write_yaml(place / "config.yaml", config_data(config.replace(seed=seed)))
        write_text(place / "metrics.jsonl", "".join(json.dumps(_own(row, i)) + "\n" for row in rows))
        shutil.copyfile(made.folder / "environment.json", place / "environment.json")
        write_json(place / "result.json", result)
        results.append(result)
    return results
