"""`by-domain`: another part for every domain of the data, in any slot where that makes sense.

`advantage=by-domain advantage.cases.math=ngrpo advantage.default=grpo`. The domain is the prompt's. A domain without a case uses the default.
"""

from __future__ import annotations

from dataclasses import field

import torch

from volvelle.core.parts import part

from .advantages import GroupNormalised
from .objectives import Clipped
from .records import Batch
from .rewards import Verifier
from .slots import Advantage, Filter, Objective, Reward


class _Cases:
    """What the four versions share: needs of all cases, live parts started under their paths, rows of each case."""

    @property
    def needs(self) -> frozenset[str]:
        return self.default.needs.union(*(p.needs for p in self.cases.values())) if self.default else frozenset().union(*(p.needs for p in self.cases.values()))

    def start(self, run):
        live = {name: run.start(f"cases.{name}", p) for name, p in self.cases.items()}
        return self.live(live, run.start("default", self.default))


class _Live:
    def __init__(self, cases: dict, default):
        self.cases, self.default = cases, default

    def parts(self, domains: list[str]):
        """(live part, long index of its rows) for every case that occurs."""
        rows: dict[str | None, list[int]] = {}
        for i, d in enumerate(domains):
            rows.setdefault(d if d in self.cases else None, []).append(i)
        for name, index in rows.items():
            yield (self.default if name is None else self.cases[name]), index


class _LiveAdvantage(_Live):
    def __call__(self, batch: Batch) -> torch.Tensor:
        out = torch.zeros(batch.ids.shape, device=batch.ids.device)
        for live, index in self.parts(batch.domain):
            rows = torch.tensor(index, device=out.device)
            piece = batch.select(rows)
            found = live(piece)
            width = piece.ids.shape[1]
            out[rows, :width] = found if found.ndim == 2 else found[:, None].expand(-1, width)
        return out


class _LiveObjective(_Live):
    def __call__(self, scores, batch: Batch) -> torch.Tensor:
        out = torch.zeros_like(scores.logps)
        for live, index in self.parts(batch.domain):
            rows = torch.tensor(index, device=out.device)
            matrix = live(scores, batch)
            out = out.index_copy(0, rows, (matrix if matrix.ndim == 2 else matrix[:, None].expand_as(out))[rows])
        return out


class _LiveReward(_Live):
    def score(self, rollouts):
        out: dict[str, torch.Tensor] = {}
        for live, index in self.parts([r.prompt.domain for r in rollouts]):
            for name, values in live.score([rollouts[i] for i in index]).items():
                out.setdefault(name, torch.zeros(len(rollouts)))[index] = torch.as_tensor(values, dtype=torch.float32)
        return out

    def total(self, scores, meta, step):
        out = torch.zeros(len(meta["rollouts"]))
        for live, index in self.parts([r.prompt.domain for r in meta["rollouts"]]):
            own = {k: v[index] for k, v in scores.items() if any(k in meta["rollouts"][i].scores for i in index)}
            out[index] = live.total(own, {"rollouts": [meta["rollouts"][i] for i in index]}, step)
        return out


class _LiveFilter(_Live):
    def __init__(self, cases, default):
        super().__init__(cases, default)
        every = [*cases.values(), default]
        self.refill = any(f.refill for f in every if f is not None)
        self.max_rounds = max((f.max_rounds for f in every if f is not None), default=0)

    def __call__(self, batch):
        keep, train = torch.ones_like(batch.train), batch.train.clone()
        for live, index in self.parts(batch.domain):
            if live is not None:
                rows = torch.tensor(index, device=keep.device)
                keep[rows], train[rows] = live(batch.select(rows))
        return keep, train


@part("by-domain")
class AdvantageByDomain(_Cases, Advantage):
    """Each domain's responses get their credit from that domain's advantage, with statistics over that domain alone."""

    cases: dict[str, Advantage] = field(default_factory=dict)
    default: Advantage = GroupNormalised()
    live = _LiveAdvantage


@part("by-domain")
class ObjectiveByDomain(_Cases, Objective):
    """Each domain's responses get their loss from that domain's objective; aggregation is the default's, over all of them."""

    cases: dict[str, Objective] = field(default_factory=dict)
    default: Objective = Clipped()
    live = _LiveObjective

    @property
    def aggregation(self):
        return self.default.aggregation


@part("by-domain")
class RewardByDomain(_Cases, Reward):
    """Each domain's responses are scored by that domain's reward."""

    cases: dict[str, Reward] = field(default_factory=dict)
    default: Reward = Verifier()
    live = _LiveReward


@part("by-domain")
class FilterByDomain(_Cases, Filter):
    """Each domain's groups are kept or dropped by that domain's filter (none: kept)."""

    cases: dict[str, Filter] = field(default_factory=dict)
    default: Filter | None = None
    live = _LiveFilter
