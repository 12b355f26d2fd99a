"""The effective horizon and SQIRL, shallow Q-iteration via reinforcement learning (arXiv 2312.08369).

Solves: tells in advance whether random exploration will do, and learns simply where it does.

Idea. Take the Q function of the uniformly random policy, Q^1, apply only k - 1 steps of Q-value iteration to it, and act greedily. If every greedy
policy of Q^k is optimal the problem is k-QVI-solvable. How small k may be, and how clearly Q^k separates optimal actions from others (the k-gap
Delta_k), gives the stochastic effective horizon H = min_k k + log_A(1 / Delta_k^2): sample cost grows like A^H, not like A^T. SQIRL learns Q^k one time
step after another from random roll-outs by plain regression; GORP is its open-loop predecessor for deterministic problems.

Pick it as a diagnostic for PPO- or DQN-like exploration, as a simple learner for short look-ahead, as a baseline. Do not pick it for long episodes (one
policy per time step, T rounds) or where random roll-outs never see a reward.

Definitions and greedy returns agree with the authors' published analyses of sticky-action problems (github.com/cassidylaidlaw/effective-horizon).
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from volvelle.core.errors import UserError

from ..lookahead import TIE, greedy_actions, guaranteed_return, optimal_q, q_iteration, random_q, reachable, reward_q, worst_q
from ..mdp import MDP

PRECISION = 1e-4  # an action is suboptimal when its optimal Q falls short by more than this


# ---- analysis of a known problem ---------------------------------------------------------------------------------------------------
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


# ---- learning from episodes --------------------------------------------------------------------------------------------------------
def table(states: int, unseen: float | None = None) -> Callable:
    """REGRESS by averaging per (state, action). Pairs without data predict `unseen`, or the mean of all targets if None."""
    def regress(observations, actions, targets, n_actions):
        cell = observations * n_actions + actions
        count, total = (np.bincount(cell, w, states * n_actions) for w in (None, targets))
        rest = targets.mean() if unseen is None else unseen
        means = np.where(count > 0, total / np.maximum(count, 1), rest).reshape(states, n_actions)
        return lambda observations: means[observations]
    return regress


def per_action(make: Callable) -> Callable:
    """REGRESS with one regressor per action; make() returns an object with scikit-learn's fit and predict. Actions without data predict the mean."""
    def regress(observations, actions, targets, n_actions):
        flat = observations.reshape(len(observations), -1)
        models = [make().fit(flat[actions == a], targets[actions == a]) if (actions == a).any() else None for a in range(n_actions)]
        rest = targets.mean()
        return lambda x: np.stack([np.full(len(x), rest) if m is None else m.predict(x.reshape(len(x), -1)) for m in models], -1)
    return regress


@dataclass
class Sqirl:
    """One policy per time step, learnt in order. sampler: see sampling; depth: k; episodes: m per time step; regress: as `table` returns.

    regress(observations [n, ...], actions [n], targets [n], n_actions) -> function(observations [n, ...]) -> Q [n, A].
    """
    sampler: Callable
    regress: Callable
    depth: int = 1
    episodes: int = 100
    discount: float = 1.0
    frozen: list = field(default_factory=list)  # Q functions of the time steps done; never changed again
    steps: int = 0                              # environment steps used

    @property
    def finished(self) -> bool:
        return len(self.frozen) == self.sampler.horizon

    def act(self, t: int, observations, rng: np.random.Generator) -> np.ndarray:
        """Greedy for the time steps done, uniformly random after."""
        if t < len(self.frozen):
            return self.frozen[t](observations).argmax(-1)
        return rng.integers(self.sampler.actions, size=len(observations))

    def iterate(self, rng: np.random.Generator) -> dict[str, float]:
        """Learn the policy of the next time step i from m episodes that play at random from i on. Only steps t >= i enter a regression."""
        i, T, A = len(self.frozen), self.sampler.horizon, self.sampler.actions
        data = self.sampler(self.episodes, lambda t, x: self.act(t, x, rng), rng)
        self.steps += data.steps
        last, q = min(i + self.depth, T) - 1, None
        for t in range(last, i - 1, -1):
            on = data.alive[:, t]
            targets = data.returns_to_go(self.discount)[:, t] if t == last else data.rewards[:, t].copy()
            if t < last and q is not None:
                targets[data.alive[:, t + 1]] += self.discount * q(data.observations[data.alive[:, t + 1], t + 1]).max(-1)
            q = self.regress(data.observations[on, t], data.actions[on, t], targets[on], A) if on.any() else None
        self.frozen.append(q or (lambda observations: np.zeros((len(observations), A))))  # no episode lives to step i: nothing to decide
        return {"return": float(data.rewards.sum(1).mean()), "reached": float(data.alive[:, i].mean()), "steps": self.steps}


def gorp(sampler: Callable, depth: int, episodes: int, rng: np.random.Generator, discount: float = 1.0) -> tuple[list[int], int]:
    """(actions, environment steps): the open-loop plan of greedy over random policy, for deterministic problems.

    At each time step every sequence of `depth` actions is tried in `episodes` episodes that end at random; the first action of the sequence with the
    best mean reward to go is kept, the first in lexicographic order among ties.
    """
    plan, steps = [], 0
    for i in range(sampler.horizon):
        best, value = 0, -math.inf
        for sequence in itertools.product(range(sampler.actions), repeat=min(depth, sampler.horizon - i)):
            forced = plan + list(sequence)
            data = sampler(episodes, lambda t, x: np.full(len(x), forced[t]) if t < len(forced) else rng.integers(sampler.actions, size=len(x)), rng)
            mean = data.returns_to_go(discount)[:, i].mean()
            steps += data.steps
            if mean > value:
                best, value = sequence[0], mean
        plan.append(best)
        if not data.alive[:, i].any():
            break
    return plan, steps
