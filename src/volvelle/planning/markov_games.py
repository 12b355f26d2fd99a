"""Two-player Markov games as tables: exact evaluation of policies, tabular learning of replies, two small grids.

A policy is an array [S, A] of action probabilities. Every player's action slips with probability `slip`: it is then replaced by a
uniformly random one. Episodes last at most `horizon` steps; state S - 1 is terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from volvelle.core.errors import UserError

from .games import Profile, judge
from .psro import Policies


@dataclass(frozen=True, eq=False)
class MarkovGame:
    """next: [S, A, B] successor; rewards: [2, S, A, B]; events: name -> [S, A, B] what to count (crashes, catches) per episode."""

    next: Int[np.ndarray, "S A B"]
    rewards: Float[np.ndarray, "two S A B"]
    start: int
    horizon: int
    slip: float
    events: dict[str, np.ndarray]

    def __post_init__(self):
        if not 0 <= self.slip <= 1:
            raise UserError(f"slip={self.slip}: must lie in [0, 1]")
        if self.rewards.shape != (2, *self.next.shape) or any(e.shape != self.next.shape for e in self.events.values()):
            raise UserError(f"rewards {self.rewards.shape} and events must match the successor table {self.next.shape}")

    @property
    def states(self) -> int:
        return len(self.next)

    def slipped(self, policy: Float[np.ndarray, "S A"]) -> Float[np.ndarray, "S A"]:
        return (1 - self.slip) * policy + self.slip / policy.shape[1]

    def joint(self, policies: tuple[np.ndarray, np.ndarray]) -> Float[np.ndarray, "S A B"]:
        return self.slipped(policies[0])[:, :, None] * self.slipped(policies[1])[:, None, :]

    def visits(self, policies: tuple[np.ndarray, np.ndarray]) -> Float[np.ndarray, "S A B"]:
        """Expected number of times each (state, joint action) occurs in an episode."""
        joint, now = self.joint(policies), np.eye(self.states)[self.start]
        total = np.zeros(joint.shape)
        for _ in range(self.horizon):
            flow = now[:, None, None] * joint
            total += flow
            now = np.bincount(self.next.reshape(-1), flow.reshape(-1), minlength=self.states)
        return total

    def count(self, policies: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """Expected count of every event in one episode."""
        visits = self.visits(policies)
        return {name: float((visits * event).sum()) for name, event in self.events.items()}

    def returns(self, policies: tuple[np.ndarray, np.ndarray]) -> tuple[Float[np.ndarray, " two"], Float[np.ndarray, " two"]]:
        """Mean and variance of each player's undiscounted return, exactly, by backward recursion on the first two moments."""
        joint = self.joint(policies)
        first, second = np.zeros((2, 2, self.states))
        for _ in range(self.horizon):
            later, square = first[:, self.next], second[:, self.next]
            second = (joint * (self.rewards**2 + 2 * self.rewards * later + square)).sum((2, 3))
            first = (joint * (self.rewards + later)).sum((2, 3))
        mean = first[:, self.start]
        return mean, np.maximum(second[:, self.start] - mean**2, 0.0)

    def simulate(self, policies: tuple[np.ndarray, np.ndarray], episodes: int, generator: np.random.Generator) -> Float[np.ndarray, "two n"]:
        """Sampled returns of `episodes` episodes."""
        state, total = np.full(episodes, self.start), np.zeros((2, episodes))
        for _ in range(self.horizon):
            a, b = (draw(self.slipped(policy)[state], generator) for policy in policies)
            total += self.rewards[:, state, a, b]
            state = self.next[state, a, b]
        return total


def draw(probabilities: Float[np.ndarray, "n A"], generator: np.random.Generator) -> Int[np.ndarray, " n"]:
    """One action per row, by inverting the cumulative distribution."""
    cumulative = probabilities.cumsum(1)
    return (generator.random((len(probabilities), 1)) * cumulative[:, -1:] >= cumulative).sum(1)


@dataclass
class MarkovArena:
    """A Markov game as an arena of population play. Replies are learnt by tabular Q-learning on batches of episodes, each against one
    policy drawn from the others' mixture, maximising E[R] - risk Var[R] by block-coordinate ascent on its dual form.

    kind: "step" changes every reward to r - risk r^2 + 2 risk y r with y the running mean reward per step (the per-step variance of
    MVPI, arXiv 2004.10888); "episode" does so with whole returns, paid at the end; "opponent" penalises only the variance between the
    opponents met, by weighting returns against opponent b with 1 - 2 risk (mean_b - mean), its linearisation.
    episodes: 0 evaluates pairs of policies exactly; n > 0 by n sampled episodes with the same random numbers for every pair.
    """

    game: MarkovGame
    starters: list[list[np.ndarray]]
    risk: float = 0.0
    kind: Literal["step", "episode", "opponent"] = "episode"
    episodes: int = 0
    batches: int = 150
    batch: int = 512
    learning_rate: float = 0.1
    exploration: float = 1.0
    discount: float = 0.97
    starting: int = 1

    players = 2

    def __post_init__(self):
        if self.kind not in ("step", "episode", "opponent"):
            raise UserError(f"kind={self.kind!r}: accepted: step, episode, opponent")
        if self.risk < 0:
            raise UserError(f"risk={self.risk}: must be at least 0")

    def initial(self, player, generator):
        chosen = generator.choice(len(self.starters[player]), self.starting, replace=False)
        return [self.starters[player][i] for i in chosen]

    def payoffs(self, policies, generator):
        if not self.episodes:
            return self.game.returns(policies)[0]
        return self.game.simulate(policies, self.episodes, np.random.default_rng(0)).mean(1)

    def respond(self, player: int, populations: Policies, mix: Profile, generator: np.random.Generator) -> np.ndarray:
        """A deterministic policy for `player` against opponents drawn from the other's mixture."""
        game, n = self.game, self.batch
        rivals, weights = np.stack(populations[1 - player]), mix[1 - player]
        rivals = (1 - game.slip) * rivals + game.slip / rivals.shape[2]
        actions = game.next.shape[1 + player]
        q, level, means = np.zeros((game.states, actions)), 0.0, np.zeros(len(rivals))
        for batch in range(self.batches):
            explore = self.exploration * (1 - batch / self.batches) + 0.02
            rival = generator.choice(len(rivals), n, p=weights)
            state, total, paid = np.full(n, game.start), np.zeros(n), 0
            for step in range(game.horizon):
                own = np.where(generator.random(n) < explore, generator.integers(actions, size=n), q[state].argmax(1))
                played = np.where(generator.random(n) < game.slip, generator.integers(actions, size=n), own)
                other = draw(rivals[rival, state], generator)
                pair = (played, other) if player == 0 else (other, played)
                after, reward = game.next[state, *pair], game.rewards[player, state, *pair]
                live = state < game.states - 1
                total, paid = total + reward, paid + live.sum()
                over = live & ((after == game.states - 1) | (step == game.horizon - 1))
                signal = self._signal(reward, total, over, level, means[rival] - level)
                target = signal + self.discount * np.where(over, 0.0, q[after].max(1))
                cell = state[live] * actions + own[live]
                size = np.bincount(cell, minlength=q.size)
                error = np.bincount(cell, (target - q[state, own])[live], minlength=q.size)
                q += self.learning_rate * (error / np.maximum(size, 1)).reshape(q.shape)
                state = after
            met = np.bincount(rival, minlength=len(rivals))
            fresh = np.bincount(rival, total, minlength=len(rivals)) / np.maximum(met, 1)
            means = np.where(met > 0, 0.8 * means + 0.2 * fresh, means)
            level = 0.8 * level + 0.2 * (total.sum() / paid if self.kind == "step" else total.mean())
        return np.eye(actions)[q.argmax(1)]

    def _signal(self, reward, total, over, level, lead):
        if self.kind == "step":
            return reward - self.risk * reward**2 + 2 * self.risk * level * reward
        if self.kind == "episode":
            return np.where(over, total - self.risk * total**2 + 2 * self.risk * level * total, 0.0) if self.risk else reward
        return reward * (1 - 2 * self.risk * lead)

    def measure(self, populations, game, mix, mistakes):
        """Mean, variance and worst case in the game among the policies, and every event per episode: as intended, and ("_trembling") when
        each player's policy is drawn uniformly with probability `mistakes`."""
        shaken = [(1 - mistakes) * p + mistakes / len(p) for p in mix]
        found = judge(game, mix, mistakes)
        for a, one in enumerate(populations[0]):
            for b, two in enumerate(populations[1]):
                for weights, ending in ((mix, ""), (shaken, "_trembling")):
                    if share := weights[0][a] * weights[1][b]:
                        for name, count in self.game.count((one, two)).items():
                            found[name + ending] = found.get(name + ending, 0.0) + share * count
        return {name: float(value) for name, value in found.items()}


MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])


def stag_hunt(size: int = 5, slip: float = 0.1, horizon: int = 14, together: float = 5.0, alone: float = -3.0,
              hare: float = 2.0) -> MarkovGame:
    """Two hunters on a grid, starting in opposite corners; a stag in the centre, hares in the other two corners.

    Stepping onto a hare pays `hare`; onto the stag `together` each when both do so in the same step, else `alone`; the hunter then
    leaves. Events: hares, stags (hunters who caught one together), failures (lone attempts).
    """
    cells = size * size
    gone, stag = cells, (size // 2) * size + size // 2
    hares = (size - 1, cells - size)
    where = np.stack(np.divmod(np.arange(cells), size), 1)
    moved = np.clip(where[:, None] + MOVES, 0, size - 1) @ [size, 1]          # [cells, 5]
    moved = np.vstack([moved, np.full(5, gone)])
    one, two = np.divmod(np.arange((cells + 1) ** 2), cells + 1)
    at = np.stack(np.broadcast_arrays(moved[one][:, :, None], moved[two][:, None, :]))
    caught, on_stag = np.isin(at, hares), at == stag
    both = on_stag.all(0)
    rewards = hare * caught + on_stag * np.where(both, together, alone)
    left = np.where(caught | on_stag, gone, at)
    return MarkovGame(left[0] * (cells + 1) + left[1], rewards.astype(float), int(cells - 1), horizon, slip,
                      {"hares": caught.sum(0), "stags": 2 * both, "failures": (on_stag & ~both).sum(0)})


def merge(length: int = 4, slip: float = 0.1, horizon: int = 16, crash: float = -50.0, arrive: float = 10.0) -> MarkovGame:
    """Two cars, `length` cells from the point where their lanes merge; each waits, drives one cell or two.

    A step costs 1; passing the point pays `arrive`; passing it in the same step is a crash and pays both `crash`. Events: crashes,
    arrivals.
    """
    gone = 0                                                                   # distance still to go; 0 = through
    one, two = np.divmod(np.arange((length + 1) ** 2)[::-1], length + 1)      # the terminal state comes last
    to_go = np.stack([one, two])
    move = np.maximum(to_go[:, :, None] - np.arange(3), gone)                  # [2, S, 3]
    at = np.stack(np.broadcast_arrays(move[0][:, :, None], move[1][:, None, :]))
    live = (to_go > 0)[:, :, None, None]
    through = live & (at == 0)
    crashed = through.all(0)
    rewards = np.where(crashed, crash, arrive * through) - live
    return MarkovGame(len(one) - 1 - (at[0] * (length + 1) + at[1]), rewards.astype(float), 0, horizon, slip,
                      {"crashes": crashed, "arrivals": (through & ~crashed).sum(0)})


def walkers(size: int, player: int, noise: float = 0.0) -> list[np.ndarray]:
    """Three policies on `stag_hunt(size)`: for the stag (wait beside it until the other is beside it too), and for either hare. They walk
    on shortest ways, a share `noise` of the steps at random."""
    where = np.stack(np.divmod(np.arange(size * size), size), 1)
    reached = np.clip(where[:, None] + MOVES, 0, size - 1)
    found = []
    for goal in (size * size // 2, size - 1, size * size - size):
        away = np.abs(reached - where[goal]).sum(2)
        best = away == away.min(1, keepdims=True)
        walk = np.vstack([best / best.sum(1, keepdims=True), np.full((1, 5), 0.2)])[:, None].repeat(len(where) + 1, 1)  # [own, other, 5]
        if goal == size * size // 2:
            near = np.append(np.abs(where - where[goal]).sum(1) == 1, False)
            walk[np.ix_(near, ~near)] = np.eye(5)[0]
        walk = (1 - noise) * walk + noise / 5
        found.append((walk if player == 0 else walk.swapaxes(0, 1)).reshape(-1, 5))
    return found
