"""Two levels of goal-reaching: a high policy that names a state some steps ahead, by its representation, and a low policy that goes there.

HIQL (arXiv 2307.11949) and what builds on it. phi([s; g]) is the representation of a goal seen from a state, of length sqrt(width); values are V(s, phi([s; g])).
There is one phi for all: values, their lagged copies (which lag on top of phi only), the low policy's input and the high policy's target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from volvelle.control.heads import HALF_LOG_TWO_PI
from volvelle.control.learner import Count, NonNegative, Positive
from volvelle.control.networks import Network, Output
from volvelle.control.policy import Deciding
from volvelle.control.spaces import Layout, Spec
from volvelle.core.errors import UserError
from volvelle.core.parts import part

from .goals import Goals, LiveGoals, apart, split, together
from .losses import advantage_weights
from .policies import HeadPolicy
from .reaching import LAST_GAIN, Level, Reaching, ReachingAgent, implicit_value_loss
from .samplers import BatchSampler, reserved


# ---------------------------------------------------------------------------------------------- batches

def subgoal_targets(rows: np.ndarray, finals: np.ndarray, later: np.ndarray, random: np.ndarray, pick: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Goals of the high policy and the rows it shall name: min(row + steps, goal) for goals of the same trajectory, min(row + steps, final) for random ones.

    pick: where the random goal is taken. All row numbers of one shape.
    """
    ahead = rows + steps
    return np.where(pick, random, later), np.where(pick, np.minimum(ahead, finals), np.minimum(ahead, later))


@part("subgoals")
class Subgoals(Goals):
    """Goals for two levels. `steps`: how far ahead subgoals lie.

    The batch of `goals`, and low_goals (the state `steps` ahead, at most the trajectory's last goal), high_goals and high_targets (the state `steps`
    ahead on the way to it). The high policy's goals follow actor_trajectory, actor_random and actor_geometric.
    """

    steps: Count = 25

    def __post_init__(self):
        super().__post_init__()
        if self.actor_current:
            raise UserError(f"sampler.actor_current={self.actor_current}: a policy of two levels takes no present goals; accepted: 0")

    def build(self, table, rng, batch, gamma):
        reserved(table.data, ("value_goals", "actor_goals", "masks", "rows", "next_obs", "low_goals", "high_goals", "high_targets"))
        return LiveSubgoals(self, table, rng, batch, gamma)


class LiveSubgoals(LiveGoals):
    def gather(self, rows):
        part, numbers = self.part, self.numbers
        later, finals, n = numbers.later(rows, part.actor_geometric), numbers.finals[rows], rows.shape[1]
        goals, targets = subgoal_targets(rows, finals, later, numbers.random(n), numbers.rng.uniform(n) < part.actor_random, part.steps)
        value = numbers.goals(rows, part.value_current, part.value_trajectory, part.value_geometric)
        batch = self.value_batch(rows, value)
        names = ("obs", "next_obs", "value_goals", "low_goals", "high_goals", "high_targets")
        return batch | dict(zip(names, self.states(rows, rows + 1, value, numbers.ahead(rows, part.steps), goals, targets), strict=True))


# ---------------------------------------------------------------------------------------------- networks

def lengthened(x: Tensor) -> Tensor:
    """Scaled to length sqrt(width), [..., width]."""
    return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1])


class TwoLevels(Deciding):
    """phi and both policies. Acting: the high policy's mean, brought to length, is the low policy's goal; a new one at every step."""

    def __init__(self, part: Hierarchical, spec: Spec, seeds: int):
        super().__init__()
        layout, (state, self.goal) = spec.observations, split(spec.observations)
        self.phi_net = Output(part.value_network.build(layout, seeds), seeds, part.width, part.value_network.init)
        self.high = Output(part.network.build(layout, seeds), seeds, part.width, part.network.init, LAST_GAIN)
        self.low = HeadPolicy(part.network, part.head, replace(spec, observations=Layout(vector=state.vector + part.width)), seeds, gain=LAST_GAIN)

    def phi(self, states: Tensor, goals: Tensor) -> Tensor:
        """Representation of goals seen from states, [S, B, width]."""
        return lengthened(self.phi_net(together(states, goals)))

    def best(self, observations):
        states, _ = apart(observations, self.goal)
        return self.low.best(together(states, lengthened(self.high(observations))))

    def explore(self, observations, streams):
        states, _ = apart(observations, self.goal)
        named = self.high(observations)
        noise = torch.from_numpy(streams.normal(*named.shape[1:])).to(named.device)
        return self.low.explore(together(states, lengthened(named + noise)), streams)


class Guided(Deciding):
    """The low policy of two levels led by given subgoals: `ahead(observations)` names the states to go to, [S, N, state]."""

    def __init__(self, levels: TwoLevels, ahead: Any):
        super().__init__()
        self.levels, self.ahead = levels, ahead

    def best(self, observations):
        states, _ = apart(observations, self.levels.goal)
        return self.levels.low.best(together(states, self.levels.phi(states, self.ahead(observations))))


# ---------------------------------------------------------------------------------------------- diagnostics

def order_consistency(values: Tensor, steps: int) -> Tensor:
    """Share of pairs (s_t, s_(t + steps)) of a shortest way [..., T] whose later state has the higher value; [...]. arXiv 2505.12737."""
    if values.shape[-1] <= steps:
        raise UserError(f"order consistency over {steps} steps needs a way of more than {steps} states; it has {values.shape[-1]}")
    return (values[..., steps:] > values[..., :-steps]).float().mean(-1)


# ---------------------------------------------------------------------------------------------- recipe and agent

@dataclass(frozen=True, eq=False)
class Hierarchical(Reaching):
    """level: of the expectile; width: of phi; *_temperature, cap: of both policies' weights min(exp(temperature A), cap).

    low_trains_phi: let the low policy's loss into phi (for images).
    """

    sampler: BatchSampler = Subgoals()
    level: Level = 0.7
    width: Count = 10
    low_temperature: NonNegative = 3.0
    high_temperature: NonNegative = 3.0
    cap: Positive = 100.0
    low_trains_phi: bool = False

    def check(self, recipe):
        super().check(recipe)
        if not isinstance(self.sampler, Subgoals):
            raise UserError(f"sampler={self.sampler.part_name}: two levels need goals for both; accepted: subgoals, options")

    def actor(self, spec, seeds):
        return TwoLevels(self, spec, seeds)


class HierarchicalAgent(ReachingAgent):
    """Both levels weigh by one value; `high_value` is where a method gives the high level another."""

    def value_net(self, network: Network) -> Output:
        """Two heads on state and representation."""
        state, _ = split(self.spec.observations)
        return Output(network.build(Layout(vector=state.vector + self.part.width), 2 * self.seeds), 2 * self.seeds, 1, network.init, members=2)

    def networks(self):
        return {"value": (self.value_net(self.part.value_network), 2)}

    def lags(self):
        return ("value",)

    def value(self, name: str, states: Tensor, goals: Tensor) -> Tensor:
        """V(s, phi([s; g])) of every head, [S, heads, B]."""
        return self.heads(self.net[name], together(states, self.module.phi(states, goals)))

    def implicit_loss(self, name: str, states: Tensor, following: Tensor, goals: Tensor, rewards: Tensor, masks: Tensor) -> Tensor:
        """implicit_value_loss of one value; the lagged copies see today's phi, without gradient."""
        seen = together(states, self.module.phi(states, goals))
        with torch.no_grad():
            lagged = self.targets[name].module
            here, after = self.heads(lagged, seen), self.heads(lagged, together(following, self.module.phi(following, goals)))
        return implicit_value_loss(self.heads(self.net[name], seen), here, after, rewards, masks, self.part.gamma, self.part.level)

    @torch.no_grad()
    def gain(self, name: str, states: Tensor, later: Tensor, goals: Tensor) -> Tensor:
        """V(later, g) - V(s, g), means of the heads, [S, B]."""
        return self.value(name, later, goals).mean(1) - self.value(name, states, goals).mean(1)

    def high_value(self) -> str:
        """The network whose value weighs the high policy."""
        return "value"

    def low_loss(self, batch):
        """-mean min(exp(temperature (V(s', w) - V(s, w))), cap) log pi(a | s, phi([s; w])), per seed; w: the state some steps ahead."""
        goals, part = batch["low_goals"], self.part
        weights = advantage_weights(self.gain("value", batch["obs"], batch["next_obs"], goals), part.low_temperature, part.cap)
        with torch.set_grad_enabled(part.low_trains_phi and torch.is_grad_enabled()):
            named = self.module.phi(batch["obs"], goals)
        return -(weights * self.module.low.log_prob(together(batch["obs"], named), batch["actions"])).mean(-1)

    def high_loss(self, batch):
        """-mean min(exp(temperature (V(w, g) - V(s, g))), cap) log N(phi([s; w]); mean(s, g), 1), per seed."""
        goals, targets, part = batch["high_goals"], batch["high_targets"], self.part
        weights = advantage_weights(self.gain(self.high_value(), batch["obs"], targets, goals), part.high_temperature, part.cap)
        with torch.no_grad():
            named = self.module.phi(batch["obs"], targets)
        error = self.module.high(together(batch["obs"], goals)) - named
        return (weights * (0.5 * error.square() + HALF_LOG_TWO_PI).sum(-1)).mean(-1)

    def value_losses(self, batch) -> dict[str, Tensor]:
        return {"value": self.implicit_loss("value", batch["obs"], batch["next_obs"], batch["value_goals"], batch["rewards"], batch["masks"])}

    def losses(self, batch):
        return self.value_losses(batch) | {"low": self.low_loss(batch), "high": self.high_loss(batch)}
