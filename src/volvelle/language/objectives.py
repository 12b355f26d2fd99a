"""Losses as pure functions of tensors, how a loss matrix becomes one number, and the objective parts of the base recipes.

logps, old [N, T] log-probs of the sampled tokens now and at the start of the update; advantages [N] or [N, T]; losses are to be minimised.
Sources: PPO 1707.06347, DAPO 2503.14476, GSPO 2507.18071, CISPO 2506.13585, RLOO 2402.14740.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from volvelle.core.parts import part
from volvelle.core.schedule import Schedule, at

from .records import FORCED, POLICY, Batch, Scores
from .slots import Objective

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant", "padded"]
Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]


def aggregate(mask: torch.Tensor, how: str, length: int | None = None, total_rows: int | None = None) -> torch.Tensor:
    """Weights [N, T] whose product with the loss matrix sums to the aggregated loss. mask [N, T]: tokens with loss (muted rows: none).

    token_mean: sum / tokens; sequence_mean: mean over responses of token means; sequence_sum: mean over responses of token sums;
    constant: sum / (N length); padded: sum / length (verl's constant norm); length None = T. The loop passes the sampler's length cap, so
    that the divisor does not move with the longest response of a batch. Responses without a loss token still count in N.
    """
    weights = mask.float()
    rows = total_rows or len(mask)
    if how == "token_mean":
        return weights / weights.sum().clamp(min=1)
    if how == "sequence_mean":
        return weights / weights.sum(1, keepdim=True).clamp(min=1) / rows
    if how == "sequence_sum":
        return weights / rows
    if how == "constant":
        return weights / (rows * (length or mask.shape[1]))
    if how == "padded":
        return weights / (length or mask.shape[1])
    raise ValueError(how)


def log_ratio(logps: torch.Tensor, old: torch.Tensor, bound: float = 20.0) -> torch.Tensor:
    """[N, T]: logps - old, held within ±bound so that exp stays finite (verl's convention)."""
    return (logps - old).clamp(-bound, bound)


def per_token(advantages: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Advantages as [N, T]."""
    return advantages[:, None].expand_as(like) if advantages.ndim == 1 else advantages


def clipped(ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float, dual: float | None = None) -> torch.Tensor:
    """max(-A w, -A clip(w, 1-low, 1+high)); with `dual` c, at most -A c where A < 0 (dual clip)."""
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)
    return loss


def sequence_log_ratio(logps: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[N]: mean over the response's tokens of logps - old (GSPO's length-normalised ratio, as a logarithm)."""
    return torch.where(mask, logps - old, 0.0).sum(1) / mask.sum(1).clamp(min=1)


@part("clipped")
class Clipped(Objective):
    """The clipped surrogate of PPO and GRPO. clip_low / clip_high bound the ratio; dual_clip c (off: none) caps the loss of a very likely
    bad token; length fixes the divisor of the aggregations "constant" and "padded" (none: the
    sampler's length cap)."""

    clip_low: AtLeast0 = 0.2
    clip_high: AtLeast0 = 0.2
    dual_clip: Positive | None = None
    aggregation: Aggregation = "token_mean"
    length: Annotated[int, Field(gt=0)] | None = None
    needs = frozenset({"old", "advantages"})

    def __call__(self, scores: Scores, batch: Batch):
        ratio = log_ratio(scores.logps, batch.old.logps).exp()
        return clipped(ratio, per_token(batch.advantages, ratio), self.clip_low, self.clip_high, self.dual_clip)


@part("policy-gradient")
class PolicyGradient(Objective):
    """REINFORCE: -A log p. No ratio: only right while the batch comes from the present policy (one update per batch)."""

    aggregation: Aggregation = "token_mean"
    length: Annotated[int, Field(gt=0)] | None = None
    needs = frozenset({"advantages"})

    def __call__(self, scores, batch):
        return -per_token(batch.advantages, scores.logps) * scores.logps


@part("gspo")
class GSPO(Objective):
    """GSPO (arXiv 2507.18071): one length-normalised ratio per response, clipped; every token carries A s_i as its gradient."""

    clip_low: AtLeast0 = 3e-4
    clip_high: AtLeast0 = 4e-4
    aggregation: Aggregation = "sequence_mean"
    length: Annotated[int, Field(gt=0)] | None = None
    needs = frozenset({"old", "advantages"})

    def __call__(self, scores, batch):
        mean = sequence_log_ratio(scores.logps, batch.old.logps, batch.acted((POLICY,)))
        token = scores.logps - scores.logps.detach() + mean.detach()[:, None].clamp(max=10.0)
        return clipped(token.exp(), per_token(batch.advantages, token), self.clip_low, self.clip_high)


@part("cispo")
class CISPO(Objective):
    """CISPO (arXiv 2506.13585): REINFORCE weighted by the clipped ratio without gradient; no token is ever dropped. clip_low none: no lower clip."""

    clip_low: AtLeast0 | None = None
    clip_high: AtLeast0 = 4.0
    aggregation: Aggregation = "token_mean"
    length: Annotated[int, Field(gt=0)] | None = None
    needs = frozenset({"old", "advantages"})

    def __call__(self, scores, batch):
        ratio = log_ratio(scores.logps, batch.old.logps).exp().detach()
        weight = ratio.clamp(min=None if self.clip_low is None else 1 - self.clip_low, max=1 + self.clip_high)
        return -weight * per_token(batch.advantages, ratio) * scores.logps


@part("rloo")
class SequenceClipped(Objective):
    """RLOO's surrogate as TRL implements it: the ratio of whole responses (sum of log-ratios), clipped; mean over responses, no length norm."""

    clip_low: AtLeast0 = 0.2
    clip_high: AtLeast0 = 0.2
    needs = frozenset({"old", "advantages"})

    def __call__(self, scores, batch):
        mask = batch.acted((POLICY,))
        ratio = torch.where(mask, log_ratio(scores.logps, batch.old.logps), 0.0).sum(1).clamp(-20, 20).exp()
        credit = batch.advantages if batch.advantages.ndim == 1 else torch.where(mask, batch.advantages, 0.0).sum(1) / mask.sum(1).clamp(min=1)
        return clipped(ratio, credit, self.clip_low, self.clip_high)


@part("nll")
class NLL(Objective):
    """Negative log-likelihood of the response's tokens: supervised training on logged text, or an auxiliary term on what was sampled."""

    coefficient: AtLeast0 | Schedule = 1.0
    on: Literal["forced", "policy", "both"] = "forced"
    aggregation: Aggregation = "token_mean"
    length: Annotated[int, Field(gt=0)] | None = None

    @property
    def acts_on(self):
        return {"forced": (FORCED,), "policy": (POLICY,), "both": (FORCED, POLICY)}[self.on]

    def __call__(self, scores, batch):
        return -at(self.coefficient, batch.step) * scores.logps


@part("entropy")
class Entropy(Objective):
    """Entropy bonus: minus coefficient times the entropy at each acted token. A negative coefficient lowers entropy."""

    coefficient: float | Schedule = 0.001
    aggregation: Aggregation = "token_mean"
    length: Annotated[int, Field(gt=0)] | None = None
    needs = frozenset({"entropy"})

    def __call__(self, scores, batch):
        return -at(self.coefficient, batch.step) * scores.entropy
