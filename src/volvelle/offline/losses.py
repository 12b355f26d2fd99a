"""Small pure functions that several offline methods share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def advantage_weights(advantages: Tensor, temperature: float, cap: float) -> Tensor:
    """min(exp(temperature * A), cap), without gradient: how much of an action an advantage-weighted policy takes over."""
    return (advantages.detach() * temperature).exp().clamp(max=cap)


def huber(error: Tensor, delta: float) -> Tensor:
    """0.5 e^2 inside [-delta, delta], 0.5 delta^2 + delta (|e| - delta) outside."""
    size = error.abs()
    return torch.where(size <= delta, 0.5 * error.square(), delta * (size - 0.5 * delta))


def conservative_gap(values: Tensor, recorded: Tensor) -> Tensor:
    """CQL's penalty (arXiv 2006.04779): logsumexp of the values of all (sampled) actions [..., n] minus the recorded action's [...]."""
    return values.logsumexp(-1) - recorded


def scaled_policy_gradient(values: Tensor, eps: float = 0.0) -> Tensor:
    """-mean Q / (mean |Q| + eps), the divisor without gradient: a policy loss that does not depend on the scale of Q. [S, B] -> [S]."""
    return -values.mean(-1) / (values.detach().abs().mean(-1) + eps)


def gradient_excess(values: Callable[[Tensor], Tensor], actions: Tensor) -> Tensor:
    """mean max(|dQ/da| - 1, 0)^2, summed over members: a penalty on critics that are steep in the action. values: [S, B, d] -> [S, members, B]."""
    actions = actions.detach().requires_grad_(True)
    made = values(actions)
    slopes = torch.stack([torch.autograd.grad(made[:, i].sum(), actions, create_graph=True)[0].norm(dim=-1) for i in range(made.shape[1])], 1)
    return (slopes - 1).clamp(min=0).square().mean(-1).sum(-1)
