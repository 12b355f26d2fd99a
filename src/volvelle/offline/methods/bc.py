"""Behaviour cloning: imitate the recorded actions, all of them or those of the best episodes.

Problem: learn to act from recordings alone, without rewards.
Idea: maximise the likelihood of the recorded action in the recorded state (head=around, head=categorical), or with head=none regress a
deterministic tanh policy on it by squared error. `best` keeps only that share of the episodes with the highest discounted return (10 % BC).
Pick it when the recordings are good, and as the baseline every other offline method must beat. It cannot be better than what it imitates.
Source: for the best-episodes form and its scores see the comparison in arXiv 2106.01345.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field

from volvelle.control.heads import PolicyHead
from volvelle.control.methods.td3 import Actor
from volvelle.control.networks import MLP, Network
from volvelle.control.speed import descent
from volvelle.control.stacked import Streams, make
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, Optimiser

from ..data.dataset import Dataset
from ..heads import AroundMean
from ..learner import Offline
from ..policies import HeadPolicy
from ..samplers import BatchSampler, Table

Share = Annotated[float, Field(gt=0, le=1)]


def best_episodes(data: Dataset, share: float, gamma: float) -> np.ndarray:
    """The episodes with the highest discounted return, at least one: round(share * E) of them."""
    rewards = np.asarray(data.fields["rewards"], np.float64)
    returns = np.array([rewards[a:b] @ gamma ** np.arange(b - a) for a, b in zip(data.firsts, data.lasts)])
    return np.sort(np.argsort(-returns, kind="stable")[: max(1, round(share * len(returns)))])


@part("recorded-actions")
class RecordedActions(BatchSampler):
    """Steps with their actions; no rewards needed. best: only the share of the episodes with the highest discounted return."""

    best: Share = 1.0

    def build(self, table, rng, batch, gamma):
        steps = table.data.rows
        if self.best < 1:
            table.data.require("sampler.best", "rewards")
            steps = steps[np.isin(table.data.episode_of[steps], best_episodes(table.data, self.best, gamma))]
        return _Recorded(table, rng, batch, steps)


class _Recorded:
    def __init__(self, table: Table, rng: Streams, batch: int, steps: np.ndarray):
        self.table, self.rng, self.batch, self.steps = table, rng, batch, steps

    def draw(self):
        rows = self.steps[self.rng.integers(len(self.steps), self.batch)]
        return self.table.take(rows) | {"obs": self.table.states(rows)}


@part("behaviour-cloning")
class BC(Offline):
    """head: none for a deterministic policy and squared error (mean over batch and action dimensions)."""

    needs: ClassVar[tuple[str, ...]] = ()
    sampler: BatchSampler = RecordedActions()
    network: Network = MLP(hidden=(256, 256), activation="relu")
    head: PolicyHead | None = AroundMean()
    optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    exploration: float = 0.0

    def actor(self, spec, seeds):
        return Actor(self, spec, seeds) if self.head is None else HeadPolicy(self.network, self.head, spec, seeds)

    def agent(self, run, spec, data):
        return BCAgent(run, self, spec)


class BCAgent:
    """The algorithm."""

    def __init__(self, run, part: BC, spec):
        self.part, self.module = part, part.actor(spec, part.seeds)
        self.policy = make(run, "actor", self.module, part.optimiser, part.seeds)
        self.size = sum(p.numel() for p in self.module.parameters())
        self.descend = descent(run, self.policy, self.loss)

    def loss(self, batch) -> torch.Tensor:
        """Per seed: -mean log pi(a|s), or the mean squared error of the deterministic action in units of half the range."""
        if self.part.head is None:
            return ((self.module(batch["obs"]) - batch["actions"]) / self.module.scale).square().flatten(1).mean(-1)
        return -self.module.log_prob(batch["obs"], batch["actions"]).mean(-1)

    def update(self, batch):
        return {"loss": self.descend(batch), "norm": self.policy.step()}

    def report(self, made):
        return {"loss/actor": made["loss"], "gradient_norm": made["norm"]}


bc = method("bc", BC(), title="behaviour cloning", source="see arXiv 2106.01345")
