"""Dual-Q and dual-V as they stand: the methods that arXiv 2302.08560 shows to be instances, and IV-Learn, its dual-V for demonstrations alone.

Problem: regularised offline learning and imitation have many names for two losses.
Idea: with reward r, data d, divergence f and weight alpha,
  dual-Q:  max_pi min_Q  (1 - gamma) E Q(s0, pi) + alpha E_d f*((r + gamma Q(s', pi) - Q(s, a)) / alpha)
  dual-V:         min_V  (1 - gamma) E V(s0)     + alpha E_d f*_p((r + gamma V(s') - V(s)) / alpha),  policy: imitate with weights (f')^-1 of the residual.
  | reward          | data    | dual-Q                               | dual-V                                    |
  | recorded        | dataset | dual-q (AlgaeDICE; CQL: chi-square)  | dual-v (OptiDICE)                         |
  | discriminator's | dataset | dual-q-imitation (OPOLO, OPIRL type) | dual-v-imitation (SMODICE, DemoDICE type) |
  | none            | expert  | iq-learn (IQ-Learn, ValueDICE type)  | iv-learn                                  |
The discriminator D(s, a) tells expert from data; its reward log(D / (1 - D)) means something only where the data cover the expert: else see recoil.
Pick these to compare with or where an exact dual is wanted; next values come from single samples inside f, so noisy transitions bias them, and the
implicit forms (dual-rl, iql, xql) are steadier.
Source: arXiv 2302.08560, and for the members arXiv 1912.02074, 2106.10783, 2102.13185, 2202.02433, 2106.12142.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from volvelle.control.actorcritic import Critics
from volvelle.control.heads import PolicyHead, Squashed
from volvelle.control.learner import Count, Positive
from volvelle.control.networks import MLP, Network, Output
from volvelle.control.stacked import Streams, make
from volvelle.control.valueheads import MSE
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, Optimiser

from ..demonstrations import Demonstrations
from ..divergences import ChiSquare, Divergence, dual_q, dual_v
from ..heads import AroundMean
from ..implicit import action_numbers, action_width
from ..learner import Offline
from ..policies import HeadPolicy
from ..samplers import BatchSampler, Transitions, _Transitions
from .cql import repeated

Reward = Literal["recorded", "discriminator", "none"]


@part("transitions-and-starts")
class TransitionsAndStarts(Transitions):
    """Steps as `transitions` draws them, with as many first states of episodes: initial_obs."""

    def build(self, table, rng, batch, gamma):
        table.data.require("this method", "rewards")
        return _WithStarts(table, rng, batch, gamma)


class _WithStarts(_Transitions):
    def draw(self):
        firsts = self.table.data.firsts
        return super().draw() | {"initial_obs": self.table.states(firsts[self.rng.integers(len(firsts), self.batch)])}


@dataclass(frozen=True, eq=False)
class Dual(Offline):
    """reward: "recorded", "discriminator" (log-odds of a classifier of expert against data pairs) or "none"; alpha: weight of the divergence."""

    needs: ClassVar[tuple[str, ...]] = ("discounts", "next_obs", "initial_obs")
    sampler: BatchSampler = TransitionsAndStarts()
    reward: Reward = "recorded"
    divergence: Divergence = ChiSquare()
    alpha: Positive = 1.0
    network: Network = MLP(hidden=(256, 256), activation="relu")
    value_network: Network = MLP(hidden=(256, 256), activation="relu")
    policy_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    value_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    discriminator_optimiser: Optimiser = Adam(lr=3e-4, clip=None)

    def check(self, recipe):
        super().check(recipe)
        shown, demonstrated = self.sampler.part_name, isinstance(self.sampler, Demonstrations)
        good = {"recorded": isinstance(self.sampler, TransitionsAndStarts), "discriminator": demonstrated and not self.sampler.alone, "none": demonstrated and self.sampler.alone}
        if not good[self.reward]:
            words = {"recorded": "transitions-and-starts", "discriminator": "demonstrations with alone=false", "none": "demonstrations with alone=true"}
            raise UserError(f"sampler={shown}: reward={self.reward} needs sampler={words[self.reward]}")
        if self.reward != "recorded" and self.rewards != "as-is":
            raise UserError(f"rewards={self.rewards}: with reward={self.reward} no rewards are read; accepted: as-is")


class DualAgent:
    """What both duals share: the reward, and which rows are the data."""

    def __init__(self, run, part: Dual, spec):
        self.part, self.spec, seeds = part, spec, part.seeds
        self.module = part.actor(spec, seeds)
        self.policy = make(run, "actor", self.module, part.policy_optimiser, seeds)
        self.discriminator = None
        self.size = sum(p.numel() for p in self.module.parameters())
        if part.reward == "discriminator":
            body = part.value_network.build(spec.observations, seeds, action_width(spec))
            self.discriminator = make(run, "discriminator", Output(body, seeds, 1, part.value_network.init), part.discriminator_optimiser, seeds)
            self.size += sum(p.numel() for p in self.discriminator.module.parameters())

    def rewarded(self, batch) -> dict:
        """The rows that are the data, with their rewards [S, B]; a discriminator learns on the way."""
        if self.part.reward == "recorded":
            return batch
        if self.part.reward == "none":
            return batch | {"rewards": torch.zeros_like(batch["discounts"])}
        logits = self.discriminator.module(batch["obs"], action_numbers(batch["actions"], self.spec)).squeeze(-1)
        count = logits.shape[-1] // 2
        first = {k: {n: x[:, :count] for n, x in v.items()} if isinstance(v, dict) else v[:, :count] for k, v in batch.items()}
        self.discriminator.backward((F.softplus(logits[:, :count]) + F.softplus(-logits[:, count:])).mean(-1))
        self.discriminator.step()
        return first | {"rewards": logits[:, :count].detach()}

    def report(self, made):
        return dict(made)


# --------------------------------------------------------------------------------------------------------------- dual-V

@part("dual-v")
class DualV(Dual):
    """cap: of the weights that recorded actions are imitated with."""

    head: PolicyHead = AroundMean()
    cap: Positive = 100.0

    def actor(self, spec, seeds):
        return HeadPolicy(self.network, self.head, spec, seeds)

    def agent(self, run, spec, data):
        return DualVAgent(run, self, spec)


class DualVAgent(DualAgent):
    def __init__(self, run, part: DualV, spec):
        super().__init__(run, part, spec)
        network = part.value_network
        self.values = make(run, "values", Output(network.build(spec.observations, part.seeds), part.seeds, 1, network.init), part.value_optimiser, part.seeds)
        self.size += sum(p.numel() for p in self.values.module.parameters())

    def v(self, observations) -> Tensor:
        return self.values.module(observations).squeeze(-1)

    def update(self, batch):
        part, batch = self.part, self.rewarded(batch)
        td = batch["rewards"] + batch["discounts"] * self.v(batch["next_obs"]) - self.v(batch["obs"])
        loss_v = dual_v(self.v(batch["initial_obs"]), td, part.divergence, part.alpha, part.gamma)
        self.values.backward(loss_v)
        norm = self.values.step()
        weights = part.divergence.ratio(td.detach() / part.alpha).clamp(max=part.cap)
        loss_pi = -(weights * self.module.log_prob(batch["obs"], batch["actions"])).mean(-1)
        self.policy.backward(loss_pi)
        self.policy.step()
        return {"loss/value": loss_v.detach(), "loss/actor": loss_pi.detach(), "weight": weights, "reward": batch["rewards"], "gradient_norm": norm}


# --------------------------------------------------------------------------------------------------------------- dual-Q

@part("dual-q")
class DualQ(Dual):
    """head: for continuous actions, one with a reparameterised sample; discrete ones get a softmax and exact expectations. critics: Q is their mean."""

    head: PolicyHead = Squashed()
    critics: Count = 1

    def actor(self, spec, seeds):
        head = AroundMean() if spec.actions.kind == "discrete" else self.head
        return HeadPolicy(self.network, head, spec, seeds)

    def agent(self, run, spec, data):
        return DualQAgent(run, self, spec)


class DualQAgent(DualAgent):
    def __init__(self, run, part: DualQ, spec):
        super().__init__(run, part, spec)
        self.critics = Critics(run, part.value_network, MSE(), part.value_optimiser, spec.observations, action_width(spec), 1, part.seeds, part.critics, 1.0)
        self.sampling = Streams(run, "sampling", part.seeds)
        self.size += self.critics.size

    def expected(self, observations) -> Tensor:
        """Q of the policy's action, [S, members, B], with gradients to both."""
        outputs = self.module(observations)
        if self.spec.actions.kind == "discrete":
            n = self.spec.actions.codes[0]
            every = torch.eye(n, device=outputs.device).repeat(outputs.shape[1], 1).expand(outputs.shape[0], -1, -1)
            return (outputs.softmax(-1).unsqueeze(1) * self.critics.values(repeated(observations, n), every).unflatten(-1, (-1, n))).sum(-1)
        noise = self.sampling.noise(self.module.head, outputs.shape[1]).to(outputs.device)
        return self.critics.values(observations, self.module.head.draw(outputs, noise)[0])

    def loss(self, batch) -> Tensor:
        """The saddle's value per seed [S], summed over members."""
        part, q = self.part, self.critics.values(batch["obs"], action_numbers(batch["actions"], self.spec))
        td = batch["rewards"].unsqueeze(1) + batch["discounts"].unsqueeze(1) * self.expected(batch["next_obs"]) - q
        return dual_q(self.expected(batch["initial_obs"]), td, part.divergence, part.alpha, part.gamma).sum(-1)

    def update(self, batch):
        """Both sides move on the same loss: Q down, the policy up."""
        batch = self.rewarded(batch)
        loss = self.loss(batch)
        self.critics.net.backward(loss)
        norm = self.critics.net.step()
        self.policy.flat.grad.neg_()
        self.policy.step()
        return {"loss": loss.detach(), "reward": batch["rewards"], "gradient_norm": norm}


alone, both = Demonstrations(alone=True), Demonstrations(merge=False)
titled = {"source": "arXiv 2302.08560"}
dual_v_recorded = method("dual-v", DualV(), title="dual-V with recorded rewards (OptiDICE type)", **titled)
dual_v_imitation = method("dual-v-imitation", DualV(reward="discriminator", sampler=both), title="dual-V with a discriminator's rewards (SMODICE type)", **titled)
iv_learn = method("iv-learn", DualV(reward="none", sampler=alone), title="IV-Learn: dual-V from demonstrations alone", **titled)
dual_q_recorded = method("dual-q", DualQ(), title="dual-Q with recorded rewards (AlgaeDICE type)", **titled)
dual_q_imitation = method("dual-q-imitation", DualQ(reward="discriminator", sampler=both), title="dual-Q with a discriminator's rewards (OPOLO type)", **titled)
iq_learn = method("iq-learn", DualQ(reward="none", sampler=alone), title="IQ-Learn: dual-Q from demonstrations alone", **titled)
