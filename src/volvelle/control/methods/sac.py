"""Soft actor-critic: off-policy control with a bonus for entropy.

Problem: off-policy learning of continuous control is data-efficient but brittle.
Idea: maximise return plus alpha times the policy's entropy. Two critics learn the soft value; their minimum is the target and guides a tanh-
Gaussian policy through the reparameterised action; alpha is tuned so that the entropy stays near -|A|.
Pick it for continuous actions when environment steps are expensive; td3 is its deterministic sibling; sac-discrete is for discrete actions.
Source: arXiv 1812.05905. Defaults are those of single-file implementations (critic lr 1e-3, the policy moves twice
every 2nd step, log std through tanh into [-5, 2]); delay=1, critic.lr=3e-4, alpha_fresh=false, alpha_loss=log, critic_weight=0.5,
head.low=-20 and head.smooth=false give the other common set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, Optimiser

from ..actorcritic import Critics, uniform_actions
from ..buffers import Uniform
from ..losses import mean_over_rows
from ..speed import descent
from ..heads import PolicyHead, Squashed
from ..learner import Count, Positive
from ..networks import MLP, Network, Output
from ..offpolicy import OffPolicy
from ..policy import Deciding
from ..stacked import Streams, make
from ..targets import soft_target
from ..valueheads import MSE, ValueHead


@dataclass(frozen=True, eq=False)
class Soft(OffPolicy):
    """alpha: number, or none to tune it towards target_entropy; alpha_start: its first value; alpha_loss: gradient through "exp" (alpha) or "log".

    delay: the policy moves every so many updates, then as many times; critic_weight: factor of the sum of the critics' losses.
    """

    network: Network = MLP(hidden=(256, 256), activation="relu")
    value: ValueHead = MSE()
    critics: Count = 2
    actor_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    critic_optimiser: Optimiser = Adam(lr=1e-3, clip=None)
    alpha_optimiser: Optimiser = Adam(lr=1e-3, clip=None)
    alpha: Positive | None = None
    alpha_start: Positive = 1.0
    alpha_loss: Literal["exp", "log"] = "exp"
    alpha_fresh: bool = True
    tau: Annotated[float, Field(gt=0, le=1)] = 0.005
    delay: Count = 2
    critic_weight: Positive = 1.0

    def check(self, recipe):
        super().check(recipe)
        if not self.value.scalar:
            raise UserError(f"value={self.value.part_name} learns a return distribution, but soft values are numbers; accepted: mse, huber, hl-gauss, two-hot")


@part("soft-actor-critic")
class SAC(Soft):
    """target_entropy: none means minus the number of action dimensions; uniform random actions during the warm-up."""

    head: PolicyHead = Squashed()
    target_entropy: float | None = None

    def actor(self, spec, seeds):
        return Actor(self, spec, seeds)

    def agent(self, run, spec):
        return SACAgent(run, self, spec)


class Temperature(torch.nn.Module):
    """log alpha, one per seed [S, 1]."""

    def __init__(self, seeds: int, start: float):
        super().__init__()
        self.log = torch.nn.Parameter(torch.full((seeds, 1), start).log())


class Actor(Deciding):
    def __init__(self, recipe: SAC, spec, seeds: int):
        super().__init__()
        self.head = recipe.head.bind(spec.actions)
        self.net = Output(recipe.network.build(spec.observations, seeds), seeds, self.head.width, recipe.network.init)

    def forward(self, x) -> Tensor:
        return self.net(x)

    def best(self, observations):
        return self.head.mode(self.net(observations))

    def explore(self, observations, streams):
        outputs = self.net(observations)
        return self.head.sample(outputs, streams.noise(self.head, outputs.shape[1]).to(outputs.device))


class SoftAgent:
    """Shared by both forms: the temperature, and the order of an update."""

    def __init__(self, run, part: Soft, spec, module: Deciding, extra: int, outputs: int, target_entropy: float):
        seeds = part.seeds
        self.part, self.module, self.target_entropy, self.count = part, module, target_entropy, 0
        self.policy = make(run, "actor", module, part.actor_optimiser, seeds)
        self.critics = Critics(run, part.network, part.value, part.critic_optimiser, spec.observations, extra, outputs, seeds, part.critics, part.tau)
        self.temperature = make(run, "temperature", Temperature(seeds, part.alpha or part.alpha_start), None if part.alpha else part.alpha_optimiser, seeds)
        self.exploring, self.sampling = Streams(run, "exploring", seeds), Streams(run, "sampling", seeds)
        self.size = sum(p.numel() for p in module.parameters()) + self.critics.size

    @property
    def alpha(self) -> Tensor:
        return self.temperature.module.log.detach().exp()                                             # [S, 1]

    def tune(self, excess: Tensor) -> None:
        """One step of the temperature; excess [S]: mean of log pi + target entropy, without gradient."""
        if self.part.alpha is None:
            log = self.temperature.module.log.squeeze(-1)
            self.temperature.backward(-(log.exp() if self.part.alpha_loss == "exp" else log) * excess)
            self.temperature.step()

    def update(self, batch):
        made = self.update_critics(batch) | {"norm": self.critics.net.step()}
        if self.critics.net.steps % self.part.delay == 0:
            for _ in range(self.part.delay):
                made |= self.update_actor(batch)
        self.critics.target.update()
        return made

    def weighted(self, batch, losses: Tensor, made: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The critics' losses [S, members, B] as what is descended, per seed, with replay's weights; and all that was made on the way."""
        return self.part.critic_weight * mean_over_rows(losses, batch.get("weights")).sum(-1), made | {"losses": losses}

    def report(self, made):
        shown = {"loss/critic": made["losses"], "q": self.critics.values_of(made["outputs"]), "gradient_norm": made["norm"], "alpha": self.alpha}
        return shown | ({"loss/actor": made["actor"], "entropy": -made["logp"]} if "actor" in made else {})

    def errors(self, made):
        return (self.critics.values_of(made["outputs"]) - made["target"].unsqueeze(1)).abs().mean(1)


class SACAgent(SoftAgent):
    """The algorithm for continuous actions."""

    def __init__(self, run, part: SAC, spec):
        module = part.actor(spec, part.seeds)
        wanted = -float(spec.actions.continuous) if part.target_entropy is None else part.target_entropy
        super().__init__(run, part, spec, module, spec.actions.continuous, 1, wanted)
        self.head = module.head.to(run.device)
        self.low, self.high = self.head.bias - self.head.scale, self.head.bias + self.head.scale
        self.descend_critics = descent(run, self.critics.net, lambda batch, noise, alpha: self.weighted(batch, *self.critic_loss(batch, noise, alpha)))
        self.descend_actor = descent(run, self.policy, self.actor_loss, through=True)

    def noise(self, steps, envs):
        head = self.head
        return list(zip(self.exploring.noise(head, steps, envs).unbind(1), torch.from_numpy(self.exploring.uniform(steps, envs, head.size)).unbind(1)))

    def explore(self, observations, noise, env_steps):
        normal, chance = (x.to(self.low.device) for x in noise)
        if env_steps < self.part.warmup:
            return uniform_actions(self.low, self.high, chance).cpu().numpy()
        return self.head.sample(self.module(observations), normal).cpu().numpy()

    def fresh(self, batch) -> Tensor:
        """Noise for one draw of actions for the whole batch: all that the critics' and the actor's loss need to be a function."""
        return self.sampling.noise(self.head, batch["rewards"].shape[1]).to(self.low.device)

    critic_noise = actor_noise = fresh

    def critic_loss(self, batch, noise: Tensor, alpha: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [S, members, B], and the critics' outputs and the target [S, B]."""
        with torch.no_grad():
            actions, logp = self.head.draw(self.module(batch["next_obs"]), noise)
            value = self.critics.target_values(batch["next_obs"], actions).amin(1)
            target = soft_target(batch["rewards"], batch["discounts"], value, logp, alpha)
        outputs = self.critics.net.module(batch["obs"], batch["actions"])
        return self.critics.losses(outputs, target), {"outputs": outputs, "target": target}

    def actor_loss(self, observations, noise: Tensor, alpha: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """mean(alpha log pi - min_k Q_k), per seed, and log pi [S, B]."""
        actions, logp = self.head.draw(self.module(observations), noise)
        value = self.critics.values(observations, actions).amin(1)
        return (alpha * logp - value).mean(-1), {"logp": logp}

    def update_critics(self, batch):
        return self.descend_critics(batch, self.critic_noise(batch), self.alpha)[1]

    def update_actor(self, batch):
        loss, made = self.descend_actor(batch["obs"], self.actor_noise(batch), self.alpha)
        self.policy.step()
        logp = made["logp"]
        if self.part.alpha is None:
            if self.part.alpha_fresh:
                with torch.no_grad():
                    logp = self.head.draw(self.module(batch["obs"]), self.fresh(batch))[1]
            self.tune(logp.mean(-1) + self.target_entropy)
        return made | {"actor": loss, "logp": logp}


sac = method("sac", SAC(warmup=5000, replay=Uniform(capacity=1_000_000, batch=256)), title="soft actor-critic", source="arXiv 1812.05905")
