"""PMOE inside PPO: a mixture of experts as the policy, its weights taught by an extra Q network.

Problem, idea and when to pick it: see pmoe. Here the ratio is that of the full mixture density, log sum_i w_i N(a; mu_i, sigma_i) with sigma free
of the state, so the clipped surrogate moves weights and experts alike. A further network regresses Q(s, a) to the value target; per minibatch one
action of every expert is drawn, without gradient, the best under Q named, and the frequency loss added:
surrogate + value_weight * value loss + Q loss + frequency loss, one optimiser, gradients clipped jointly.
Source: arXiv 2104.09122. value_weight 0.25 here is 0.5 with the inner half of the authors' file. The density is a logsumexp: theirs underflows.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import nn

from volvelle.core.errors import UserError
from volvelle.core.parts import method, part

from ..heads import PolicyHead
from ..learner import NonNegative
from ..mixtures import GaussianMixture
from ..networks import Network, Output
from ..onpolicy import ActorCritic, OnPolicy, OnPolicyLearner
from ..stacked import Streams
from .pmoe import Gate, frequency_loss
from .ppo import ppo_continuous


@part("pmoe-ppo")
class PMOEPPO(OnPolicy):
    """frequency_weight: of the frequency loss; gate: network of the mixing weights (none: linear in the observation)."""

    head: PolicyHead = GaussianMixture(experts=4)
    frequency_weight: NonNegative = 1.0
    gate: Network | None = None

    def check(self, recipe):
        super().check(recipe)
        if not isinstance(self.head, GaussianMixture):
            raise UserError(f"head={self.head.part_name}: pmoe-ppo weighs experts; accepted: {GaussianMixture.part_name}")
        if self.shared:
            raise UserError("shared=true: the experts of pmoe-ppo have a network of their own; accepted: false")

    def actor(self, spec, seeds):
        return MixtureActorCritic(self, spec, seeds)

    def start(self, run):
        return PMOEPPOLearner(run, self)


class MixtureActorCritic(ActorCritic):
    """The policy network gives the experts' means, the gate the weights; q_net values actions."""

    def __init__(self, recipe: PMOEPPO, spec, seeds: int):
        super().__init__(recipe, spec, seeds)
        how, size = recipe.network.init, spec.actions.continuous
        experts = recipe.head.experts
        self.policy_net = Output(recipe.network.build(spec.observations, seeds), seeds, experts * size, how, 0.01 if how == "orthogonal" else 1.0)
        self.gate = Gate(recipe.gate, spec.observations, seeds, experts)
        self.q_net = Output(recipe.network.build(spec.observations, seeds, size), seeds, 1, how)
        self.free = nn.Parameter(torch.full((seeds, 1, self.head.free), self.head.start))

    def policy(self, x):
        return torch.cat([self.gate(x), self.policy_net(x)], -1), self.free


class PMOEPPOLearner(OnPolicyLearner):
    def __init__(self, run, part: PMOEPPO):
        super().__init__(run, part)
        self.drawing = Streams(run, "experts", part.seeds)

    def minibatches(self, batch):
        for mini in super().minibatches(batch):
            yield mini | {"noise": self.drawing.noise(self.head, mini["old"].shape[1]).to(self.device)}

    def _loss(self, batch):
        loss, policy, value, logp = super()._loss(batch)
        module, obs = self.net.module, batch["obs"]
        errors = (module.q_net(obs, batch["actions"]).squeeze(-1) - batch["returns"]).square()
        outputs = module.policy(obs)
        with torch.no_grad():
            tried = self.head.every(outputs, batch["noise"])                                                  # [S, B, K, A]
            best = torch.stack([module.q_net(obs, a).squeeze(-1) for a in tried.unbind(-2)], -1).argmax(-1)
        frequency = frequency_loss(self.head.weights(outputs), best)
        return loss + errors.mean(-1) + self.part.frequency_weight * frequency.mean(-1), policy, value, logp


def _with(recipe: OnPolicy, **more) -> PMOEPPO:
    """The settings of another on-policy recipe."""
    return PMOEPPO(**{f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "head"} | more)


pmoe_ppo = method("pmoe-ppo", _with(ppo_continuous), title="mixture of experts as the policy of PPO", source="arXiv 2104.09122")
