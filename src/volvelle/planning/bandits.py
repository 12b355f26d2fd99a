"""Multitask contextual bandits and linear Markov decision processes on a finite set of inputs, as arrays, and their regret.

M tasks are played in step: in every round each task shows some inputs (a context with an action), one is chosen, a noisy reward comes
back. A class of representations is one array [P, X, k]: P candidate feature maps of X inputs. A task's mean reward is linear in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from volvelle.core.errors import UserError


@dataclass(frozen=True, eq=False)
class Bandits:
    """means: [M, X] expected reward of every input; noise: standard deviation of the Gaussian noise; shown: inputs per task and round."""

    means: Float[np.ndarray, "M X"]
    noise: float
    shown: int

    def __post_init__(self):
        means = np.asarray(self.means, dtype=np.float64)
        if means.ndim != 2 or not np.isfinite(means).all():
            raise UserError(f"means of shape {means.shape}: expected finite numbers [tasks, inputs]")
        if not 1 <= self.shown <= means.shape[1]:
            raise UserError(f"shown={self.shown}: must lie between 1 and the {means.shape[1]} inputs")
        if self.noise < 0:
            raise UserError(f"noise={self.noise}: must be at least 0")
        object.__setattr__(self, "means", means)

    @property
    def tasks(self) -> int:
        return len(self.means)

    def show(self, generator: np.random.Generator) -> Int[np.ndarray, "M K"]:
        """Different random inputs for every task."""
        return generator.random(self.means.shape).argpartition(self.shown - 1, 1)[:, : self.shown]

    def pull(self, inputs: Int[np.ndarray, " M"], generator: np.random.Generator) -> Float[np.ndarray, " M"]:
        return self.means[np.arange(self.tasks), inputs] + self.noise * generator.standard_normal(self.tasks)

    def regret(self, shown: Int[np.ndarray, "M K"], inputs: Int[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
        """Expected reward lost against the best input shown, per task."""
        return np.take_along_axis(self.means, shown, 1).max(1) - self.means[np.arange(self.tasks), inputs]


class Player(Protocol):
    """What plays bandits: chooses one of the shown inputs for every task, then sees the rewards."""

    def choose(self, shown: Int[np.ndarray, "M K"]) -> Int[np.ndarray, " M"]: ...

    def observe(self, inputs: Int[np.ndarray, " M"], rewards: Float[np.ndarray, " M"]) -> None: ...


def play_round(player: Player, world: Bandits | LinearMdps, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Regret and reward of every task in one round (of decision processes: one episode). `generator` draws inputs and noise only, so
    players given equal generators see equal inputs."""
    if isinstance(world, LinearMdps):
        return player.episode(generator)
    shown = world.show(generator)
    inputs = player.choose(shown)
    rewards = world.pull(inputs, generator)
    player.observe(inputs, rewards)
    return world.regret(shown, inputs), rewards


def play(player: Player, world: Bandits | LinearMdps, rounds: int, generator: np.random.Generator) -> Float[np.ndarray, "M T"]:
    """Regret per task and round."""
    return np.stack([play_round(player, world, generator)[0] for _ in range(rounds)], 1)


# ------------------------------------------------------------------------------------------------- problems

def unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length one."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def synthetic(tasks: int, generator: np.random.Generator, inputs: int = 30, maps: int = 25, rank: int = 2, noise: float = 0.3,
              shown: int = 6, shared: bool = True) -> tuple[Bandits, Float[np.ndarray, "P X k"], Int[np.ndarray, " M"]]:
    """Random unit feature maps, one of them true for all tasks (`shared`) or a different one for every task; heads uniform on the
    sphere. Returns the bandits, the class of maps and the true map of each task."""
    if not shared and tasks > maps:
        raise UserError(f"maps={maps}: {tasks} tasks that share nothing need as many maps")
    features = unit(generator.standard_normal((maps, inputs, rank)))
    truth = np.full(tasks, generator.integers(maps)) if shared else generator.choice(maps, tasks, replace=False)
    heads = unit(generator.standard_normal((tasks, rank)))
    means = np.einsum("mxk,mk->mx", features[truth], heads)
    return Bandits(means, noise, shown), features, truth


def digits(tasks: int, generator: np.random.Generator, noise: float = 0.3, shown: int = 5) -> tuple[Bandits, Float[np.ndarray, "X 64"]]:
    """Images of handwritten digits (scikit-learn's 1,797 of 8x8); each task pays a random amount in [-1, 1] per digit, so that the
    one-hot class is a representation of rank 10 that all tasks share. Returns the bandits and the images, scaled to [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits problem needs the package scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    worth = generator.uniform(-1, 1, (tasks, 10))
    return Bandits(worth[:, data.target], noise, shown), data.data / 16.0


def fourier(inputs: Float[np.ndarray, "X d"], maps: int, rank: int, scales: Float[np.ndarray, " P"] | float,
            generator: np.random.Generator) -> Float[np.ndarray, "P X k"]:
    """A class of random Fourier feature maps cos(W x + b) / sqrt(rank), of length at most 1; `scales`: bandwidth, one or one per map."""
    scales = np.broadcast_to(np.asarray(scales, dtype=np.float64), maps)
    weights = generator.standard_normal((maps, inputs.shape[1], rank)) / scales[:, None, None]
    return np.cos(np.einsum("xd,pdk->pxk", inputs, weights) + generator.uniform(0, 2 * np.pi, (maps, 1, rank))) / np.sqrt(rank)


@dataclass(frozen=True, eq=False)
class LinearMdps:
    """M episodic decision processes whose rewards and transitions are linear in one feature map of (state, action).

    features: [P, S * A, k] candidate maps; transitions: [M, S * A, S]; rewards: [M, S * A] in [0, 1], seen with
    Gaussian noise; every episode starts in state 0.
    """

    features: Float[np.ndarray, "P X k"]
    transitions: Float[np.ndarray, "M X S"]
    rewards: Float[np.ndarray, "M X"]
    horizon: int
    noise: float = 0.0

    @property
    def tasks(self) -> int:
        return len(self.rewards)

    @property
    def states(self) -> int:
        return self.transitions.shape[2]

    @property
    def actions(self) -> int:
        return self.transitions.shape[1] // self.states

    def values(self) -> Float[np.ndarray, "H M S A"]:
        """Optimal action values by backward induction; level 0 is the first step."""
        found, later = [], np.zeros((self.tasks, self.states))
        for _ in range(self.horizon):
            q = (self.rewards + np.einsum("mxs,ms->mx", self.transitions, later)).reshape(self.tasks, self.states, self.actions)
            found.append(q)
            later = q.max(2)
        return np.stack(found[::-1])

    def move(self, inputs: Int[np.ndarray, " M"], generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and next states, one per task."""
        tasks = np.arange(self.tasks)
        cumulative = self.transitions[tasks, inputs].cumsum(1)
        after = (generator.random((self.tasks, 1)) * cumulative[:, -1:] >= cumulative).sum(1)
        return self.rewards[tasks, inputs] + self.noise * generator.standard_normal(self.tasks), after


def linear_mdps(tasks: int, generator: np.random.Generator, states: int = 6, actions: int = 3, rank: int = 2, maps: int = 25,
                horizon: int = 3, noise: float = 0.3) -> LinearMdps:
    """Soft state aggregation: the true map (the first) puts every (state, action) between `rank` corners; each task draws a reward and
    a successor distribution per corner. All values are then exactly linear in it; the other maps are drawn alike."""
    features = generator.dirichlet(np.full(rank, 0.3), (maps, states * actions))
    corners = generator.dirichlet(np.full(states, 0.3), (tasks, rank))
    worth = generator.uniform(0, 1, (tasks, rank))
    return LinearMdps(features, np.einsum("xk,mks->mxs", features[0], corners), worth @ features[0].T, horizon, noise)


# ------------------------------------------------------------------------------------------------- complexity

def eluder_dimension(values: Float[np.ndarray, "F n"], eps: float) -> int:
    """The eluder dimension of a finite class on n points, by search over all sequences (n up to about 8).

    The longest sequence for which one eps' >= eps makes every element eps'-independent of those before it: two functions whose
    distance on the earlier elements is at most eps' differ by more than eps' on it (Russo and Van Roy, 2013).
    """
    if eps <= 0:
        raise UserError(f"eps={eps}: must be positive")
    one, two = np.triu_indices(len(values), 1)
    gaps = np.abs(values[one] - values[two])                 # [pairs, n]

    def extend(spent, left, allowed):                        # allowed: intervals [low, high) of eps' still possible
        best = 0
        for x in left:
            low, high = np.sqrt(spent), gaps[:, x]
            meets = [(max(a, c), min(b, d)) for a, b in allowed for c, d in zip(low, high, strict=True) if max(a, c) < min(b, d)]
            if meets:
                best = max(best, 1 + extend(spent + gaps[:, x] ** 2, [y for y in left if y != x], _joined(meets)))
        return best

    return extend(np.zeros(len(gaps)), list(range(values.shape[1])), [(eps, np.inf)])


def _joined(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same set as disjoint intervals."""
    joined: list[tuple[float, float]] = []
    for low, high in sorted(intervals):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return joined
