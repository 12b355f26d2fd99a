"""AWAC: an off-policy critic with an advantage-weighted policy.

Problem: policy gradients through an offline critic leave the data; pure imitation ignores rewards.
Idea: learn Q of the present policy by temporal differences (actions at s' from the policy), and imitate recorded actions with weights
exp(A / lambda), A = min Q(s, a) - mean over policy actions of min Q(s, .). The policy stays near the data without an explicit constraint.
Pick it when training goes on online afterwards; offline alone iql is steadier, since it never asks for actions outside the data.
Source: arXiv 2006.09359.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.actorcritic import Critics
from volvelle.control.heads import PolicyHead
from volvelle.control.learner import Count, Positive
from volvelle.control.networks import MLP, Network
from volvelle.control.stacked import Streams, make
from volvelle.control.valueheads import MSE, ValueHead
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, Optimiser

from ..heads import AroundMean
from ..implicit import action_numbers, action_width
from ..learner import Offline
from ..losses import advantage_weights
from ..policies import HeadPolicy
from .cql import repeated


@part("advantage-weighted")
class AWAC(Offline):
    """lam: temperature of the weights min(exp(A / lam), cap); samples: policy actions behind the value of a state."""

    network: Network = MLP(hidden=(256, 256), activation="relu")
    value: ValueHead = MSE()
    critics: Count = 2
    head: PolicyHead = AroundMean()
    actor_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    critic_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    tau: Annotated[float, Field(gt=0, le=1)] = 0.005
    lam: Positive = 1.0
    cap: Positive = 100.0
    samples: Count = 1

    def check(self, recipe):
        super().check(recipe)
        if not self.value.scalar:
            raise UserError(f"value={self.value.part_name} learns a return distribution; awac takes minima of numbers; accepted: mse, huber, hl-gauss, two-hot")

    def actor(self, spec, seeds):
        return HeadPolicy(self.network, self.head, spec, seeds)

    def agent(self, run, spec, data):
        return AWACAgent(run, self, spec)


class AWACAgent:
    """The algorithm: critics, policy, targets."""

    def __init__(self, run, part: AWAC, spec):
        self.part, self.spec, seeds = part, spec, part.seeds
        self.module = part.actor(spec, seeds)
        self.policy = make(run, "actor", self.module, part.actor_optimiser, seeds)
        self.critics = Critics(run, part.network, part.value, part.critic_optimiser, spec.observations, action_width(spec), 1, seeds, part.critics, part.tau)
        self.sampling = Streams(run, "sampling", seeds)
        self.size = sum(p.numel() for p in self.module.parameters()) + self.critics.size

    @torch.no_grad()
    def act(self, observations) -> Tensor:
        """One action of the policy per row, as the critics take it."""
        return action_numbers(self.module.explore(observations, self.sampling), self.spec)

    def advantage(self, batch, actions: Tensor) -> Tensor:
        """min Q(s, a) minus the mean of min Q(s, .) over policy actions, [S, B], without gradient."""
        with torch.no_grad():
            states = repeated(batch["obs"], self.part.samples)
            baseline = self.critics.values(states, self.act(states)).amin(1).unflatten(-1, (-1, self.part.samples)).mean(-1)
            return self.critics.values(batch["obs"], actions).amin(1) - baseline

    def update(self, batch):
        part, actions = self.part, action_numbers(batch["actions"], self.spec)
        with torch.no_grad():
            target = batch["rewards"] + batch["discounts"] * self.critics.target_values(batch["next_obs"], self.act(batch["next_obs"])).amin(1)
        loss_q = self.critics.losses(self.critics.net(batch["obs"], actions), target).mean(-1).sum(-1)
        self.critics.net.backward(loss_q)
        norm = self.critics.net.step()
        weights = advantage_weights(self.advantage(batch, actions), 1 / part.lam, part.cap)
        loss_pi = -(weights * self.module.log_prob(batch["obs"], batch["actions"])).mean(-1)
        self.policy.backward(loss_pi)
        self.policy.step()
        self.critics.target.update()
        return {"loss/critic": loss_q.detach(), "loss/actor": loss_pi.detach(), "q": target, "gradient_norm": norm}

    def report(self, made):
        return dict(made)


awac = method("awac", AWAC(), title="advantage-weighted actor-critic", source="arXiv 2006.09359")
