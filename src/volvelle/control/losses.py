"""Policy losses as pure functions. Tensors are [S, B] (seeds, batch); a loss per seed [S] or per item [S, B] comes back."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the last axis, [S, B] -> [S]; rows of weight 0 do not count (None: all count alike)."""
    return values.mean(-1) if weights is None else (values * weights).sum(-1) / weights.sum(-1).clamp(min=1e-8)


def mean_over_rows(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the last axis of losses [S, B] or [S, members, B], each row times its weight [S, B] (None: 1). A mean, not a weighted average."""
    if weights is not None:
        losses = losses * (weights if losses.ndim == 2 else weights.unsqueeze(1))
    return losses.mean(-1)


def standardise(advantages: Tensor, weights: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """(A - mean) / (std + eps) per seed, with the sample (n - 1) standard deviation."""
    if weights is None:
        spread, mean = torch.std_mean(advantages, -1, keepdim=True)
        return (advantages - mean) / (spread + eps)
    count = weights.sum(-1, keepdim=True)
    mean = (advantages * weights).sum(-1, keepdim=True) / count
    variance = ((advantages - mean).square() * weights).sum(-1, keepdim=True) / (count - 1).clamp(min=1.0)
    return (advantages - mean) / (variance.sqrt() + eps)


def clipped_surrogate(logp: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's pessimistic surrogate (arXiv 1707.06347), per item: max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))."""
    ratio, costs = (logp - old).exp(), -advantages
    return torch.maximum(costs * ratio, costs * ratio.clamp(1 - clip, 1 + clip))


def approximate_kl(logp: Tensor, old: Tensor) -> Tensor:
    """mean((ratio - 1) - log ratio) over the last axis: a low-variance, non-negative estimate of KL(old || new)."""
    log_ratio = logp - old
    return (log_ratio.exp() - 1 - log_ratio).mean(-1)


def clipped_value_error(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((v - R)^2, (v_old + clip(v - v_old, -clip, clip) - R)^2), per item."""
    moved = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (moved - returns).square())


def conservative_gap(values: Tensor, actions: Tensor) -> Tensor:
    """log sum_a exp Q(s, a) - Q(s, a of the data), per item (arXiv 2006.04779). values [..., actions], actions [...]."""
    return values.logsumexp(-1) - values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
