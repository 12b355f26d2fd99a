"""The offline recipe and its loop: draw a batch, make one update. It knows no paper; several seeds learn side by side as one model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.encoding import Vocabulary
from volvelle.control.envs import probe
from volvelle.control.evaluation import Evaluation, Evaluator
from volvelle.control.learner import Assessed, Count
from volvelle.control.normalise import ObservationNormaliser
from volvelle.control.policy import Deciding, Policy
from volvelle.control.slots import ControlTask, Relabel
from volvelle.control.spaces import Spec
from volvelle.control.speed import keep_freed_memory
from volvelle.control.stacked import Streams
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import Recipe, to_config
from volvelle.core.tasks import Task

from .commands import GoalTask
from .data.dataset import Dataset
from .evaluation import GoalEvaluator, normalised
from .goals import Goals
from .samplers import BatchSampler, Table, Transitions
from .tasks import OfflineTask


class OfflineAgent(Protocol):
    """What the loop asks of an agent. `module` is what acts; `size` its number of trained parameters."""

    module: Deciding
    size: int

    def update(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One gradient step of every part; returns what `report` needs."""

    def report(self, made: dict[str, Any]) -> dict[str, Tensor | float]:
        """Metrics of an update, from what it returned."""


@dataclass(frozen=True, eq=False)
class Offline(Recipe):
    """Fields of every offline recipe.

    seeds: so many, from the run's on, train as one model; period: gradient steps per learner step; batch: rows per gradient step and seed;
    normalise_observations: (s - mean) / (std + 1e-3) over the dataset, also when acting, cut at +-10; rewards: "as-is", "return-range" (times 1000 /
    (best - worst episode's return)) or "minus-one"; relabels: changes of sampled batches, in order.
    """

    wing: ClassVar[str] = "offline"
    goals: ClassVar[bool] = False  # whether it learns to reach commanded goals
    needs: ClassVar[tuple[str, ...]] = ("rewards", "discounts", "next_obs")  # of a batch, beside obs and actions
    acting: ClassVar[tuple[str, ...]] = ()  # fields that matter when acting alone: an evaluation may change them
    seeds: Count = 1
    period: Count = 1000
    batch: Count = 256
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99
    sampler: BatchSampler = Transitions()
    normalise_observations: bool = False
    rewards: Literal["as-is", "return-range", "minus-one"] = "as-is"
    relabels: dict[str, Relabel] = field(default_factory=dict)
    evaluation: Evaluation = Evaluation()

    def validate(self, task: Task | None = None) -> None:
        super().validate(task)
        if task is None:
            raise UserError(f"{self.part_name}: no task; give a dataset, for example --task offline:PATH or --task pendulum-medium-replay")
        if not isinstance(task, OfflineTask):
            raise UserError(f"task {task.label()} is no dataset; {self.part_name} learns from one: --task offline:PATH or pendulum-medium-replay (volvelle data collect makes them)")
        if any(getattr(r, "when", "sample") == "store" for r in self.relabels.values()):
            raise UserError("relabels of an offline recipe change sampled batches; when=store is for replay buffers")

    def actor(self, spec: Spec, seeds: int) -> Deciding:
        """The module that acts, untrained; used to train and to load a saved policy."""
        raise NotImplementedError

    def agent(self, run, spec: Spec, data: Dataset) -> OfflineAgent:
        raise NotImplementedError

    def start(self, run):
        return OfflineLearner(run, self)

    def total(self, run) -> int:
        """Gradient steps of the whole run, for schedules that end with it."""
        return run.config.steps * self.period


@dataclass(frozen=True, eq=False)
class GoalOffline(Offline):
    """Base of the recipes that learn to reach commanded goals: their policies meet state and goal side by side."""

    goals: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("value_goals", "actor_goals", "rewards", "masks", "next_obs")
    sampler: BatchSampler = Goals()

    def check(self, recipe):
        super().check(recipe)
        if self.normalise_observations:
            raise UserError("normalise_observations: not for recipes with goals")
        if self.rewards != "as-is":
            raise UserError(f"rewards={self.rewards}: goal-conditioned recipes make their rewards from goals; see sampler.reward_shift")


def standardiser(data: Dataset, seeds: int, eps: float = 1e-3) -> ObservationNormaliser | None:
    """(s - mean) / (std + eps) over the dataset's steps, the same for every seed; None without vector observations."""
    name = next((n for n in ("obs", "obs/vector") if n in data.fields and data.fields[n].ndim == 2), None)
    if name is None:
        return None
    mean, std = data.moments(name)
    made = ObservationNormaliser(seeds, len(mean))
    made.moments.mean[:], made.moments.var[:], made.moments.count = mean, np.square(std + eps), float(data.steps)
    made.load_state_dict(made.state_dict())
    return made


def prepared(data: Dataset, how: str) -> Dataset:
    """The dataset with its rewards prepared as the recipe says."""
    if how == "as-is":
        return data
    data.require(f"rewards={how}", "rewards")
    rewards = data.fields["rewards"]
    if how == "return-range":
        returns = data.returns()
        if returns.max() == returns.min():
            raise UserError(f"rewards=return-range: every episode of {data.label()} has the same return")
        rewards = np.asarray(rewards) * np.float32(1000 / (returns.max() - returns.min()))
    else:
        rewards = np.asarray(rewards) - np.float32(1)
    return replace(data, fields={**data.fields, "rewards": rewards})


class OfflineLearner(Assessed):
    """step = `period` gradient steps."""

    def __init__(self, run, part: Offline):
        self.run, self.part, self.device, task = run, part, run.device, run.config.task
        keep_freed_memory()
        self.vocabulary, self.evaluators = Vocabulary(), {}
        self.relabels = {name: run.start(f"relabels.{name}", r) for name, r in part.relabels.items()}
        self.data = prepared(task.dataset(run.reporter), part.rewards)
        self.spec = self.spec_of(task)
        self.normaliser = standardiser(self.data, part.seeds) if part.normalise_observations else None
        self.table = Table(self.data, self.normaliser, self.device)
        self.sampler = part.sampler.build(self.table, Streams(run, "batches", part.seeds), part.batch, part.gamma)
        self.agent = part.agent(run, self.spec, self.data)
        self.size = self.agent.size
        self.gradient_steps = 0
        self.first: dict[str, Any] | None = self.sampler.draw()  # the first batch, looked at before anything is written
        if not self.relabels:
            self.fit(self.first)

    def spec_of(self, task: OfflineTask) -> Spec:
        """What the agent acts on: the dataset's observations, with the goal behind them for recipes with goals. UserError if the environment has others."""
        spec, world = self.data.spec, task.world()
        if self.part.goals:
            width = spec.observations.vector
            if spec.observations.images or not width:
                raise UserError(f"{self.part.part_name} commands states as goals; dataset {self.data.label()} has {spec.observations.describe()}; accepted: one vector")
            spec = Spec(replace(spec.observations, vector=2 * width, goal=width), spec.actions)
            if world is not None and not isinstance(world, GoalTask):
                raise UserError(f"{self.part.part_name} learns to reach commanded goals, and {world.label()} commands none; accepted: maze:…, ogbench:…, datasets collected there")
        elif isinstance(world, GoalTask):
            raise UserError(f"{self.part.part_name} learns from rewards, and {world.label()} commands goals; accepted for it: gcbc, gcivl, gciql, hiql, qrl, crl")
        if world is not None:
            probe(world).require(spec, f"dataset {self.data.label()}", world.label())
        return spec

    def step(self) -> dict[str, float]:
        made: dict[str, Any] = {}
        for _ in range(self.part.period):
            made = self.learn()
        for relabel in self.relabels.values():
            if hasattr(relabel, "update"):
                relabel.update(self.table)
        metrics = {k: float(v.mean() if isinstance(v, Tensor) else v) for k, v in self.agent.report(made).items()}
        return {"gradient_steps": float(self.gradient_steps)} | metrics

    def learn(self) -> dict[str, Any]:
        """One sampled batch, one update."""
        batch, self.first = self.sampler.draw() if self.first is None else self.first, None
        for relabel in self.relabels.values():
            batch = relabel(batch)
        if self.relabels and not self.gradient_steps:
            self.fit(batch)
        made = self.agent.update(batch)
        self.gradient_steps += 1
        return made

    def fit(self, batch: dict[str, Any]) -> None:
        """UserError if a batch lacks what the recipe learns from, or has weights, which no offline recipe heeds."""
        part = self.part
        name, usual = part.sampler.part_name, type(part).__dataclass_fields__["sampler"].default.part_name
        if missing := [k for k in ("obs", "actions", *part.needs) if k not in batch]:
            raise UserError(f"sampler={name}: its batches have no {', '.join(missing)}, which {part.part_name} learns from; accepted: {usual}, or a sampler that gives them")
        if "weights" in batch:
            raise UserError(f"sampler={name}: its batches have weights, which {part.part_name} does not heed; accepted: batches without them (a dataset's field of that name: rename it)")

    def module_policy(self) -> Deciding:
        return self.agent.module

    # ---- evaluation

    def evaluator(self, task: ControlTask, episodes: int) -> Any:
        world = task.world() if isinstance(task, OfflineTask) else task
        if isinstance(world, GoalTask):
            if self.part.evaluation.tail is not None:
                raise UserError(f"evaluation.tail: {world.label()} is judged by its share of successes, which has no tail; accepted: none")
            return GoalEvaluator(world, lambda n: world.replace(goal=n), self.part.seeds, episodes, self.vocabulary, self.run.reporter)
        return Evaluator(world, self.part.seeds, episodes, self.vocabulary, self.run.reporter)

    def evaluate(self, task: ControlTask | None = None) -> dict[str, float]:
        """Episodes in the environment, with the normalised score where the dataset knows its references; without an environment, the distance to the data."""
        shown = task or (self.evaluated.task if self.evaluated is not None else self.run.config.task)
        if isinstance(shown, OfflineTask) and shown.world() is None:
            return self.fidelity()
        found = super().evaluate(task)
        meta = self.data.meta
        if "return" in found and meta.get("ref_max_score") is not None and meta["ref_max_score"] != meta.get("ref_min_score"):
            found = normalised(found, meta["ref_min_score"], meta["ref_max_score"])
        return found

    @torch.no_grad()
    def fidelity(self, rows: int = 1024) -> dict[str, float]:
        """Mean squared distance (share of other choices for discrete actions) between the policy's best action and the recorded one."""
        picked = np.tile(self.data.rows[:: max(1, len(self.data.rows) // rows)], (self.part.seeds, 1))
        states = self.table.states(picked)
        if self.part.goals:
            states = torch.cat([states, self.table.states(np.minimum(picked + 1, self.data.lasts[self.data.episode_of[picked]]))], -1)
        best, recorded = self.agent.module.best(states), self.table.field("actions", picked)
        gap = (best - recorded).square().float() if best.is_floating_point() else (best != recorded).float()
        per_seed = gap.flatten(1).mean(1)
        found = {"action_error": float(per_seed.mean())}
        return found if self.part.seeds == 1 else found | {f"action_error@{s}": float(v) for s, v in enumerate(per_seed)}

    def evaluate_as(self, config, best: Path | None) -> None:
        world = config.task.world() if isinstance(config.task, OfflineTask) else config.task
        if self.part.goals and isinstance(world, ControlTask) and not isinstance(world, GoalTask):
            raise UserError(f"task {world.label()} commands no goals; this run learnt to reach them")
        part = config.recipe
        changed = [f.name for f in fields(part) if f.name != "evaluation" and getattr(part, f.name) != getattr(self.part, f.name)]
        if fixed := [name for name in changed if name not in part.acting]:
            raise UserError(f"{fixed[0]}: a trained {part.part_name} is evaluated as it was trained; an evaluation may change {', '.join(('evaluation', *part.acting))}")
        super().evaluate_as(config, best)
        if changed:
            kept = (self.policy() if self.loaded is None else self.loaded).data()
            self.loaded = Policy.from_data(kept | {"recipe": to_config(part)}, str(self.run.folder))

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"gradient_steps": self.gradient_steps, "dataset": self.data.fingerprint, "spec": self.spec.data()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["dataset"] != self.data.fingerprint:
            raise RunStopped(f"the checkpoint was made with another dataset than {self.data.label()} now is; its contents have changed")
        self.gradient_steps = state["gradient_steps"]
        if self.gradient_steps:
            self.first = None
