"""f-divergences and the dual problems of regularised reinforcement learning (arXiv 2302.08560), as pure functions.

A divergence is D_f(p || q) = E_q f(p / q) with f convex, f(1) = 0. max over visitations d of E_d[r] - alpha D_f(d || data), with the Bellman flow as
constraint, has two unconstrained duals: `dual_q` (of a given policy, itself maximised) and `dual_v` (the policy is gone). `mixture_dual_q` matches
a policy with an expert when both are mixed with the data. td are Bellman residuals r + gamma E Q(s', a') - Q(s, a), or the same in V.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from volvelle.core.parts import Part, part


class Divergence(Part):
    """Slot. All functions are elementwise."""

    slot: ClassVar[str] = "divergence"

    def generator(self, t: Tensor) -> Tensor:
        """f(t) for ratios t >= 0."""
        raise NotImplementedError

    def conjugate(self, x: Tensor) -> Tensor:
        """f*(x) = max over w of w x - f(w); infinite where the maximum is."""
        raise NotImplementedError

    def ratio(self, x: Tensor) -> Tensor:
        """The best ratio w >= 0 for residual x: max(0, the inverse of f' at x)."""
        raise NotImplementedError

    def positive_conjugate(self, x: Tensor) -> Tensor:
        """f*_p(x) = max over w >= 0 of w x - f(w)."""
        w = self.ratio(x)
        return w * x - self.generator(w)

    def surrogate(self, x: Tensor) -> Tensor:
        """What stands for f*_p in implicit maximisation: 0 where the residual is not positive, f* above."""
        raise NotImplementedError


@part("chi-square")
class ChiSquare(Divergence):
    """Pearson's: f(t) = (t - 1)^2, f*(x) = x + x^2 / 4, ratio max(0, 1 + x / 2)."""

    def generator(self, t):
        return (t - 1).square()

    def conjugate(self, x):
        return x + x.square() / 4

    def ratio(self, x):
        return (1 + x / 2).clamp(min=0)

    def surrogate(self, x):
        return self.conjugate(x.clamp(min=0))


@part("total-variation")
class TotalVariation(Divergence):
    """f(t) = |t - 1| / 2, f*(x) = x for |x| <= 1/2, else infinite."""

    def generator(self, t):
        return (t - 1).abs() / 2

    def conjugate(self, x):
        return torch.where(x.abs() <= 0.5, x, torch.inf)

    def ratio(self, x):
        return torch.where(x > 0.5, torch.inf, (x >= -0.5).to(x.dtype))

    def positive_conjugate(self, x):
        return torch.where(x > 0.5, torch.inf, x.clamp(min=-0.5))

    def surrogate(self, x):
        return x.clamp(min=0)


@part("reverse-kl")
class ReverseKL(Divergence):
    """f(t) = t log t, f*(x) = ratio = exp(x - 1). It has no tame surrogate: its implicit maximum is Gumbel regression, maximum=gumbel."""

    def generator(self, t):
        return torch.xlogy(t, t)

    def conjugate(self, x):
        return (x - 1).exp()

    def ratio(self, x):
        return (x - 1).exp()

    def surrogate(self, x):
        return self.conjugate(x)


def dual_q(initial: Tensor, td: Tensor, divergence: Divergence, alpha: float, gamma: float) -> Tensor:
    """(1 - gamma) E Q(s0, pi) + alpha E f*(td / alpha), minimised over Q. initial [..., B], td [..., B] with a' of the policy -> [...]."""
    return (1 - gamma) * initial.mean(-1) + alpha * divergence.conjugate(td / alpha).mean(-1)


def dual_v(initial: Tensor, td: Tensor, divergence: Divergence, alpha: float, gamma: float) -> Tensor:
    """(1 - gamma) E V(s0) + alpha E f*_p(td / alpha), minimised over V. initial [..., B], td [..., B] -> [...]."""
    return (1 - gamma) * initial.mean(-1) + alpha * divergence.positive_conjugate(td / alpha).mean(-1)


def mixture_dual_q(initial: Tensor, target: Tensor, data: Tensor, divergence: Divergence, share: float, gamma: float) -> Tensor:
    """b (1 - gamma) E Q(s0, pi) + E_mix f*(td) - (1 - b) E_data td, with b = share and mix = b target + (1 - b) data; minimised over Q.

    Its minimum is -D_f(b d_pi + (1 - b) data || mix), whatever data cover. target, data [..., B]: residuals without rewards -> [...].
    """
    mixed = share * divergence.conjugate(target).mean(-1) + (1 - share) * divergence.conjugate(data).mean(-1)
    return share * (1 - gamma) * initial.mean(-1) + mixed - (1 - share) * data.mean(-1)


def mixture_chi_square(policy: Tensor, recorded: Tensor, target: Tensor, data: Tensor, share: float) -> Tensor:
    """The same for chi-square, its start moved to the target's states: b (E Q(s, pi) - E Q(s, a)) + E_mix td^2 / 4.

    policy: Q of the policy's actions, recorded: Q of the target's pairs, target and data: residuals; [..., B] -> [...].
    """
    mixed = share * target.square().mean(-1) + (1 - share) * data.square().mean(-1)
    return share * (policy.mean(-1) - recorded.mean(-1)) + mixed / 4


def implicit_maximum(x: Tensor, level: float, surrogate: Tensor) -> Tensor:
    """f-DVL's loss of x = Q - V up to a constant: level * surrogate - (1 - level) * x. A larger level takes V closer to the largest recorded Q."""
    return level * surrogate - (1 - level) * x
