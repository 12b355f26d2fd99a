"""Tabular problems as environments to act in, and environments that show the stock: what the deep forms of the planning methods learn on."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
from pydantic import Field

from volvelle.control.slots import ControlTask
from volvelle.core.errors import UserError
from volvelle.core.parts import part
from volvelle.core.tasks import Task, task_reader

from ..distributions import combine, cvar
from ..mdp import MDP
from ..stock import next_stock
from ..tasks import LotteryGrid, TabularTask


class MdpEnv(gym.Env):
    """Observes which state it is in (one-hot) and the share of the horizon gone by, which is a true end. A vector reward is summed; info tells reward_0, ..."""

    def __init__(self, mdp: MDP):
        if mdp.horizon is None:
            raise UserError("played: needs a tabular task with a horizon")
        self.mdp, self.starts = mdp, np.cumsum(mdp.initial)
        self.observation_space = gym.spaces.Box(0, 1, (mdp.states + 1,), np.float32)
        self.action_space = gym.spaces.Discrete(mdp.actions)

    def seen(self) -> np.ndarray:
        found = np.zeros(self.mdp.states + 1, np.float32)
        found[self.state], found[-1] = 1, self.t / self.mdp.horizon
        return found

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.t = int(np.searchsorted(self.starts, self.np_random.random() * self.starts[-1], side="right")), 0
        return self.seen(), {}

    def step(self, action):
        m, row = self.mdp, self.state * self.mdp.actions + int(action)
        first, last = m.offsets[row], m.offsets[row + 1]
        cumulated = np.cumsum(m.probability[first:last])
        i = first + int(np.searchsorted(cumulated, self.np_random.random() * cumulated[-1], side="right"))
        self.state, self.t = int(m.next_state[i]), self.t + 1
        info = {} if m.reward.ndim == 1 else {f"reward_{j}": float(r) for j, r in enumerate(m.reward[i])}
        return self.seen(), float(m.reward[i].sum()), bool(m.absorbing[self.state]) or self.t >= m.horizon, False, info


@part("played")
class Played(ControlTask):
    """A tabular task of the planning wing as an environment. instance: which one, for tasks that are drawn at random."""

    base: Task = LotteryGrid()
    instance: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.base, TabularTask):
            raise UserError(f"task.base={self.base.label()}: belongs to the {self.base.wing} wing; expected a tabular task such as table:FrozenLake-v1")

    def label(self):
        return f"played-{self.base.label()}"

    def make(self, render=None, training=False):
        return MdpEnv(_table(self.base, self.instance))


@lru_cache(maxsize=8)
def _table(base: TabularTask, instance: int) -> MDP:
    """Built once for the many copies that a learner makes: some tables are enumerated. Tasks from files are read again once they have left the cache."""
    return base.mdp(instance)


@task_reader("played")
def _played(text: str) -> Played:
    """A tabular task as an environment for the methods of the control wing: played:lottery-grid, played:table:FrozenLake-v1"""
    return Played(base=text)


@part("stock")
class Stock(ControlTask):
    """An environment that also shows the stock c, what the rewards so far are worth now: C' = (C + R) / discount, as the last numbers of its vector.

    low, high: while training, every episode draws its start stock from there. starts: start stocks of evaluation, drawn evenly (empty: from low to high).
    discount: that of the learner. taus: which CVaRs of the discounted return G evaluation reports, beside miss = mean |c_0 + G|, shortfall = mean min(c_0 + G, 0),
    surplus and above = share of c_0 + G >= 0. shown: false leaves the observation as it is and only measures, for learners without a stock to be held against.
    components: of the reward; with several, the environment's info names them reward_0, ..., every component of the stock is drawn alike, and miss is the mean
    of ||c_0 + G||_1. pays, for learners of other kinds: the "reward", or minus the "deviation" ||C'||_1, or by how much it fell (its "drive").
    """

    base: Task = Played()
    low: float = -2.0
    high: float = 2.0
    starts: tuple[float, ...] = ()
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    taus: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.1, 0.25, 0.5)
    shown: bool = True
    components: Annotated[int, Field(gt=0)] = 1
    pays: Literal["reward", "deviation", "drive"] = "reward"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.base, ControlTask):
            raise UserError(f"task.base={self.base.label()}: belongs to the {self.base.wing} wing; expected an environment such as CartPole-v1 or played:lottery-grid")
        if self.low >= self.high:
            raise UserError(f"task.low={self.low}, task.high={self.high}: start stocks are drawn from between; expected low < high")

    @property
    def info(self):
        return tuple(f"end_{i}" for i in range(self.components)) if self.components > 1 else ("start_stock", "total")

    def label(self):
        return f"stock-{self.base.label()}"

    def make(self, render=None, training=False):
        return WithStock(self.base.make(render, training), self, training)

    def measure(self, ends):
        if self.components > 1:
            return {"miss": float(np.abs(np.stack([ends[k] for k in self.info])).sum(0).mean())} | {f"miss_{i}": float(np.abs(ends[k]).mean()) for i, k in enumerate(self.info)}
        end = ends["start_stock"] + ends["total"]
        law = combine(np.zeros(len(end), np.int64), ends["total"], np.full(len(end), 1 / len(end)), 1)
        return {"miss": float(np.abs(end).mean()), "shortfall": float(np.minimum(end, 0).mean()), "surplus": float(np.maximum(end, 0).mean()),
                "above": float((end >= -1e-6).mean())} | {f"cvar@{tau:g}": float(cvar(law, tau)[0]) for tau in self.taus}


@task_reader("stock")
def _stock(text: str) -> Stock:
    """An environment with the stock in its observation, for d-eta-n: stock:played:lottery-grid (then task.low, task.high, task.starts)"""
    return Stock(base=text)


class WithStock(gym.Wrapper):
    """Joins the stock [m] to the observation; info tells the start stock and the discounted return so far, or for several components end_i = c_0 + G so far."""

    def __init__(self, env: gym.Env, task: Stock, training: bool):
        super().__init__(env)
        self.task, self.training, self.rng = task, training, np.random.default_rng(0)
        box = gym.spaces.Box(-np.inf, np.inf, (task.components,), np.float32)
        space = env.observation_space
        parts = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {"observation": space}
        self.several = isinstance(space, gym.spaces.Dict)
        if task.shown:
            self.observation_space = gym.spaces.Dict({**parts, "~stock": box})  # the last of all names: the last numbers of the vector

    def seen(self, observation):
        if not self.task.shown:
            return observation
        parts = dict(observation) if self.several else {"observation": observation}
        return {**parts, "~stock": self.stock.astype(np.float32)}

    def told(self, info):
        if self.task.components == 1:
            return {**info, "start_stock": float(self.start[0]), "total": float(self.total[0])}
        return {**info, **{k: float(x) for k, x in zip(self.task.info, self.start + self.total)}}

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng([seed, 2])
        task = self.task
        drawn = (self.rng.uniform(task.low, task.high, task.components) if self.training or not task.starts else
                 np.array(task.starts)[self.rng.integers(len(task.starts), size=task.components)])
        self.stock = self.start = drawn.astype(float)
        self.total, self.weight = np.zeros(task.components), 1.0
        observation, info = self.env.reset(seed=seed, options=options)
        return self.seen(observation), self.told(info)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        task, before = self.task, self.stock
        gained = np.array([info[f"reward_{i}"] for i in range(task.components)] if task.components > 1 else [float(reward)])
        self.stock = next_stock(self.stock, gained, task.discount)
        self.total, self.weight = self.total + self.weight * gained, self.weight * task.discount
        if task.pays != "reward":
            reward = float((np.abs(before).sum() if task.pays == "drive" else 0.0) - np.abs(self.stock).sum())
        return self.seen(observation), reward, terminated, truncated, self.told(info)
