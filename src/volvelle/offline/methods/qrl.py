"""Quasimetric RL: the optimal time to a goal as the largest distance that no recorded step contradicts.

Problem: learn optimal goal-reaching from data without bootstrapping and without an expectile's optimism.
Idea: the optimal cost-to-go is a quasimetric (triangle inequality, not symmetric). So take a network that can be nothing else, d(s, g), and push the
distance of random pairs up, 100 softplus(5 - d/100), while no recorded step may cost more than 1: a dual variable holds mean relu(d(s, s') - 1)^2 at 0.05.
A model of the dynamics in the metric's own features tells where an action leads; the policy descends d from there and stays near the data.
Pick it for stitching in worlds that do what they are told; noise in the dynamics breaks the constraint. Fewer seams than gciql or hiql on mid-length ways.
Source: arXiv 2304.01203, form and defaults of 2410.20092; distances: interval embeddings (iqe, 2211.15120) or metric residual networks (mrn, 2208.08133).
extraction.weight: 0.003 for ant mazes, 0.0003 point mazes. Discrete actions: extraction=awr, which needs no model.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.control.learner import Count, Positive
from volvelle.control.networks import Network, Output
from volvelle.control.spaces import Layout
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part

from ..goals import Goals, split
from ..implicit import action_width
from ..reaching import AscentAndCloning, Extraction, Reaching, ReachingAgent
from ..samplers import BatchSampler


def interval_distance(x: Tensor, y: Tensor, alpha: Tensor, group: int) -> Tensor:
    """Interval quasimetric embedding: [..., width] twice -> [...].

    The width falls into groups of `group` intervals [x_i, y_i] (empty where y_i <= x_i); a group's component is the length of their union, and the
    distance is alpha mean + (1 - alpha) max over components. arXiv 2211.15120.
    """
    left, order = x.unflatten(-1, (-1, group)).sort(-1)
    right = torch.maximum(left, y.unflatten(-1, (-1, group)).gather(-1, order))
    covered = torch.cat([torch.full_like(right[..., :1], -torch.inf), right.cummax(-1).values[..., :-1]], -1)
    components = F.relu(right - torch.maximum(left, covered)).sum(-1)
    return alpha * components.mean(-1) + (1 - alpha) * components.amax(-1)


def residual_distance(x: Tensor, y: Tensor) -> Tensor:
    """Metric residual network: Euclidean distance of the first halves plus relu(max(x - y)) of the second ones. [..., width] twice -> [...]. arXiv 2208.08133."""
    (same, more), (same_y, more_y) = x.chunk(2, -1), y.chunk(2, -1)
    return (same - same_y).square().sum(-1).clamp(min=1e-12).sqrt() + F.relu((more - more_y).amax(-1))


def spreading_loss(distances: Tensor) -> Tensor:
    """100 softplus(5 - d / 100): pushes distances up, ever less beyond 500. Per item."""
    return 100 * F.softplus(5 - distances / 100)


def step_excess(distances: Tensor) -> Tensor:
    """relu(d(s, s') - 1)^2: how much recorded steps cost above 1. Per item."""
    return F.relu(distances - 1).square()


class Quasimetric(nn.Module):
    """Features of states, and the distance between them; alpha and the dual variable are learnt too."""

    def __init__(self, network: Network, state: Layout, width: int, group: int | None, seeds: int):
        super().__init__()
        self.group = group
        self.phi = Output(network.build(state, seeds), seeds, width, network.init)
        self.alpha = nn.Parameter(torch.zeros(seeds, 1)) if group is not None else None

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of features, [S, B]."""
        return residual_distance(x, y) if self.alpha is None else interval_distance(x, y, self.alpha.sigmoid(), self.group)

    def forward(self, states: Tensor, goals: Tensor) -> Tensor:
        return self.between(self.phi(states), self.phi(goals))


class Dual(nn.Module):
    """The logarithm of a positive multiplier, one per seed; starts at 1."""

    def __init__(self, seeds: int):
        super().__init__()
        self.log = nn.Parameter(torch.zeros(seeds, 1))

    def forward(self) -> Tensor:
        return self.log.squeeze(-1).exp()


@part("quasimetric")
class QRL(Reaching):
    """metric: iqe or mrn, of `width` features (iqe: in groups of `group`); margin: of the steps' excess cost; extraction: ddpg-bc or awr."""

    sampler: BatchSampler = Goals(value_current=0.0, value_trajectory=0.0, value_random=1.0)
    metric: Literal["iqe", "mrn"] = "iqe"
    width: Count = 512
    group: Count = 8
    margin: Positive = 0.05
    extraction: Extraction = AscentAndCloning(weight=0.003)

    def check(self, recipe):
        super().check(recipe)
        if self.width % (self.group if self.metric == "iqe" else 2):
            raise UserError(f"width={self.width}: metric={self.metric} needs a multiple of {self.group if self.metric == 'iqe' else 2}")

    def agent(self, run, spec, data):
        return QRLAgent(run, self, spec)


class QRLAgent(ReachingAgent):
    """The algorithm."""

    def networks(self):
        part, s, net = self.part, self.seeds, self.part.value_network
        state, _ = split(self.spec.observations)
        made = {"metric": (Quasimetric(net, state, part.width, part.group if part.metric == "iqe" else None, s), 1), "dual": (Dual(s), 1)}
        if isinstance(part.extraction, AscentAndCloning):
            made["dynamics"] = (Output(net.build(Layout(vector=part.width), s, action_width(self.spec)), s, part.width, net.init), 1)
        return made

    def judges(self):
        return self.net["metric"], self.net["dynamics"]

    def after(self, features: Tensor, actions: Tensor) -> Tensor:
        """Features of the state that follows: the model gives the change."""
        return features + self.net["dynamics"](features, actions)

    def metric_losses(self, batch):
        """Per seed: spreading plus multiplier (without gradient) times the steps' excess; and the multiplier's loss lambda (margin - excess)."""
        metric, multiplier = self.net["metric"], self.net["dual"]()
        here = metric.phi(batch["obs"])
        excess = step_excess(metric.between(here, metric.phi(batch["next_obs"]))).mean(-1)
        spread = spreading_loss(metric.between(here, metric.phi(batch["value_goals"]))).mean(-1)
        return {"metric": spread + multiplier.detach() * excess, "multiplier": multiplier * (self.part.margin - excess.detach())}

    def dynamics_loss(self, batch):
        """Half the way there and back between the predicted and the recorded next features, per seed; trains the features too."""
        metric = self.net["metric"]
        found, wanted = self.after(metric.phi(batch["obs"]), batch["actions"]), metric.phi(batch["next_obs"])
        return (metric.between(wanted, found) + metric.between(found, wanted)).mean(-1) / 2

    def worth(self, batch, actions):
        metric = self.net["metric"]
        return -metric.between(self.after(metric.phi(batch["obs"]), actions), metric.phi(batch["actor_goals"]))

    def advantages(self, batch):
        metric = self.net["metric"]
        return metric(batch["obs"], batch["actor_goals"]) - metric(batch["next_obs"], batch["actor_goals"])

    def losses(self, batch):
        found = self.metric_losses(batch)
        if "dynamics" in self.net:
            found["dynamics"] = self.dynamics_loss(batch)
        return found | {"actor": self.part.extraction.loss(self, batch)}


qrl = method("qrl", QRL(), title="quasimetric reinforcement learning", source="arXiv 2304.01203")
