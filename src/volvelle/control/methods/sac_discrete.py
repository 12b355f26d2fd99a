"""Soft actor-critic for discrete actions.

Problem: entropy-regularised off-policy learning where actions are choices, and a reparameterised sample does not exist.
Idea: the critics give Q for every action and the policy is a softmax, so the soft value, the policy loss and the temperature loss are exact
expectations over the actions instead of samples. The target entropy is a share of the uniform policy's.
Pick it when dqn explores too little; dqn with n-step and double targets is simpler and often as good.
Source: arXiv 1910.07207; expectations as there, defaults near those of single-file implementations, with smaller networks' buffer and batch.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam

from ..buffers import Uniform
from ..networks import Output
from ..policy import Deciding
from ..speed import descent
from .sac import Soft, SoftAgent


@part("discrete-soft-actor-critic")
class DiscreteSAC(Soft):
    """The target entropy is `entropy_share` times that of the uniform policy; all expectations over actions are exact."""

    entropy_share: Annotated[float, Field(ge=0, le=1)] = 0.89

    def actor(self, spec, seeds):
        return DiscreteActor(self, spec, seeds)

    def agent(self, run, spec):
        return DiscreteSACAgent(run, self, spec)


class DiscreteActor(Deciding):
    def __init__(self, recipe: DiscreteSAC, spec, seeds: int):
        super().__init__()
        spec.actions.only("discrete", "sac-discrete")
        self.actions = spec.actions.codes[0]
        self.net = Output(recipe.network.build(spec.observations, seeds), seeds, self.actions, recipe.network.init)

    def forward(self, x) -> Tensor:
        """Log-probabilities [S, B, actions]."""
        return self.net(x).log_softmax(-1)

    def best(self, observations):
        return self.net(observations).argmax(-1)

    def explore(self, observations, streams):
        logits = self.net(observations)
        return (logits + torch.from_numpy(streams.gumbel(*logits.shape[1:])).to(logits.device)).argmax(-1)


class DiscreteSACAgent(SoftAgent):
    def __init__(self, run, part: DiscreteSAC, spec):
        module = part.actor(spec, part.seeds)
        wanted = part.entropy_share * float(torch.tensor(float(module.actions)).log())
        super().__init__(run, part, spec, module, 0, module.actions, wanted)
        self.descend_critics, self.descend_actor = descent(run, self.critics.net, self.critic_loss), descent(run, self.policy, self.actor_loss)

    def noise(self, steps, envs):
        gumbel = torch.from_numpy(self.exploring.gumbel(steps, envs, self.module.actions)).unbind(1)
        return list(zip(gumbel, self.exploring.integers(self.module.actions, steps, envs).swapaxes(0, 1)))

    def explore(self, observations, noise, env_steps):
        gumbel, random = noise
        if env_steps < self.part.warmup:
            return random
        logits = self.module.net(observations)
        return (logits + gumbel.to(logits.device)).argmax(-1).cpu().numpy()

    def critic_loss(self, batch, alpha: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critics' loss per seed [S], with their losses [S, members, B], outputs of the taken actions and target [S, B]."""
        with torch.no_grad():
            logps = self.module(batch["next_obs"])
            value = self.critics.target_values(batch["next_obs"]).amin(1)                              # [S, B, A]
            soft = (logps.exp() * (value - alpha.unsqueeze(-1) * logps)).sum(-1)
            target = batch["rewards"] + batch["discounts"] * soft
        outputs = self.critics.net(batch["obs"]).unflatten(-1, (self.module.actions, -1))              # [S * members, B, A, width]
        actions = batch["actions"].repeat_interleave(self.part.critics, 0)[..., None, None].expand(-1, -1, 1, outputs.shape[-1])
        chosen = outputs.gather(-2, actions).squeeze(-2)
        return self.weighted(batch, self.critics.losses(chosen, target), {"outputs": chosen, "target": target})

    def actor_loss(self, observations, alpha: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """mean sum_a pi (alpha log pi - min_k Q_k), per seed, and sum_a pi log pi [S, B]."""
        with torch.no_grad():
            value = self.critics.values(observations).amin(1)
        logps = self.module(observations)
        p = logps.exp()
        return (p * (alpha.unsqueeze(-1) * logps - value)).sum(-1).mean(-1), {"logp": (p * logps).sum(-1)}

    def update_critics(self, batch):
        return self.descend_critics(batch, self.alpha)[1]

    def update_actor(self, batch):
        loss, made = self.descend_actor(batch["obs"], self.alpha)
        self.policy.step()
        self.tune(made["logp"].mean(-1) + self.target_entropy)
        return made | {"actor": loss}


sac_discrete = method("sac-discrete", DiscreteSAC(
    warmup=1000, every=4, delay=1, replay=Uniform(capacity=100_000, batch=64), critic_optimiser=Adam(lr=3e-4, eps=1e-4, clip=None),
    actor_optimiser=Adam(lr=3e-4, eps=1e-4, clip=None), alpha_optimiser=Adam(lr=3e-4, eps=1e-4, clip=None), critic_weight=0.5),
    title="soft actor-critic for discrete actions", source="arXiv 1910.07207")
