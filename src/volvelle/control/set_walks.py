"""Walks that are paid for the set of states they visit: worlds (grids, graphs), the environment, and exact and greedy walks to compare with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part

from .measures import Measure
from .setfunctions import Coverage, SetFunction
from .slots import ControlTask

Count = Annotated[int, Field(gt=0)]
MOVES = np.array([(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)])  # stay, right, down, left, up


@dataclass(frozen=True, eq=False)
class Graph:
    """next [V, A]: the state that action a leads to; places [V, 2]: row and column; start: the first state."""

    next: np.ndarray
    places: np.ndarray
    start: int


class World(Part):
    """Slot: where to walk. `graph()` gives the states, actions and places."""

    slot: ClassVar[str] = "world"

    def graph(self) -> Graph:
        raise NotImplementedError


@part("grid")
class Grid(World):
    """rows x columns cells, numbered row by row; actions stay, right, down, left, up, which the border stops. start: a cell, -1 for the middle."""

    rows: Count = 10
    columns: Count = 10
    start: Annotated[int, Field(ge=-1)] = -1

    def graph(self):
        places = np.stack(np.divmod(np.arange(self.rows * self.columns), self.columns), 1)
        ahead = np.clip(places[:, None] + MOVES, 0, (self.rows - 1, self.columns - 1))
        middle = self.rows // 2 * self.columns + self.columns // 2
        return Graph(ahead[..., 0] * self.columns + ahead[..., 1], places, _within(middle if self.start < 0 else self.start, len(places)))


@part("complete")
class Complete(World):
    """rows x columns states, and action a leads to state a from everywhere; with task.noise = eps V / (V - 1) this is an eps-bandit."""

    rows: Count = 4
    columns: Count = 4
    start: Annotated[int, Field(ge=0)] = 0

    def graph(self):
        size = self.rows * self.columns
        places = np.stack(np.divmod(np.arange(size), self.columns), 1)
        return Graph(np.tile(np.arange(size), (size, 1)), places, _within(self.start, size))


@part("graph-file")
class GraphFile(World):
    """A graph of yours: JSON with "edges" [[from, to], ...], "places" [[row, column], ...] and, if they matter, "start" and "directed" (false).

    Action 0 stays, action i goes to the i-th neighbour in the order of the edges; where there is none it stays.
    """

    path: str = ""

    def graph(self):
        try:
            data = json.loads(Path(self.path).read_text(encoding="utf-8"))
            places, edges = np.array(data["places"], float), np.array(data["edges"], int).reshape(-1, 2)
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"graph {self.path!r}: {str(error) or type(error).__name__}; expected JSON with edges and places") from None
        if places.ndim != 2 or places.shape[1] != 2 or (edges.size and not 0 <= edges.min() <= edges.max() < len(places)):
            raise UserError(f"graph {self.path!r}: edges must join the states 0 to {len(places) - 1}, places must be pairs of numbers")
        neighbours: list[list[int]] = [[v] for v in range(len(places))]
        for a, b in edges.tolist() if data.get("directed") else [e for a, b in edges.tolist() for e in ((a, b), (b, a))]:
            if b not in neighbours[a]:
                neighbours[a].append(b)
        most = max(map(len, neighbours))
        table = np.array([n + [v] * (most - len(n)) for v, n in enumerate(neighbours)])
        return Graph(table, places, _within(int(data.get("start", 0)), len(places)))


def _within(start: int, size: int) -> int:
    if start >= size:
        raise UserError(f"start={start}: accepted are states from 0 to {size - 1}")
    return start


class SetWalkEnv(gym.Env):
    """`horizon` steps on a graph from its start; with probability `noise` a uniform action is taken instead.

    pays: "marginal" F(s' | all before), "modular" F({s'}) whatever came before, "final" F of the whole walk less F of its start, at its end.
    Observation (see SetWalk.sees); info: `value`, F of the walk so far, and `distinct`, how many states it visited.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(self, graph: Graph, measure: Measure, horizon: int, noise: float = 0.0, pays: str = "marginal", sees: str = "code", render_mode=None):
        self.graph, self.measure, self.horizon, self.noise, self.pays, self.sees = graph, measure, horizon, noise, pays, sees
        self.render_mode, self.size = render_mode, len(graph.next)
        self.table, self.singles = graph.next.tolist(), measure.singles
        self.action_space = spaces.Discrete(graph.next.shape[1])
        low, high = graph.places.min(0), graph.places.max(0)
        self.scaled = (2 * (graph.places - low) / np.maximum(high - low, 1) - 1).astype(np.float32)
        widths = {"place": 3, "history": self.size + 3, "indices": horizon + 2, "walk": 3 * (horizon + 1)}
        if sees == "code":
            self.observation_space = spaces.Discrete(self.size * horizon + 1)
        elif sees == "one-hot":
            self.observation_space = spaces.MultiDiscrete([self.size, horizon + 1])
        elif sees == "time":
            self.observation_space = spaces.Discrete(horizon + 1)
        else:
            self.observation_space = spaces.Box(-np.inf, np.inf, (widths[sees],), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.t = self.graph.start, 0
        self.walk, self.value = [self.at], self.measure.gain(self.measure.empty(), self.at)
        self.first, self.state = self.value, self.measure.add(self.measure.empty(), self.at)
        return self._observation(), {"value": self.value, "distinct": 1.0}

    def _observation(self) -> Any:
        if self.sees == "code":
            return min(self.t * self.size + self.at, self.size * self.horizon)     # the end has one code of its own: nothing is decided there
        if self.sees == "one-hot":
            return np.array([self.at, self.t])
        if self.sees == "time":
            return self.t
        now = [*self.scaled[self.at], 2 * self.t / self.horizon - 1]
        if self.sees == "history":
            seen = np.zeros(self.size)
            seen[self.walk] = 1
            return np.array([*now, *seen], np.float32)
        if self.sees == "indices":
            return np.array([v / self.size for v in self.walk] + [-1.0] * (self.horizon - self.t) + [now[2]], np.float32)
        if self.sees == "walk":
            rows = np.zeros((self.horizon + 1, 3), np.float32)
            rows[self.horizon - self.t :, :2], rows[self.horizon - self.t :, 2] = self.scaled[self.walk], np.arange(1, self.t + 2) / (self.horizon + 1)
            return rows.reshape(-1)
        return np.array(now, np.float32)

    def step(self, action):
        if self.noise and self.np_random.random() < self.noise:
            action = self.np_random.integers(self.action_space.n)
        self.at, self.t = self.table[self.at][int(action)], self.t + 1
        gain, over = self.measure.gain(self.state, self.at), self.t >= self.horizon
        self.state, self.value = self.measure.add(self.state, self.at), self.value + gain
        self.walk.append(self.at)
        paid = gain if self.pays == "marginal" else float(self.singles[self.at]) if self.pays == "modular" else (self.value - self.first) * over
        return self._observation(), paid, over, False, {"value": self.value, "distinct": float(len(set(self.walk)))}

    def render(self):
        """States as squares at their places: F({v}) in grey, visited ones in blue (the later the brighter), the walker in red."""
        side, low = 24, self.graph.places.min(0)
        height, width = ((np.ceil(self.graph.places.max(0) - low)).astype(int) + 1) * side
        picture = np.full((height, width, 3), 255, np.uint8)
        for v, (row, column) in enumerate(np.round(self.graph.places - low).astype(int)):
            colour = np.full(3, 235 - 110 * self.singles[v] / max(self.singles.max(), 1e-12))
            if v in self.walk:
                colour = np.array([40, 90, 130 + 120 * (len(self.walk) - self.walk[::-1].index(v)) / (self.horizon + 1)])
            picture[row * side + 1 : (row + 1) * side - 1, column * side + 1 : (column + 1) * side - 1] = (220, 50, 40) if v == self.at else colour
        return picture


@lru_cache(maxsize=8)
def bound(world: World, function: SetFunction) -> tuple[Graph, Measure]:
    """A world's graph with its measure; both are immutable and shared by all copies of an environment."""
    graph = world.graph()
    return graph, function.bind(graph.places)


@part("set-walk")
class SetWalk(ControlTask):
    """A walk of `horizon` steps that is paid for the set of states it visits. `value`: F of the whole walk; `distinct`: states visited.

    noise: share of random actions. pays: what training is paid, "marginal" gains, "modular" F({s'}), or F of the whole walk at its "final"
    step; evaluation always counts F. sees: "code" (one number per time and state: for tables and linear policies, up to 4096 of them), "one-hot"
    (state and time apart), "place" (scaled place and time), "time" alone, and with the past: "history" (place, time and a mark for every
    visited state), "indices" (the numbers of the states so far, -1 where there are none yet) or "walk" (place and time of every step so far, the newest
    last, zeros before the first: for network=gru).
    """

    info: ClassVar[tuple[str, ...]] = ("value", "distinct")
    world: World = Grid()
    function: SetFunction = Coverage()
    horizon: Count = 24
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    pays: Literal["marginal", "modular", "final"] = "marginal"
    sees: Literal["code", "one-hot", "place", "time", "history", "indices", "walk"] = "code"

    def make(self, render=None, training=False):
        graph, measure = bound(self.world, self.function)
        return SetWalkEnv(graph, measure, self.horizon, self.noise, self.pays if training else "marginal", self.sees, render)

    def measure(self, ends):
        return {k: float(ends[k].mean()) for k in self.info}


# ---------------------------------------------------------------------------------------------- walks to compare with

def greedy_walk(graph: Graph, measure: Measure, horizon: int) -> tuple[list[int], float]:
    """The walk that takes the largest marginal gain at every step (the first action among equals), with F of it."""
    at, state, walk = graph.start, measure.add(measure.empty(), graph.start), [graph.start]
    for _ in range(horizon):
        gains = measure.gains(state)[graph.next[at]]
        at = int(graph.next[at, gains.argmax()])
        state = measure.add(state, at)
        walk.append(at)
    return walk, measure.value(walk)


def best_walk(graph: Graph, measure: Measure, horizon: int, limit: int = 1_000_000) -> tuple[list[int], float]:
    """The walk with the greatest F in a world without noise, by depth-first search with the bound that later gains are at most present ones.

    Raises UserError after `limit` visited nodes: no polynomial algorithm is good on all graphs (submodular orienteering).
    """
    near = [sorted(set(row)) for row in graph.next.tolist()]
    reach = [_reach(near, d) for d in range(horizon + 1)]
    best, nodes = greedy_walk(graph, measure, horizon), 0

    def search(path, state, value):
        nonlocal nodes, best
        nodes, left = nodes + 1, horizon + 1 - len(path)
        if nodes > limit:
            raise UserError(f"best_walk: more than {limit} walks to look at; take a smaller world or horizon, or greedy_walk")
        if not left:
            best = (path, value) if value > best[1] else best
            return
        gains = measure.gains(state)
        ahead = np.sort(gains[reach[left][path[-1]]])
        if value + (left * ahead[-1] if measure.repeats else ahead[-left:].sum()) <= best[1] + 1e-12:
            return
        for v in sorted(near[path[-1]], key=lambda v: -gains[v]):
            search([*path, v], measure.add(state, v), value + float(gains[v]))

    first = measure.empty()
    search([graph.start], measure.add(first, graph.start), measure.gain(first, graph.start))
    return best


def _reach(near: list[list[int]], steps: int) -> list[np.ndarray]:
    """The states within so many steps of each."""
    found = []
    for v in range(len(near)):
        seen, edge = {v}, {v}
        for _ in range(steps):
            edge = {u for w in edge for u in near[w]} - seen
            seen |= edge
        found.append(np.array(sorted(seen)))
    return found
