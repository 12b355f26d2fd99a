"""Contrastive RL: the value of a goal as the chance that the future holds it, learnt by telling futures apart.

Problem: reach commanded goals without bootstrapping, whose errors grow with the length of the way.
Idea: f(s, a, g) = phi(s, a) . psi(g) / sqrt(width) tells the trajectory's own future states g (geometric ahead) from those of the other rows of the batch: binary
cross-entropy of the matrix of all pairs against the identity, for two critics. f is then the log-odds of meeting g when going on like the data.
The policy climbs the smaller f and stays near the data (ddpg-bc); awr compares with a contrastive V of its own.
Pick it for long trajectories that visit much (navigate); it values the data's own behaviour, so it joins pieces of trajectories badly (stitch: gciql, qrl, hiql).
Source: arXiv 2206.07568, form and defaults of 2410.20092. extraction.weight: 0.1 for ant mazes, 0.03 point mazes. Discrete actions: extraction=awr.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.control.learner import Count
from volvelle.control.networks import Network, Output
from volvelle.control.spaces import Layout
from volvelle.core.parts import method, part

from ..goals import Goals, split
from ..implicit import action_numbers, action_width
from ..reaching import AscentAndCloning, Extraction, Reaching, ReachingAgent
from ..samplers import BatchSampler


def contrastive_loss(logits: Tensor) -> Tensor:
    """Binary cross-entropy of all pairs against the identity: mean over the entries of [S, heads, B, B] (row i: state i with every goal), per seed [S]."""
    own = torch.eye(logits.shape[-1], device=logits.device).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, own, reduction="none").mean((-1, -2, -3))


class Bilinear(nn.Module):
    """phi(s, a) . psi(g) / sqrt(width), `members` per seed."""

    def __init__(self, network: Network, state: Layout, actions: int, goal: int, width: int, seeds: int, members: int):
        super().__init__()
        copies = seeds * members
        self.seeds, self.members, self.scale = seeds, members, 1 / math.sqrt(width)
        self.phi = Output(network.build(state, copies, actions), copies, width, network.init, members=members)
        self.psi = Output(network.build(Layout(vector=goal), copies), copies, width, network.init, members=members)

    def _apart(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.seeds, self.members))

    def forward(self, states: Tensor, goals: Tensor, actions: Tensor | None = None) -> Tensor:
        """Row by row, [S, members, B]."""
        return self._apart((self.phi(states, actions) * self.psi(goals)).sum(-1) * self.scale)

    def pairs(self, states: Tensor, goals: Tensor, actions: Tensor | None = None) -> Tensor:
        """Every state (with its action) with every goal, [S, members, B, B]."""
        return self._apart(torch.bmm(self.phi(states, actions), self.psi(goals).mT) * self.scale)


@part("contrastive")
class CRL(Reaching):
    """width: of phi and psi; extraction: ddpg-bc (continuous actions) or awr."""

    sampler: BatchSampler = Goals(value_current=0.0, value_trajectory=1.0, value_random=0.0)
    width: Count = 512
    extraction: Extraction = AscentAndCloning(weight=0.1)

    def agent(self, run, spec, data):
        return CRLAgent(run, self, spec)


class CRLAgent(ReachingAgent):
    """The algorithm."""

    def networks(self):
        part, (state, goal) = self.part, split(self.spec.observations)
        made = {"critic": (Bilinear(part.value_network, state, action_width(self.spec), goal, part.width, self.seeds, 2), 2)}
        if not isinstance(part.extraction, AscentAndCloning):
            made["value"] = (Bilinear(part.value_network, state, 0, goal, part.width, self.seeds, 1), 1)
        return made

    def judges(self):
        return (self.net["critic"],)

    def worth(self, batch, actions):
        return self.net["critic"](batch["obs"], batch["actor_goals"], action_numbers(actions, self.spec)).amin(1)

    def advantages(self, batch):
        return self.worth(batch, batch["actions"]) - self.net["value"](batch["obs"], batch["actor_goals"]).squeeze(1)

    def losses(self, batch):
        goals, actions = batch["value_goals"], action_numbers(batch["actions"], self.spec)
        found = {"critic": contrastive_loss(self.net["critic"].pairs(batch["obs"], goals, actions))}
        if "value" in self.net:
            found["value"] = contrastive_loss(self.net["value"].pairs(batch["obs"], goals))
        return found | {"actor": self.part.extraction.loss(self, batch)}


crl = method("crl", CRL(), title="contrastive reinforcement learning", source="arXiv 2206.07568")
