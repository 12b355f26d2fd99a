"""Implicit maxima: losses that pull a value V(s) towards the largest Q(s, a) over the recorded actions, without asking for any other action.

All take differences x = Q(s, a) - V(s), [S, B] (the last axis is the batch), and give a loss per item; V's gradient is minus the derivative.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.parts import Part, part

Level = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


def expectile_loss(x: Tensor, level: float) -> Tensor:
    """|level - 1(x < 0)| x^2: level 0.5 is half the squared error, towards 1 only shortfalls count (arXiv 2110.06169)."""
    return torch.where(x < 0, 1 - level, level) * x.square()


def gumbel_loss(x: Tensor, beta: float, clip: float) -> Tensor:
    """Gumbel regression (arXiv 2301.02328), rescaled by its batch: z = min(x / beta, clip), m = max(max z, -1) without gradient,

    e^(z - m) - z e^(-m) - e^(-m). The batch is the last axis; the gradient through a clipped z is 0.
    """
    z = (x / beta).clamp(max=clip)
    top = z.detach().amax(-1, keepdim=True).clamp(min=-1.0)
    return (z - top).exp() - z * (-top).exp() - (-top).exp()


class Maximum(Part):
    """Slot: `loss(x)` per item for differences x = Q - V, [S, B]."""

    slot: ClassVar[str] = "maximum"

    def loss(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@part("expectile")
class Expectile(Maximum):
    """The expectile at `level` (IQL)."""

    level: Level = 0.7

    def loss(self, x):
        return expectile_loss(x, self.level)


@part("gumbel")
class Gumbel(Maximum):
    """The soft maximum at temperature `beta` (XQL, reverse KL); `clip` bounds the exponent."""

    beta: Positive = 1.0
    clip: Positive = 7.0

    def loss(self, x):
        return gumbel_loss(x, self.beta, self.clip)
