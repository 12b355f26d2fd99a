"""OTA, option-aware temporally abstracted value: a value for the high level that counts options instead of steps.

Problem: on very long ways hiql fails because its high policy picks bad subgoals: far from the goal the one-step value is so flat and noisy that the sign of
V(subgoal, g) - V(s, g) is often wrong. (Led by true subgoals, hiql's low policy succeeds.)
Idea: a second value for the high level alone. One backup spans an option, `abstraction` steps of the data that end early at the goal: reward -1 and one discount
per option, 0 at its success. The way shrinks from d to about d / n backups, so the value stays ordered over the whole trajectory. The low level keeps the
one-step value, and both train the one representation phi.
Pick it for long-horizon goal-reaching, with hiql's settings, and tune `sampler.abstraction` alone: 5 in large mazes, more for longer tasks. States within one option
of the goal all get value 0, so n should not exceed sampler.steps by much on short tasks, where hiql or gciql do as well. Not for rewards other than goals.
Source: arXiv 2505.12737.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from volvelle.control.evaluation import Evaluation
from volvelle.control.learner import Count
from volvelle.control.networks import FourierMLP
from volvelle.core.claims import Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam

from ..behaviours import Walker
from ..commands import Maze
from ..hierarchy import Hierarchical, HierarchicalAgent, LiveSubgoals, Subgoals
from ..samplers import BatchSampler, reserved
from ..tasks import Generated
from .hiql import hiql

FIELDS = ("option_ends", "option_goals", "option_rewards", "option_masks")


def option_rows(rows: np.ndarray, finals: np.ndarray, later: np.ndarray, random: np.ndarray, on_way: np.ndarray, current: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Where options end, and their goals; row numbers of one shape.

    An option ends n steps on, at its trajectory's goal (`on_way`: the goal is `later`) or, for a random goal, only at the trajectory's end. Where `current`,
    the goal is replaced by the option's end.
    """
    ends = np.minimum(rows + n, np.where(on_way, later, finals))
    return ends, np.where(current, ends, np.where(on_way, later, random))


def option_backup(rows: np.ndarray, ends: np.ndarray, goals: np.ndarray, gamma: float, count: str) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and masks of a backup over options: r + gamma m V(end). An option succeeds where its end is the goal.

    count="options": -1 and one discount per option, whatever its length; 0 and no bootstrap at success. count="steps": the ordinary n-step backup,
    -(1 - gamma^j) / (1 - gamma) and gamma^j for j steps, which leaves the horizon as long as it was.
    """
    open_ = (ends != goals).astype(np.float32)
    if count == "options":
        return -open_, open_
    power = gamma ** (ends - rows).astype(np.float64)
    return (-(1 - power) / (1 - gamma)).astype(np.float32), (open_ * power / gamma).astype(np.float32)


@part("options")
class Options(Subgoals):
    """abstraction: steps per option; count: "options", or "steps" for the ordinary n-step backup (a variant to compare with).

    The batch of `subgoals`, and option_ends, option_goals, option_rewards, option_masks. Their goals follow value_*.
    """

    abstraction: Count = 5
    count: Literal["options", "steps"] = "options"

    def build(self, table, rng, batch, gamma):
        if self.count == "steps" and not 0 < gamma < 1:
            raise UserError(f"gamma={gamma}: sampler.count=steps needs a discount between 0 and 1")
        reserved(table.data, ("value_goals", "masks", "rows", "next_obs", "low_goals", "high_goals", "high_targets", *FIELDS))
        return LiveOptions(self, table, rng, batch, gamma)


class LiveOptions(LiveSubgoals):
    def gather(self, rows):
        part, numbers, n = self.part, self.numbers, rows.shape[1]
        share = part.value_trajectory / (1 - part.value_current) if part.value_current < 1 else 0.0
        later, random = numbers.later(rows, part.value_geometric), numbers.random(n)
        on_way, current = numbers.rng.uniform(n) < share, numbers.rng.uniform(n) < part.value_current
        ends, goals = option_rows(rows, numbers.finals[rows], later, random, on_way, current, part.abstraction)
        rewards, masks = (torch.from_numpy(x).to(self.table.device) for x in option_backup(rows, ends, goals, numbers.gamma, part.count))
        return super().gather(rows) | dict(zip(FIELDS, (*self.states(ends, goals), rewards, masks), strict=True))


@part("option-aware")
class OTA(Hierarchical):
    """The recipe of two levels with a high value of its own; see volvelle.offline.hierarchy."""

    sampler: BatchSampler = Options()

    def check(self, recipe):
        super().check(recipe)
        if not isinstance(self.sampler, Options):
            raise UserError(f"sampler={self.sampler.part_name}: ota's high value needs options; accepted: options (hiql takes subgoals)")

    def agent(self, run, spec, data):
        return OTAAgent(run, self, spec)


class OTAAgent(HierarchicalAgent):
    """The algorithm: what hiql does, with the high policy weighed by a value over options."""

    def networks(self):
        return super().networks() | {"high_value": (self.value_net(self.part.value_network), 2)}

    def lags(self):
        return ("value", "high_value")

    def high_value(self):
        return "high_value"

    def value_losses(self, batch):
        high = self.implicit_loss("high_value", batch["obs"], *(batch[k] for k in FIELDS))
        return super().value_losses(batch) | {"high_value": high}


# --------------------------------------------------------------------------------------------------------------- recipe and claim

_network = FourierMLP(hidden=(64, 64), activation="gelu", init="fan-avg")
_small = {"network": _network, "value_network": _network.replace(layer_norm=True), "batch": 128, "period": 900, "optimiser": Adam(lr=1e-3, clip=None), "tau": 0.05,
          "evaluation": Evaluation(episodes=3), "diagnose": True}

claim = Claim(
    says="orders the states of long ways where hiql's value does not, so that its high policy names better subgoals",
    arms={"hiql": hiql(**_small, sampler=Subgoals(steps=25)), "ota": OTA(**_small, sampler=Options(steps=25, abstraction=25))},
    task=Generated(env=Maze(maze="corridor", speed=0.1, noise=0.0125, time_limit=600), behaviour=Walker(), quality="navigate", steps=50_000, length=1000),
    steps=2, seeds=5, equal="gradient steps", minutes=10, quick={"steps": 1, "seeds": 2},
    expects=("ota > hiql on order", "ota > hiql on success"), run={"checkpoint_every": 1})

ota = method("ota", OTA(), title="option-aware temporally abstracted value", source="arXiv 2505.12737", claim=claim)
