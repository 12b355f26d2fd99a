"""Seconds per sweep of distributional value iteration on a stock grid, beside one memory-bound pass over the arrays the sweep reads and writes.

    python benchmarks/planning.py

The pass copies the laws and scores once and reads the outcomes once: no sweep can be faster. One thread; the least of several repeats.
"""
import time

import numpy as np

from volvelle.planning.functionals import shortfall
from volvelle.planning.grid_kernels import choose, mix
from volvelle.planning.mdp import MDP
from volvelle.planning.stock_grid import StockGrid, cell_shifts
from volvelle.planning.worlds import grid_world

ATOMS, REPEATS = 51, 15


def grid_problem(side: int, slip: float) -> MDP:
    """An open grid of side * side cells; two thirds of the cells pay -1, 0 or 2."""
    rng = np.random.default_rng(0)
    text = ["".join(rng.choice(list("abcd"), size=side)) for _ in range(side)]
    text[0] = "S" + text[0][1:]
    return grid_world(text, rewards={"a": -1.0, "b": 0.0, "c": 2.0}, ends="", slip=slip, horizon=20)[0]


def compare(name: str, mdp: MDP) -> None:
    grid = StockGrid(-25.0, 1.0, ATOMS)
    S, N = mdp.states, ATOMS
    rng = np.random.default_rng(0)
    laws, out = rng.dirichlet(np.ones(N), size=(S, N)), np.zeros((S, N, N))
    score, new_score = np.tile(shortfall().utility(grid.totals), (S, 1)), np.zeros((S, N))
    policy = np.zeros((S, N), np.int16)
    moves = (mdp.offsets, mdp.next_state, mdp.probability, *cell_shifts(mdp, grid, 0))

    def sweep():
        choose(*moves, score, new_score, policy)
        mix(*moves, policy, laws, out)

    def memory_pass():
        np.copyto(out, laws)
        np.copyto(new_score, score)
        policy.fill(0)
        for array in moves:
            array.sum()

    seconds = {}
    for run in (sweep, memory_pass):
        run()
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        seconds[run] = min(times)
    print(f"{name:58s} sweep {seconds[sweep] * 1e3:8.3f} ms   pass {seconds[memory_pass] * 1e3:8.3f} ms   "
          f"ratio {seconds[sweep] / seconds[memory_pass]:.2f}")


if __name__ == "__main__":
    print(f"4 actions, {ATOMS} atoms, float64")
    compare("  196 states x 51 stocks (9,996 pairs), deterministic", grid_problem(14, 0.0))
    compare("  196 states x 51 stocks (9,996 pairs), slippery", grid_problem(14, 2 / 3))
    compare("10,000 states x 51 stocks (510,000 pairs), deterministic", grid_problem(100, 0.0))
    compare("10,000 states x 51 stocks (510,000 pairs), slippery", grid_problem(100, 2 / 3))
