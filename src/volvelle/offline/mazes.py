"""A small point maze of ours: a point pushed through corridors, with commanded goals. Fast enough for tests, hard enough to tell methods apart."""

from __future__ import annotations

from collections import deque
from functools import lru_cache

import gymnasium as gym
import numpy as np

Cell = tuple[int, int]

# "#": wall; the five tasks are pairs of cells (row, column): where one starts, where the goal is
MAZES: dict[str, tuple[tuple[str, ...], tuple[tuple[Cell, Cell], ...]]] = {
    "small": (("#######",
               "#  #  #",
               "#  #  #",
               "#     #",
               "####  #",
               "#     #",
               "#######"), (((1, 1), (5, 1)), ((5, 1), (1, 1)), ((1, 5), (1, 1)), ((3, 1), (5, 2)), ((1, 2), (1, 4)))),
    "medium": (("########",
                "#  ##  #",
                "#  #   #",
                "##   ###",
                "#  #   #",
                "# #  # #",
                "#   #  #",
                "########"), (((1, 1), (6, 6)), ((6, 1), (1, 6)), ((5, 3), (4, 2)), ((6, 5), (6, 1)), ((2, 6), (1, 1)))),
    "large": (("############",
               "#    #     #",
               "# ## # # # #",
               "#      #   #",
               "# #### ### #",
               "#  # #     #",
               "## # # # ###",
               "#  #   #   #",
               "############"), (((1, 1), (7, 10)), ((5, 4), (7, 1)), ((7, 4), (1, 10)), ((3, 8), (5, 4)), ((1, 1), (5, 4)))),
    "corridor": (("##############",
                  "#            #",
                  "############ #",
                  "#            #",
                  "# ############",
                  "#            #",
                  "##############"), (((1, 1), (5, 12)), ((5, 12), (1, 1)), ((3, 6), (5, 12)), ((1, 6), (3, 6)), ((5, 6), (3, 6)))),
}


@lru_cache(maxsize=None)
def distances(name: str, goal: Cell) -> np.ndarray:
    """Steps between neighbouring cells to the goal, [rows, columns]; -1 where there is a wall or no way."""
    rows = MAZES[name][0]
    found = np.full((len(rows), len(rows[0])), -1)
    found[goal] = 0
    queue = deque([goal])
    while queue:
        i, j = queue.popleft()
        for cell in ((i - 1, j), (i, j - 1), (i + 1, j), (i, j + 1)):
            if rows[cell[0]][cell[1]] != "#" and found[cell] < 0:
                found[cell] = found[i, j] + 1
                queue.append(cell)
    return found


def shortest_way(name: str, place: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Corners of a shortest way from a place to a goal, through the middles of the cells between them: [corners, 2]."""
    far = distances(name, (int(goal[0]), int(goal[1])))
    i, j = int(place[0]), int(place[1])
    if far[i, j] < 0:
        raise ValueError(f"maze {name}: no way from {place.tolist()} to {goal.tolist()}")
    corners = [np.asarray(place, float)]
    while far[i, j] > 0:
        i, j = min(((i - 1, j), (i, j - 1), (i + 1, j), (i, j + 1)), key=lambda c: far[c] if far[c] >= 0 else 10**6)
        corners.append(np.array([i + 0.5, j + 0.5]))
    if len(corners) > 1:
        corners.pop()
    return np.array([*corners, np.asarray(goal, float)])


def along(corners: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Places that far along a way, at most its end: [n] -> [n, 2]."""
    reached = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1))])
    return np.stack([np.interp(lengths, reached, corners[:, axis]) for axis in (0, 1)], -1)


class PointMaze(gym.Env):
    """The observation is the point's place (row, column) in units of cells, the action a push in [-1, 1]^2 of which `speed` cells come through.

    reset(options={"task_id": 1..5}) starts one of the maze's tasks, without it at a free cell for no goal; info holds "goal", the observation at
    the goal. The reward is 1 within `reach` of the goal, which ends the episode, else 0.
    """

    metadata = {"render_modes": []}

    def __init__(self, maze: str = "medium", speed: float = 0.4, noise: float = 0.05, reach: float = 0.5):
        rows, self.tasks = MAZES[maze]
        self.maze, self.speed, self.noise, self.reach = maze, speed, noise, reach
        self.free = np.array([[c != "#" for c in row] for row in rows])
        self.cells = [tuple(map(int, c)) for c in np.argwhere(self.free)]
        self.observation_space = gym.spaces.Box(0, max(self.free.shape), (2,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.place, self.goal = np.zeros(2), None

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)

    def cell(self, place: np.ndarray | None = None) -> Cell:
        place = self.place if place is None else place
        return int(place[0]), int(place[1])

    def somewhere(self, cell: Cell) -> np.ndarray:
        """A place near the middle of a cell."""
        return np.array(cell) + 0.5 + self.np_random.uniform(-0.25, 0.25, 2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        number = (options or {}).get("task_id")
        start, goal = self.tasks[number - 1] if number else (self.cells[self.np_random.integers(len(self.cells))], None)
        self.place = self.somewhere(start)
        self.goal = None if goal is None else self.somewhere(goal)
        return self.place.astype(np.float32), {} if goal is None else {"goal": self.goal.astype(np.float32)}

    def step(self, action):
        push = np.clip(np.asarray(action, np.float64), -1, 1) * self.speed + self.np_random.normal(0, self.noise, 2)
        for axis in (0, 1):  # one axis after the other, so that a point slides along walls
            moved = self.place.copy()
            moved[axis] += np.clip(push[axis], -0.9, 0.9)
            if self.free[self.cell(moved)]:
                self.place = moved
        success = self.goal is not None and float(np.linalg.norm(self.place - self.goal)) < self.reach
        return self.place.astype(np.float32), float(success), success, False, {"success": float(success)}

    def waypoint(self, goal: np.ndarray) -> np.ndarray:
        """Where to head for on the way to a goal: the middle of the next cell, or the goal itself when it is in this one."""
        here, target = self.cell(), self.cell(goal)
        if here == target:
            return goal
        far = distances(self.maze, target)
        i, j = here
        best = min(((i - 1, j), (i, j - 1), (i + 1, j), (i, j + 1)), key=lambda c: far[c] if far[c] >= 0 else 10**6)
        return np.array(best) + 0.5
