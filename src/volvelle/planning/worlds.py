"""Tabular problems from rules: enumerated worlds, ASCII grids, Gymnasium environments that can be copied, and random instances."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from volvelle.core.errors import UserError

from .mdp import MDP

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # north, east, south, west


def enumerate_states(starts: Iterable[Hashable] | Hashable, actions: int, step: Callable, horizon=None, discount=1.0,
                     max_states: int = 100_000) -> tuple[MDP, list]:
    """All states reachable from `starts` (equally likely first states), breadth first, and the MDP over them.

    step(state, action) returns one outcome (next state, reward, ended) or a list of (probability, next state, reward, ended). States are
    hashable; those that end share one absorbing end state, the last index. Returns (mdp, states in index order).
    """
    starts = list(starts) if isinstance(starts, (list, set, frozenset)) else [starts]
    index = {state: i for i, state in enumerate(dict.fromkeys(starts))}
    states, table = list(index), []
    for state in states:
        row = []
        for action in range(actions):
            outcomes = step(state, action)
            outcomes = outcomes if isinstance(outcomes, list) else [(1.0, *outcomes)]
            merged = []
            for probability, following, reward, ended in outcomes:
                if not ended and following not in index:
                    if len(states) >= max_states:
                        raise UserError(f"enumerate_states: more than max_states={max_states} states are reachable")
                    index[following] = len(states)
                    states.append(following)
                merged.append((probability, 0 if ended else index[following], reward, ended))
            row.append(merged)
        table.append(row)
    initial = np.zeros(len(states))
    initial[[index[s] for s in starts]] = 1 / len(set(starts))
    return MDP.from_successors(table, initial, horizon, discount), states


def grid_world(rows: Sequence[str], rewards: dict = {"G": 1.0}, ends: str = "G", step_reward: float = 0.0, slip: float = 0.0, horizon=None,
               discount=1.0) -> tuple[MDP, list]:
    """A grid from text: '#' wall, 'S' start (at least one), anything else floor. Actions: north, east, south, west.

    Entering a cell pays step_reward plus what `rewards` says of its character: a number, or a lottery [(probability, reward), ...].
    Characters in `ends` end the episode. With probability `slip` the move goes to one of the two sides instead, half each.
    """
    if len({len(r) for r in rows}) != 1:
        raise UserError(f"grid_world: rows of lengths {[len(r) for r in rows]}; all must be equally long")
    cells = {(i, j): c for i, row in enumerate(rows) for j, c in enumerate(row) if c != "#"}
    starts = [cell for cell, c in cells.items() if c == "S"]
    if not starts:
        raise UserError("grid_world: no 'S' in the grid; mark at least one start cell")
    if not 0 <= slip <= 1:
        raise UserError(f"grid_world: slip {slip}; accepted: 0 to 1")

    def step(cell, action):
        outcomes = []
        for turn, chance in ((0, 1 - slip), (1, slip / 2), (-1, slip / 2)):
            move = MOVES[(action + turn) % 4]
            target = (cell[0] + move[0], cell[1] + move[1])
            target = target if target in cells else cell
            paid = rewards.get(cells[target], 0.0)
            lottery = paid if isinstance(paid, (list, tuple)) else [(1.0, paid)]
            outcomes += [(chance * p, target, step_reward + r, cells[target] in ends) for p, r in lottery if chance * p > 0]
        return outcomes

    return enumerate_states(starts, 4, step, horizon, discount)


def enumerate_environment(env, key: Callable, horizon=None, discount=1.0, seed: int = 0, max_states: int = 20_000,
                          action: Callable = int) -> tuple[MDP, list]:
    """A deterministic Gymnasium environment, enumerated by stepping deep copies of it.

    key(env) names the state (everything that decides what happens next, except the clock). Time-limit truncation is not an outcome: the
    horizon of the MDP takes its place. action(i): what to give the environment for the i-th action. Returns (mdp, keys in index order).
    """
    base = env.unwrapped
    if not hasattr(base.action_space, "n"):
        raise UserError(f"enumerate_environment: action space {base.action_space}; a Discrete one is needed")
    base.reset(seed=seed)
    copies = {key(base): copy.deepcopy(base)}

    def step(state, number):
        env = copy.deepcopy(copies[state])
        _, reward, ended, _, _ = env.step(action(number) + int(getattr(base.action_space, "start", 0)))
        following = key(env)
        copies.setdefault(following, env)
        return following, float(reward), bool(ended)

    return enumerate_states(key(base), int(base.action_space.n), step, horizon, discount, max_states)


def enumerate_minigrid(env: str, horizon=None, discount=1.0, actions: Sequence[int] = (), layout: int = 0, max_states: int = 20_000) -> tuple[MDP, list]:
    """A MiniGrid environment: the agent's place and direction, what it carries, and the grid. `layout` seeds it; actions: those allowed (empty: all).

    Its rewards shrink with the step count, which is no part of the state: here success pays 1 (and failure, where there is a price, -1). UserError for an
    environment that draws at random as it goes, and for actions that it does not have.
    """
    import gymnasium
    try:
        import minigrid  # noqa: F401  (registers its environments)
        base = gymnasium.make(env).unwrapped
    except (ImportError, gymnasium.error.Error) as error:
        raise UserError(f"environment {env!r} cannot be made: {error}") from None
    n = int(base.action_space.n)
    if not set(actions) <= set(range(n)):
        raise UserError(f"actions {list(actions)}: {env} has 0 to {n - 1}")
    base.reset(seed=layout)
    drawn = base.np_random.bit_generator.state

    def key(env):
        if env.np_random.bit_generator.state != drawn:
            raise UserError(f"environment {base.spec.id!r} draws at random as it goes: it cannot be enumerated by stepping copies")
        held = env.carrying
        return (*map(int, env.agent_pos), int(env.agent_dir), None if held is None else held.encode(), env.grid.encode().tobytes())

    base.action_space = gymnasium.spaces.Discrete(len(actions) or n)
    mdp, keys = enumerate_environment(base, key, horizon, discount, layout, max_states, (lambda a: actions[a]) if actions else int)
    return mdp.with_(reward=np.sign(mdp.reward)), keys


def random_mdp(rng: np.random.Generator, states: int, actions: int, successors: int = 2, rewards: Sequence[float] = (-1.0, 0.0, 1.0, 2.0),
               horizon=None, discount=1.0, components: int | None = None) -> MDP:
    """A random instance: every row has `successors` outcomes with Dirichlet probabilities and rewards drawn from `rewards`."""
    M = states * actions * successors
    row = np.arange(M) // successors
    shape = M if components is None else (M, components)
    return MDP.from_outcomes(states, actions, row // actions, row % actions, rng.integers(states, size=M),
                             rng.dirichlet(np.ones(successors), size=states * actions).ravel(), rng.choice(rewards, size=shape),
                             rng.dirichlet(np.ones(states)), horizon, discount)
