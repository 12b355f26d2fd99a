"""The implicit-maximum family: V follows the best recorded actions, Q regresses r + gamma V(s'), the policy imitates by advantage.

IQL, XQL and f-DVL are this recipe with one `maximum` each. No action outside the data is ever asked for its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from volvelle.control.actorcritic import Critics
from volvelle.control.heads import PolicyHead
from volvelle.control.learner import Count, NonNegative, Positive
from volvelle.control.networks import MLP, Network, Output
from volvelle.control.spaces import Spec
from volvelle.control.speed import descent
from volvelle.control.stacked import make
from volvelle.control.valueheads import MSE, ValueHead
from volvelle.core.errors import UserError
from volvelle.core.schedule import Cosine
from volvelle.core.trainable import Adam, Optimiser

from .heads import AroundMean
from .learner import Offline
from .losses import advantage_weights
from .maxima import Expectile, Maximum
from .policies import HeadPolicy


@dataclass(frozen=True, eq=False)
class ImplicitQ(Offline):
    """maximum: how V follows Q over the recorded actions; temperature, cap: of the policy's weights min(exp(temperature A), cap).

    fresh: the advantage and Q's target use the V just moved (false: the V from before the update); decay: the policy's rate falls to 0 as a cosine.
    """

    network: Network = MLP(hidden=(256, 256), activation="relu", init="orthogonal")
    value_network: Network = MLP(hidden=(256, 256), activation="relu", init="orthogonal")
    maximum: Maximum = Expectile()
    value: ValueHead = MSE()
    critics: Count = 2
    head: PolicyHead = AroundMean()
    actor_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    critic_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    value_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    tau: Annotated[float, Field(gt=0, le=1)] = 0.005
    temperature: NonNegative = 3.0
    cap: Positive = 100.0
    fresh: bool = True
    decay: bool = True

    def check(self, recipe):
        super().check(recipe)
        if not self.value.scalar:
            raise UserError(f"value={self.value.part_name} learns a return distribution; implicit maxima are of numbers; accepted: mse, huber, hl-gauss, two-hot")

    def actor(self, spec, seeds):
        return HeadPolicy(self.network, self.head, spec, seeds)

    def agent(self, run, spec, data):
        return ImplicitAgent(run, self, spec)


def decaying(optimiser: Optimiser, steps: int) -> Optimiser:
    """The optimiser with its rate falling to 0 over so many steps as half a cosine; one with a schedule of its own stays as it is."""
    return optimiser.replace(lr=Cosine(start=optimiser.lr, end=0.0, period=max(1, steps))) if isinstance(optimiser.lr, float) else optimiser


def action_numbers(actions: Tensor, spec: Spec) -> Tensor:
    """Actions as a critic takes them: continuous as they are, discrete ones one-hot; [S, B, width]."""
    if spec.actions.kind == "continuous":
        return actions
    columns = actions.unsqueeze(-1) if spec.actions.plain else actions
    return torch.cat([F.one_hot(columns[..., i].long(), n).float() for i, n in enumerate(spec.actions.codes)], -1)


def action_width(spec: Spec) -> int:
    if spec.actions.kind == "mixed":
        raise UserError(f"actions of {spec.actions.describe()} are not supported; accepted: continuous or discrete ones")
    return spec.actions.continuous or sum(spec.actions.codes)


class ImplicitAgent:
    """The algorithm. Order of an update: V, policy, Q, target."""

    def __init__(self, run, part: ImplicitQ, spec: Spec):
        self.part, self.spec, seeds = part, spec, part.seeds
        self.module = part.actor(spec, seeds)
        self.policy = make(run, "actor", self.module, decaying(part.actor_optimiser, part.total(run)) if part.decay else part.actor_optimiser, seeds)
        self.critics = Critics(run, part.network, part.value, part.critic_optimiser, spec.observations, action_width(spec), 1, seeds, part.critics, part.tau)
        self.values = make(run, "values", Output(part.value_network.build(spec.observations, seeds), seeds, 1, part.value_network.init), part.value_optimiser, seeds)
        self.size = sum(p.numel() for m in (self.module, self.values.module) for p in m.parameters()) + self.critics.size
        self.descend_values, self.descend_actor = descent(run, self.values, self.value_loss), descent(run, self.policy, self.actor_loss)
        self.descend_critics = descent(run, self.critics.net, self.critic_loss)

    def v(self, observations) -> Tensor:
        """V(s), [S, B]."""
        return self.values.module(observations).squeeze(-1)

    @torch.no_grad()
    def target_q(self, observations, actions: Tensor) -> Tensor:
        """The smaller of the lagged critics, [S, B]."""
        return self.critics.target_values(observations, actions).amin(1)

    def value_loss(self, batch, actions: Tensor, q: Tensor) -> Tensor:
        """Mean of the implicit maximum's loss of Qbar - V, per seed."""
        return self.part.maximum.loss(q - self.v(batch["obs"])).mean(-1)

    def critic_loss(self, batch, actions: Tensor, following: Tensor) -> Tensor:
        """Sum over critics of the mean loss against r + discount V(s'), per seed."""
        target = batch["rewards"] + batch["discounts"] * following
        return self.critics.losses(self.critics.net(batch["obs"], actions), target).mean(-1).sum(-1)

    def actor_loss(self, batch, advantages: Tensor) -> Tensor:
        """-mean min(exp(temperature A), cap) log pi(a|s), per seed."""
        weights = advantage_weights(advantages, self.part.temperature, self.part.cap)
        return -(weights * self.module.log_prob(batch["obs"], batch["actions"])).mean(-1)

    @torch.no_grad()
    def both_values(self, batch) -> tuple[Tensor, Tensor]:
        """V(s), V(s')."""
        return self.v(batch["obs"]), self.v(batch["next_obs"])

    def update(self, batch: dict[str, Any]) -> dict[str, Any]:
        actions = action_numbers(batch["actions"], self.spec)
        q = self.target_q(batch["obs"], actions)
        before = None if self.part.fresh else self.both_values(batch)
        loss_v = self.descend_values(batch, actions, q)
        self.values.step()
        here, following = self.both_values(batch) if before is None else before
        loss_pi = self.descend_actor(batch, q - here)
        self.policy.step()
        loss_q = self.descend_critics(batch, actions, following)
        norm = self.critics.net.step()
        self.critics.target.update()
        return {"loss/value": loss_v, "loss/actor": loss_pi, "loss/critic": loss_q, "q": q, "v": here, "gradient_norm": norm}

    def report(self, made):
        return dict(made)
