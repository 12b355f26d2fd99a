"""Three small grid games in one environment, each with its own symbols and its own legal actions, and the scripts that play them.

An observation is the grid as whole numbers, one symbol per cell, and the number of the game. Games follow one another from episode to episode.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated, Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from pydantic import Field

from volvelle.control.slots import ControlTask
from volvelle.core.errors import UserError
from volvelle.core.parts import part, preset

from .behaviours import Behaviour
from .tasks import Generated

GAMES = ("coins", "falling", "door")
LEGAL = ((0, 1, 2, 3), (2, 3, 4), (0, 1, 2, 3, 5))     # up, down, left, right, stay, use
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (0, 0))
SYMBOLS = 12
HUNTER, COIN, ROCK, CATCHER, FRUIT, STONE, WALKER, KEY, CARRIER, DOOR, LAVA = range(1, SYMBOLS)
Cell = tuple[int, int]


class GridGame(gym.Env):
    """coins: +1 for each of three coins (two if size is 3), -1 for each of size - 2 rocks, over when the coins are gone. falling: things fall one row a step; +1 for a caught
    fruit, -1 and over for a caught stone. door: +1 for the key, +1 and over for `use` next to the door with it, -1 and over in lava (size - 2 cells).

    An illegal action does nothing. games: numbers of the games that are played in turn, starting anywhere; length: steps per episode.
    """

    def __init__(self, games: tuple[int, ...] = (0, 1, 2), size: int = 5, length: int = 16):
        self.games, self.size, self.length, self.turn = games, size, length, 0
        self.observation_space = spaces.Dict({"game": spaces.Discrete(len(GAMES)), "grid": spaces.Box(0, SYMBOLS - 1, (size, size), np.uint8)})
        self.action_space = spaces.Discrete(len(MOVES))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = self.turn + 1 if seed is None else int(self.np_random.integers(len(self.games)))
        self.game = self.games[self.turn % len(self.games)]
        self.steps, self.earned, self.grid = 0, 0.0, np.zeros((self.size, self.size), np.uint8)
        if self.game == 1:
            self.place = (self.size - 1, int(self.np_random.integers(self.size)))
            self.drop()
        else:
            free = [divmod(int(i), self.size) for i in self.np_random.permutation(self.size**2)]
            self.place = free.pop()
            for symbol in (COIN,) * min(3, self.size - 1) + (ROCK,) * (self.size - 2) if self.game == 0 else (KEY, DOOR) + (LAVA,) * (self.size - 2):
                self.grid[free.pop()] = symbol
        return self.seen(), self.told()

    def drop(self) -> None:
        self.grid[0, self.np_random.integers(self.size)] = FRUIT if self.np_random.random() < 0.5 else STONE

    def seen(self) -> dict[str, Any]:
        shown = self.grid.copy()
        shown[self.place] = (HUNTER, CATCHER, CARRIER if self.game == 2 and not (self.grid == KEY).any() else WALKER)[self.game]
        return {"game": self.game, "grid": shown}

    def told(self) -> dict[str, float]:
        return {"game": float(self.game), "earned": self.earned}

    def step(self, action):
        action = int(action)
        reward, over = self.move(action) if action in LEGAL[self.game] else (0.0, False)
        if self.game == 1:
            reward, over = self.fall()
        self.steps, self.earned = self.steps + 1, self.earned + reward
        return self.seen(), reward, over, not over and self.steps >= self.length, self.told()

    def move(self, action: int) -> tuple[float, bool]:
        (row, column), (down, right) = self.place, MOVES[action]
        there = (min(max(row + down, 0), self.size - 1), min(max(column + right, 0), self.size - 1))
        found = int(self.grid[there])
        if self.game == 2 and action == 5:
            near = (self.grid == DOOR) & (np.abs(np.indices(self.grid.shape) - np.array(self.place)[:, None, None]).sum(0) == 1)
            won = bool(near.any() and not (self.grid == KEY).any())
            return float(won), won
        if found == DOOR:
            return 0.0, False
        self.place = there
        if found in (COIN, ROCK, KEY):
            self.grid[there] = 0
        reward = {COIN: 1.0, KEY: 1.0, ROCK: -1.0, LAVA: -1.0}.get(found, 0.0)
        return reward, found == LAVA or (found == COIN and not (self.grid == COIN).any())

    def fall(self) -> tuple[float, bool]:
        (row, column), = np.argwhere(self.grid)
        thing, self.grid[row, column] = int(self.grid[row, column]), 0
        if row + 1 < self.size:
            self.grid[row + 1, column] = thing
        caught = row + 1 == self.size - 1 and column == self.place[1]
        if row + 1 == self.size - 1:
            self.grid[row + 1, column] = 0
            self.drop()
        return (0.0 if not caught else 1.0 if thing == FRUIT else -1.0), caught and thing == STONE


@part("grid-games")
class GridGames(ControlTask):
    """Three grid games in turn, or one of them. size: cells per side; length: steps per episode."""

    info: ClassVar[tuple[str, ...]] = ("game", "earned")
    legal: ClassVar[tuple[tuple[int, ...], ...]] = LEGAL  # actions that do something, by game
    game: Literal["all", "coins", "falling", "door"] = "all"
    size: Annotated[int, Field(ge=3, le=16)] = 5
    length: Annotated[int, Field(gt=0)] = 16

    def label(self):
        return ("grid-games" if self.game == "all" else f"grid-{self.game}") + (f"-{self.size}x{self.size}" if self.size != 5 else "")

    def make(self, render=None, training=False):
        if render is not None:
            raise UserError(f"task {self.label()}: its environment draws no pictures")
        return GridGame(tuple(range(len(GAMES))) if self.game == "all" else (GAMES.index(self.game),), self.size, self.length)

    def measure(self, ends):
        """Mean return of every game that was played."""
        return {f"{name}_return": float(ends["earned"][ends["game"] == i].mean()) for i, name in enumerate(GAMES) if (ends["game"] == i).any()}


# ---------------------------------------------------------------------------------------------- who plays them

@part("grid-script")
class GridScript(Behaviour):
    """Plays the grid games by the shortest way; random actions are legal ones. careless: the share of episodes played for anything at all, whether it
    is worth something or harmful."""

    careless: Annotated[float, Field(ge=0, le=1)] = 0.5

    def pilot(self, task, env, spec, rng):
        if not isinstance(env.unwrapped, GridGame):
            raise UserError(f"behaviour=grid-script plays grid-games; {task.label()} is none; accepted: grid-games")
        return _Script(env.unwrapped, self.careless, rng)


class _Script:
    def __init__(self, game: GridGame, careless: float, rng: np.random.Generator):
        self.game, self.share, self.rng, self.careless = game, careless, rng, False

    def begin(self) -> None:
        self.careless = bool(self.rng.random() < self.share)

    def random(self, obs) -> np.int64:
        """A uniformly random legal action."""
        return np.int64(self.rng.choice(LEGAL[self.game.game]))

    def __call__(self, obs) -> np.int64:
        game = self.game
        if game.game == 1:
            (_, column), = np.argwhere(game.grid)
            gap = int(column) - game.place[1]
            if self.careless or FRUIT in game.grid:
                return np.int64(4 if not gap else 3 if gap > 0 else 2)
            return np.int64(4 if gap else 3 if game.place[1] < game.size - 1 else 2)
        things = ((COIN, ROCK) if game.game == 0 else (LAVA, KEY, DOOR)) if self.careless else (COIN,) if game.game == 0 else (KEY,) if KEY in game.grid else (DOOR,)
        way = self.way(things, () if self.careless else (ROCK, LAVA))
        return np.int64(5 if game.game == 2 and way is not None and way[1] == 1 and way[0] == DOOR and KEY not in game.grid else self.random(obs) if way is None else way[2])

    def way(self, things: tuple[int, ...], never: tuple[int, ...]) -> tuple[int, int, int] | None:
        """(symbol, distance, first move) of the nearest cell with one of `things`, around cells with one of `never` and around the door."""
        grid, size = self.game.grid, self.game.size
        queue: deque[tuple[Cell, int, int]] = deque([(self.game.place, 0, -1)])
        seen = {self.game.place}
        while queue:
            (row, column), far, first = queue.popleft()
            for action in range(4):
                there = (row + MOVES[action][0], column + MOVES[action][1])
                if there in seen or not (0 <= there[0] < size and 0 <= there[1] < size):
                    continue
                seen.add(there)
                symbol, start = int(grid[there]), action if first < 0 else first
                if symbol in things:
                    return symbol, far + 1, start
                if symbol not in never and symbol != DOOR:
                    queue.append((there, far + 1, start))
        return None


preset("grid-games-mixed", Generated(env=GridGames(), behaviour=GridScript(), quality="mixed", steps=30_000))
preset("grid-games-small", Generated(env=GridGames(size=3, length=12), behaviour=GridScript(), quality="mixed", steps=30_000))
