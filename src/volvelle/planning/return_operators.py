"""Bellman operators on return distributions over (state, stock) pairs, and value and policy iteration with them.

eta is a stack of n laws, one per pair of `stock.Augmented`: the law of the discounted return G to go. T_pi is a discount-contraction in the largest
Wasserstein-1 distance over pairs. Source: arXiv 2501.13028.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from volvelle.core.errors import UserError

from .distributions import Laws, diracs, mixture
from .mdp import MDP
from .stock import Augmented

TIE = 1e-12  # values closer than this are ties, and the first action wins


def lookahead(pairs: Augmented, laws: Laws) -> Laws:
    """The law of R + discount G(S', C') for every row (pair, action), pair-major: [n * A]."""
    m = pairs.mdp
    return mixture(laws, m.outcome_row, m.next_state, m.probability, m.states * m.actions, m.reward, m.discount)


def scores(pairs: Augmented, functional: Callable, rows: Laws) -> np.ndarray:
    """K(law of stock + return) for every pair and action, [n, A]; rows as `lookahead` gives them."""
    return functional(rows.shift(np.repeat(pairs.stock, pairs.mdp.actions, 0))).reshape(-1, pairs.mdp.actions)


def bellman(pairs: Augmented, policy, laws: Laws) -> Laws:
    """T_pi: the law of R + discount G(S', C') with the action drawn from policy, integers [n] or probabilities [n, A]."""
    policy, A = np.asarray(policy), pairs.mdp.actions
    rows = lookahead(pairs, laws)
    if policy.ndim == 1:
        return rows.take(np.arange(len(policy)) * A + policy)
    return mixture(rows, np.repeat(np.arange(len(policy)), A), np.arange(policy.size), policy.ravel(), len(policy))


def best_action(values) -> np.ndarray:
    """The first of the actions that tie for the largest value, values [..., A]."""
    return (values >= values.max(-1, keepdims=True) - TIE).argmax(-1)


def greedy(pairs: Augmented, functional: Callable, laws: Laws) -> tuple[np.ndarray, Laws]:
    """(policy [n], T_* laws): the action that is best for K(stock + R + discount G), the first among ties, and the laws it leads to."""
    rows = lookahead(pairs, laws)
    policy = best_action(scores(pairs, functional, rows))
    return policy, rows.take(np.arange(len(policy)) * pairs.mdp.actions + policy)


def start_laws(pairs: Augmented, laws: Laws | None = None) -> Laws:
    """eta_0: all mass on 0, or the given laws with mass on 0 where the episode is over."""
    rest = diracs(np.zeros_like(pairs.stock))
    if laws is None:
        return rest
    n, over = len(rest), pairs.mdp.absorbing
    both = Laws(np.concatenate([laws.atoms, rest.atoms]), np.concatenate([laws.weights, rest.weights]),
                np.concatenate([laws.offsets, laws.offsets[-1] + rest.offsets[1:]]))
    return both.take(np.where(over, n, 0) + np.arange(n))


def evaluate(pairs: Augmented, policy, max_sweeps: int = 10_000) -> Laws:
    """eta^pi of a stationary policy on pairs where every episode ends: T_pi until nothing moves. UserError if it never settles."""
    laws = start_laws(pairs)
    for _ in range(max_sweeps):
        before, laws = laws, bellman(pairs, policy, laws)
        if len(laws.atoms) == len(before.atoms) and np.allclose(laws.atoms, before.atoms, atol=1e-12) and \
                np.allclose(laws.weights, before.weights, atol=1e-13):
            return laws
    raise UserError(f"evaluate: return distributions still move after {max_sweeps} sweeps; give a problem whose episodes end, or mdp.unroll it")


# ---- value and policy iteration ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Plan:
    """policy [T, n]: the action of each pair with T, T-1, ... steps to go (one row if stationary); laws: returns from each pair at time 0."""
    pairs: Augmented
    functional: Callable
    policy: np.ndarray
    laws: Laws

    def act(self, t: int, state: int, stock) -> int:
        return int(self.policy[min(t, len(self.policy) - 1), self.pairs.index(state, stock)])

    def law(self, state: int, stock) -> Laws:
        """The law of the return from (state, stock); shift it by the stock for what the functional judges."""
        return self.laws.take([self.pairs.index(state, stock)])

    def values(self) -> np.ndarray:
        """F_K: the functional of stock + return for every pair, [n]; right for the pairs the plan starts from."""
        return self.functional(self.laws.shift(self.pairs.stock))

    def value(self, state: int, stock) -> float:
        i = self.pairs.index(state, stock)
        return float(self.functional(self.laws.take([i]).shift(self.pairs.stock[i:i + 1]))[0])


def value_iteration(pairs: Augmented, functional: Callable, sweeps: int | None = None, laws: Laws | None = None) -> Plan:
    """eta_{k+1} = T_* eta_k for `sweeps` steps (default: the depth of the pairs), from eta_0 = `laws` (default: all mass on 0)."""
    laws, policies = start_laws(pairs, laws), []
    for _ in range(pairs.depth if sweeps is None else sweeps):
        policy, laws = greedy(pairs, functional, laws)
        policies.append(policy)
    return Plan(pairs, functional, policy=np.array(policies[::-1]), laws=laws)


def policy_iteration(pairs: Augmented, functional: Callable, policy=None, max_rounds: int = 1000) -> Plan:
    """Evaluate, improve, repeat until no pair's functional rises; starts from `policy` [n] (default: action 0 everywhere)."""
    policy = np.zeros(pairs.mdp.states, np.int64) if policy is None else np.asarray(policy)
    for _ in range(max_rounds):
        laws = evaluate(pairs, policy)
        value = scores(pairs, functional, lookahead(pairs, laws))
        stay = value[np.arange(len(policy)), policy]
        better = value.max(1) > stay + TIE
        if not better.any():
            return Plan(pairs, functional, policy[None], laws)
        policy = np.where(better, value.argmax(1), policy)
    raise UserError(f"policy_iteration: still improving after {max_rounds} rounds")


def start_law(mdp: MDP, plan: Plan, stock) -> Laws:
    """The law of the return over the initial distribution, all starting with `stock`."""
    states = np.flatnonzero(mdp.initial)
    rows = [plan.pairs.index(s, stock) for s in states]
    return mixture(plan.laws, np.zeros(len(rows), np.int64), rows, mdp.initial[states], 1)
