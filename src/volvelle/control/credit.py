"""On-policy credit: what a rollout's rewards say about its actions, and the plain policy-gradient objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.parts import Part, part

from .targets import bootstrap_cuts, discounted_returns, gae


@dataclass
class Rollout:
    """What was collected, [S, T, N]: rewards, values of the observations, whether an episode ended, was cut (not terminated) there, the value of
    the final observation of cut episodes, whether a step counts. last_values [S, N]: of what follows the last step.
    """

    rewards: Tensor
    values: Tensor
    ended: Tensor
    cut: Tensor
    final_values: Tensor
    last_values: Tensor
    valid: Tensor


class Advantage(Part):
    """Slot: the live object maps (rollout, gamma) to advantages and value targets, both [S, T, N]. `critic`: whether it needs values."""

    slot: ClassVar[str] = "advantage"
    call: ClassVar[tuple[str, ...]] = ("rollout", "gamma")
    critic: ClassVar[bool] = True

    @classmethod
    def from_function(cls, function, call):
        return function

    def __call__(self, rollout: Rollout, gamma: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@part("gae")
class GAE(Advantage):
    """Generalised advantage estimation (arXiv 1506.02438); value targets are advantage + value. lam=1: return minus value."""

    lam: Annotated[float, Field(ge=0, le=1)] = 0.95

    def __call__(self, rollout, gamma):
        rewards = bootstrap_cuts(rollout.rewards, rollout.cut, rollout.final_values, gamma)
        advantages = gae(rewards, rollout.values, rollout.last_values, rollout.ended, gamma, self.lam)
        return advantages, advantages + rollout.values


@part("monte-carlo")
class MonteCarlo(Advantage):
    """Discounted reward-to-go of whole episodes, minus a baseline.

    baseline: none; mean (over all steps of the batch); value (the critic). A cut episode counts what it got, without a bootstrap.
    """

    baseline: Literal["none", "mean", "value"] = "mean"
    critic: ClassVar[bool] = False

    def __call__(self, rollout, gamma):
        returns = discounted_returns(rollout.rewards, rollout.ended, gamma)
        if self.baseline == "none":
            return returns, returns
        if self.baseline == "value":
            return returns - rollout.values, returns
        valid = rollout.valid.to(returns.dtype)
        mean = (returns * valid).sum((1, 2), keepdim=True) / valid.sum((1, 2), keepdim=True)
        return returns - mean, returns


class Objective(Part):
    """Slot: the policy loss per item [S, B] from log-probabilities and a batch with `old` log-probabilities and `advantages`."""

    slot: ClassVar[str] = "objective"
    call: ClassVar[tuple[str, ...]] = ("logp", "batch")

    @classmethod
    def from_function(cls, function, call):
        return function

    def __call__(self, logp: Tensor, batch: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError


@part("policy-gradient")
class PolicyGradient(Objective):
    """-A log pi: the score-function gradient."""

    def __call__(self, logp, batch):
        return -batch["advantages"] * logp


def explained_variance(values: Tensor, targets: Tensor) -> Tensor:
    """1 - var(target - value) / var(target) over everything; NaN where the targets do not vary."""
    spread = targets.var()
    return torch.where(spread > 0, 1 - (targets - values).var() / spread, torch.nan)
