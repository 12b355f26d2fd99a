"""SQIRL in its practical form, by tables instead of a network, and what it foretells for learners that explore at random (arXiv 2312.08369)."""

from __future__ import annotations

from typing import Any

import numpy as np

from volvelle.core.errors import UserError

from ..horizons import analyse, approximate_k
from ..lookahead import optimal_q
from ..mdp import MDP
from ..sampling import TabularSampler, expected_returns
from ..tasks import TabularTask


def shared_sqirl(mdp: MDP, depth: int, episodes: int, budget: int, rng: np.random.Generator) -> tuple[list[np.ndarray], int]:
    """(one Q [S, A] per time step, steps; cut short above `budget`): the practical form of SQIRL by tables instead of a network.

    Iteration i plays `episodes` episodes, at random from step i on, and stores what was random. Head 1 is the mean stored return of a (state, action), head j the
    mean of r + discount max_a Q_{j-1}(s', a); both over all that is stored and all time steps. Pairs without data count as the mean.
    """
    sampler, A, rows, frozen, steps = TabularSampler(mdp), mdp.actions, [], [], 0
    while len(frozen) < mdp.horizon and steps <= budget:
        i = len(frozen)
        data = sampler(episodes, lambda t, s: frozen[t][s].argmax(-1) if t < i else rng.integers(A, size=len(s)), rng)
        steps += data.steps
        episode, t = np.nonzero(data.alive & (np.arange(mdp.horizon) >= i))
        after = data.observations[episode, t + 1]
        rows.append(np.stack([data.observations[episode, t] * A + data.actions[episode, t], after, (t == mdp.horizon - 1) | mdp.absorbing[after],
                              data.rewards[episode, t], data.returns_to_go(mdp.discount)[episode, t]]))
        cells, following, ended, rewards, targets = np.concatenate(rows, 1)
        cells, following = cells.astype(int), following.astype(int)
        count = np.bincount(cells, minlength=mdp.states * A)
        for head in range(depth):
            targets = targets if head == 0 else rewards + mdp.discount * np.where(ended > 0, 0.0, q[following].max(-1))
            q = np.where(count > 0, np.bincount(cells, targets, mdp.states * A) / np.maximum(count, 1), targets.mean() if len(targets) else 0.0).reshape(-1, A)
        frozen.append(q)
    return frozen, steps


def sqirl_steps(mdp: MDP, depth: int, goal: float, budget: int, rng: np.random.Generator) -> float:
    """Of the first whole run, m = 1, 2, 4, ... episodes per time step, whose policy returns `goal`."""
    m = 1
    while True:
        frozen, steps = shared_sqirl(mdp, depth, m, budget, rng)
        if steps > budget:
            return np.inf
        if expected_returns(mdp, lambda t, s: frozen[t][s].argmax(-1)[None])[0] >= goal:
            return float(steps)
        m *= 2


def near_optimal(mdp: MDP, share: float = 0.95) -> float:
    """The return that counts as solved: short of the optimum J* by at most (1 - share) |J*|."""
    best = float(mdp.initial @ optimal_q(mdp)[0].max(-1))
    return best - (1 - share) * abs(best) - 1e-9


def foretell(task: TabularTask, budget: int = 100_000, seeds: int = 3, depths: tuple[int, ...] = (1, 2, 3), share: float = 0.95) -> dict[str, Any]:
    """Everything that `volvelle horizon` prints: the exact analysis, the steps that SQIRL needs (median over seeds, inf: more than the budget), and whether
    learners that explore at random are expected to solve the task within the budget: `expected` is whether SQIRL with its best k does.

    The measured agreement with Q-learning and PPO is that of the claim horizon-study.
    """
    mdp = task.mdp(0)
    if mdp.reward.ndim != 1:
        raise UserError(f"task {task.label()}: has a reward of {mdp.reward.shape[1]} components; a scalar reward is needed")
    found, goal = analyse(mdp), near_optimal(mdp, share)
    steps = {k: float(np.median([sqirl_steps(mdp, k, goal, budget, np.random.default_rng([s, k])) for s in range(seeds)])) for k in depths}
    return {"states": mdp.states, "actions": mdp.actions, "time_limit": mdp.horizon, "random_return": found.random_return, "optimal_return": found.optimal_return,
            "min_k": found.min_k, "min_k_within_1_percent": approximate_k(mdp, 0.01), "planning_window": found.epw, "effective_horizon": found.effective_horizon,
            **{f"sqirl_steps_k{k}": n for k, n in steps.items()}, "expected": min(steps.values()) <= budget}
