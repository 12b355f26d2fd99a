"""Mixtures of Gaussian experts as policy heads.

A bound mixture reads [..., K + ...]: K logits of the mixing weights first, then the experts' numbers. Its noise is one block of normal numbers
per expert and action dimension, then K Gumbel numbers that draw the expert. `experts` K = 1 is the plain head, to the bit.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.errors import UserError
from volvelle.core.parts import part

from .heads import HALF_LOG_TWO_PI, Distribution, Normal, PolicyHead, Squash, Squashed
from .spaces import Actions

Experts = Annotated[int, Field(ge=1)]


def chosen(values: Tensor, index: Tensor) -> Tensor:
    """values [..., K] or [..., K, A] at index [...] of the experts."""
    if values.ndim == index.ndim + 1:
        return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return values.gather(-2, index[..., None, None].expand(*index.shape, 1, values.shape[-1])).squeeze(-2)


class _Mixture(Distribution):
    """What both mixtures share; `inner` is one expert's distribution, of `size` action dimensions."""

    experts: int
    size: int

    def weights(self, outputs) -> Tensor:
        """Mixing weights [..., K]."""
        made = outputs[0] if isinstance(outputs, tuple) else outputs
        return made[..., : self.experts].softmax(-1)

    def blocks(self, outputs) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [..., K], means and log standard deviations [..., K, A]."""
        raise NotImplementedError

    def noise_parts(self, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normal numbers [..., K, A] and Gumbel numbers [..., K] (none for one expert)."""
        normal = noise[..., : self.experts * self.size].unflatten(-1, (self.experts, self.size))
        return normal, None if self.experts == 1 else noise[..., self.experts * self.size :]

    def index(self, logits: Tensor, gumbel: Tensor | None) -> Tensor:
        """A sample of the softmax of the logits, [...]; without noise the likeliest expert."""
        return (logits if gumbel is None else logits + gumbel).argmax(-1)

    def set_noise(self) -> None:
        self.normals = self.experts * self.size
        self.noise, self.noise_width = ("normal", self.size) if self.experts == 1 else ("mixed", self.normals + self.experts)


class NormalMixture(_Mixture):
    """sum_i w_i N(mu_i, diag sigma_i^2), sigma free of the state; actions are not squashed. width K + K A, free K A."""

    def __init__(self, size: int, experts: int, start: float):
        self.size, self.experts, self.start, self.expert = size, experts, start, Normal(size, start, False)
        self.width, self.free = experts * (1 + size), experts * size
        self.set_noise()

    def blocks(self, outputs):
        made, free = outputs
        means, stds = (x.unflatten(-1, (self.experts, self.size)) for x in (made[..., self.experts :], free))
        return made[..., : self.experts], means, stds.expand_as(means)

    def every(self, outputs, noise: Tensor) -> Tensor:
        """One action of every expert [..., K, A]."""
        _, means, log_stds = self.blocks(outputs)
        return torch.addcmul(means, log_stds.exp(), self.noise_parts(noise)[0])

    def sample(self, outputs, noise):
        return chosen(self.every(outputs, noise), self.index(outputs[0][..., : self.experts], self.noise_parts(noise)[1]))

    def mode(self, outputs, gumbel: Tensor | None = None):
        logits, means, _ = self.blocks(outputs)
        return chosen(means, self.index(logits, gumbel))

    def log_prob(self, outputs, actions):
        """log sum_i w_i N(a; mu_i, sigma_i), by logsumexp."""
        logits, means, log_stds = self.blocks(outputs)
        each = self.expert.log_prob((means, log_stds), actions.unsqueeze(-2))
        return (logits.log_softmax(-1) + each).logsumexp(-1)

    def entropy(self, outputs):
        """H(w) + sum_i w_i H_i: exact where experts do not overlap, above the entropy elsewhere (which has no closed form)."""
        logits, means, log_stds = self.blocks(outputs)
        logw = logits.log_softmax(-1)
        return (logw.exp() * (self.expert.entropy((means, log_stds)) - logw)).sum(-1)


@part("gaussian-mixture")
class GaussianMixture(PolicyHead):
    """A mixture of Gaussians with weights from the state, for on-policy methods: the density is the mixture's. Deviations start at exp(start)."""

    experts: Experts = 4
    start: float = 0.0

    def bind(self, actions):
        if actions.kind != "continuous":
            raise UserError(f"head=gaussian-mixture needs continuous actions; this task has {actions.describe()}; accepted: categorical, mixed")
        return NormalMixture(actions.continuous, self.experts, self.start)


class SquashMixture(Squash, _Mixture):
    """A mixture of tanh-squashed Gaussians. width K + 2 K A: logits, means, log standard deviations."""

    def __init__(self, actions: Actions, experts: int, low: float, high: float, smooth: bool):
        super().__init__(actions, low, high, smooth)
        self.experts = experts
        self.width = experts * (1 + 2 * self.size)
        self.set_noise()

    def blocks(self, outputs):
        means, log_stds = self.split(outputs[..., self.experts :])
        return outputs[..., : self.experts], *(x.unflatten(-1, (self.experts, self.size)) for x in (means, log_stds))

    def every(self, outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A reparameterised action of every expert [..., K, A], and its log-probability under that expert alone [..., K]."""
        _, means, log_stds = self.blocks(outputs)
        normal = self.noise_parts(noise)[0]
        squashed = torch.addcmul(means, log_stds.exp(), normal).tanh()
        slack = torch.addcmul(self.scale + self.EPS, squashed.square(), self.scale, value=-1)
        terms = -0.5 * normal.square() - log_stds - slack.log()
        return torch.addcmul(self.bias, squashed, self.scale), terms.sum(-1) - self.size * HALF_LOG_TWO_PI

    def draw(self, outputs, noise):
        """An action of a drawn expert, and its log-probability under that expert: mixing adds no entropy."""
        actions, logps = self.every(outputs, noise)
        index = self.index(outputs[..., : self.experts], self.noise_parts(noise)[1])
        return chosen(actions, index), chosen(logps, index)

    def sample(self, outputs, noise):
        return self.draw(outputs, noise)[0]

    def mode(self, outputs, gumbel: Tensor | None = None):
        logits, means, _ = self.blocks(outputs)
        return chosen(means, self.index(logits, gumbel)).tanh() * self.scale + self.bias

    def log_prob(self, outputs, actions):
        """Of the whole mixture."""
        logits, means, log_stds = self.blocks(outputs)
        squashed = ((actions - self.bias) / self.scale).clamp(-1 + 1e-6, 1 - 1e-6).unsqueeze(-2)
        z = (squashed.atanh() - means) * (-log_stds).exp()
        terms = -0.5 * z.square() - log_stds - (self.scale * (1 - squashed.square()) + self.EPS).log()
        return (logits.log_softmax(-1) + terms.sum(-1) - self.size * HALF_LOG_TWO_PI).logsumexp(-1)


class Composed(Squash):
    """One squashed Gaussian made of K: "gating", the weighted mean of means and of log deviations, or "product", of precisions (a weighted product)."""

    def __init__(self, actions: Actions, experts: int, low: float, high: float, smooth: bool, how: str):
        super().__init__(actions, low, high, smooth)
        self.experts, self.how, self.width = experts, how, experts * (1 + 2 * self.size)

    def weights(self, outputs: Tensor) -> Tensor:
        return outputs[..., : self.experts].softmax(-1)

    def split(self, outputs):
        means, log_stds = (x.unflatten(-1, (self.experts, self.size)) for x in super().split(outputs[..., self.experts :]))
        weights = self.weights(outputs).unsqueeze(-1)
        if self.how == "gating":
            return (weights * means).sum(-2), (weights * log_stds).sum(-2)
        precision = weights * (-2 * log_stds).exp()
        total = precision.sum(-2)
        return (precision * means).sum(-2) / total, -0.5 * total.log()

    def mode(self, outputs):
        return self.split(outputs)[0].tanh() * self.scale + self.bias


@part("squashed-mixture")
class SquashedMixture(Squashed):
    """A mixture of squashed Gaussians, for pmoe: `experts` of them.

    compose: "draw" one expert, or make one Gaussian of all by "gating" or "product", as composed-policy baselines do.
    """

    experts: Experts = 4
    compose: Literal["draw", "gating", "product"] = "draw"

    def check(self, recipe):
        if not getattr(recipe, "mixes", False):
            raise UserError(f"head=squashed-mixture: its mixing weights are learnt by pmoe alone, not by {recipe.part_name}; accepted here: squashed")

    def bind(self, actions):
        if actions.kind != "continuous" or not actions.bounded:
            raise UserError(f"head=squashed-mixture needs continuous actions with finite bounds; this task has {actions.describe()}")
        numbers = (actions, self.experts, self.low, self.high, self.smooth)
        return SquashMixture(*numbers) if self.compose == "draw" else Composed(*numbers, self.compose)
