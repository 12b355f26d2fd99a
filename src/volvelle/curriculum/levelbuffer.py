"""Levels kept with their scores: high ones are met again, low ones make room for new ones (prioritised level replay)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .gridworlds import Levels


class LevelBuffer:
    """levels; score [B]; active [B]: an agent lives there now; new [B]: not scored yet."""

    def __init__(self, levels: Levels):
        B = len(levels)
        self.levels, self.score = levels, torch.zeros(B)
        self.active, self.new = torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)

    @property
    def curated(self) -> Tensor:
        """Indices of levels that may be met again: scored and not active."""
        return torch.nonzero(~self.active & ~self.new)[:, 0]

    @property
    def fresh(self) -> Tensor:
        """Indices of levels nobody has met."""
        return torch.nonzero(~self.active & self.new)[:, 0]

    def finish(self, index: Tensor, scores: Tensor) -> None:
        """Lifetimes on the levels at `index` have ended with these scores."""
        self.score[index], self.active[index], self.new[index] = scores.to(self.score), False, False

    def renew(self, count: int, draw) -> None:
        """If fewer than `count` fresh levels are left: `count` levels of draw(count) take the places of inactive ones, new ones first, then the lowest scores."""
        if len(self.fresh) >= count:
            return
        worth = torch.where(self.new, -torch.inf, self.score).masked_fill(self.active, torch.inf)
        index = worth.topk(count, largest=False).indices
        self.levels.put(index, draw(count))
        self.new[index], self.score[index] = True, 0.0

    def rank(self, count: int, transform: Literal["rank", "proportional"], temperature: float, generator: torch.Generator) -> Tensor:
        """`count` curated levels: the highest scores in order ("rank"), or drawn without replacement, p ~ exp(score / temperature)."""
        index = self.curated
        score = self.score[index]
        if transform == "proportional":  # adding Gumbel noise and taking the largest draws without replacement
            noise = torch.rand(len(index), generator=generator, dtype=torch.float64).clamp_min(1e-300)
            score = score.double() / temperature - torch.log(-torch.log(noise))
        return index[score.sort(descending=True, stable=True).indices[:count]]

    def sample(self, count: int, batch: int, replay: float, transform: Literal["rank", "proportional"], temperature: float, draw, generator: torch.Generator) -> Tensor:
        """Levels for `count` new lifetimes, now active. Each is curated with probability `replay` (if there are `batch` such levels), else fresh.

        draw(count) makes levels when fewer than `batch` are fresh; None: no level is replaced, and where none is fresh any inactive one is taken.
        """
        if draw is not None:
            self.renew(batch, draw)
        wanted = int((torch.rand(count, generator=generator) < replay).sum())
        old = self.rank(wanted, transform, temperature, generator) if wanted and len(self.curated) >= batch else torch.zeros(0, dtype=torch.long)
        rest = self.curated[~torch.isin(self.curated, old)] if draw is None else self.curated[:0]
        others = torch.cat([some[torch.randperm(len(some), generator=generator)] for some in (self.fresh, rest)])
        index = torch.cat([old, others[: count - len(old)]])
        self.active[index] = True
        return index

    def state_dict(self):
        return {"levels": self.levels.tensors(), "score": self.score, "active": self.active, "new": self.new}

    def load_state_dict(self, state):
        self.levels = Levels(**state["levels"])
        self.score, self.active, self.new = state["score"], state["active"], state["new"]
