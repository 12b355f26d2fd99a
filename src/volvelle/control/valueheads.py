"""Value heads: how a network's outputs stand for a value, and how they are fitted to a target.

A head turns `width` outputs into a value, builds the target of a Bellman backup, and gives the loss per item. The scalar heads (mse,
huber, hl-gauss, two-hot) back up numbers; the distributional ones (c51, quantile) back up return distributions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part

Positive = Annotated[float, Field(gt=0)]
Bins = Annotated[int, Field(ge=2)]


class ValueHead(Part):
    """Slot. scalar: targets are plain numbers. `low`, `high`: the range that can be represented, where there is one."""

    slot: ClassVar[str] = "value"
    scalar: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Outputs per value."""
        return 1

    def value(self, outputs: Tensor) -> Tensor:
        """[..., width] -> [...]."""
        return outputs.squeeze(-1)

    def backup(self, outputs: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
        """The target r + discount * (what the outputs stand for), without gradient. outputs [..., width], the others [...]."""
        return rewards + discounts * self.value(outputs)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Loss per item [...]; target as `backup` made it, or plain numbers [...]."""
        raise NotImplementedError


@part("mse")
class MSE(ValueHead):
    """Squared error (v - y)^2."""

    def loss(self, outputs, target):
        return (outputs.squeeze(-1) - target).square()


@part("huber")
class Huber(ValueHead):
    """Smooth L1: quadratic up to an error of `beta`, then linear."""

    beta: Positive = 1.0

    def loss(self, outputs, target):
        return F.smooth_l1_loss(outputs.squeeze(-1), target, reduction="none", beta=self.beta)


@dataclass(frozen=True, eq=False)
class _Range(ValueHead):
    """Heads over a fixed range of values.

    prior: the value that outputs near 0 stand for (none: the middle of the range), as an initial bias of the output layer would give it.
    """

    prior: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"{self.part_name}: the range [{self.low}, {self.high}] must be finite with low < high")
        if self.prior is not None and not self.low <= self.prior <= self.high:
            raise UserError(f"{self.part_name}: prior={self.prior} lies outside the range; accepted: {self.low} to {self.high}")

    @property
    def width(self):
        return self.bins

    def support(self, like: Tensor) -> Tensor:
        """The values the bins stand for, [bins]."""
        return torch.linspace(self.low, self.high, self.bins, dtype=like.dtype, device=like.device)

    def logits(self, outputs: Tensor) -> Tensor:
        """Outputs with the bias of the prior: the log of its histogram, a hundredth of which is spread evenly."""
        if self.prior is None:
            return outputs
        return outputs + (0.99 * self.label(torch.tensor(self.prior, dtype=outputs.dtype, device=outputs.device)) + 0.01 / self.bins).log()

    def value(self, outputs):
        return (self.logits(outputs).softmax(-1) * self.support(outputs)).sum(-1)

    def label(self, target: Tensor) -> Tensor:
        """The histogram [..., bins] that stands for numbers [...]; each sums to 1 and has no gradient."""
        raise NotImplementedError

    def loss(self, outputs, target):
        return -(self.label(target.detach()) * self.logits(outputs).log_softmax(-1)).sum(-1)


@part("hl-gauss")
class HLGauss(_Range):
    """Cross-entropy to a Gaussian-smeared histogram of the target (arXiv 2403.03950).

    bins intervals between low and high; the deviation is `ratio` bin widths, or `sigma` in units of value (to keep when bins change). Targets outside
    the range are moved to its edge.
    """

    low: float = -10.0
    high: float = 10.0
    bins: Bins = 51
    ratio: Positive = 0.75
    sigma: Positive | None = None

    def support(self, like):
        half = (self.high - self.low) / self.bins / 2
        return torch.linspace(self.low + half, self.high - half, self.bins, dtype=like.dtype, device=like.device)

    def label(self, target):
        edges = torch.linspace(self.low, self.high, self.bins + 1, dtype=target.dtype, device=target.device)
        sigma = self.sigma or self.ratio * (self.high - self.low) / self.bins
        cdf = torch.erf((edges - target.clamp(self.low, self.high).unsqueeze(-1)) / (math.sqrt(2) * sigma))
        return cdf.diff(dim=-1) / (cdf[..., -1:] - cdf[..., :1])


@part("two-hot")
class TwoHot(_Range):
    """Cross-entropy to the two locations next to the target, weighted so that their mean is the target."""

    low: float = -10.0
    high: float = 10.0
    bins: Bins = 51

    def label(self, target):
        return project(torch.ones_like(target).unsqueeze(-1), target.unsqueeze(-1), self.low, self.high, self.bins)


def project(probabilities: Tensor, values: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Categorical projection (arXiv 1707.06887): mass at arbitrary values [..., n], onto `bins` atoms from low to high. -> [..., bins].

    Values outside the range go to the nearest atom. Total mass is kept, and so is the mean where nothing lay outside.
    """
    place = (values.clamp(low, high) - low) / ((high - low) / (bins - 1))
    below = place.floor().clamp(0, bins - 1)
    above = (below + 1).clamp(max=bins - 1)
    upper = place - below
    mass = torch.zeros(*values.shape[:-1], bins, dtype=values.dtype, device=values.device)
    mass.scatter_add_(-1, below.long(), probabilities * (1 - upper))
    return mass.scatter_add_(-1, above.long(), probabilities * upper)


@part("c51")
class C51(_Range):
    """The return distribution on fixed atoms (arXiv 1707.06887); the loss is the cross-entropy to the projected target."""

    low: float = -10.0
    high: float = 10.0
    bins: Bins = 51
    scalar: ClassVar[bool] = False

    def backup(self, outputs, rewards, discounts):
        values = rewards.unsqueeze(-1) + discounts.unsqueeze(-1) * self.support(outputs)
        return project(self.logits(outputs).softmax(-1), values, self.low, self.high, self.bins)

    def label(self, target):
        return project(torch.ones_like(target).unsqueeze(-1), target.unsqueeze(-1), self.low, self.high, self.bins)

    def loss(self, outputs, target):
        label = target.detach() if target.ndim == outputs.ndim else self.label(target.detach())
        return -(label * self.logits(outputs).log_softmax(-1)).sum(-1)


@part("quantile")
class Quantile(ValueHead):
    """Quantiles of the return at midpoints (i + 0.5) / quantiles, quantile Huber loss (arXiv 1710.10044).

    Loss: sum over predicted quantiles, mean over target quantiles.
    """

    quantiles: Annotated[int, Field(ge=1)] = 200
    kappa: Positive = 1.0
    scalar: ClassVar[bool] = False

    @property
    def width(self):
        return self.quantiles

    def value(self, outputs):
        return outputs.mean(-1)

    def backup(self, outputs, rewards, discounts):
        return rewards.unsqueeze(-1) + discounts.unsqueeze(-1) * outputs

    def loss(self, outputs, target):
        target = target.detach() if target.ndim == outputs.ndim else target.detach().unsqueeze(-1)
        tau = (torch.arange(self.quantiles, dtype=outputs.dtype, device=outputs.device) + 0.5) / self.quantiles
        error = target.unsqueeze(-2) - outputs.unsqueeze(-1)                      # [..., i predicted, j target]
        size = error.abs()
        huber = torch.where(size <= self.kappa, 0.5 * error.square(), self.kappa * (size - 0.5 * self.kappa)) / self.kappa
        weight = (tau.unsqueeze(-1) - (error.detach() < 0).to(outputs.dtype)).abs()
        return (weight * huber).mean(-1).sum(-1)
