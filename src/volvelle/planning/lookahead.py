"""Finite-horizon Q functions [T, S, A] of a tabular MDP: of the random, the best and the worst policy, steps of Q-value iteration, and
greedy play with the worst breaking of ties. Source of the definitions: arXiv 2312.08369.

TIE is the one tolerance for "equally good": Q values this close (relative to the largest return) are ties.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from volvelle.core.errors import UserError

from .mdp import MDP, backup

TIE = 1e-12


def q_function(mdp: MDP, reduce: Callable) -> np.ndarray:
    """Q_t = R + discount P reduce(Q_{t+1}), Q_{T-1} = R; reduce maps [S, A] to [S]. [T, S, A]."""
    q = np.empty((_steps(mdp), mdp.states, mdp.actions))
    q[-1] = mdp.expected_reward
    for t in reversed(range(len(q) - 1)):
        q[t] = backup(mdp, reduce(q[t + 1]))
    return q


def random_q(mdp: MDP) -> np.ndarray:
    """Q of the uniformly random policy."""
    return q_function(mdp, lambda q: q.mean(-1))


def optimal_q(mdp: MDP) -> np.ndarray:
    return q_function(mdp, lambda q: q.max(-1))


def worst_q(mdp: MDP) -> np.ndarray:
    """Q of the policy with the least return."""
    return q_function(mdp, lambda q: q.min(-1))


def reward_q(mdp: MDP) -> np.ndarray:
    """The expected immediate reward at every time: where the planning window starts counting."""
    return np.repeat(mdp.expected_reward[None], _steps(mdp), 0)


def q_iteration(mdp: MDP, q: np.ndarray) -> np.ndarray:
    """One step of Q-value iteration at every time: R + discount P max Q_{t+1}; the last time step stays as it is."""
    return np.stack([*(backup(mdp, following.max(-1)) for following in q[1:]), q[-1]])


def greedy_actions(q: np.ndarray, tolerance: float | None = None) -> np.ndarray:
    """[..., A] bool: the actions that tie for the largest Q. Default tolerance: TIE times the largest |Q| (at least 1)."""
    tolerance = TIE * max(1.0, float(np.abs(q).max())) if tolerance is None else tolerance
    return q >= q.max(-1, keepdims=True) - tolerance


def reachable(mdp: MDP, allowed: np.ndarray) -> np.ndarray:
    """[T, S] bool: states that can be met at time t by taking allowed actions only, allowed [T, S, A] bool."""
    met = np.zeros(allowed.shape[:2], bool)
    met[0] = mdp.initial > 0
    possible = mdp.transition.T.tocsr()
    possible.data = (possible.data > 0).astype(float)
    for t in range(len(met) - 1):
        met[t + 1] = possible @ (allowed[t] & met[t][:, None]).ravel().astype(float) > 0
    return met


def guaranteed_return(mdp: MDP, allowed: np.ndarray) -> float:
    """The return from the initial distribution when an adversary picks among the allowed actions [T, S, A]."""
    values = np.zeros(mdp.states)
    for may in allowed[::-1]:
        values = np.where(may, backup(mdp, values), np.inf).min(-1)
    return float(mdp.initial @ values)


def sticky(mdp: MDP, repeat: float) -> MDP:
    """Actions that stick: after the first step the previously *executed* action is executed again with probability `repeat`.

    State s with previous action a is s * A + a; the initial states, at which nothing can repeat yet, are S * A + s.
    """
    if not 0 <= repeat <= 1:
        raise UserError(f"repeat {repeat}; accepted: 0 to 1")
    S, A = mdp.states, mdp.actions
    state, action = np.divmod(mdp.outcome_row, A)
    target = mdp.next_state * A + np.where(mdp.absorbing[mdp.next_state], 0, action)  # what is executed becomes the previous action
    previous, chosen = np.divmod(np.arange(A * A), A)
    pieces = [(S * A + state, action, target, mdp.probability, mdp.reward)]
    for p, c in zip(previous, chosen):  # chosen c is executed with 1 - repeat, else the previous p
        for executed, chance in ((c, 1 - repeat), (p, repeat)):
            mine = np.flatnonzero(action == executed)
            if chance > 0:
                pieces.append((state[mine] * A + p, np.full(len(mine), c), target[mine], chance * mdp.probability[mine], mdp.reward[mine]))
    columns = [np.concatenate(x) for x in zip(*pieces)]
    return MDP.from_outcomes(S * A + S, A, *columns, np.append(np.zeros(S * A), mdp.initial), mdp.horizon, mdp.discount)


def _steps(mdp: MDP) -> int:
    if mdp.horizon is None:
        raise UserError("horizon None: Q functions by time need a finite horizon")
    if mdp.reward.ndim != 1:
        raise UserError(f"reward has {mdp.reward.shape[1]} components; a scalar reward is needed")
    return mdp.horizon
