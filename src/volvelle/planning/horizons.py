"""How hard an MDP is for random exploration: k-QVI-solvability, action gaps, effective horizons (arXiv 2312.08369).

Definitions and greedy returns agree with the authors' published analyses of sticky-action problems (github.com/cassidylaidlaw/effective-horizon).
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from volvelle.core.errors import UserError

from .lookahead import TIE, greedy_actions, guaranteed_return, optimal_q, q_iteration, random_q, reachable, reward_q, worst_q
from .mdp import MDP

PRECISION = 1e-4  # an action is suboptimal when its optimal Q falls short by more than this


@dataclass(frozen=True)
class Analysis:
    """What is known about an MDP's difficulty for random exploration.

    min_k: smallest k whose every greedy policy is optimal; epw: the same from immediate rewards (the effective planning window); both None if not
    found within max_k. greedy_returns[k-1]: J_k, the return of the worst greedy policy of Q^k. gaps[k-1]: the k-gap, nan if k does not solve.
    horizons[k-1]: H_k; effective_horizon: the least of them.
    """
    random_return: float
    optimal_return: float
    worst_return: float
    min_k: int | None
    epw: int | None
    greedy_returns: tuple[float, ...]
    gaps: tuple[float, ...]
    horizons: tuple[float, ...]
    effective_horizon: float


def analyse(mdp: MDP, max_k: int | None = None, precision: float = PRECISION, return_range: float = 1.0) -> Analysis:
    """Exact analysis up to k = max_k (default: the horizon, where Q^k is optimal). return_range: what returns are measured in, for H_k."""
    max_k, optimal = mdp.horizon if max_k is None else max_k, optimal_q(mdp)
    returns, gaps, horizons = [], [], []
    q, min_k = random_q(mdp), None
    random_return = float(mdp.initial @ q[0].mean(-1))
    for k in range(1, max_k + 1):
        solved = solvable(mdp, q, optimal, precision)
        min_k = k if solved and min_k is None else min_k
        returns.append(guaranteed_return(mdp, greedy_actions(q)))
        gaps.append(k_gap(mdp, q, optimal, precision) if solved else math.nan)
        horizons.append(horizon_of(k, gaps[-1] / return_range, mdp.actions))
        q = q_iteration(mdp, q)
    return Analysis(random_return, float(mdp.initial @ optimal[0].max(-1)), float(mdp.initial @ worst_q(mdp)[0].min(-1)), min_k,
                    minimum_k(mdp, reward_q(mdp), max_k, precision), tuple(returns), tuple(gaps), tuple(horizons), min(horizons))


def suboptimal(optimal: np.ndarray, precision: float = PRECISION) -> np.ndarray:
    """[T, S, A] bool from the optimal Q."""
    return optimal < optimal.max(-1, keepdims=True) - precision


def solvable(mdp: MDP, q: np.ndarray, optimal: np.ndarray, precision: float = PRECISION) -> bool:
    """Whether every policy that is greedy for q is optimal: no suboptimal greedy action can be met from the start, ties followed."""
    greedy = greedy_actions(q)
    return not (greedy & suboptimal(optimal, precision) & reachable(mdp, greedy)[..., None]).any()


def minimum_k(mdp: MDP, q: np.ndarray, max_k: int | None = None, precision: float = PRECISION) -> int | None:
    """The smallest k for which the (k-1)-fold Q-value iteration of q solves the problem; None if none up to max_k (default: the horizon)."""
    optimal = optimal_q(mdp)
    for k in range(1, (mdp.horizon if max_k is None else max_k) + 1):
        if solvable(mdp, q, optimal, precision):
            return k
        q = q_iteration(mdp, q)
    return None


def approximate_k(mdp: MDP, slack: float, max_k: int | None = None) -> int | None:
    """The smallest k whose worst greedy policy returns at least J* - slack |J*| (for J* > 0: (1 - slack) J*)."""
    q, best = random_q(mdp), float(mdp.initial @ optimal_q(mdp)[0].max(-1))
    for k in range(1, (mdp.horizon if max_k is None else max_k) + 1):
        if guaranteed_return(mdp, greedy_actions(q)) >= best - slack * abs(best) - TIE * max(1.0, abs(best)):
            return k
        q = q_iteration(mdp, q)
    return None


def k_gap(mdp: MDP, q: np.ndarray, optimal: np.ndarray, precision: float = PRECISION) -> float:
    """Delta_k: the least lead of the best action over the best suboptimal one in Q^k, over the states that greedy play can meet.

    inf if no such state has a suboptimal action.
    """
    behind = np.where(suboptimal(optimal, precision), q, -np.inf).max(-1)
    met = reachable(mdp, greedy_actions(q))
    return float((q.max(-1) - behind)[met].min())


def horizon_of(k: int, gap: float, actions: int) -> float:
    """H_k = k + log_A(1 / gap^2); k itself for an infinite gap, inf for nan (not solvable) and for a gap of 0."""
    if math.isnan(gap) or gap <= 0:
        return math.inf
    return float(k) if math.isinf(gap) or actions == 1 else k + max(0.0, -2 * math.log(gap) / math.log(actions))


def deterministic_horizon(mdp: MDP, precision: float = PRECISION) -> tuple[float, dict[int, int]]:
    """(H, {k: m_k}): the effective horizon of a deterministic problem by a simple variance bound, H = min_k k + log_A m_k.

    m_k = max over met (t, s) of ceil(16 var / gap^2 ln(2 T A^k)), at least 1; var bounds the variance of a random roll-out's return by
    (Q^1 - Q_worst)(Q* - Q_worst), carried back by max with each step. Only k below the best H so far (first: T) is tried.
    """
    if not mdp.deterministic:
        raise UserError("deterministic_horizon: some action has several outcomes; use analyse(mdp).effective_horizon")
    T, A = mdp.horizon, mdp.actions
    q, optimal, worst = random_q(mdp), optimal_q(mdp), worst_q(mdp)
    bad = suboptimal(optimal, precision)
    var = (q - worst) * (optimal - worst)
    best, samples, k = float(T), {}, 1
    while k < best:
        behind = np.where(bad, q, -np.inf).max(-1)
        lead = q.max(-1) - behind
        met = reachable(mdp, q > behind[..., None] + TIE)
        if (lead[met] > TIE).all():
            spread = 16 * var.max(-1)[met] / lead[met] ** 2 * math.log(2 * T * float(A) ** k)
            samples[k] = max(1, math.ceil(spread.max()))
            best = min(best, k + math.log(samples[k]) / math.log(A))
        q = q_iteration(mdp, q)
        following = mdp.next_state.reshape(mdp.states, A)
        var = np.stack([*(v.max(-1)[following] for v in var[1:]), var[-1]])
        k += 1
    return best, samples


def sample_bound(k: int, horizon: int, effective: float, actions: int, complexity: float, error: float, amplification: float = 1.0) -> float:
    """k T^3 alpha^(2(k-1)) A^(H_k) D / eps: environment steps after which SQIRL is eps-optimal, up to constants and logarithms."""
    return k * horizon**3 * amplification ** (2 * (k - 1)) * actions**effective * complexity / error
