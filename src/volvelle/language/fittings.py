"""The fittings of the loop: group filters, the KL to the reference, the critic, and how updates are made."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part
from volvelle.core.schedule import Schedule, at
from volvelle.core.trainable import AdamW, Optimiser

from .advantages import group_index, group_low, group_mean
from .batching import deal
from .objectives import Aggregation, aggregate
from .records import POLICY, Batch
from .slots import Critic, Filter

AtLeast0 = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]


# ------------------------------------------------------------------------------------------------------------------ filters

def homogeneous(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[N] bool: the row's group has one value throughout (groups of one row do not count as homogeneous)."""
    index, count = group_index(groups)
    return ((group_low(values, index, count) == -group_low(-values, index, count)) & (count > 1))[index]


@part("drop")
class Drop(Filter):
    """Drops whole groups. which: "homogeneous" (all rewards equal: DAPO's dynamic sampling), "correct" (all at `best` or above: NGRPO),
    "wrong" (none above `worst`). mute_overlong: rows that hit the length cap stay in the statistics without loss (DAPO)."""

    which: Literal["homogeneous", "correct", "wrong", "none"] = "homogeneous"
    best: float = 1.0
    worst: float = 0.0
    mute_overlong: bool = False
    refill: bool = True
    max_rounds: Annotated[int, Field(ge=0)] = 10

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(keep [N] bool, constant within groups; train [N] bool)."""
        rewards, groups = batch.rewards, batch.groups
        keep = torch.ones_like(rewards, dtype=torch.bool)
        if self.which == "homogeneous":
            keep = ~homogeneous(rewards, groups)
        elif self.which == "correct":
            keep = group_mean((rewards < self.best).float(), groups) > 0
        elif self.which == "wrong":
            keep = group_mean((rewards > self.worst).float(), groups) > 0
        return keep, batch.train & batch.finished if self.mute_overlong else batch.train


# ----------------------------------------------------------------------------------------------------------------------- KL

def kl_estimate(logps: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """KL to the reference at each sampled token. k1 = log p/q; k2 = (log p/q)^2 / 2; k3 = q/p - log q/p - 1; k3+ has k3's value and k2's
    gradient. log q/p is held within ±20 and k3 within ±10 (verl's convention). Source: joschu.net/blog/kl-approx.html."""
    if estimator == "k1":
        return logps - reference
    if estimator == "k2":
        return 0.5 * (logps - reference) ** 2
    back = (reference - logps).clamp(-20, 20)
    k3 = (back.exp() - back - 1).clamp(-10, 10)
    if estimator == "k3":
        return k3
    k2 = 0.5 * (logps - reference) ** 2
    return k2 - k2.detach() + k3.detach()


class Coefficient(Part):
    """A KL coefficient that follows the KL it is to hold."""

    slot = "coefficient"


@part("adaptive")
class Adaptive(Coefficient):
    """beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon after each step of n responses (arXiv 1909.08593)."""

    initial: AtLeast0 = 0.2
    target: Annotated[float, Field(gt=0)] = 6.0
    horizon: Annotated[float, Field(gt=0)] = 10000.0

    def start(self, run):
        return LiveAdaptive(self)


class LiveAdaptive:
    def __init__(self, description: Adaptive):
        self.part, self.value = description, description.initial

    def observe(self, kl: float, n: int) -> None:
        error = min(max(kl / self.part.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.part.horizon

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@part("kl")
class KL(Part):
    """The pull towards the reference policy: in the reward (subtracted token by token before advantages) or in the loss."""

    slot = "kl"
    estimator: Literal["k1", "k2", "k3", "k3+"] = "k3"
    place: Literal["reward", "loss"] = "loss"
    coefficient: AtLeast0 | Schedule | Coefficient = 0.001
    aggregation: Aggregation = "token_mean"
    needs = frozenset({"reference"})

    def check(self, recipe):
        if self.place == "loss" and self.estimator == "k1":
            raise UserError("kl.estimator=k1 with kl.place=loss has no effect: its gradient is zero on average; accepted in the loss: k2, k3, k3+")

    def start(self, run):
        return LiveKL(self, run)


class LiveKL:
    def __init__(self, description: KL, run):
        self.part = description
        self.adaptive = run.start("coefficient", description.coefficient) if isinstance(description.coefficient, Coefficient) else None

    def coefficient(self, step: int) -> float:
        return self.adaptive.value if self.adaptive else at(self.part.coefficient, step)

    def penalty(self, batch: Batch) -> torch.Tensor:
        """[N, T] to add to the token rewards."""
        kl = kl_estimate(batch.old.logps, batch.reference.logps, self.part.estimator)
        return -self.coefficient(batch.step) * torch.where(batch.acted((POLICY,)), kl, 0.0)

    def loss(self, scores, batch: Batch) -> torch.Tensor:
        return self.coefficient(batch.step) * kl_estimate(scores.logps, batch.reference.logps, self.part.estimator)

    def update(self, batch: Batch) -> None:
        if self.adaptive:
            mask = batch.acted((POLICY,))
            kl = torch.where(mask, batch.old.logps - batch.reference.logps, 0.0)
            self.adaptive.observe(float(kl.sum(1).mean()), len(batch))


# ------------------------------------------------------------------------------------------------------------------- critic

def value_loss(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float | None) -> torch.Tensor:
    """[N, T]: half the squared error, the larger of unclipped and clipped (values held within ±clip of the old ones)."""
    loss = (values - returns) ** 2
    if clip is not None:
        loss = torch.maximum(loss, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    return 0.5 * loss


@part("value")
class ValueCritic(Critic):
    """A value of every token's state, from a copy of the policy's body with a scalar head (starting at zero)."""

    optimiser: Optimiser = AdamW(lr=1e-5)
    clip: Annotated[float, Field(gt=0)] | None = 0.2
    micro_tokens: Count = 8192

    def start(self, run):
        return LiveValueCritic(self, run)


class LiveValueCritic:
    def __init__(self, description: ValueCritic, run):
        self.part = description
        self.model, self.processes = run.model("model", run.policy.value_module(), description.optimiser), run.processes

    @torch.no_grad()
    def values(self, batch: Batch) -> torch.Tensor:
        """[N, T] value of the state before each token; 0 on padding."""
        out = torch.zeros(batch.ids.shape, device=batch.ids.device)
        for rows in deal(batch, self.part.micro_tokens, False, self.processes):
            micro = batch.select(rows)
            out[rows[:, None], torch.arange(micro.ids.shape[1], device=out.device)] = self.model(micro, micro.mask)
        return self.processes.total(out)

    def fit(self, batch: Batch) -> dict[str, float]:
        mask = batch.acted((POLICY,)) & batch.train[:, None]
        weights = aggregate(mask, "token_mean")
        total = 0.0
        for rows in deal(batch, self.part.micro_tokens, False, self.processes):
            micro = batch.select(rows)
            keep = micro.acted((POLICY,))
            loss = value_loss(self.model(micro, keep), micro.values, micro.returns, self.part.clip)
            loss = (weights[rows][:, : keep.shape[1]] * loss).sum()
            self.model.backward(loss)
            total += float(loss.detach())
        self.processes.sum_gradients(self.model.parameters)
        return self.processes.merge({"critic/loss": total}) | {"critic/grad_norm": self.model.step()}


# ------------------------------------------------------------------------------------------------------------------ updates

@part("updates")
class Updates(Part):
    """How a batch is turned into optimiser steps.

    epochs: passes over the batch; minibatch: prompts per optimiser step (none: the whole batch); micro_tokens: tokens laid out in one
    forward pass (memory, not mathematics); normalise="minibatch": whiten advantages within each mini-batch, as Stable-Baselines3 does.
    """

    slot = "updates"
    optimiser: Optimiser = AdamW(lr=1e-6)
    epochs: Count = 1
    minibatch: Count | None = None
    micro_tokens: Count = 8192
    normalise: Literal["none", "minibatch"] = "none"
