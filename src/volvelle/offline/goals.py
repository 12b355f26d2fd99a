"""Goals drawn from the data, as OGBench defines them (arXiv 2410.20092): the present state, a later state of the same trajectory, a random state.

The functions are pure: row numbers and uniform numbers in, row numbers out. A goal is a row; "reached" means the same row, not the same place.
The last goal of a trajectory is the state of its last step: the final observation begins no step, so nothing could be learnt to value it.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.spaces import Layout, Observation
from volvelle.control.stacked import Streams
from volvelle.core.errors import UserError
from volvelle.core.parts import part

from .data.dataset import Dataset
from .samplers import BatchSampler, Table, reserved

Share = Annotated[float, Field(ge=0, le=1)]


def trajectory_goals(rows: np.ndarray, finals: np.ndarray, chance: np.ndarray, gamma: float | None) -> np.ndarray:
    """Later rows of the same trajectory: min(row + Geometric(1 - gamma), final); gamma=None: uniform in (row, final].

    chance: uniform in [0, 1). A row that is the final one is its own goal.
    """
    if gamma is None:
        return np.rint(np.minimum(rows + 1, finals) * chance + finals * (1 - chance)).astype(np.int64)
    steps = 1 + np.floor(np.log1p(-chance.astype(np.float64)) / np.log(gamma))
    return np.minimum(rows + steps, finals).astype(np.int64)


def mixed_goals(rows: np.ndarray, trajectory: np.ndarray, random: np.ndarray, chances: tuple[np.ndarray, np.ndarray], current: float, share: float) -> np.ndarray:
    """The present row with probability `current`, a trajectory goal with `share`, else a random one. chances: two sets of uniform numbers."""
    later = chances[0] < (share / (1 - current) if current < 1 else 0.0)
    return np.where(chances[1] < current, rows, np.where(later, trajectory, random))


class GoalRows:
    """Rows and goals of a dataset by number, each seed with its own random numbers; all [S, B]."""

    def __init__(self, data: Dataset, rng: Streams, gamma: float):
        self.data, self.rng, self.gamma = data, rng, gamma
        self.steps = data.rows
        self.finals = (data.lasts - 1)[data.episode_of]  # the last goal of every row's trajectory

    def rows(self, batch: int) -> np.ndarray:
        return self.steps[self.rng.integers(len(self.steps), batch)]

    def random(self, batch: int) -> np.ndarray:
        return self.steps[self.rng.integers(len(self.steps), batch)]

    def later(self, rows: np.ndarray, geometric: bool) -> np.ndarray:
        return trajectory_goals(rows, self.finals[rows], self.rng.uniform(rows.shape[1]), self.gamma if geometric else None)

    def goals(self, rows: np.ndarray, current: float, trajectory: float, geometric: bool) -> np.ndarray:
        later, n = self.later(rows, geometric), rows.shape[1]
        return mixed_goals(rows, later, self.random(n), (self.rng.uniform(n), self.rng.uniform(n)), current, trajectory)

    def ahead(self, rows: np.ndarray, steps: int) -> np.ndarray:
        """So many steps ahead, at most the trajectory's last goal."""
        return np.minimum(rows + steps, self.finals[rows])


@part("goals")
class Goals(BatchSampler):
    """Hindsight goals for a value function and for an actor.

    The shares of present, trajectory and random goals must add up to 1; *_geometric: trajectory goals at geometric distance (1 - gamma), else uniform.
    The batch: obs, actions, next_obs, value_goals, actor_goals, rewards (0 where the value goal is the row itself, else -1), masks (1 where it is
    not), extra fields, rows. reward_shift: rewards are success plus this.
    """

    value_current: Share = 0.2
    value_trajectory: Share = 0.5
    value_random: Share = 0.3
    value_geometric: bool = True
    actor_current: Share = 0.0
    actor_trajectory: Share = 1.0
    actor_random: Share = 0.0
    actor_geometric: bool = False
    reward_shift: float = -1.0

    def __post_init__(self):
        super().__post_init__()
        for who in ("value", "actor"):
            shares = [getattr(self, f"{who}_{kind}") for kind in ("current", "trajectory", "random")]
            if abs(sum(shares) - 1) > 1e-6:
                raise UserError(f"sampler: {who}_current + {who}_trajectory + {who}_random = {sum(shares):g}; the shares must add up to 1")

    def build(self, table, rng, batch, gamma):
        reserved(table.data, ("value_goals", "actor_goals", "masks", "rows", "next_obs"))
        return LiveGoals(self, table, rng, batch, gamma)


class LiveGoals:
    """`draw()` chooses rows, `gather(rows)` what belongs to them; samplers of methods extend the latter."""

    def __init__(self, part: Goals, table: Table, rng: Streams, batch: int, gamma: float):
        self.part, self.table, self.batch = part, table, batch
        self.numbers = GoalRows(table.data, rng, gamma)

    def draw(self) -> dict[str, Any]:
        return self.gather(self.numbers.rows(self.batch))

    def gather(self, rows: np.ndarray) -> dict[str, Any]:
        part, numbers = self.part, self.numbers
        value = numbers.goals(rows, part.value_current, part.value_trajectory, part.value_geometric)
        actor = numbers.goals(rows, part.actor_current, part.actor_trajectory, part.actor_geometric)
        names = ("obs", "next_obs", "value_goals", "actor_goals")
        return self.value_batch(rows, value) | dict(zip(names, self.states(rows, rows + 1, value, actor), strict=True))

    def value_batch(self, rows: np.ndarray, goals: np.ndarray) -> dict[str, Any]:
        """The fields of the steps, rewards and masks for those goals, rows."""
        batch: dict[str, Any] = self.table.take(rows)
        for name in ("rewards", "terminated", "truncated"):
            batch.pop(name, None)
        reached = torch.from_numpy((goals == rows).astype(np.float32)).to(self.table.device)
        return batch | {"rewards": reached + self.part.reward_shift, "masks": 1 - reached, "rows": torch.from_numpy(rows)}

    def states(self, *rows: np.ndarray) -> list[Observation]:
        """Observations of several sets of rows [S, B], gathered at once."""
        found = self.table.states(np.stack(rows, 1))
        if isinstance(found, dict):
            return [{k: v[:, i] for k, v in found.items()} for i in range(len(rows))]
        return list(found.unbind(1))


# ---------------------------------------------------------------------------------------------- states and goals for the networks

def split(layout: Layout) -> tuple[Layout, int]:
    """The layout of the state alone, and how many numbers the goal has. UserError without a goal."""
    if not layout.goal or layout.images:
        raise UserError(f"goals: the observations are {layout.describe()}; goal-conditioned methods need one vector with the goal at its end")
    return Layout(vector=layout.vector - layout.goal), layout.goal


def apart(observations: Tensor, goal: int) -> tuple[Tensor, Tensor]:
    """[..., state + goal] -> state, goal."""
    return observations[..., :-goal], observations[..., -goal:]


def together(states: Tensor, goals: Tensor) -> Tensor:
    """State and goal side by side, as the policy meets them: [..., state + goal]."""
    return torch.cat([states, goals], -1)
