"""Grid worlds in batches: L levels with W copies each step as one tensor operation (the levels of arXiv 2007.08794 and 2310.02782).

A level is a square of cells with walls, a start, objects and an episode length. Actions: up, down, left, right, stay; leaving the square or entering
a wall is staying. One step: move; an object that was there before the step on the new cell is collected; absent objects return, each with its own
probability; what was collected is gone for the next step; the reward is the sum of collected rewards, the episode ends with the sum of collected
probabilities of ending, or at the level's length. Ended copies start again within the step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

ACTIONS = 5


@dataclass
class Levels:
    """L levels of up to C cells and O objects.

    size [L]: cells per side (cell = row * size + column); walls [L, C] bool; start [L]; place [L, O]: cells of objects; owned [L, O] bool: which
    objects the level has; reward, ends, returns [L, O]: reward of an object, probability that collecting it ends the episode, probability per
    step that it comes back; limit [L]: steps per episode; lifetime [L]: updates of an agent that learns here.
    """

    size: Tensor
    walls: Tensor
    start: Tensor
    place: Tensor
    owned: Tensor
    reward: Tensor
    ends: Tensor
    returns: Tensor
    limit: Tensor
    lifetime: Tensor

    def __len__(self):
        return len(self.size)

    @property
    def cells(self) -> int:
        return self.walls.shape[1]

    @property
    def objects(self) -> int:
        return self.place.shape[1]

    @property
    def states(self) -> int:
        """Tabular states: cell + cells * sum of 2^i over the objects i that are there."""
        return self.cells * 2**self.objects

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __getitem__(self, index: Tensor | slice) -> Levels:
        return Levels(**{k: v[index] for k, v in self.tensors().items()})

    def put(self, index: Tensor, other: Levels) -> None:
        """Overwrite the levels at `index`."""
        for name, value in self.tensors().items():
            value[index] = getattr(other, name)

    def to(self, device) -> Levels:
        return Levels(**{k: v.to(device) for k, v in self.tensors().items()})

    def clone(self) -> Levels:
        return Levels(**{k: v.clone() for k, v in self.tensors().items()})

    def moves(self) -> Tensor:
        """[L, C, 5]: the cell after each action. Cells beyond the square lead to themselves."""
        cell = torch.arange(self.cells, device=self.size.device).expand(len(self), -1)
        size = self.size[:, None]
        row, column = cell // size, cell % size
        ways = [(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)]
        found = []
        for down, right in ways:
            r, c = row + down, column + right
            inside = (r >= 0) & (r < size) & (c >= 0) & (c < size) & (cell < size**2)
            target = torch.where(inside, r * size + c, cell)
            found.append(torch.where(self.walls.gather(1, target), cell, target))
        return torch.stack(found, -1)


def join(levels: list[Levels]) -> Levels:
    """Levels of one shape, one batch after the other."""
    return Levels(**{f.name: torch.cat([getattr(one, f.name) for one in levels]) for f in fields(Levels)})


class Worlds:
    """W copies of each of L levels in play: cell, time [L, W], there [L, W, O] (objects present)."""

    def __init__(self, levels: Levels, workers: int):
        self.levels, self.workers = levels, workers
        L, device = len(levels), levels.size.device
        self.cell, self.time = (torch.zeros(L, workers, dtype=torch.long, device=device) for _ in range(2))
        self.there = torch.zeros(L, workers, levels.objects, dtype=torch.bool, device=device)
        self.refresh()
        self.restart(torch.arange(L, device=device))

    def refresh(self) -> None:
        """Read the levels again, after they were changed."""
        levels = self.levels
        self.flat = levels.moves().reshape(-1)
        self.base = (torch.arange(len(levels), device=levels.size.device) * (levels.cells * ACTIONS))[:, None]
        self.place, self.owned = levels.place[:, None], levels.owned[:, None]
        self.reward, self.ends = (torch.where(levels.owned, x, 0.0)[:, None] for x in (levels.reward, levels.ends))
        self.comeback = torch.where(levels.owned, levels.returns, 0.0)[:, None]
        self.start, self.limit = levels.start[:, None], levels.limit[:, None]
        self.bits = (levels.cells * 2 ** torch.arange(levels.objects, device=levels.size.device))

    def restart(self, index: Tensor) -> None:
        """New episodes in all copies of these levels."""
        self.cell[index], self.time[index] = self.start[index].expand(-1, self.workers).clone(), 0
        self.there[index] = self.owned[index].expand(-1, self.workers, -1).clone()

    def states(self) -> Tensor:
        """[L, W]: the tabular state of every copy."""
        return self.cell + (self.there * self.bits).sum(-1)

    def step(self, actions: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """actions [L, W]; uniform [L, W, O + 1] numbers in [0, 1). Returns (rewards, done [bool]), both [L, W]."""
        cell = self.flat[self.base + self.cell * ACTIONS + actions]
        taken = self.there & (self.place == cell[..., None])
        rewards = (taken * self.reward).sum(-1)
        self.time += 1
        done = (uniform[..., -1] < (taken * self.ends).sum(-1)) | (self.time >= self.limit)
        self.there = torch.where(done[..., None], self.owned, (self.there | (uniform[..., :-1] < self.comeback)) & ~taken)
        self.cell = torch.where(done, self.start, cell)
        self.time.masked_fill_(done, 0)
        return rewards, done

    def state_dict(self) -> dict[str, Tensor]:
        return {"cell": self.cell, "time": self.time, "there": self.there}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in ("cell", "time", "there"):
            setattr(self, name, state[name].to(self.cell.device).clone())
        self.refresh()


def optimal_returns(levels: Levels, actions: bool = False):
    """The largest expected undiscounted return of an episode, exactly: [L].

    actions: also the maximising actions by steps played, [limit, L, states] int8. Backward induction over cells, objects present and steps left;
    objects come back independently, so the expectation over which are present is taken one object at a time.
    """
    L, C, O = len(levels), levels.cells, levels.objects
    moves, horizon = levels.moves(), int(levels.limit.max())
    dtype, device = torch.float64, levels.size.device
    rows = torch.arange(L, device=device)
    gain, ending = torch.zeros(L, *(2,) * O, C, dtype=dtype, device=device), torch.zeros(L, *(2,) * O, C, dtype=dtype, device=device)
    for i in range(O):
        for table, value in ((gain, levels.reward), (ending, levels.ends)):
            view = table.movedim(1 + i, 1)[:, 1]                   # object i there
            flat = view.movedim(-1, 1)                              # [L, C, ...]
            flat[rows, levels.place[:, i]] += torch.where(levels.owned[:, i], value[:, i], 0.0).to(dtype).view(L, *(1,) * (O - 1))
    going = 1 - ending.clamp(max=1.0)
    targets = moves.view(L, *(1,) * O, C, ACTIONS)
    value, chosen = torch.zeros_like(gain), []
    comeback = torch.where(levels.owned, levels.returns, 0.0).to(dtype)
    for step in range(horizon - 1, -1, -1):
        after = value
        for i in range(O):
            x = after.movedim(1 + i, 1)                             # [L, 2, ..., C]
            p = comeback[:, i].view(L, *(1,) * O)
            absent, there = (1 - p) * x[:, 0] + p * x[:, 1], x[:, 1].clone()
            there.movedim(-1, 1)[rows, levels.place[:, i]] = x[:, 0].movedim(-1, 1)[rows, levels.place[:, i]]  # collected: surely absent next
            after = torch.stack([absent, there], 1).movedim(1, 1 + i)
        worth = gain + going * after                                # of arriving in a cell
        q = worth.unsqueeze(-1).expand(*worth.shape, ACTIONS).gather(-2, targets.expand(*worth.shape, ACTIONS))
        best, which = q.max(-1)
        playing = (step < levels.limit).view(L, *(1,) * (O + 1))
        value = torch.where(playing, best, 0.0)
        if actions:
            chosen.append(which.permute(0, *range(O, 0, -1), O + 1).reshape(L, -1).to(torch.int8))
    first = value.permute(0, *range(O, 0, -1), O + 1).reshape(L, -1)  # object 0 is the lowest bit, so the last axis but the cells'
    state = levels.start + (levels.owned * levels.cells * 2 ** torch.arange(O, device=device)).sum(-1)
    found = first.gather(1, state[:, None])[:, 0]
    return (found, torch.stack(chosen[::-1])) if actions else found
