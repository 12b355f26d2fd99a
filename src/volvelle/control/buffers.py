"""Storage of rollouts and replay: one preallocated block per field, written row by row, read by index.

Blocks are [S, T, N, ...] (seeds, time, environments). NumPy writes, torch reads; both see the same memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from volvelle.core.errors import RunStopped, UserError
from volvelle.core.files import directory
from volvelle.core.parts import Part, part
from volvelle.core.schedule import Schedule, at

from .spaces import Spec
from .stacked import Streams
from .targets import n_step

Fields = dict[str, tuple[tuple[int, ...], Any]]  # name -> (shape, dtype); "obs/…" are the parts of an observation
TORCH = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool, "uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16,
         "int32": torch.int32, "uint16": torch.uint16}


def observation_fields(spec: Spec, prefix: str) -> Fields:
    """The fields that hold an observation: one under `prefix`, or one per part under "prefix/part"."""
    parts = spec.observations.fields()
    if spec.observations.single:
        return {prefix: next(iter(parts.values()))}
    return {f"{prefix}/{k}": v for k, v in parts.items()}


class Blocks:
    """Named blocks [S, T, N, ...] and the observations among them as one value.

    packed: the float32 fields lie side by side in one block, so that a sampled batch gathers them at once; each field is a view of it.
    """

    def __init__(self, seeds: int, steps: int, count: int, fields: Fields, packed: bool = False):
        self.seeds, self.steps, self.count = seeds, steps, count
        single = {k: tuple(shape) for k, (shape, dtype) in fields.items() if packed and np.dtype(dtype) == np.float32}
        self.wide = {k: shape for k, shape in single.items() if shape}  # these first, then the fields that are one number
        self.numbers = [k for k, shape in single.items() if not shape]
        self.widths = [*map(math.prod, self.wide.values()), len(self.numbers)]
        self.pack = torch.zeros(seeds, steps, count, sum(self.widths))
        views = self.columns(self.pack)
        self.tensors = {k: views[k] if k in views else torch.zeros(seeds, steps, count, *shape, dtype=TORCH[str(np.dtype(dtype))])
                        for k, (shape, dtype) in fields.items()}
        self.loose = {k: t for k, t in self.tensors.items() if k not in views}
        self.arrays = {k: t.numpy() for k, t in self.tensors.items()}
        self.parts = {k: [f for f in fields if f.startswith(f"{k}/")] for k in {f.partition("/")[0] for f in fields if "/" in f}}

    def write(self, t: int, name: str, value: Any) -> None:
        """Store [S, N, ...] (or a dict of such, for an observation) at time t."""
        if isinstance(value, dict):
            for k, v in value.items():
                self.arrays[f"{name}/{k}"][:, t] = v
        else:
            self.arrays[name][:, t] = value

    def columns(self, pack: Tensor) -> dict[str, Tensor]:
        """The packed fields, as views of rows [..., width] of the pack."""
        *wide, numbers = pack.split_with_sizes(self.widths, -1)
        found = {k: v if len(shape) == 1 else v.unflatten(-1, shape) for (k, shape), v in zip(self.wide.items(), wide)}
        found.update(zip(self.numbers, numbers.unbind(-1)))
        return found

    def packed(self, rows: Tensor) -> dict[str, Tensor]:
        """The packed fields of the rows [...] (seed, time and environment in one number)."""
        return self.columns(torch.index_select(self.pack.view(-1, self.pack.shape[-1]), 0, rows.view(-1)).view(*rows.shape, -1))

    def gather(self, rows: Tensor) -> dict[str, Any]:
        """All fields of the rows [S, B] (seed, time and environment in one number), observations as one value."""
        flat, shape = rows.view(-1), rows.shape
        found = self.packed(rows)
        for k, t in self.loose.items():
            found[k] = torch.index_select(t.view(-1, *t.shape[3:]), 0, flat).view(*shape, *t.shape[3:])
        for name, parts in self.parts.items():
            found[name] = {f.partition("/")[2]: found.pop(f) for f in parts}
        return found

    def read(self, name: str, function=lambda x: x) -> Any:
        """A field as a tensor, or an observation as a dict of tensors; `function` is applied to each."""
        if name in self.parts:
            return {f.partition("/")[2]: function(self.tensors[f]) for f in self.parts[name]}
        return function(self.tensors[name])


# ---------------------------------------------------------------------------------------------- replay

@dataclass(frozen=True, eq=False)
class ReplayPart(Part):
    """Slot: how past transitions are kept and drawn.

    capacity: transitions per seed; batch: transitions per seed and gradient step; n_step: rewards summed before the bootstrap.
    """

    slot: ClassVar[str] = "replay"
    capacity: Annotated[int, Field(gt=0)] = 1_000_000
    batch: Annotated[int, Field(gt=0)] = 256
    n_step: Annotated[int, Field(gt=0)] = 1

    def build(self, seeds: int, count: int, gamma: float, spec: Spec, extra: Fields, rng: Streams) -> Replay:
        if self.capacity < count or self.capacity % count:
            raise UserError(f"replay.capacity={self.capacity}: must be a multiple of the number of environments ({count})")
        return self.live(self, seeds, count, gamma, spec, extra, rng)

    @property
    def live(self) -> type[Replay]:
        return Replay


@part("uniform")
class Uniform(ReplayPart):
    """Every stored transition is as likely as any other."""


class Replay:
    """A ring of `capacity / N` time steps. `sample` returns a dict of tensors [S, B, ...]:

    obs, actions, rewards (n-step sums), next_obs, discounts (gamma^m, 0 after a termination), the extra fields, `rows` (where they stand).
    """

    wants_errors = False

    def __init__(self, part: ReplayPart, seeds: int, count: int, gamma: float, spec: Spec, extra: Fields, rng: Streams):
        self.part, self.gamma, self.rng = part, gamma, rng
        self.length = part.capacity // count
        actions = spec.actions
        fields: Fields = {**observation_fields(spec, "obs"), "actions": (actions.shape, actions.dtype), "rewards": ((), np.float32),
                          "terminated": ((), np.float32), "ended": ((), np.float32), **observation_fields(spec, "next_obs"), **extra}
        self.blocks = Blocks(seeds, self.length, count, fields, packed=True)
        self.starts = np.arange(seeds)[:, None] * (self.length * count)  # of every seed's rows among all
        self.seeds, self.count = seeds, count
        self.added = 0        # time steps written in all
        self.saved = 0        # of these, how many are on disk
        self.segments: list[str] = []
        self.rewritten = False  # set when stored rows were changed: the next save writes all of them again
        self.version = 0

    def __len__(self) -> int:
        """Transitions per seed."""
        return min(self.added, self.length) * self.count

    def add(self, obs: Any, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, ended: np.ndarray, next_obs: Any, **extra: Any) -> None:
        """One time step of every environment; all [S, N, ...]. next_obs is the true next observation, also at an end."""
        t, write = self.added % self.length, self.blocks.write
        write(t, "obs", obs)
        write(t, "actions", actions)
        write(t, "rewards", rewards)
        write(t, "terminated", terminated)
        write(t, "ended", ended)
        write(t, "next_obs", next_obs)
        for name, value in extra.items():
            write(t, name, value)
        self.added += 1

    def cut(self) -> None:
        """Close all open episodes: the next step begins new ones."""
        if self.added:
            self.blocks.arrays["ended"][:, (self.added - 1) % self.length] = True

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows [S, B] within each seed (time * N + environment), and importance weights or None."""
        return self.rng.integers(len(self), self.part.batch), None

    def sample(self, step: int = 0) -> dict[str, Any]:
        rows, weights = self.draw(step)
        place = torch.from_numpy(rows + self.starts)
        batch = self.blocks.gather(place)
        if self.part.n_step == 1:
            batch["discounts"] = torch.rsub(batch.pop("terminated"), self.gamma, alpha=self.gamma)  # gamma (1 - terminated)
        else:
            batch["rewards"], batch["discounts"], last = self._n_step(rows)
            batch["next_obs"] = self.blocks.gather(last + torch.from_numpy(self.starts))["next_obs"]
            del batch["terminated"]
        del batch["ended"]
        batch["rows"] = place
        if weights is not None:
            batch["weights"] = torch.from_numpy(weights)
        return batch

    def _n_step(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        n, ring = self.part.n_step, self.length * self.count
        ahead = np.arange(n)
        window = (rows[..., None] + ahead * self.count) % ring                                  # [S, B, n]
        newest = (self.added - 1) % self.length
        left = (newest - rows // self.count) % self.length                                      # steps after this row
        steps = window.reshape(self.seeds, -1) + self.starts
        rewards, terminated, ended = map(self.blocks.packed(torch.from_numpy(steps).view(window.shape)).get, ("rewards", "terminated", "ended"))
        ended = (ended > 0) | torch.from_numpy(ahead >= left[..., None])
        total, discount, last = n_step(rewards, terminated > 0, ended, self.gamma)
        return total, discount, torch.gather(torch.from_numpy(window), -1, last.unsqueeze(-1)).squeeze(-1)

    def learnt(self, batch: dict[str, Any], errors: Tensor) -> None:
        """Tell the buffer the absolute errors [S, B] of a batch it gave (where `wants_errors`)."""

    # ---- checkpoints: rows since the last one go to a segment file of their own; a checkpoint only lists its segments

    def save(self, folder: Path) -> None:
        """Write the rows added since the last save; drop files that the last checkpoint no longer listed."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("rows-*"):
            if path.name not in self.segments:
                path.unlink() if path.is_file() else [p.unlink() for p in path.iterdir()] and path.rmdir()
        oldest = max(0, self.added - self.length)
        start = oldest if self.rewritten else max(self.saved, oldest)
        if self.rewritten:
            self.segments, self.version = [], self.version + 1
        if start < self.added:
            when = np.arange(start, self.added) % self.length
            name = f"rows-{start:09d}-{self.added:09d}" + (f"-v{self.version}" if self.version else "")
            with directory(folder / name) as made:
                save_file({k: t[:, when].contiguous() for k, t in self.blocks.tensors.items()}, str(made / "rows.safetensors"))
            self.segments = [*self.segments, name]
        self.segments = [s for s in self.segments if int(s.split("-")[2]) > oldest]
        self.saved, self.rewritten = self.added, False

    def state_dict(self) -> dict[str, Any]:
        return {"added": self.added, "segments": list(self.segments), "version": self.version}

    def load(self, state: dict[str, Any], folder: Path) -> None:
        self.added = self.saved = state["added"]
        self.segments, self.version = list(state["segments"]), state["version"]
        for name in self.segments:
            start, stop = name.split("-")[1:3]
            path = folder / name / "rows.safetensors"
            if not path.is_file():
                raise RunStopped(f"the replay buffer's file {path} is missing")
            rows = load_file(str(path))
            when = np.arange(int(start), int(stop)) % self.length
            for key, tensor in self.blocks.tensors.items():
                if key not in rows or rows[key].shape[2:] != tensor.shape[2:]:
                    raise RunStopped(f"the replay buffer's file {path} does not fit this task: {key!r}")
                tensor[:, when] = rows[key]


# ---------------------------------------------------------------------------------------------- prioritised

@part("prioritised")
class Prioritised(ReplayPart):
    """Transitions are drawn in proportion to (|error| + eps)^alpha; weights (n p)^-beta, divided by their largest (arXiv 1511.05952).

    beta is a number or a schedule over gradient steps.
    """

    alpha: Annotated[float, Field(ge=0)] = 0.6
    beta: Annotated[float, Field(ge=0, le=1)] | Schedule = 0.4
    eps: Annotated[float, Field(gt=0)] = 1e-6

    @property
    def live(self):
        return PrioritisedReplay


class PrioritisedReplay(Replay):
    wants_errors = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.tree = SumTree(self.seeds, self.length * self.count)
        self.largest = np.ones(self.seeds)

    def add(self, *values, **more):
        t = self.added % self.length
        super().add(*values, **more)
        rows = np.broadcast_to(t * self.count + np.arange(self.count), (self.seeds, self.count))
        self.tree.set(rows, np.broadcast_to(self.largest[:, None] ** self.part.alpha, rows.shape))

    def draw(self, step):
        batch = self.part.batch
        where = (np.arange(batch) + self.rng.uniform(batch).astype(np.float64)) / batch         # one draw per equal share
        rows, share = self.tree.find(where)
        weights = (len(self) * share) ** -at(self.part.beta, step)
        return rows, (weights / weights.max(1, keepdims=True)).astype(np.float32)

    def learnt(self, batch, errors):
        rows = batch["rows"].numpy() - self.starts
        sizes = errors.detach().cpu().double().abs().numpy() + self.part.eps
        self.largest = np.maximum(self.largest, sizes.max(1))
        self.tree.set(rows, sizes**self.part.alpha)

    def state_dict(self):
        return super().state_dict() | {"priorities": self.tree.leaves()[:, : len(self)].copy(), "largest": self.largest.copy()}

    def load(self, state, folder):
        super().load(state, folder)
        self.largest, saved = state["largest"].copy(), state["priorities"]
        self.tree.set(np.broadcast_to(np.arange(saved.shape[1]), saved.shape), saved)


class SumTree:
    """Sums over a binary tree of non-negative weights, one tree per seed; all operations work on whole batches."""

    def __init__(self, seeds: int, size: int):
        self.size = 1 << max(0, size - 1).bit_length()
        self.nodes = np.zeros((seeds, 2 * self.size))
        self.seed = np.arange(seeds)[:, None]

    def leaves(self) -> np.ndarray:
        return self.nodes[:, self.size :]

    def set(self, rows: np.ndarray, weights: np.ndarray) -> None:
        """rows [S, B]; of a row given twice the last weight stays."""
        at_ = rows + self.size
        self.nodes[self.seed, at_] = weights
        while at_[0, 0] > 1:
            at_ = at_ >> 1
            self.nodes[self.seed, at_] = self.nodes[self.seed, 2 * at_] + self.nodes[self.seed, 2 * at_ + 1]

    def find(self, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows at the given shares [S, B] in [0, 1) of the total, and each row's part of the total."""
        total = self.nodes[:, 1:2]
        left = shares * total
        at_ = np.ones(shares.shape, np.int64)
        while at_[0, 0] < self.size:
            at_ = 2 * at_
            here = self.nodes[self.seed, at_]
            # past this child's sum, and never into an empty one: rounding must not reach rows that hold nothing
            right = (left >= here) & (self.nodes[self.seed, at_ + 1] > 0)
            left = np.where(right, left - here, np.minimum(left, here))
            at_ = at_ + right
        return at_ - self.size, self.nodes[self.seed, at_] / total


