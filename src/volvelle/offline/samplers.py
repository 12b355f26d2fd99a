"""Batches from a dataset: rows drawn per seed, gathered as tensors [S, B, ...].

A sampler is a part; `build` binds it to a dataset. What it returns is an open dict: methods with further needs (option ends, subgoals, segments)
bring their own sampler in their file and reuse `Table` and the functions of `goals.py`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from volvelle.control.normalise import ObservationNormaliser
from volvelle.control.stacked import Streams
from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part

from .data.dataset import STANDARD, Dataset


class Table:
    """The rows of a dataset as tensors. `take(rows)` gathers the fields of steps, `states(rows)` observations, `field(name, rows)` one field.

    rows: NumPy or torch integers [S, B, ...]; the results have these axes in front. Observations are normalised if a normaliser is given. All
    float32 fields of a step lie side by side, so that a batch gathers them at once; of a mapped dataset every field is read for itself.
    """

    def __init__(self, data: Dataset, normaliser: ObservationNormaliser | None = None, device: torch.device | str = "cpu"):
        self.data, self.device, self.later, self.normaliser = data, device, None, normaliser
        self.parts = {n: torch.from_numpy(data.fields[n]) for n in data.observation_names}
        if normaliser is not None:
            name = "obs" if "obs" in self.parts else "obs/vector"
            if data.mapped:
                self.later = (name, normaliser)
            else:
                self.parts[name] = torch.from_numpy(normaliser(np.asarray(data.fields[name])[None])[0].astype(np.float32))
        rest = {n: torch.from_numpy(v) for n, v in data.fields.items() if n not in data.observation_names}
        flat = {} if data.mapped else {n: v for n, v in rest.items() if v.dtype == torch.float32}
        self.columns: dict[str, tuple[slice, tuple[int, ...]]] = {}
        place = 0
        for name, value in flat.items():
            width = math.prod(value.shape[1:])
            self.columns[name] = (slice(place, place := place + width), tuple(value.shape[1:]))
        self.pack = torch.cat([v.reshape(len(v), -1) for v in flat.values()], 1).to(device) if flat else None
        self.others = {n: v if data.mapped else v.to(device) for n, v in rest.items() if n not in flat}
        self.parts = self.parts if data.mapped else {n: v.to(device) for n, v in self.parts.items()}

    def _rows(self, rows: np.ndarray | Tensor) -> tuple[Tensor, tuple[int, ...]]:
        rows = torch.from_numpy(np.ascontiguousarray(rows)) if isinstance(rows, np.ndarray) else rows
        return rows.reshape(-1).to("cpu" if self.data.mapped else self.device), tuple(rows.shape)

    def _pick(self, values: Tensor, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.index_select(values, 0, flat).view(*shape, *values.shape[1:]).to(self.device)

    def states(self, rows: np.ndarray | Tensor) -> Any:
        """Observations of any rows: one tensor, or a dict of parts."""
        flat, shape = self._rows(rows)
        found = {n: self._pick(v, flat, shape) for n, v in self.parts.items()}
        if self.later is not None:
            name, normaliser = self.later
            found[name] = torch.from_numpy(normaliser(found[name].cpu().numpy().reshape(1, -1, found[name].shape[-1]))[0].astype(np.float32)).view(found[name].shape).to(self.device)
        return found["obs"] if "obs" in found else {n.partition("/")[2]: v for n, v in found.items()}

    def field(self, name: str, rows: np.ndarray | Tensor) -> Tensor:
        flat, shape = self._rows(rows)
        if name in self.columns:
            where, tail = self.columns[name]
            return torch.index_select(self.pack[:, where], 0, flat).view(*shape, *tail)
        return self._pick(self.others[name], flat, shape)

    def take(self, rows: np.ndarray | Tensor, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """Fields of steps by name; None: all but observations."""
        flat, shape = self._rows(rows)
        found: dict[str, Tensor] = {}
        if self.pack is not None:
            packed = torch.index_select(self.pack, 0, flat).view(*shape, -1)
            for name, (where, tail) in self.columns.items():
                if names is None or name in names:
                    found[name] = packed[..., where.start] if not tail else packed[..., where].unflatten(-1, tail) if len(tail) > 1 else packed[..., where]
        for name, values in self.others.items():
            if names is None or name in names:
                found[name] = self._pick(values, flat, shape)
        return found


class BatchSampler(Part):
    """Slot: `build(table, rng, batch, gamma)` returns an object whose `draw()` gives a batch, a dict of tensors [S, B, ...]."""

    slot: ClassVar[str] = "sampler"

    def build(self, table: Table, rng: Streams, batch: int, gamma: float) -> Any:
        raise NotImplementedError


@part("transitions")
class Transitions(BatchSampler):
    """Every step is as likely as any other.

    The batch: obs, actions, rewards, discounts (gamma, 0 after a termination), next_obs, every extra field under its own name, rows.
    """

    def build(self, table, rng, batch, gamma):
        table.data.require("this method", "rewards")
        return _Transitions(table, rng, batch, gamma)


class _Transitions:
    def __init__(self, table: Table, rng: Streams, batch: int, gamma: float):
        self.table, self.rng, self.batch, self.gamma = table, rng, batch, gamma
        self.steps = table.data.rows

    def draw(self) -> dict[str, Any]:
        table = self.table
        rows = self.steps[self.rng.integers(len(self.steps), self.batch)]
        both = table.states(np.concatenate([rows, rows + 1], 1))
        batch: dict[str, Any] = table.take(rows)
        cut = self.batch
        if isinstance(both, dict):
            batch["obs"], batch["next_obs"] = {k: v[:, :cut] for k, v in both.items()}, {k: v[:, cut:] for k, v in both.items()}
        else:
            batch["obs"], batch["next_obs"] = both[:, :cut], both[:, cut:]
        batch["discounts"] = torch.rsub(batch.pop("terminated"), self.gamma, alpha=self.gamma)
        batch.pop("truncated")
        batch["rows"] = torch.from_numpy(rows)
        return batch


def reserved(data: Dataset, names: tuple[str, ...]) -> None:
    """UserError if an extra field of the dataset has the name of one that a sampler makes."""
    if clash := set(data.extras) & (set(names) - set(STANDARD)):
        raise UserError(f"dataset {data.label()}: its field {min(clash)!r} has the name of a field of the batch; rename it")
