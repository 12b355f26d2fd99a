"""Two levels of goal-reaching: a high policy that names a state some steps ahead, by its representation, and a low policy that goes there.

HIQL (arXiv 2307.11949) and what builds on it. phi([s; g]) is the representation of a goal seen from a state, of length sqrt(width); values are V(s, phi([s; g])).
There is one phi for all: values, their lagged copies (which lag on top of phi only), the low policy's input and the high policy's target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

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

from .commands import Maze
from .goals import Goals, LiveGoals, apart, split, together
from .learner import OfflineLearner
from .losses import advantage_weights
from .mazes import MAZES, along, shortest_way
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
    """The low policy of two levels led by true subgoals of one of our mazes: the place `length` cells ahead on a shortest way to the goal."""

    def __init__(self, levels: TwoLevels, maze: str, length: float):
        super().__init__()
        self.levels, self.maze, self.length = levels, maze, np.array([length])

    def ahead(self, states: Tensor, goals: Tensor) -> Tensor:
        pairs = zip(states.reshape(-1, 2).cpu().numpy(), goals.reshape(-1, 2).cpu().numpy(), strict=True)
        found = np.stack([along(shortest_way(self.maze, place, goal), self.length)[0] for place, goal in pairs])
        return torch.from_numpy(found.astype(np.float32)).view(states.shape).to(states.device)

    def best(self, observations):
        states, goals = apart(observations, self.levels.goal)
        return self.levels.low.best(together(states, self.levels.phi(states, self.ahead(states, goals))))


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

    low_trains_phi: let the low policy's loss into phi (for images). diagnose: evaluations in our mazes also report `order`, the order consistency of the
    high level's value over sampler.steps steps, and `oracle_success`, that of the low policy led by true subgoals.
    """

    needs: ClassVar[tuple[str, ...]] = ("value_goals", "low_goals", "high_goals", "high_targets", "rewards", "masks", "next_obs")
    sampler: BatchSampler = Subgoals()
    level: Level = 0.7
    width: Count = 10
    low_temperature: NonNegative = 3.0
    high_temperature: NonNegative = 3.0
    cap: Positive = 100.0
    low_trains_phi: bool = False
    diagnose: bool = False

    def check(self, recipe):
        super().check(recipe)
        if not isinstance(self.sampler, Subgoals):
            raise UserError(f"sampler={self.sampler.part_name}: two levels need goals for both; accepted: subgoals, options")

    def validate(self, task=None):
        super().validate(task)
        if self.diagnose and not isinstance(task.world(), Maze):
            raise UserError(f"diagnose=true knows shortest ways in our mazes only; this task is {task.label()}; accepted: datasets of maze:…")

    def actor(self, spec, seeds):
        return TwoLevels(self, spec, seeds)

    def start(self, run):
        return HierarchicalLearner(run, self)


class HierarchicalLearner(OfflineLearner):
    """The offline loop, with the diagnostics of two levels."""

    leader: tuple[str, float] | None = None  # maze and length, while true subgoals lead

    def module_policy(self):
        return self.agent.module if self.leader is None else Guided(self.agent.module, *self.leader)

    def evaluate(self, task=None):
        found = super().evaluate(task)
        if not self.part.diagnose or task is not None or self.evaluated is not None:
            return found
        world = self.run.config.task.world()
        if self.run.step:  # an untrained low policy follows nobody
            self.leader = (world.maze, self.part.sampler.steps * world.speed)
            try:
                led = super().evaluate(task)
            finally:
                self.leader = None
            found |= {f"oracle_{k}": v for k, v in led.items() if k.startswith("success") and "/" not in k}
        order = self.order(world)
        return found | {"order": float(order.mean())} | ({f"order@{s}": float(v) for s, v in enumerate(order)} if len(order) > 1 else {})

    @torch.no_grad()
    def order(self, world: Maze) -> Tensor:
        """Order consistency of the high level's value per seed, mean over those of the maze's tasks that are more than sampler.steps steps long."""
        agent, steps, found = self.agent, self.part.sampler.steps, []
        for start, goal in MAZES[world.maze][1]:
            corners = shortest_way(world.maze, np.array(start) + 0.5, np.array(goal) + 0.5)
            total = np.linalg.norm(np.diff(corners, axis=0), axis=1).sum()
            states = along(corners, np.arange(0, total, world.speed))
            if len(states) > steps:
                places = torch.from_numpy(states.astype(np.float32)).expand(self.part.seeds, -1, -1).to(self.device)
                goals = torch.tensor(goal, dtype=torch.float32, device=self.device).add(0.5).expand_as(places)
                found.append(order_consistency(agent.value(agent.high_value(), places, goals).mean(1), steps))
        if not found:
            raise UserError(f"diagnose=true: no task of {world.label()} is more than sampler.steps={steps} steps long")
        return torch.stack(found).mean(0)


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
