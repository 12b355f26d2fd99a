"""Policy-space response oracles (Lanctot et al., 2017): grow a population of policies per player, solve the game among them, train
a reply to that solution, repeat. What is solved and what a reply maximises is chosen from outside; policies are arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
from jaxtyping import Float

from volvelle.core.errors import UserError

from .games import Game, Profile, exploitability, judge, moments
from .simplex import maximise_quadratic

Policies = list[list[np.ndarray]]  # per player, its population
MetaSolver = Callable[[Game], Profile]


class Arena(Protocol):
    """Where policies meet: a simulator or a payoff table. `risk` is how strongly a reply avoids variance."""

    players: int

    def initial(self, player: int, generator: np.random.Generator) -> list[np.ndarray]: ...

    def payoffs(self, policies: tuple[np.ndarray, ...], generator: np.random.Generator) -> Float[np.ndarray, " players"]: ...

    def respond(self, player: int, populations: Policies, mix: Profile, generator: np.random.Generator) -> np.ndarray | None: ...

    def measure(self, populations: Policies, game: Game, mix: Profile, mistakes: float) -> dict[str, float]: ...


def uniform(game: Game) -> Profile:
    """The meta-strategy of fictitious self-play: every policy so far alike."""
    return game.uniform()


def latest(game: Game) -> Profile:
    """The meta-strategy of plain self-play: the newest policy only."""
    return [np.eye(size)[-1] for size in game.sizes]


@dataclass
class Psro:
    """The loop. `step()` adds at most one policy per player; `game` holds the mean payoffs among all policies so far."""

    arena: Arena
    meta: MetaSolver
    generator: np.random.Generator

    def __post_init__(self):
        self.populations: Policies = [self.arena.initial(i, self.generator) for i in range(self.arena.players)]
        self.payoffs = np.full((self.arena.players, *map(len, self.populations)), np.nan)
        self._fill()

    @property
    def game(self) -> Game:
        return Game(self.payoffs, "population game")

    def mix(self) -> Profile:
        return self.meta(self.game)

    def step(self, mix: Profile | None = None) -> bool:
        """One round; says whether a policy was added (False: no player has a better reply left). `mix`: the solution, if known."""
        mix, before = mix or self.mix(), [len(p) for p in self.populations]
        replies = [self.arena.respond(i, self.populations, mix, self.generator) for i in range(self.arena.players)]
        for population, reply in zip(self.populations, replies, strict=True):
            population += [] if reply is None else [reply]
        grown = np.full((self.arena.players, *map(len, self.populations)), np.nan)
        grown[(slice(None), *(slice(size) for size in before))] = self.payoffs
        self.payoffs = grown
        self._fill()
        return any(reply is not None for reply in replies)

    def _fill(self) -> None:
        for cell in product(*(range(len(p)) for p in self.populations)):
            if np.isnan(self.payoffs[(0, *cell)]):
                policies = tuple(p[c] for p, c in zip(self.populations, cell, strict=True))
                self.payoffs[(slice(None), *cell)] = self.arena.payoffs(policies, self.generator)


@dataclass
class MatrixArena:
    """A payoff table as an arena: a policy is a pure action, shape [1]. A reply is computed exactly: the action, among those not yet
    in the population, that the best response (mean minus risk times variance) over all actions plays most; none left: no reply. `repeat` lets an action enter the
    population again, which fictitious self-play (`uniform`) needs."""

    table: Game
    risk: float = 0.0
    repeat: bool = False

    def __post_init__(self):
        if self.risk < 0:
            raise UserError(f"risk={self.risk}: must be at least 0")
        self.players = self.table.players

    def initial(self, player, generator):
        return [generator.integers(self.table.sizes[player], size=1)]

    def payoffs(self, policies, generator):
        return self.table.payoffs[(slice(None), *(int(p[0]) for p in policies))]

    def spread(self, populations: Policies, mix: Profile) -> Profile:
        """The population's mixture as a profile over all actions of the table."""
        return [np.bincount([int(p[0]) for p in population], weights, minlength=size)
                for population, weights, size in zip(populations, mix, self.table.sizes, strict=True)]

    def respond(self, player, populations, mix, generator):
        mean, covariance = moments(self.table, self.spread(populations, mix), player)
        reply = maximise_quadratic(mean, self.risk * covariance)
        if not self.repeat:
            reply[[int(p[0]) for p in populations[player]]] = 0
        return np.array([np.argmax(reply)]) if reply.max() > 1e-9 else None

    def measure(self, populations, game, mix, mistakes):
        """What the mixture gets in the whole table, and its exploitability there."""
        full = self.spread(populations, mix)
        return judge(self.table, full, mistakes) | {"exploitability": exploitability(self.table, full)}
