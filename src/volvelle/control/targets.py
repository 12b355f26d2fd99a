"""Targets and advantages as pure functions.

Tensors are [..., T, N]: leading axes (seeds), time, environments. `terminated` marks true ends, `ended` any end of an episode; a cut by a
time limit is bootstrapped: its reward already holds gamma * V(final observation) (`bootstrap_cuts`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def bootstrap_cuts(rewards: Tensor, cut: Tensor, final_values: Tensor, gamma: float) -> Tensor:
    """Rewards with gamma * V(final observation) added where an episode was cut short but not terminated.

    rewards, cut (bool), final_values: [..., T, N]; values where `cut` is False are ignored.
    """
    return rewards + gamma * torch.where(cut, final_values, torch.zeros_like(final_values))


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, last_values: Tensor, ended: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (arXiv 1506.02438).

    delta_t = r_t + gamma (1 - ended_t) V_{t+1} - V_t and A_t = delta_t + gamma lam (1 - ended_t) A_{t+1}.

    rewards, values, ended: [..., T, N] (V of the observation acted on); last_values: [..., N], V after the last step. -> [..., T, N].
    """
    going = gamma * (~ended).to(rewards.dtype)
    following = torch.cat([values[..., 1:, :], last_values.unsqueeze(-2)], -2)
    advantages = rewards + going * following - values
    carry = (going * lam).unbind(-2)
    steps = advantages.unbind(-2)
    for t in range(len(steps) - 2, -1, -1):
        steps[t].addcmul_(carry[t], steps[t + 1])
    return advantages


def lambda_returns(rewards: Tensor, values: Tensor, last_values: Tensor, ended: Tensor, gamma: float, lam: float) -> Tensor:
    """TD(lambda) returns: the advantages of `gae` plus the values; same shapes."""
    return gae(rewards, values, last_values, ended, gamma, lam) + values


def discounted_returns(rewards: Tensor, ended: Tensor, gamma: float, last_values: Tensor | None = None) -> Tensor:
    """Reward-to-go within each episode: G_t = r_t + gamma (1 - ended_t) G_{t+1}, with G_T = last_values (or 0). [..., T, N]."""
    last = torch.zeros_like(rewards[..., 0, :]) if last_values is None else last_values
    return gae(rewards, torch.zeros_like(rewards), last, ended, gamma, 1.0)


def n_step(rewards: Tensor, terminated: Tensor, ended: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """n-step sums from n consecutive rewards of one environment, stopping at the first end.

    rewards, terminated, ended: [..., n]. Returns (sum of gamma^k r_k, discount of the value that follows, index of the last step used),
    each [...]. The discount is gamma^m after m steps, and 0 after a termination.
    """
    open_before = torch.cumprod(torch.cat([torch.ones_like(rewards[..., :1]), (~ended[..., :-1]).to(rewards.dtype)], -1), -1)
    powers = gamma ** torch.arange(rewards.shape[-1], dtype=rewards.dtype, device=rewards.device)
    total = (powers * open_before * rewards).sum(-1)
    used = open_before.sum(-1)
    last = used.long() - 1
    stopped = torch.gather(terminated, -1, last.unsqueeze(-1)).squeeze(-1)
    return total, gamma**used * (~stopped).to(rewards.dtype), last


def soft_target(rewards: Tensor, discounts: Tensor, values: Tensor, logps: Tensor, alpha: Tensor | float) -> Tensor:
    """Soft Bellman target r + discount (V - alpha log pi), discount = gamma (1 - terminated); all shapes broadcast."""
    return rewards + discounts * (values - alpha * logps)
