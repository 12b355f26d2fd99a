"""The verbs, from Python: train, evaluate, compare, reproduce, report, methods, tasks, load. The command line calls these."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .claims import Reproduction, run_claim
from .comparing import Comparison, compare_arms
from .errors import UserError
from .files import read_json, read_lines
from .parts import Recipe, coerce, parse_overrides
from .processes import processes
from .registry import Method, registry
from .run import RunConfig, read_config
from .tasks import Model, Task
from .trainer import Trained, checkpoints, load_checkpoint, start, threads, train_config

ROOTS = ("task", "model", "run")


def configure(method: str | Recipe, task: str | Task | None = None, model: str | Model | None = None,
              overrides: Sequence[str] | Mapping[str, Any] = (), **options) -> RunConfig:
    """The configuration that a method, a task, a model and overrides describe.

    method: a name ("grpo", "control/ppo") or a recipe; overrides: "advantage=ngrpo" changes the recipe, "task.…", "model.…" and
    "run.…" the rest; options: fields of RunConfig. UserError on anything unknown or ill-typed.
    """
    registry.load()
    paths = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    task = coerce(Task | None, task, "task")
    found: Method | None = None
    if isinstance(method, str):
        found = registry.method(method, task.wing if task is not None else None)
        recipe, name = found.recipe, found.name
    else:
        recipe = method
        name = next((m.name for m in registry.methods.values() if m.recipe is recipe), "custom")
    model = coerce(Model | None, model, "model")
    if model is None and task is not None and getattr(task, "default_model", None) is not None:
        model = coerce(Model, task.default_model, "model")
    if hasattr(recipe, "total_steps"):
        options.setdefault("steps", recipe.total_steps)
    config = RunConfig(recipe=recipe, task=task, model=model, method=name, **options)
    grouped: dict[str, Any] = {}
    for path, value in paths.items():
        root, _, rest = path.partition(".")
        if root == "run" and rest:
            grouped[rest] = value
        elif root in ("task", "model"):
            if getattr(config, root) is None and rest:
                raise UserError(f"{path}={value}: this run has no {root}; give --{root} first")
            grouped[path] = value
        else:
            grouped[f"recipe.{path}"] = value
    try:
        return config.override(**grouped) if grouped else config
    except UserError as error:
        raise UserError(str(error).replace("recipe.", "")) from None


def fresh_folder(config: RunConfig, root: str | Path = "runs") -> Path:
    """A folder name under `root` that is not taken yet."""
    label = re.sub(r"[^A-Za-z0-9_.+-]+", "-", config.label())
    taken = (Path(root) / f"{label}-s{config.seed}{'' if i == 1 else f'-{i}'}" for i in range(1, 10_000))
    return next(p for p in taken if not p.exists())


def train(method: str | Recipe | None = None, task=None, model=None, *, overrides=(), folder: str | Path | None = None,
          resume: str | Path | None = None, allow_code: Sequence[str] = (), progress: Callable | None = None,
          reporter: Callable[[str], None] | None = None, **options) -> Trained:
    """Train, or go on with a run.

    train("grpo", task="gcd-easy", model="smollm2", steps=20); train(grpo(advantage=my_function), task=my_task, …);
    train(resume="runs/x") goes on with what config.yaml there says (`steps` may raise the number of steps); a run whose functions live in
    a program is resumed by that program: train(recipe, …, resume=path).
    """
    if resume is not None:
        folder = Path(resume)
        if method is None:
            config = read_config(folder, tuple(allow_code))
            config = config.replace(**{k: v for k, v in options.items() if v is not None})
        else:
            config = configure(method, task, model, overrides, **options)
        return train_config(config, folder, True, progress, reporter)
    if method is None:
        raise UserError("train: no method; give one, for example grpo, or resume=RUN")
    config = configure(method, task, model, overrides, **options)
    return train_config(config, folder or processes().same(fresh_folder(config)), False, progress, reporter)


def open_run(folder: str | Path, best: bool = False, allow_code: Sequence[str] = (), **changes) -> tuple[Any, Any]:
    """(run, learner) as of the last checkpoint; changes: fields of the configuration to replace (task, recipe)."""
    config = read_config(folder, tuple(allow_code))
    found = checkpoints(Path(folder))
    if not found:
        raise UserError(f"{folder}: no checkpoint there")
    run, learner = start(config, Path(folder))
    load_checkpoint(run, learner, found[-1])
    return run, learner


def load(folder: str | Path, allow_code: Sequence[str] = ()) -> dict[str, Any]:
    """What a run has made ("policy", "actor", …), ready to use."""
    return open_run(folder, allow_code=allow_code)[1].product()


def evaluate(what: str | Path, task=None, *, overrides=(), allow_code: Sequence[str] = (), best: bool = False) -> dict[str, float]:
    """Evaluate a run, or a model folder or name on a task.

    overrides: dotted, "evaluation.split=test" and the like (test is the default split where the recipe has splits).
    """
    folder = Path(what)
    if (folder / "config.yaml").is_file():
        config = read_config(folder, tuple(allow_code))
        run, learner = open_run(folder, allow_code=allow_code)
        new = _for_evaluation(config if task is None else config.replace(task=coerce(Task, task, "task")), overrides)
        if best and not (folder / "best").is_dir():
            raise UserError(f"{folder}: no best/ there; it is kept when evaluate_every is set and the metric rises")
        if best or new != config:
            if hasattr(learner, "evaluate_as"):
                learner.evaluate_as(new, folder / "best" if best else None)
            else:
                raise UserError(f"a run of the {config.recipe.wing} wing is evaluated as it was trained; leave out task, best and overrides")
        with threads(config.threads, learner):
            return learner.evaluate()
    if task is None:
        raise UserError(f"eval {what}: not a run folder; to evaluate a model, name a task as well, for example --task gcd-easy")
    task = coerce(Task, task, "task")
    config = _for_evaluation(configure(_bare(task.wing), task, str(what)), overrides)
    _, learner = start(config, Path("."))
    with threads(config.threads, learner):
        return learner.evaluate()


def _bare(wing: str) -> Recipe:
    """Any recipe of the wing that needs nothing special: evaluation does not depend on how one would train."""
    found = registry.methods.get((wing, "grpo"))
    if found is None:
        raise UserError(f"a model alone cannot be evaluated in the {wing} wing; evaluate a run")
    return found.recipe


def _for_evaluation(config: RunConfig, overrides) -> RunConfig:
    paths = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    evaluation = getattr(config.recipe, "evaluation", None)
    if evaluation is not None and any(f.name == "split" for f in dataclasses.fields(evaluation)):
        paths = {"evaluation.split": "test", **paths}
    moved = {p if p.partition(".")[0] in ("task", "model") else f"recipe.{p}": v for p, v in paths.items()}
    try:
        return config.override(**moved) if moved else config
    except UserError as error:
        raise UserError(str(error).replace("recipe.", "")) from None


def compare(arms: Sequence[str | Recipe] | Mapping[str, Any], task=None, model=None, *, seeds: int | Sequence[int] = 5, folder: str | Path | None = None,
            backend: str = "local", workers: int = 1, overrides=(), metric: str | None = None, progress: Callable | None = None, **options) -> Comparison:
    """Run several arms with paired seeds on one task and write report.html.

    arms: "grpo", "grpo advantage=ngrpo", "mine=grpo advantage=ngrpo" (named), or a mapping from names to recipes; overrides go to every
    arm; metric: one that every result must have, or the comparison stops at the first run. Returns a Comparison with values, tables and curves. Calling it again with the same folder goes on where it stopped.
    """
    named = dict(arms) if isinstance(arms, Mapping) else dict(_arm(a) for a in arms)
    if not isinstance(arms, Mapping) and len(named) != len(arms):
        raise UserError(f"compare: two arms have the same name; name them, for example first={list(arms)[0]!r}")
    configs = {}
    for name, (method, own) in ((n, a if isinstance(a, tuple) else (a, ())) for n, a in named.items()):
        configs[name] = configure(method, task, model, [*overrides, *own], **options).replace(method=name)
        configs[name].recipe.validate(configs[name].task)
    folder = Path(folder) if folder else Path("runs") / ("compare-" + "-vs-".join(re.sub(r"[^A-Za-z0-9_.+-]+", "-", n) for n in configs))
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    made = compare_arms(configs, numbers, folder, backend, workers, progress, metric)
    label = next(iter(configs.values())).task
    made.write(" vs ".join(configs) + (f" on {label.label()}" if label else ""))
    return made


def _arm(text: str | Recipe) -> tuple[str, Any]:
    if not isinstance(text, str):
        name = next((m.name for m in registry.methods.values() if m.recipe is text), type(text).__name__)
        return name, text
    first, *own = text.split()
    name, sign, method = first.partition("=")
    return (name, (method, own)) if sign else ("_".join([first, *(w.replace("=", "-") for w in own)]), (first, own))


def reproduce(method: str, *, scale: str = "cpu", seeds: int | None = None, folder: str | Path | None = None, backend: str = "local",
              workers: int = 1, progress: Callable | None = None) -> Reproduction:
    """Run a method's claim; the verdict comes from the paired t intervals. See save_reproduction for reproductions/."""
    found = registry.method(method)
    if found.claim is None:
        have = ", ".join(sorted(m.name for m in registry.methods.values() if m.claim))
        raise UserError(f"method {method!r} carries no claim; methods with one: {have or 'none'}")
    claim = found.claim if seeds is None else dataclasses.replace(found.claim, seeds=seeds)
    return run_claim(found.name, claim, folder or Path("runs") / f"reproduce-{found.name}-{scale}", scale, backend, workers, progress)


def report(folder: str | Path, allow_code: Sequence[str] = ()) -> Path:
    """Write report.html for a run, or again for a comparison's folder."""
    folder = Path(folder)
    if (folder / "config.yaml").is_file():
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder}: no metrics.jsonl there; the run has not begun")
        return _SingleRun(folder, allow_code).write_page()
    found = sorted(folder.glob("*/seed-*/result.json"))
    if not found:
        raise UserError(f"{folder}: neither a run (config.yaml) nor a comparison (ARM/seed-N/result.json)")
    arms, results = {}, {}
    for path in found:
        arm = path.parent.parent.name
        arms.setdefault(arm, read_config(path.parent, tuple(allow_code), look=True))
        results.setdefault(arm, {})[int(path.parent.name.removeprefix("seed-"))] = read_json(path)
    arms.pop("prepare", None)
    seeds = sorted(set.intersection(*(set(results[a]) for a in arms)))
    if not seeds:
        raise UserError(f"{folder}: no seed is finished in every arm yet")
    made = Comparison(arms, seeds, folder, {a: [results[a][s] for s in seeds] for a in arms})
    return made.write(" vs ".join(arms))


class _SingleRun(Comparison):
    """One run as a comparison of one arm, for its report."""

    def __init__(self, folder: Path, allow_code=()):
        config = read_config(folder, tuple(allow_code), look=True)
        done = folder / "result.json"
        rows = read_lines(folder / "metrics.jsonl")
        last = {k.removeprefix("eval/"): v for row in rows for k, v in row.items() if k.startswith("eval/")}
        super().__init__({config.method or "run": config}, [config.seed], folder, {config.method or "run": [read_json(done) if done.is_file() else {"metrics": last}]})

    def run_folder(self, arm, seed):
        return self.folder

    def write_page(self) -> Path:
        config = next(iter(self.arms.values()))
        return self.write(config.label())


def methods() -> list[Method]:
    """Every registered method, by wing and name."""
    registry.load()
    return sorted(registry.methods.values(), key=lambda m: (m.wing, m.name))


def is_method(name: str) -> bool:
    """Whether a method of that name is registered (in any wing)."""
    registry.load()
    return any(name in (m.name, m.key) for m in registry.methods.values())


def tasks() -> dict[str, str]:
    """Names that --task takes, with one line each."""
    registry.load()
    def line(found: Any) -> str:
        return (found.__doc__ or "").strip().partition("\n")[0]

    table = {name: value if isinstance(value, type) else type(value) for name, value in registry.table(Task).items()}
    named = {name: line(value) for name, value in table.items() if name not in Task.readers}
    prefixed = {f"{prefix}:…": line(table.get(prefix, reader)) for prefix, reader in Task.readers.items()}
    free = {f"<{f.accepts}>": line(f) for f in Task.fallback}
    return named | prefixed | free


