"""Bellman operators on return distributions over (state, stock) pairs: T_pi, the greedy step T_*, and evaluation.

eta is a stack of n laws, one per pair of `stock.Augmented`: the law of the discounted return G to go. T_pi is a discount-contraction in the largest
Wasserstein-1 distance over pairs. Source: arXiv 2501.13028.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from volvelle.core.errors import UserError

from .distributions import Laws, diracs, mixture
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


def greedy(pairs: Augmented, functional: Callable, laws: Laws) -> tuple[np.ndarray, Laws]:
    """(policy [n], T_* laws): the action that is best for K(stock + R + discount G), the first among ties, and the laws it leads to."""
    rows = lookahead(pairs, laws)
    value = scores(pairs, functional, rows)
    policy = (value >= value.max(1, keepdims=True) - TIE).argmax(1)
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
