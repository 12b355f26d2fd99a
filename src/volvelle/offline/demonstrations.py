"""Imitation from a few demonstrations and a dataset of unknown quality: batches of one half each, without rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from volvelle.control.learner import Count
from volvelle.control.stacked import Streams
from volvelle.core.errors import UserError
from volvelle.core.parts import part
from volvelle.core.tasks import Task

from .data.dataset import Dataset
from .samplers import BatchSampler, Table


def joined(data: Dataset, expert: Dataset) -> Dataset:
    """Both one behind the other, with the fields that imitation needs. UserError if observations or actions differ."""
    if expert.spec != data.spec:
        raise UserError(f"sampler.expert={expert.label()} has {expert.spec.describe()}; the dataset {data.label()} has {data.spec.describe()}")
    names = [*data.observation_names, "actions", "terminated", "truncated"]
    return Dataset({n: np.concatenate([data.fields[n], expert.fields[n]]) for n in names}, np.concatenate([data.lengths, expert.lengths]), data.spec,
                   data.states & set(names), data.observation_space, data.action_space, dict(data.meta))


def apart_from(data: Dataset, expert: Dataset) -> np.ndarray:
    """The steps of a dataset that begin in no state of another's."""
    flat = [np.concatenate([np.asarray(d.fields[n]).reshape(len(d.fields[n]), -1) for n in data.observation_names], 1) for d in (data, expert)]
    known = {row.tobytes() for row in flat[1][expert.rows].astype(np.float64)}
    return np.array([r for r in data.rows if flat[0][r].astype(np.float64).tobytes() not in known], np.int64)


@part("demonstrations")
class Demonstrations(BatchSampler):
    """Rows 0 ... B - 1 of a batch come from the task's dataset, rows B ... 2B - 1 from the demonstrations; rewards are not read.

    expert: the dataset of demonstrations; episodes: only its first so many; merge: its steps belong to the first half too; apart: leave out the steps
    of the task's dataset that begin in a state of the demonstrations, so that it does not cover them; alone: the demonstrations' half only (for bc).
    The batch: obs, actions, next_obs, discounts (gamma, 0 after a termination), initial_obs (first states, as the rows), rows (of both datasets joined).
    """

    expert: Task | None = None
    episodes: Count | None = None
    merge: bool = True
    apart: bool = False
    alone: bool = False

    def build(self, table, rng, batch, gamma):
        if self.expert is None or not hasattr(self.expert, "dataset"):
            shown = "none" if self.expert is None else self.expert.label()
            raise UserError(f"sampler.expert={shown}: no demonstrations; accepted: a dataset, for example sampler.expert=offline:PATH or pendulum-expert")
        expert = self.expert.dataset()
        if self.episodes is not None and self.episodes > len(expert):
            raise UserError(f"sampler.episodes={self.episodes}: {expert.label()} has {len(expert)} episodes")
        expert = expert if self.episodes is None else expert.take(np.arange(self.episodes))
        return LiveDemonstrations(self, table, expert, rng, batch, gamma)


class LiveDemonstrations:
    def __init__(self, part: Demonstrations, table: Table, expert: Dataset, rng: Streams, batch: int, gamma: float):
        whole, data = joined(table.data, expert), table.data
        self.table = Table(whole, table.normaliser, table.device)
        self.part, self.rng, self.batch, self.gamma = part, rng, batch, gamma
        self.expert = whole.rows[whole.rows > data.lasts[-1]]
        first = apart_from(data, expert) if part.apart else data.rows
        self.first = np.concatenate([first, self.expert]) if part.merge else first
        if not part.alone and not len(self.first):
            raise UserError(f"sampler.apart=true leaves no step of {data.label()}")
        self.starts = (whole.firsts[: len(data)], whole.firsts[len(data):])

    def pick(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        sources = (second,) if self.part.alone else (first, second)
        return np.concatenate([s[self.rng.integers(len(s), self.batch)] for s in sources], 1)

    def draw(self) -> dict[str, Any]:
        rows, starts = self.pick(self.first, self.expert), self.pick(*self.starts)
        found = self.table.states(np.stack([rows, rows + 1, starts], 1))
        each = [{k: v[:, i] for k, v in found.items()} if isinstance(found, dict) else found[:, i] for i in range(3)]
        taken = self.table.take(rows, ("actions", "terminated"))
        return {"obs": each[0], "next_obs": each[1], "initial_obs": each[2], "actions": taken["actions"],
                "discounts": torch.rsub(taken["terminated"], self.gamma, alpha=self.gamma), "rows": torch.from_numpy(rows)}
