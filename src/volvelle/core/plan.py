"""Plans: recipes one after the other, each with its own data, rewards and length, handing on what they made.

A plan is itself a recipe, so it trains, resumes and compares like one. Every stage has fresh optimisers and starts from the policy of the stage
before it; other products are handed on by name with `take`. Every stage is evaluated on every task of the plan.
"""

from __future__ import annotations

import operator
import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from .errors import RunStopped, UserError, unknown
from .files import directory
from .parts import Part, Recipe, part
from .run import Run
from .tasks import Task

Count = Annotated[int, Field(gt=0)]
_UNTIL = re.compile(r"\s*([\w./@+-]+)\s*(>=|<=|>|<)\s*(-?[\d.]+(?:e-?\d+)?)\s*", re.IGNORECASE)
_COMPARE = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}


@part("stage")
class Stage(Part):
    """One recipe within a plan.

    task: None = the run's; steps: at most; until: stop earlier, when a metric says so ("clip_ratio > 0.1"); take: field of the stage's run
    configuration -> "stage.product" made earlier ("recipe.reward.model": "judge.reward"). The policy is handed on without being named.
    """

    slot = "stage"
    recipe: Recipe = None  # type: ignore[assignment]
    task: Task | None = None
    steps: Count = 100
    until: str | None = None
    take: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if self.until is not None and not _UNTIL.fullmatch(self.until):
            raise UserError(f"until={self.until!r}: expected METRIC COMPARISON NUMBER, for example clip_ratio > 0.1")

    def over(self, metrics: dict[str, float]) -> bool:
        if self.until is None:
            return False
        name, sign, number = _UNTIL.fullmatch(self.until).groups()
        if name not in metrics:
            raise RunStopped(f"until={self.until!r}: the step reported no {name!r}; it reported {', '.join(sorted(metrics))}")
        return _COMPARE[sign](metrics[name], float(number))


@part("plan")
class Plan(Recipe):
    """Stages in order, the whole sequence `rounds` times."""

    stages: dict[str, Stage] = field(default_factory=dict)
    rounds: Count = 1

    @property
    def wing(self) -> str:  # type: ignore[override]
        return type(next(iter(self.stages.values())).recipe).wing

    @property
    def total_steps(self) -> int:
        """Steps of the whole plan when no stage stops early."""
        return self.rounds * sum(s.steps for s in self.stages.values())

    def validate(self, task=None):
        if not self.stages:
            raise UserError("plan: no stages; give at least one, for example stages.first=stage")
        for name, stage in self.stages.items():
            if stage.recipe is None:
                raise UserError(f"stages.{name}.recipe: a stage needs a recipe")
            for path, source in stage.take.items():
                earlier = source.partition(".")[0]
                if earlier not in self.stages:
                    raise unknown("stage", earlier, self.stages, f" in stages.{name}.take.{path}")
            stage.recipe.validate(stage.task or task)

    def start(self, run):
        return PlanLearner(self, run)


class PlanLearner:
    """Drives the learner of the present stage; its state is which stage that is, and that stage's run."""

    def __init__(self, plan: Plan, run: Run):
        self.plan, self.run = plan, run
        self.order = [(r, name, stage) for r in range(plan.rounds) for name, stage in plan.stages.items()]
        self.finished = False
        self.enter(0)

    def folder(self, index: int) -> Path:
        round_, name, _ = self.order[index]
        return self.run.folder / "stages" / (name if self.plan.rounds == 1 else f"{round_}-{name}")

    def enter(self, index: int) -> None:
        """Start stage `index` from what the earlier stages left on disk."""
        _, _, stage = self.order[index]
        config = self.run.config.replace(recipe=stage.recipe, task=stage.task or self.run.config.task, steps=stage.steps)
        changes: dict[str, Any] = {}
        if index and (self.folder(index - 1) / "policy").is_dir():
            changes["model"] = str(self.folder(index - 1) / "policy")
        for path, source in stage.take.items():
            name, _, product = source.partition(".")
            at = max((i for i in range(index) if self.order[i][1] == name), default=None)
            if at is None or not (self.folder(at) / product).exists():
                raise RunStopped(f"take {path}: stage {name!r} has made no {product!r} yet")
            changes[path] = str(self.folder(at) / product)
        config = config.override(**changes) if changes else config
        self.index, self.stage = index, stage
        self.inner = Run(config, self.folder(index))
        self.inner.reporter, self.inner._pending_samples = self.run.reporter, self.run._pending_samples
        self.inner.learner = self.learner = stage.recipe.start(self.inner)
        self.size = getattr(self.learner, "size", 0)

    def step(self) -> dict[str, float]:
        metrics = self.learner.step()
        self.inner.step += 1
        out = metrics | {"stage": float(self.index)}
        if self.inner.step >= self.stage.steps or self.stage.over(metrics):
            self.leave()
        return out

    def leave(self) -> None:
        """Put the stage's products on disk and enter the next stage, or finish."""
        for name, made in self.learner.product().items():
            if hasattr(made, "save"):
                with directory(self.folder(self.index) / name) as folder:
                    made.save(folder)
        if self.index + 1 < len(self.order):
            self.enter(self.index + 1)
        else:
            self.finished = True

    def tasks(self) -> dict[str, Task]:
        """Every task of the plan by label."""
        every = [self.run.config.task, *(s.task for s in self.plan.stages.values())]
        return {t.label(): t for t in every if t is not None}

    def evaluate(self) -> dict[str, float]:
        """The run's task by its own names, the others as LABEL/METRIC."""
        main = self.run.config.task
        out = {}
        for label, task in self.tasks().items():
            found = self.learner.evaluate(task)
            out |= found if main is not None and task == main else {f"{label}/{k}": v for k, v in found.items()}
        return out

    def product(self):
        return self.learner.product()

    def state_dict(self):
        return {"index": self.index, "finished": self.finished, "run": self.inner.state_dict(), "learner": self.learner.state_dict()}

    def load_state_dict(self, state):
        if state["index"] != self.index:
            self.enter(state["index"])
        self.finished = state["finished"]
        self.inner.load_state_dict(state["run"])
        self.learner.load_state_dict(state["learner"])
