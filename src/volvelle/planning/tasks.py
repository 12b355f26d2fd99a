"""Tasks of the planning wing."""

from __future__ import annotations

import zipfile
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import part
from volvelle.core.tasks import Task, task_reader

from .lookahead import sticky
from .mdp import MDP
from .worlds import enumerate_minigrid, enumerate_states, grid_world, random_mdp

Steps = Annotated[int, Field(gt=0)]
Discount = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class TabularTask(Task):
    """A finite-horizon tabular MDP, known exactly. `mdp(seed)`: tasks that are drawn at random draw with the run's seed, others ignore it."""

    wing: ClassVar[str] = "planning"
    metric: ClassVar[str] = "value"

    def mdp(self, seed: int = 0) -> MDP:
        raise NotImplementedError


@part("toy-text")
class ToyText(TabularTask):
    """A Gymnasium toy-text environment by its transition table, or a MiniGrid one by enumeration; `repeat` is the probability that an action sticks.

    options: of the environment (toy-text); actions: those allowed (empty: all), layout: which drawing of its grid (MiniGrid).
    """

    env: str = "FrozenLake-v1"
    horizon: Steps = 20
    discount: Discount = 1.0
    repeat: Share = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    actions: tuple[Annotated[int, Field(ge=0)], ...] = ()
    layout: Annotated[int, Field(ge=0)] = 0

    def mdp(self, seed=0):
        if self.env.startswith(("MiniGrid-", "BabyAI-")):
            if self.options:
                raise UserError(f"task.options={self.options}: MiniGrid environments take actions and layout")
            mdp, _ = enumerate_minigrid(self.env, self.horizon, self.discount, self.actions, self.layout)
        elif self.actions or self.layout:
            raise UserError(f"task.env={self.env}: actions and layout are for MiniGrid environments")
        else:
            mdp = MDP.from_gymnasium(self.env, self.horizon, self.discount, **self.options)
        return sticky(mdp, self.repeat) if self.repeat else mdp

    def label(self):
        return self.env


@task_reader("table")
def _toy_text(name: str) -> ToyText:
    """A Gymnasium toy-text or MiniGrid environment, planned for through its transition table: table:FrozenLake-v1, table:MiniGrid-Empty-5x5-v0."""
    return ToyText(env=name)


@part("mdp-file")
class MdpFile(TabularTask):
    """An MDP from an .npz file: transition [S, A, S] and reward, or state, action, next_state, probability, reward per outcome; initial optional."""

    path: str
    horizon: Steps = 20
    discount: Discount = 1.0

    def mdp(self, seed=0):
        try:
            data = dict(np.load(self.path, allow_pickle=False))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: cannot be read as an .npz file of plain arrays ({error})") from None
        dense, flat = ("transition", "reward"), ("state", "action", "next_state", "probability", "reward")
        if set(dense) <= set(data):
            return MDP.from_arrays(data["transition"], data["reward"], data.get("initial"), self.horizon, self.discount)
        if set(flat) <= set(data):
            states = int(max(data["state"].max(), data["next_state"].max())) + 1
            columns = [data[name] for name in flat]
            return MDP.from_outcomes(states, int(data["action"].max()) + 1, *columns, data.get("initial"), self.horizon, self.discount)
        raise UserError(f"{self.path}: holds {', '.join(sorted(data)) or 'nothing'}; accepted: {', '.join(dense)} or {', '.join(flat)}")

    def label(self):
        return Path(self.path).stem


@task_reader("mdp")
def _mdp_file(path: str) -> MdpFile:
    """An MDP of your own from an .npz file of arrays: mdp:mine.npz."""
    return MdpFile(path=path)


@part("lottery-grid")
class LotteryGrid(TabularTask):
    """A random grid whose cells pay lotteries: safe ones little, risky ones more on average; another grid for every seed."""

    size: Annotated[int, Field(ge=2, le=8)] = 4
    horizon: Steps = 8
    discount: Discount = 1.0

    def mdp(self, seed=0):
        rng = np.random.default_rng(seed)
        kinds = {"s": 1.0, "m": [(0.5, 0.0), (0.5, 3.0)], "r": [(0.75, 0.0), (0.25, 8.0)], "x": [(0.5, -2.0), (0.5, 5.0)]}
        cells = rng.choice(list(kinds), size=(self.size, self.size))
        cells[0, 0] = "S"
        return grid_world(["".join(row) for row in cells], rewards=kinds, ends="", horizon=self.horizon, discount=self.discount)[0]


@part("two-resources")
class TwoResources(TabularTask):
    """Food and water, one unit of each used up per step, each found in its own place with some luck: a vector reward for homeostasis."""

    horizon: Steps = 6
    discount: Discount = 1.0
    luck: Share = 0.8

    def mdp(self, seed=0):
        rows = []
        for place in range(2):
            gain = np.eye(2)[place] * 3 - 1
            for action in range(2):  # 0: stay and gather, 1: walk
                rows += [(place, 0, place, self.luck, gain), (place, 0, place, 1 - self.luck, -np.ones(2))] if action == 0 else \
                    [(place, 1, 1 - place, 1.0, -np.ones(2))]
        state, action, target, probability, reward = (np.array(column) for column in zip(*(row for row in rows if row[3] > 0)))
        return MDP.from_outcomes(2, 2, state, action, target, probability, reward, 0, self.horizon, self.discount)


@part("lock")
class Lock(TabularTask):
    """A combination lock: one of two actions goes on, the other ends the episode; only the last step pays, and `bait` is paid for giving up at once."""

    length: Steps = 5
    repeat: Share = 0.0
    bait: float = 0.0

    def mdp(self, seed=0):
        right = np.random.default_rng(seed).integers(2, size=self.length)
        mdp, _ = enumerate_states(0, 2, lambda s, a: (s + 1, float(s == self.length - 1), s == self.length - 1) if a == right[s] else
                                  (0, self.bait * (s == 0), True), horizon=self.length)
        return sticky(mdp, self.repeat) if self.repeat else mdp


@part("trap")
class Trap(TabularTask):
    """A sure .4 at once, or a way (with `chance`) to a choice between 1 and -.5, which random play spoils."""

    chance: Annotated[float, Field(gt=0, le=1)] = 1.0

    def mdp(self, seed=0):
        way = [(self.chance, 1, 0.0, False), (1 - self.chance, 0, 0.0, True)]
        return MDP.from_successors([[[(1.0, 0, 0.4, True)], way], [[(1.0, 0, 1.0, True)], [(1.0, 0, -0.5, True)]]], horizon=2)


@part("random-table")
class RandomTable(TabularTask):
    """Transitions and rewards drawn at random, every row with a few successors: another table for every instance."""

    instance: Annotated[int, Field(ge=0)] = 0
    states: Steps = 10
    actions: Steps = 3
    successors: Steps = 2
    horizon: Steps = 10

    def mdp(self, seed=0):
        return random_mdp(np.random.default_rng(self.instance), self.states, self.actions, self.successors, (0.0, 0.0, 0.0, 1.0), self.horizon)


@part("text-grid")
class TextGrid(TabularTask):
    """A grid drawn in text: '#' wall, 'S' start, 'G' the goal, which pays 1 and ends the episode; the default is four small rooms."""

    rows: tuple[str, ...] = ("S..#...", "...#...", ".......", "#.###.#", "...#...", ".......", "...#..G")
    slip: Share = 0.0
    horizon: Steps = 30
    discount: Discount = 1.0

    def mdp(self, seed=0):
        return grid_world(self.rows, slip=self.slip, horizon=self.horizon, discount=self.discount)[0]


@part("sticky")
class Sticky(TabularTask):
    """Another tabular task with actions that stick: after the first step the action executed last is executed again with probability `repeat`."""

    base: Task = Lock()
    repeat: Share = 0.25

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.base, TabularTask):
            raise UserError(f"task.base={self.base.label()}: expected a tabular task such as table:FrozenLake-v1")

    def label(self):
        return f"sticky-{self.base.label()}"

    def mdp(self, seed=0):
        return sticky(self.base.mdp(seed), self.repeat)
