"""Who transfers where: returns of policies trained in one context and tested in every other."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

import numpy as np
from pydantic import Field

from volvelle.control.learner import ControlRecipe
from volvelle.control.policy import Policy
from volvelle.core.errors import UserError
from volvelle.core.parts import Recipe, part
from volvelle.core.run import RunConfig
from volvelle.core.tasks import Task, task_reader

from .families import Family, OverContexts


class Source(Protocol):
    """Where transfer returns come from. names [d], contexts [N, d], coordinates [N, d] (grid indices); `known`: [N, N], if all is known."""

    names: tuple[str, ...]
    contexts: np.ndarray
    coordinates: np.ndarray
    known: np.ndarray | None

    def row(self, index: int) -> np.ndarray:
        """Train in context `index` and test everywhere: scores [N] between 0 and 1."""

    def mixture(self) -> np.ndarray:
        """Train one policy on all contexts and test everywhere: [N]."""


class Stored:
    """All trainings are there already."""

    def __init__(self, values: np.ndarray, contexts: np.ndarray | None = None, mixture: np.ndarray | None = None, names: tuple[str, ...] = ("context",)):
        """values: [N, N], row trained, column tested, scores between 0 and 1; contexts [N] or [N, d], else 0 ... N - 1; mixture: [N]."""
        values = np.asarray(values, float)
        if values.ndim != 2 or values.shape[0] != values.shape[1] or not np.isfinite(values).all():
            raise UserError(f"transfer matrix: shape {list(values.shape)}; expected [N, N] of finite numbers, row trained, column tested")
        if values.min() < 0 or values.max() > 1:
            raise UserError(f"transfer matrix: values from {values.min():.4g} to {values.max():.4g}; expected scores between 0 and 1")
        count = len(values)
        contexts = np.arange(count, dtype=float) if contexts is None else np.asarray(contexts, float)
        if len(contexts) != count:
            raise UserError(f"transfer matrix: {len(contexts)} contexts for {count} rows; expected as many")
        self.contexts = contexts.reshape(count, -1)
        self.coordinates = indices(self.contexts)
        if mixture is not None and np.shape(mixture) != (count,):
            raise UserError(f"transfer matrix: mixture of shape {list(np.shape(mixture))}; expected [{count}]")
        self.known, self.multitask, self.names = values, mixture, names

    def row(self, index):
        return self.known[index]

    def mixture(self):
        if self.multitask is None:
            raise UserError("chooser=multitask: this transfer matrix has no mixture row; add an array 'mixture' [N] to the file")
        return np.asarray(self.multitask, float)


def indices(contexts: np.ndarray) -> np.ndarray:
    """[N, d]: the place of every context on the grid its values span, per parameter."""
    return np.stack([np.unique(c, return_inverse=True)[1] for c in contexts.T], -1).astype(float)


class Children:
    """Trains a child run per context, below the run's folder, and tests it in the whole family."""

    known = None

    def __init__(self, run, family: Family, recipe: Recipe, steps: int, episodes: int):
        self.run, self.family, self.recipe, self.steps = run, family, recipe, steps
        self.names, self.contexts = tuple(family.ranges), family.grid()
        self.coordinates = indices(self.contexts)
        self.tests = OverContexts(family, self.contexts, episodes, run.reporter)

    def _train(self, name: str, task: Family, seed: int) -> np.ndarray:
        config = RunConfig(recipe=self.recipe, task=task, method=name, steps=self.steps, seed=seed, checkpoint_every=0, device=self.run.config.device,
                           threads=self.run.config.threads)
        self.run.child(name, config)
        policy = Policy.load(self.run.folder / "children" / name / "policy")
        return self.family.score(self.tests.returns(policy, self.run.seed))

    def row(self, index):
        return self._train(f"context-{index}", self.family.task(self.contexts[index]), self.run.seed * 1009 + index + 1)

    def mixture(self):
        return self._train("mixture", self.family, self.run.seed * 1009)


def check_trainable(name: str, recipe: Recipe, family: Family) -> None:
    """UserError unless `recipe` can train a policy in every context of the family."""
    if family.context:
        raise UserError(f"{name}: task.context={family.context} holds the family fixed; leave it empty")
    if not isinstance(recipe, ControlRecipe) or recipe.seeds != 1 or recipe.workers:
        raise UserError(f"{name}: recipe={recipe.part_name}: trains the policies; expected a control recipe with seeds=1 and workers=0")
    family.score(np.zeros(1))
    recipe.validate(family)


class TransferTask(Task):
    """A family whose trainings are all made, or made so cheaply that they are: `source(seed)` gives them."""

    wing: ClassVar[str] = "curriculum"
    metric: ClassVar[str] = "zero_shot"

    def source(self, seed: int) -> Stored:
        raise NotImplementedError


@part("transfer-file")
class TransferFile(TransferTask):
    """A transfer matrix from an .npz file: values [N, N] (row trained, column tested, scores 0 to 1), optionally contexts [N] or [N, d] and mixture [N]."""

    path: str

    def source(self, seed):
        try:
            data = dict(np.load(self.path, allow_pickle=False))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: cannot be read as an .npz file of plain arrays ({error})") from None
        if "values" not in data or set(data) - {"values", "contexts", "mixture"}:
            raise UserError(f"{self.path}: holds {', '.join(sorted(data)) or 'nothing'}; accepted: values, and optionally contexts, mixture")
        return Stored(data["values"], data.get("contexts"), data.get("mixture"))

    def label(self):
        return Path(self.path).stem


@task_reader("transfer")
def _transfer_file(path: str) -> TransferFile:
    """Transfer returns that you have measured, as arrays in an .npz file: transfer:mine.npz"""
    return TransferFile(path=path)


@part("swing-up")
class SwingUp(TransferTask):
    """Pendulums of many lengths, all trained at once by the cross-entropy method; another matrix for every seed (about 15 s on one core)."""

    points: Annotated[int, Field(gt=1)] = 24
    low: float = 0.3
    high: float = 2.2
    population: Annotated[int, Field(gt=7)] = 64
    iterations: Annotated[int, Field(gt=0)] = 30

    def source(self, seed):
        return _swing_up(self, seed)


@functools.lru_cache(maxsize=32)
def _swing_up(task: SwingUp, seed: int) -> Stored:
    from .pendulums import transfer

    lengths = np.linspace(task.low, task.high, task.points)
    values, mixture = transfer(lengths, task.population, task.iterations, np.random.default_rng([seed, 24]))
    return Stored(values, lengths, mixture, ("length",))


