"""What the on-policy and off-policy loops share: environments, reset points, evaluation, the product, and their state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import Recipe, to_config
from volvelle.core.tasks import Task

from .encoding import Vocabulary
from .envs import Envs, each, numbers_for, probe
from .evaluation import Evaluation, Evaluator, record
from .normalise import ObservationNormaliser
from .policy import Policy, as_tensors
from .slots import ControlTask
from .spaces import Observation, Spec
from .speed import keep_freed_memory

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, eq=False)
class ControlRecipe(Recipe):
    """Fields of every control recipe. seeds: so many seeds, from the run's on, train as one model; workers: processes that step environments (0: none)."""

    wing: ClassVar[str] = "control"
    seeds: Count = 1
    workers: Annotated[int, Field(ge=0)] = 0
    evaluation: Evaluation = Evaluation()

    def validate(self, task: Task | None = None) -> None:
        super().validate(task)
        if task is None:
            raise UserError(f"{self.part_name}: no task; give one, for example --task CartPole-v1")
        if not isinstance(task, ControlTask):
            raise UserError(f"task {task.label()} belongs to the {task.wing} wing; {self.part_name} acts in environments, for example CartPole-v1")

    def actor(self, spec: Spec, seeds: int):
        """The module that acts, untrained; used to train and to load a saved policy."""
        raise NotImplementedError


class Assessed:
    """What every learner of an acting policy shares: the policy it makes, and its evaluation in environments.

    Needs run, part (with seeds, evaluation), spec, normaliser, vocabulary and evaluators (a dict).
    """

    run: Any
    part: Any
    spec: Spec
    normaliser: ObservationNormaliser | None
    vocabulary: Vocabulary
    evaluators: dict[Any, Any]

    def module_policy(self):
        """The Deciding module that acts."""
        raise NotImplementedError

    def policy(self) -> Policy:
        return Policy(self.module_policy(), self.part, self.spec, self.part.seeds, self.normaliser, self.vocabulary, to_config(self.run.config.task))

    def product(self) -> dict[str, Any]:
        return {"policy": self.policy()}

    def evaluator(self, task: ControlTask, episodes: int) -> Any:
        return Evaluator(task, self.part.seeds, episodes, self.vocabulary, self.run.reporter)

    def evaluate(self, task: ControlTask | None = None) -> dict[str, float]:
        """Play episodes of the run's task, or of another one of the same shape."""
        config = self.evaluated if self.evaluated is not None else self.run.config
        task, how = config.task if task is None else task, config.recipe.evaluation
        key = (task, how.episodes)
        if key not in self.evaluators:
            self.evaluators[key] = self.evaluator(task, how.episodes)
        self.evaluators[key].tail = how.tail
        self.evaluators[key].vocabulary.codes = dict(self.vocabulary.codes)
        policy = self.policy() if self.loaded is None else self.loaded
        found = self.evaluators[key](policy, self.run.seed, self.run.step, how.explore)
        for i in range(how.record):
            record(policy, task, self.run.folder / "videos" / f"step-{self.run.step:06d}-{i}.mp4", seed=self.run.seed + i)
        return found

    loaded: Policy | None = None
    evaluated: Any = None

    def evaluate_as(self, config, best: Path | None) -> None:
        """Evaluate from now on what `config` says, with the policy kept in `best` if given. UserError if the task does not fit the policy."""
        if not isinstance(config.task, ControlTask):
            raise UserError(f"task {config.task.label()} belongs to the {config.task.wing} wing; this run acts in environments")
        spec = probe(config.task, self.vocabulary.copy())
        spec.require(self.spec, f"the policy of {self.run.folder}", config.task.label())
        self.evaluated = config
        if best is not None:
            self.loaded = Policy.load(best / "policy", spec, config.task.label())


class ControlLearner(Assessed):
    """Base of the loops, for recipes with `relabels` and `shapers`. `obs`: current normalised observations [S, N, ...], None when new episodes must begin."""

    def __init__(self, run, part: ControlRecipe, count: int):
        self.relabels = {name: run.start(f"relabels.{name}", r) for name, r in part.relabels.items()}
        keys = tuple(dict.fromkeys(k for r in self.relabels.values() for k in getattr(r, "info", ())))
        self.run, self.part, self.device, task = run, part, run.device, run.config.task
        keep_freed_memory()
        self.vocabulary = Vocabulary()
        self.spec: Spec = probe(task, self.vocabulary)
        self.envs = Envs(task, part.seeds, count, training=True, keys=keys, shapers=list(part.shapers.values()), workers=part.workers, vocabulary=self.vocabulary,
                         report=run.reporter)
        self.normaliser: ObservationNormaliser | None = None
        self.obs: Any = None
        self.env_steps = 0
        self.trained = np.zeros((2, part.seeds))  # sum of returns, and number, of the training episodes that count towards training_return
        self.evaluators: dict[Any, Evaluator] = {}

    def update_relabels(self, buffer: Any) -> None:
        for relabel in self.relabels.values():
            if hasattr(relabel, "update"):
                relabel.update(buffer)

    # ---- observations

    def rows(self, raw: Any) -> Any:
        """[S * N, ...] -> [S, N, ...]."""
        return each(lambda x: x.reshape(self.part.seeds, -1, *x.shape[1:]), raw)

    def observe(self, raw: Any, update: bool = False) -> Any:
        """Environment rows as the networks see them; `update` takes them into the running statistics."""
        rows = self.rows(raw)
        return self.normaliser(rows, update) if self.normaliser is not None else rows

    def observe_batch(self, raw: Any) -> Observation:
        """[S, B, ...] arrays of raw observations as tensors for the networks."""
        raw = each(lambda x: np.asarray(x, np.float32) if x.dtype.kind == "f" else x, raw)
        return as_tensors(self.normaliser(raw) if self.normaliser is not None else raw, self.device)

    def current(self) -> Any:
        """The observations to act on; begins new episodes after a reset point."""
        if self.obs is None:
            first = self.run.seed
            raw = self.envs.reset([n for s in range(self.part.seeds) for n in numbers_for(first + s, self.run.step, self.envs.count)])
            self.envs.finished.clear()
            self.restarted()
            self.obs = self.observe(raw, update=True)
        return self.obs

    def restarted(self) -> None:
        """Called when new episodes begin everywhere."""

    # ---- what the trainer asks for

    def before_checkpoint(self) -> None:
        """A checkpoint is a reset point: open episodes are cut, here and in a run resumed from it."""
        self.obs = None

    def episode_metrics(self) -> dict[str, float]:
        metrics, returns = self.envs.pull()
        if self.run.step >= (1 - self.part.evaluation.training_share) * self.run.config.steps:
            self.trained += [[float(np.sum(r)) for r in returns], [len(r) for r in returns]]
        if self.part.seeds > 1:
            metrics |= {f"return@{s}": float(np.mean(r)) for s, r in enumerate(returns) if r}
        return {"env_steps": float(self.env_steps)} | metrics

    def evaluate(self, task=None):
        found = super().evaluate(task)
        if task is None and self.evaluated is None and self.trained[1].all():
            means = self.trained[0] / self.trained[1]
            found |= {"training_return": float(means.mean())} | ({f"training_return@{s}": float(m) for s, m in enumerate(means)} if len(means) > 1 else {})
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"env_steps": self.env_steps, "trained": self.trained.copy(), "spec": self.spec.data(), "vocabulary": list(self.vocabulary.codes),
                "normaliser": self.normaliser.state_dict() if self.normaliser is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        made_for = Spec.from_data(state["spec"])
        if made_for != self.spec:
            raise RunStopped(f"the checkpoint was made for {made_for.describe()}; {self.run.config.task.label()} has {self.spec.describe()}")
        self.env_steps, self.trained, self.obs = state["env_steps"], state["trained"].copy(), None
        self.vocabulary.codes = {w: i for i, w in enumerate(state["vocabulary"])}
        if self.normaliser is not None:
            self.normaliser.load_state_dict(state["normaliser"])
