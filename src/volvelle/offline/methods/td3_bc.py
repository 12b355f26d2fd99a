"""TD3+BC: TD3 with a pull towards the recorded action.

Problem: offline actor-critics exploit their critic's errors outside the data; most cures are elaborate.
Idea: add the squared distance to the recorded action to TD3's policy loss, and divide Q by its mean size so that one weight (2.5) serves all
tasks. Observations are normalised over the dataset.
Pick it for continuous actions and data of decent quality: it is the simplest offline method with a policy gradient. On mixed data iql weighs
better what to imitate.
Source: arXiv 2106.06860.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from volvelle.control.learner import Count, NonNegative, Positive
from volvelle.control.methods.td3 import Actor, TD3Agent
from volvelle.control.networks import MLP, Network
from volvelle.control.valueheads import MSE, ValueHead
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, Optimiser

from ..learner import Offline
from ..losses import scaled_policy_gradient


@part("td3-bc")
class TD3BC(Offline):
    """weight: of the policy gradient against the pull to the recorded action; the other fields are td3's."""

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
    weight: Positive = 2.5
    normalise_observations: bool = True

    def check(self, recipe):
        super().check(recipe)
        if not self.value.scalar:
            raise UserError(f"value={self.value.part_name} learns a return distribution, but td3-bc takes minima of numbers; accepted: mse, huber, hl-gauss, two-hot")

    def actor(self, spec, seeds):
        return Actor(self, spec, seeds)

    def agent(self, run, spec, data):
        return TD3BCAgent(run, self, spec)


class TD3BCAgent(TD3Agent):
    """TD3's update with this policy loss."""

    def actor_loss(self, batch) -> Tensor:
        """-weight mean Q_1(s, pi(s)) / mean |Q_1(s, pi(s))| + mean (pi(s) - a)^2 (over batch and dimensions, in units of half the range), per seed."""
        actions = self.module(batch["obs"])
        q = self.critics.leading(batch["obs"], actions)
        pull = ((actions - batch["actions"]) / self.module.scale).square().mean((-1, -2))
        return self.part.weight * scaled_policy_gradient(q) + pull


td3_bc = method("td3-bc", TD3BC(), title="TD3 with behaviour cloning", source="arXiv 2106.06860")
