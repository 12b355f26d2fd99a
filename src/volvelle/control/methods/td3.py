"""TD3: deterministic actor-critic with three cures for overestimation.

Problem: deterministic policy gradients exploit errors of their critic; values are overestimated and learning collapses.
Idea: (1) the target takes the smaller of two critics; (2) the target action gets clipped noise, so that values are smooth around it; (3) the
policy and the targets move only every 2nd critic step. Exploration is Gaussian noise on the action.
Pick it for continuous actions when a deterministic policy is wanted; sac explores better by itself. Not for discrete actions.
Source: arXiv 1802.09477.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, Optimiser

from ..actorcritic import Critics, uniform_actions
from ..buffers import Uniform
from ..learner import Count, NonNegative
from ..losses import mean_over_rows
from ..networks import MLP, Network, Output
from ..offpolicy import OffPolicy
from ..policy import Deciding
from ..speed import descent
from ..stacked import Streams, make
from ..valueheads import MSE, ValueHead


@part("td3")
class TD3(OffPolicy):
    """Noise is in units of half the action range: exploration, target_noise (clipped at noise_clip). delay: critic steps per policy step."""

    network: Network = MLP(hidden=(256, 256), activation="relu")
    value: ValueHead = MSE()
    critics: Count = 2
    actor_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    critic_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    tau: Annotated[float, Field(gt=0, le=1)] = 0.005
    delay: Count = 2
    exploration: NonNegative = 0.1
    target_noise: NonNegative = 0.2
    noise_clip: NonNegative = 0.5

    def check(self, recipe):
        super().check(recipe)
        if not self.value.scalar:
            raise UserError(f"value={self.value.part_name} learns a return distribution, but td3 takes minima of numbers; accepted: mse, huber, hl-gauss, two-hot")

    def actor(self, spec, seeds):
        return Actor(self, spec, seeds)

    def agent(self, run, spec):
        return TD3Agent(run, self, spec)


class Actor(Deciding):
    """a = tanh(network) * scale + bias."""

    def __init__(self, recipe: TD3, spec, seeds: int):
        super().__init__()
        actions = spec.actions
        if actions.kind != "continuous" or not actions.bounded:
            raise UserError(f"td3 needs continuous actions with finite bounds; this task has {actions.describe()}")
        self.net = Output(recipe.network.build(spec.observations, seeds), seeds, actions.continuous, recipe.network.init)
        low, high = torch.tensor(actions.low), torch.tensor(actions.high)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.register_buffer("scale", (high - low) / 2, persistent=False)
        self.register_buffer("bias", (high + low) / 2, persistent=False)
        self.exploration = recipe.exploration

    def forward(self, x) -> Tensor:
        return torch.addcmul(self.bias, self.net(x).tanh(), self.scale)

    def best(self, observations):
        return self(observations)

    def noisy(self, actions: Tensor, normal: Tensor) -> Tensor:
        return torch.addcmul(actions, normal, self.scale * self.exploration).clamp(self.low, self.high)

    def explore(self, observations, streams):
        actions = self(observations)
        return self.noisy(actions, torch.from_numpy(streams.normal(*actions.shape[1:])).to(actions.device))


class TD3Agent:
    """The algorithm."""

    def __init__(self, run, part: TD3, spec):
        seeds, size = part.seeds, spec.actions.continuous
        self.part, self.module, self.width = part, part.actor(spec, seeds), size
        self.policy = make(run, "actor", self.module, part.actor_optimiser, seeds)
        self.policy_target = run.lagged(self.policy, name="actor-target")
        self.critics = Critics(run, part.network, part.value, part.critic_optimiser, spec.observations, size, 1, seeds, part.critics, None)
        self.critics.leader  # made here, outside anything compiled
        self.exploring, self.sampling = Streams(run, "exploring", seeds), Streams(run, "sampling", seeds)
        self.size = sum(p.numel() for p in self.module.parameters()) + self.critics.size
        self.descend_critics, self.descend_actor = descent(run, self.critics.net, self.critic_loss), descent(run, self.policy, self.actor_loss)

    def noise(self, steps, envs):
        return list(zip(torch.from_numpy(self.exploring.normal(steps, envs, self.width)).unbind(1),
                        torch.from_numpy(self.exploring.uniform(steps, envs, self.width)).unbind(1)))

    def explore(self, observations, noise, env_steps):
        actor = self.module
        normal, chance = (x.to(actor.low.device) for x in noise)
        if env_steps < self.part.warmup:
            return uniform_actions(actor.low, actor.high, chance).cpu().numpy()
        return actor.noisy(actor(observations), normal).cpu().numpy()

    def critic_loss(self, batch, normal: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critics' loss per seed [S], with their losses [S, members, B], their outputs and the target [S, B]:

        r + discount * min_k Qbar_k(s', clip(pi_bar(s') + clipped noise)).
        """
        part, actor, critics = self.part, self.policy_target.module, self.critics
        with torch.no_grad():
            noise = (normal * part.target_noise).clamp(-part.noise_clip, part.noise_clip)
            smoothed = torch.addcmul(actor(batch["next_obs"]), noise, actor.scale).clamp(actor.low, actor.high)
            target = batch["rewards"] + batch["discounts"] * critics.target_values(batch["next_obs"], smoothed).amin(1)
        outputs = critics.net.module(batch["obs"], batch["actions"])
        losses = critics.losses(outputs, target)
        return mean_over_rows(losses, batch.get("weights")).sum(-1), {"losses": losses, "outputs": outputs, "target": target}

    def actor_loss(self, batch) -> Tensor:
        """-mean Q_1(s, pi(s)), per seed."""
        return -self.critics.leading(batch["obs"], self.module(batch["obs"])).mean(-1)

    def update(self, batch):
        part, critics = self.part, self.critics
        normal = torch.from_numpy(self.sampling.normal(batch["rewards"].shape[1], self.width)).to(batch["rewards"].device)
        made = self.descend_critics(batch, normal)[1]
        made["norm"] = critics.net.step()
        if critics.net.steps % part.delay == 0:
            made["actor"] = self.descend_actor(batch)
            self.policy.step()
            self.policy_target.refresh(part.tau)
            critics.target.refresh(part.tau)
        return made

    def report(self, made):
        shown = {"loss/critic": made["losses"], "q": self.critics.read(made["outputs"]), "gradient_norm": made["norm"]}
        return shown | ({"loss/actor": made["actor"]} if "actor" in made else {})

    def errors(self, made):
        return (self.critics.read(made["outputs"]) - made["target"].unsqueeze(1)).abs().mean(1)


td3 = method("td3", TD3(warmup=25_000, replay=Uniform(capacity=1_000_000, batch=256)), title="twin delayed deterministic policy gradient", source="arXiv 1802.09477")
