"""CANON: conditional advantage estimation (arXiv 2509.23962).

Problem. Entropy or length of a response go together with being right, but whether more or less of them is better depends on the model, the task
and the phase of training. A penalty assumes the direction; where it is the wrong one, it costs accuracy.
Idea. Order the responses of a group by such a metric, cut the group into a low and a high half, and change only the baseline:
    inter   R_i - mean of the OTHER half     which direction of the metric pays?
    intra   R_i - mean of the OWN half       which response is better at the same level of the metric?
    A_i = mu inter + (1 - mu) intra          mu = 0.5 is the plain group mean (Dr. GRPO), mu = 1 CANON-Inter, mu = 0 CANON-Intra
No direction is assumed: with equal halves, negating the metric changes nothing. Multiplying the reward of one half by alpha < 1 wherever it
appears in the inter part (CANON-Eff, with length) is the one option that takes sides.
Pick inter on entropy for accuracy in the domain, intra for exploration and out-of-domain problems, length with alpha < 1 for fewer tokens. Not
for small groups (the paper's have 16), and for odd ones only knowingly: the low half is then the smaller.

No division by a deviation; the loss is a sum over tokens divided by responses and a fixed length, the clip 0.2 / 0.28 with a dual clip of 3.
The released code divides advantages by 8192 and averages token sums over responses, which is the same; `objective.length` (none: the
sampler's cap) is that number. It discounts opposite halves for the two metrics, the long one and the low-entropy one: `discount` says which.
The metric is taken at sampling time, from the distribution that the tokens were drawn from.

Measured here (docs/methods/canon.md): both directions and the dial alpha show on a small task; a gain in accuracy does not.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field

from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import Part, method, part, preset
from volvelle.core.schedule import Schedule, at
from volvelle.core.trainable import Adam

from ..advantages import Fraction, group_index, outcome
from ..fittings import Updates
from ..models import Tiny
from ..objectives import Clipped
from ..recipe import Evaluation, LanguageRecipe
from ..records import POLICY, Batch
from ..samplers import Plain
from ..slots import Advantage
from ..tasks.text import Pause
from .dr_grpo import dr_grpo

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


# ------------------------------------------------------------------------------------------------------------ pure functions

def upper_half(metric: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[N] bool: the row is in its group's high half. metric, groups [N]; ties keep their order, the low half has floor(size / 2) rows."""
    index, count = group_index(groups)
    order = metric.argsort(stable=True)
    order = order[index[order].argsort(stable=True)]
    first = count.cumsum(0) - count
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[index[order]]
    return rank >= count[index] // 2


def half_means(values: torch.Tensor, groups: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([N] mean over the low half of the row's group, [N] mean over its high half); 0 for an empty half."""
    index, count = group_index(groups)

    def mean(rows):
        total = torch.zeros(len(count), dtype=values.dtype, device=values.device).index_add(0, index[rows], values[rows])
        return (total / torch.bincount(index[rows], minlength=len(count)).clamp(min=1))[index]

    return mean(~high), mean(high)


def conditional(rewards: torch.Tensor, groups: torch.Tensor, metric: torch.Tensor, mu: float, alpha: float = 1.0, discount: str = "high",
                beta: float = 0.0) -> torch.Tensor:
    """[N]: mu inter + (1 - mu) intra, without any division. rewards, groups, metric [N]; no gradient passes through the metric.

    In the inter part the rewards of the half named by `discount` are multiplied by alpha, on either side of the difference, and beta is
    added in the high half and taken off in the low one. A group of one response keeps its reward, as in the released code.
    """
    high = upper_half(metric, groups)
    mean_low, mean_high = half_means(rewards, groups, high)
    scale_low, scale_high = (alpha, 1.0) if discount == "low" else (1.0, alpha)
    inter = torch.where(high, scale_high * rewards - scale_low * mean_low + beta, scale_low * rewards - scale_high * mean_high - beta)
    found = mu * inter + (1 - mu) * (rewards - torch.where(high, mean_high, mean_low))
    index, count = group_index(groups)
    return torch.where(count[index] == 1, rewards, found)


# ------------------------------------------------------------------------------------------------------------- mixing schedules

class Mixing(Part):
    """A weight in [0, 1] that depends on the batch: `of(batch) -> float`."""

    slot = "mixing"


@part("accuracy")
class Accuracy(Mixing):
    """The weight of the inter part from the batch's mean reward: first="inter" 1 - mean (turns to intra as rewards rise), "intra" the mean."""

    first: Literal["inter", "intra"] = "inter"

    def of(self, batch: Batch) -> float:
        """RunStopped where the mean reward is not a share, in [0, 1]."""
        mean = float(batch.rewards.mean())
        if not 0 <= mean <= 1:
            raise RunStopped(f"advantage.mu=accuracy: the batch's mean reward is {mean:.3g}; expected one in [0, 1]")
        return 1 - mean if self.first == "inter" else mean


@part("warm-cosine")
class WarmCosine(Schedule):
    """A linear rise to `peak` over `warmup` steps, then `cycles` half cosines from peak to `floor` until step `total`, restarting at the peak.

    first="inter": that value (the paper: peak 1, floor 0.4); first="intra": 1 - that value (the paper: peak 0.6, floor 0).
    """

    peak: Fraction = 1.0
    floor: Fraction = 0.4
    warmup: Annotated[int, Field(ge=0)] = 30
    total: Count = 150
    cycles: Count = 3
    first: Literal["inter", "intra"] = "inter"

    def __post_init__(self):
        super().__post_init__()
        if self.floor > self.peak:
            raise UserError(f"floor={self.floor}: must not exceed peak={self.peak}")
        if (self.total - self.warmup) // self.cycles < 1:
            raise UserError(f"total={self.total}: leaves no step for each of {self.cycles} cycles after a warm-up of {self.warmup}")

    def at(self, step):
        if step < self.warmup:
            value = self.peak * (step + 1) / self.warmup
        else:
            length = (self.total - self.warmup) // self.cycles
            value = self.floor + 0.5 * (self.peak - self.floor) * (1 + math.cos(math.pi * ((step - self.warmup) % length) / length))
        return value if self.first == "inter" else 1 - value


# ------------------------------------------------------------------------------------------------------------------- advantage

@part("canon")
class Conditional(Advantage):
    """CANON's advantage. metric: "entropy" (mean over the response's own tokens, at sampling time), "length", "random" (the control), or
    the name of any number per response in the batch's meta. mu: the weight of the inter part. alpha, discount, beta: see `conditional`."""

    metric: str = "entropy"
    mu: Fraction | Schedule | Mixing = 1.0
    alpha: Positive = 1.0
    discount: Literal["high", "low"] = "high"
    beta: float = 0.0

    @property
    def needs(self):
        return frozenset({"entropy"} if self.metric == "entropy" else ())

    def check(self, recipe):
        group = getattr(recipe.sampler, "group", None)
        if group is not None and group < 2:
            raise UserError(f"sampler.group={group}: advantage=canon cuts every group in two; expected at least 2")
        if self.mu == 0.5 and group is not None and group % 2:
            raise UserError(f"sampler.group={group}: with advantage.mu=0.5 the halves must be equal, or the baseline is not the group's mean; "
                            "expected an even group")

    def start(self, run):
        return LiveConditional(self, run)


class LiveConditional:
    def __init__(self, description: Conditional, run):
        self.part = description
        self.rng = run.torch_rng("advantage") if description.metric == "random" else None

    def metric(self, batch: Batch) -> torch.Tensor:
        """[N]. RunStopped where the sampler has not delivered it, or it is not one finite number per response."""
        name = self.part.metric
        if name == "length":
            return batch.lengths.float()
        if name == "random":
            return torch.rand(len(batch), generator=self.rng).to(batch.rewards.device)
        if name == "entropy":
            if batch.behaviour.entropy is None:
                raise RunStopped("advantage.metric=entropy: the sampler recorded no entropy; expected sampler=plain, or advantage.metric=length")
            own = batch.acted((POLICY,))
            found = (batch.behaviour.entropy * own).sum(1) / own.sum(1).clamp(min=1)
        else:
            found = batch.meta.get(name)
            if found is None or found.ndim != 1:
                known = ", ".join(["entropy", "length", "random", *(k for k, v in batch.meta.items() if v.ndim == 1 and k != "length")])
                raise RunStopped(f"advantage.metric={name!r}: not among the numbers known per response: {known}")
        if not found.isfinite().all():
            raise RunStopped(f"advantage.metric={name!r} is not finite for {int((~found.isfinite()).sum())} of {len(batch)} responses")
        return found

    def __call__(self, batch: Batch) -> torch.Tensor:
        p = self.part
        self.mu = p.mu.of(batch) if isinstance(p.mu, Mixing) else at(p.mu, batch.step)
        return conditional(outcome(batch), batch.groups, self.metric(batch), self.mu, p.alpha, p.discount, p.beta)

    def report(self) -> dict[str, float]:
        return {"mu": self.mu}


inter = preset("canon-inter", Conditional())
intra = preset("canon-intra", Conditional(mu=0.0))
dynamic = preset("canon-dynamic", Conditional(mu=Accuracy()))
efficient = preset("canon-eff", Conditional(metric="length", alpha=0.96))
surrogate = preset("canon", Clipped(0.2, 0.28, dual_clip=3.0, aggregation="constant"))

pause = dict(sampler=Plain(group=16), objective=surrogate, prompts=16, updates=Updates(optimiser=Adam(lr=1e-4), minibatch=8),
             evaluation=Evaluation(prompts=100, samples=8, ks=(1,)))
by_length, costs = Conditional(metric="length"), Pause(right_short=0.8, right_long=0.3)


def arm(advantage: Advantage, task: Pause = Pause(right_short=0.3, right_long=0.8)) -> Arm:
    return Arm(LanguageRecipe(**pause, advantage=advantage), task)


claim = Claim(
    says="comparing the halves of a group by length amplifies the direction that pays, longer where longer is more often right and shorter where "
         "shorter is, and discounting the long half shortens responses, both at no loss of accuracy",
    arms={"dr-grpo": arm(dr_grpo.advantage), "inter": arm(by_length), "intra": arm(by_length.replace(mu=0.0)), "eff": arm(by_length.replace(alpha=0.9)),
          "inter-entropy": arm(inter), "costly-dr-grpo": arm(dr_grpo.advantage, costs), "costly-inter": arm(by_length, costs)},
    model=Tiny(layers=2, width=64, heads=2, warmup=800), steps=40, seeds=10, minutes=8,
    quick={"steps": 2, "seeds": 2, "model": Tiny(layers=2, width=64, heads=2, warmup=2)},
    expects=("inter > dr-grpo on length", "costly-inter < costly-dr-grpo on length", "eff < dr-grpo on length",
             "inter >= dr-grpo - 0.03 on pass@1", "costly-inter >= costly-dr-grpo - 0.03 on pass@1", "eff >= dr-grpo - 0.03 on pass@1"))

canon = method("canon", LanguageRecipe(sampler=Plain(group=16), advantage=inter, objective=surrogate, prompts=32, updates=Updates(minibatch=16)),
               title="Baselines from the other half of the group, ordered by entropy or length", source="arXiv 2509.23962", claim=claim)
