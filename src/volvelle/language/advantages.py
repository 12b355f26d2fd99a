"""Credit as pure functions of tensors, and the advantage parts of the base recipes.

rewards [N], groups [N] (any integers; equal = same group), mask [N, T] bool. No gradient flows through any of these.
Source of the formulas and conventions: GRPO 2402.03300, Dr. GRPO 2503.20783, RLOO 2402.14740, REINFORCE++ 2501.03262, PPO 1707.06347.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from volvelle.core.parts import part

from .records import POLICY, Batch
from .slots import Advantage

Fraction = Annotated[float, Field(ge=0, le=1)]


def group_index(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(index [N] of each row's group in 0..K-1, size [K])."""
    _, index, count = torch.unique(groups, return_inverse=True, return_counts=True)
    return index, count


def group_low(values: torch.Tensor, index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[K]: the smallest value of each group."""
    return torch.full((len(count),), torch.inf, dtype=values.dtype, device=values.device).scatter_reduce(0, index, values, "amin")


def group_mean(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[N]: the mean of `values` over each row's group; exactly their common value where all are equal."""
    index, count = group_index(groups)
    low = group_low(values, index, count)
    return (low + torch.zeros_like(low).index_add(0, index, values - low[index]) / count)[index]


def group_std(values: torch.Tensor, groups: torch.Tensor, ddof: int = 1) -> torch.Tensor:
    """[N]: standard deviation over each row's group, divisor n - ddof; groups with n <= ddof have 0."""
    index, count = group_index(groups)
    square = (values - group_mean(values, groups)) ** 2
    total = torch.zeros(len(count), dtype=values.dtype, device=values.device).index_add(0, index, square)
    return ((total / (count - ddof).clamp(min=1)).sqrt() * (count > ddof))[index]


def group_normalised(rewards: torch.Tensor, groups: torch.Tensor, scale: str = "group", ddof: int = 1, epsilon: float = 1e-6) -> torch.Tensor:
    """[N]: (r - group mean) / (deviation + epsilon); scale "group", "batch" (deviation of all rewards) or "none" (Dr. GRPO).

    A group of one response keeps its raw reward (mean 0, deviation 1), as verl does.
    """
    index, count = group_index(groups)
    single = count[index] == 1
    centred = torch.where(single, rewards, rewards - group_mean(rewards, groups))
    if scale == "none":
        return centred
    spread = rewards.std(correction=ddof).expand_as(rewards) if scale == "batch" else group_std(rewards, groups, ddof)
    scaled = centred / (spread + epsilon)
    return scaled if scale == "batch" else torch.where(single, centred, scaled)


def leave_one_out(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[N]: r_i minus the mean of the other rewards of its group; a group of one keeps its raw reward."""
    index, count = group_index(groups)
    n = count[index].to(rewards.dtype)
    return torch.where(n == 1, rewards, (rewards - group_mean(rewards, groups)) * n / (n - 1).clamp(min=1))


def whiten(values: torch.Tensor, mask: torch.Tensor, shift: bool = True, epsilon: float = 1e-8) -> torch.Tensor:
    """[N, T]: zero mean (if shift) and unit sample variance over the masked positions of the whole batch; 0 elsewhere."""
    chosen = values[mask]
    if len(chosen) < 2:
        return torch.where(mask, values, 0.0)
    mean, variance = chosen.mean(), chosen.var(correction=1)
    out = (values - mean) * torch.rsqrt(variance + epsilon) + (0.0 if shift else mean)
    return torch.where(mask, out, 0.0)


def last_positions(mask: torch.Tensor) -> torch.Tensor:
    """[N, T] bool: the last masked position of each row."""
    reverse = mask.flip(1).long().cumsum(1).flip(1)
    return mask & (reverse == 1)


def reward_to_go(token_rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """[N, T]: discounted sum of the rewards from each position on; unmasked positions are skipped over."""
    out, running = torch.zeros_like(token_rewards), torch.zeros(len(token_rewards), dtype=token_rewards.dtype, device=token_rewards.device)
    for t in range(token_rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        running = torch.where(here, token_rewards[:, t] + gamma * running, running)
        out[:, t] = torch.where(here, running, 0.0)
    return out


def gae(token_rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95):
    """(advantages, returns), each [N, T]. delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; returns = A + V.

    Unmasked positions (tool text, padding) are skipped: the running value and advantage pass over them unchanged.
    """
    advantages = torch.zeros_like(values)
    next_value, running = torch.zeros(len(values), dtype=values.dtype, device=values.device), torch.zeros(len(values), dtype=values.dtype, device=values.device)
    for t in range(values.shape[1] - 1, -1, -1):
        here = mask[:, t]
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(here, delta + gamma * lam * running, running)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, running, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def token_rewards(batch: Batch, mask: torch.Tensor) -> torch.Tensor:
    """[N, T]: the outcome reward on the last masked token, plus whatever token rewards there are (KL penalties, turn rewards)."""
    out = last_positions(mask) * batch.rewards[:, None]
    return out if batch.token_rewards is None else out + batch.token_rewards


def outcome(batch: Batch) -> torch.Tensor:
    """[N]: the reward of each response, token rewards (a KL penalty) summed in."""
    return batch.rewards if batch.token_rewards is None else batch.rewards + torch.where(batch.mask, batch.token_rewards, 0.0).sum(1)


def span(batch: Batch, over: str) -> torch.Tensor:
    return batch.mask if over == "response" else batch.acted((POLICY,))


@part("grpo")
class GroupNormalised(Advantage):
    """GRPO (arXiv 2402.03300): (r - group mean) / (group deviation + epsilon). scale="none" is Dr. GRPO, "batch" divides by the batch's deviation."""

    scale: Literal["group", "batch", "none"] = "group"
    ddof: Annotated[int, Field(ge=0, le=1)] = 1
    epsilon: Annotated[float, Field(ge=0)] = 1e-6

    def __call__(self, batch):
        return group_normalised(outcome(batch), batch.groups, self.scale, self.ddof, self.epsilon)


@part("rloo")
class LeaveOneOut(Advantage):
    """RLOO (arXiv 2402.14740): each response against the mean of the others. normalise: whiten over the batch (sample deviation, 1e-4)."""

    normalise: bool = False

    def __call__(self, batch):
        found = leave_one_out(outcome(batch), batch.groups)
        return (found - found.mean()) / (found.std() + 1e-4) if self.normalise else found


@part("return")
class Return(Advantage):
    """REINFORCE: the (discounted) reward to go of each token, minus a baseline: none, or the mean reward of the batch."""

    gamma: Fraction = 1.0
    baseline: Literal["none", "batch"] = "none"
    over: Literal["response", "acted"] = "acted"

    def __call__(self, batch):
        mask = span(batch, self.over)
        found = reward_to_go(token_rewards(batch, mask), mask, self.gamma)
        return torch.where(mask, found - outcome(batch).mean(), 0.0) if self.baseline == "batch" else found


@part("reinforce++")
class ReinforcePlusPlus(Advantage):
    """REINFORCE++ (arXiv 2501.03262): reward to go, whitened over all tokens of the batch. baseline="group" first takes off the group mean."""

    gamma: Fraction = 1.0
    baseline: Literal["none", "group"] = "none"
    over: Literal["response", "acted"] = "acted"

    def __call__(self, batch):
        mask = span(batch, self.over)
        if self.baseline == "group":
            index, count = group_index(batch.groups)
            reward = outcome(batch)
            centred = torch.where(count[index] == 1, reward, reward - group_mean(reward, batch.groups))
            return whiten(centred[:, None].expand(mask.shape).clone(), mask)
        return whiten(reward_to_go(token_rewards(batch, mask), mask, self.gamma), mask)


@part("gae")
class GeneralisedAdvantage(Advantage):
    """GAE (arXiv 1506.02438) over token rewards and critic values, whitened over the batch. Sets batch.returns (before whitening) for the critic."""

    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    whiten: bool = True
    over: Literal["response", "acted"] = "acted"
    needs = frozenset({"values"})

    def __call__(self, batch):
        mask = span(batch, self.over)
        found, batch.returns = gae(token_rewards(batch, mask), batch.values, mask, self.gamma, self.lam)
        return whiten(found, mask) if self.whiten else found
