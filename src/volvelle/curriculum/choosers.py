"""Which context to train in next: the slot, and the simple ways (all but model-based transfer, which is methods/mbtl.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part

MIXTURE = -1  # train one policy on all contexts


@dataclass
class History:
    """What has been trained. coordinates [N, d] (grid indices), budget: trainings in all; trained: indices in order; rows: scores [N] of each."""

    coordinates: np.ndarray
    budget: int
    known: np.ndarray | None = None
    trained: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    served: list[float] = field(default_factory=list)  # best score on a context when it was trained, by its own policy or an earlier one

    @property
    def best(self) -> np.ndarray:
        """V [N]: the best observed score in every context, at least 0."""
        return np.maximum(np.max(self.rows, 0), 0.0) if self.rows else np.zeros(len(self.coordinates))

    @property
    def middle(self) -> int:
        """The context nearest the middle of the grid; the lower one at a tie."""
        return nearest(self.coordinates, (self.coordinates.min(0) + self.coordinates.max(0)) / 2)

    def add(self, index: int, row: np.ndarray) -> None:
        self.trained.append(index)
        self.rows.append(np.asarray(row, float))
        self.served.append(float(self.best[index]) if index != MIXTURE else float("nan"))


def nearest(coordinates: np.ndarray, point: np.ndarray, taken: list[int] = ()) -> int:
    """The context nearest a point, the first at a tie, none of those taken."""
    distance = np.linalg.norm(coordinates - point, axis=1).round(9)
    distance[list(taken)] = np.inf
    return int(distance.argmin())


class Chooser(Part):
    """Slot: `next(history)` names the context to train in, or None when there is nothing left to gain. deploy: which policy serves a context, the
    "best" observed or its "own"."""

    slot: ClassVar[str] = "chooser"
    deploy: ClassVar[Literal["best", "own"]] = "best"

    def start(self, run):
        return self

    def next(self, history: History) -> int | None:
        raise NotImplementedError


@part("random")
class RandomChooser(Chooser):
    """Contexts at random, none twice."""

    def start(self, run):
        return _Random(run.rng("choosing"))


class _Random:
    deploy = "best"

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def next(self, history):
        left = np.setdiff1d(np.arange(len(history.coordinates)), history.trained)
        return int(self.rng.choice(left)) if len(left) else None


def one_parameter(history: History, name: str) -> np.ndarray:
    if history.coordinates.shape[1] != 1:
        raise UserError(f"chooser={name}: needs one parameter; this family has {history.coordinates.shape[1]}; accepted: mbtl, random, multitask, independent, oracle")
    return history.coordinates[:, 0]


@part("equidistant")
class Equidistant(Chooser):
    """As many evenly spaced contexts as the budget allows, from the highest down: max - (max - min) (1/2 + k) / K."""

    def next(self, history):
        x, K, k = one_parameter(history, "equidistant"), history.budget, len(history.trained)
        if k >= min(K, len(x)):
            return None
        reach = x.max() - x.min()
        return nearest(history.coordinates, np.array([x.max() - reach / (2 * K) - k * reach / K]), history.trained)


@part("greedy")
class Greedy(Chooser):
    """Fills the largest gap: the middle first, then the middle of an inner gap, or the point a third from the end of an outer one."""

    def next(self, history):
        x = one_parameter(history, "greedy")
        if len(history.trained) >= len(x):
            return None
        if not history.trained:
            return history.middle
        low, high = x.min(), x.max()
        marks = np.unique([low, high, *x[history.trained]])
        i = int(np.diff(marks).argmax())
        left, right = marks[i], marks[i + 1]
        taken = set(x[history.trained])
        if left == low and left not in taken:
            point = (2 * left + right) / 3
        elif right == high and right not in taken:
            point = (left + 2 * right) / 3
        else:
            point = (left + right) / 2
        return nearest(history.coordinates, np.array([point]), history.trained)


@part("multitask")
class Multitask(Chooser):
    """One policy, trained once on all contexts mixed."""

    def next(self, history):
        return None if history.trained else MIXTURE


@part("independent")
class Independent(Chooser):
    """A policy for every context, each used in its own only; the score is the mean over the contexts trained so far."""

    deploy: ClassVar[Literal["best", "own"]] = "own"

    def next(self, history):
        return len(history.trained) if len(history.trained) < len(history.coordinates) else None


@part("oracle")
class Oracle(Chooser):
    """Greedy on the true returns: the most that choosing one after the other without foresight could gain. Needs a task that knows them."""

    def next(self, history):
        if history.known is None:
            raise UserError("chooser=oracle: needs the returns of all trainings beforehand; accepted with transfer:FILE.npz and swing-up")
        gain = np.maximum(history.known, history.best).mean(1)
        gain[history.trained] = -np.inf
        return int(gain.argmax()) if len(history.trained) < len(gain) else None
