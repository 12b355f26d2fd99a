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
from volvelle.control.speed import descent
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
        self.descend_critics, self.descend_actor = descent(run, self.critics.net, self.critic_loss), descent(run, self.policy, self.actor_loss)

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

    def critic_loss(self, batch, actions: Tensor, following: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over critics of the mean loss against r + discount min Qbar(s', pi(s')), per seed; and that target [S, B]. following: pi(s')."""
        with torch.no_grad():
            target = batch["rewards"] + batch["discounts"] * self.critics.target_values(batch["next_obs"], following).amin(1)
        return self.critics.losses(self.critics.net.module(batch["obs"], actions), target).mean(-1).sum(-1), {"q": target}

    def actor_loss(self, batch, advantages: Tensor) -> Tensor:
        """-mean min(exp(A / lambda), cap) log pi(a|s), per seed."""
        weights = advantage_weights(advantages, 1 / self.part.lam, self.part.cap)
        return -(weights * self.module.log_prob(batch["obs"], batch["actions"])).mean(-1)

    def update(self, batch):
        actions = action_numbers(batch["actions"], self.spec)
        loss_q, made = self.descend_critics(batch, actions, self.act(batch["next_obs"]))
        norm = self.critics.net.step()
        loss_pi = self.descend_actor(batch, self.advantage(batch, actions))
        self.policy.step()
        self.critics.target.update()
        return made | {"loss/critic": loss_q, "loss/actor": loss_pi, "gradient_norm": norm}

    def report(self, made):
        return dict(made)


awac = method("awac", AWAC(), title="advantage-weighted actor-critic", source="arXiv 2006.09359")
