"""Multitask bandits as tasks, explorers as parts, and the recipe that plays them: one step is one round (or episode) in all tasks."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.files import write_json, write_text
from volvelle.core.parts import Part, Recipe, part
from volvelle.core.tasks import Task, task_reader

from .bandits import Bandits, LinearMdps, digits, fourier, linear_mdps, play_round, synthetic

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, eq=False)
class Problem:
    """What a task hands an explorer: bandits (or decision processes), a class of maps [P, X, k] with the true one per task if it is known
    and, where inputs are vectors, these [X, d]."""

    world: Bandits | LinearMdps
    features: np.ndarray | None = None
    truth: np.ndarray | None = None
    inputs: np.ndarray | None = None


class BanditTask(Task):
    """Several bandits played in step. `problem(seed)` draws one; the metric is the mean reward per round and task."""

    wing: ClassVar[str] = "planning"
    metric: ClassVar[str] = "reward"

    def problem(self, seed: int = 0) -> Problem:
        raise NotImplementedError


@part("bandits")
class SyntheticBandits(BanditTask):
    """Bandits that share one of `maps` random feature maps (or share nothing: shared=false); a new problem for every seed."""

    tasks: Count = 8
    inputs: Count = 30
    maps: Count = 25
    rank: Count = 2
    noise: NonNegative = 0.3
    shown: Count = 6
    shared: bool = True

    def problem(self, seed=0):
        rng = np.random.default_rng(seed)
        return Problem(*synthetic(self.tasks, rng, self.inputs, self.maps, self.rank, self.noise, self.shown, self.shared))


@part("digits-bandits")
class DigitsBandits(BanditTask):
    """Images of digits, each task paying its own amount per digit (needs scikit-learn). `maps` random Fourier maps of `rank` features,
    with bandwidths from 1 to 8, serve explorers that want a finite class."""

    tasks: Count = 4
    noise: NonNegative = 0.3
    shown: Count = 5
    maps: Count = 8
    rank: Count = 30

    def problem(self, seed=0):
        rng = np.random.default_rng(seed)
        bandits, inputs = digits(self.tasks, rng, self.noise, self.shown)
        return Problem(bandits, fourier(inputs, self.maps, self.rank, np.geomspace(1, 8, self.maps), rng), inputs=inputs)


@part("bandit-file")
class BanditFile(BanditTask):
    """Bandits of your own from an .npz file: means [tasks, inputs], and features [maps, inputs, k] or inputs [inputs, d] or both."""

    path: str
    noise: NonNegative = 0.3
    shown: Count = 6

    def problem(self, seed=0):
        try:
            with np.load(self.path, allow_pickle=False) as file:
                data = {key: np.asarray(file[key], np.float64) for key in file.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: cannot be read as an .npz file of plain arrays ({error})") from None
        if "means" not in data or set(data) - {"means", "features", "inputs"} or len(data) < 2:
            raise UserError(f"{self.path}: holds {', '.join(sorted(data)) or 'nothing'}; accepted: means with features or inputs or both")
        means = data["means"]
        for name, dims in (("means", 2), ("features", 3), ("inputs", 2)):
            array = data.get(name)
            if array is not None and array.ndim != dims:
                raise UserError(f"{self.path}: {name} has shape {array.shape}; expected {dims} dimensions")
            if name != "means" and array is not None and array.shape[dims - 2] != means.shape[1]:
                raise UserError(f"{self.path}: {name} has shape {array.shape}, which does not fit the {means.shape[1]} inputs of means {means.shape}")
            if array is not None and not np.isfinite(array).all():
                raise UserError(f"{self.path}: {name} holds a number that is not finite")
        return Problem(Bandits(means, self.noise, self.shown), data.get("features"), None, data.get("inputs"))

    def label(self):
        return Path(self.path).stem


@task_reader("bandits")
def _bandit_file(path: str) -> BanditFile:
    """Bandits of your own from an .npz file of arrays: bandits:mine.npz."""
    return BanditFile(path=path)


@part("linear-mdps")
class LinearMdpTask(BanditTask):
    """Episodic decision processes that share a feature map of (state, action); a new problem for every seed."""

    tasks: Count = 6
    states: Count = 6
    actions: Count = 3
    rank: Count = 2
    maps: Count = 25
    horizon: Count = 3
    noise: NonNegative = 0.3

    def problem(self, seed=0):
        world = linear_mdps(self.tasks, np.random.default_rng(seed), self.states, self.actions, self.rank, self.maps, self.horizon, self.noise)
        return Problem(world, world.features, np.zeros(self.tasks, int))


class Explorer(Part):
    """How bandits are played. `player(problem, groups, run)`: an object with choose and observe (or `episode`, for decision processes),
    state_dict and load_state_dict; `groups`: which tasks learn together."""

    slot: ClassVar[str] = "explorer"

    def require(self, problem: Problem) -> None:
        """UserError where the explorer cannot play the problem."""

    def player(self, problem: Problem, groups: list[list[int]], run) -> Any:
        raise NotImplementedError


@part("explore")
class Explore(Recipe):
    """Play all tasks in step and count the regret. sharing: "joint" learns all tasks together, "separate" each on its own."""

    wing: ClassVar[str] = "planning"
    explorer: Explorer = None  # type: ignore[assignment]
    sharing: Literal["joint", "separate"] = "joint"

    def validate(self, task=None):
        super().validate(task)
        if not isinstance(task, BanditTask):
            raise UserError(f"task {task.label() if task else None}: has no bandits; accepted: bandits, digits-bandits, linear-mdps, bandits:FILE")

    def start(self, run):
        return _Exploration(self, run)


class _Exploration:
    def __init__(self, recipe, run):
        problem = run.config.task.problem(run.seed)
        recipe.explorer.require(problem)
        self.world, self.rng = problem.world, run.rng("world")
        groups = [list(range(self.world.tasks))] if recipe.sharing == "joint" else [[i] for i in range(self.world.tasks)]
        self.player = recipe.explorer.player(problem, groups, run)
        self.lost, self.earned = np.zeros((2, 0, self.world.tasks))

    def step(self):
        lost, earned = play_round(self.player, self.world, self.rng)
        self.lost, self.earned = np.vstack([self.lost, lost]), np.vstack([self.earned, earned])
        return {"regret": self.lost.sum(0).mean(), "regret_now": lost.mean()}

    def evaluate(self):
        n = max(len(self.lost), 1)
        return {"reward": self.earned.sum(0).mean() / n, "regret": self.lost.sum(0).mean(), "regret_last_quarter": self.lost[-max(n // 4, 1):].sum(0).mean()}

    def product(self):
        return {"regret": RegretCurve(self.lost)}

    def state_dict(self):
        return {"lost": self.lost, "earned": self.earned, "player": self.player.state_dict()}

    def load_state_dict(self, state):
        self.lost, self.earned = state["lost"], state["earned"]
        self.player.load_state_dict(state["player"])


class RegretCurve:
    """Regret per round and task, [T, M]. `save` writes it as regret.json, and its running sum, one line a task, as regret.svg."""

    def __init__(self, lost: np.ndarray):
        self.lost = lost

    def save(self, folder) -> None:
        write_json(folder / "regret.json", {"regret": self.lost.tolist()})
        if len(self.lost):
            write_text(folder / "regret.svg", regret_picture({"tasks": self.lost.T}))


def regret_picture(curves: dict[str, np.ndarray], seed: int = 0) -> str:
    """SVG of cumulative regret: curves[name] is regret per round [repetitions, T]; mean and 95 % band. `seed`: of the bootstrap."""
    from volvelle.core.plots import learning_curves

    drawn = {name: (np.arange(1, lost.shape[1] + 1), np.cumsum(lost, 1)) for name, lost in curves.items()}
    return learning_curves(drawn, metric="cumulative regret per task", x="round", rng=np.random.default_rng(seed))
