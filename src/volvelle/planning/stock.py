"""Stock augmentation: the state carries c, what the rewards so far are worth now.

    C' = (C + R') / discount,    so that    c_0 + G_0 = discount^t (C_t + G_t)    for every t,

with G the discounted return to go. A policy on pairs (state, stock) can then trade what is already earned against what is to come. Here the pairs
are enumerated exactly from chosen starts; `stock_grid` interpolates where they would be too many.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volvelle.core.errors import UserError

from .distributions import DECIMALS, spans
from .mdp import MDP


def next_stock(stock, reward, discount: float):
    """C' = (C + R') / discount, elementwise."""
    return (stock + reward) / discount


@dataclass(frozen=True, eq=False)
class Augmented:
    """mdp: the process on pairs (its reward is the base reward); state [n], stock [n] or [n, m]: what pair i stands for; depth: steps covered.

    Pairs first met at the last step, and pairs in an absorbing state, only loop: nothing is decided or earned there.
    """
    mdp: MDP
    state: np.ndarray
    stock: np.ndarray
    depth: int
    keys: dict

    def index(self, state: int, stock) -> int:
        """The pair's number. UserError if it was not reached."""
        key = _keys(np.array([state]), np.asarray(stock, dtype=float).reshape(1, *self.stock.shape[1:]))[0]
        if key not in self.keys:
            raise UserError(f"state {state} with stock {np.asarray(stock).tolist()} is not reached from the given starts within {self.depth} steps")
        return self.keys[key]


def augment(mdp: MDP, states, stocks, depth: int | None = None, max_pairs: int = 1_000_000) -> Augmented:
    """Every (state, stock) reachable within `depth` steps (default: the horizon) from the start pairs states [k], stocks [k] or [k, m].

    Stocks that agree to ten decimals are one. UserError if the discount is 0, the stock's shape does not match the reward's, or more than
    max_pairs pairs appear.
    """
    depth = mdp.horizon if depth is None else depth
    if depth is None:
        raise UserError("augment: depth None and horizon None; say how many steps to enumerate")
    if mdp.discount == 0:
        raise UserError("augment: discount 0 leaves no stock (C' = (C + R) / discount); accepted: above 0, at most 1")
    states, stocks = np.atleast_1d(np.asarray(states, dtype=np.int64)), np.asarray(stocks, dtype=float)
    if stocks.shape != states.shape + mdp.reward.shape[1:]:
        raise UserError(f"stocks have shape {stocks.shape}; accepted: {states.shape + mdp.reward.shape[1:]}, one per start state")
    A, keys, found, edges = mdp.actions, {}, [], []
    _number(states, stocks, keys, found)
    first = 0
    for step in range(depth):
        state, stock = found[-1]
        inner = ~mdp.absorbing[state]
        source = first + np.flatnonzero(inner)
        first += len(state)
        picked, counts = spans(mdp.offsets[::A], state[inner])
        owner = np.repeat(np.arange(len(source)), counts)
        reward = mdp.reward[picked]
        target = _number(mdp.next_state[picked], next_stock(stock[inner][owner], reward, mdp.discount), keys, found)
        if len(keys) > max_pairs:
            raise UserError(f"augment: more than max_pairs={max_pairs} (state, stock) pairs after {step + 1} of {depth} steps; "
                            "use stock_grid, a shorter horizon, or rewards on a lattice")
        edges.append((source[owner], mdp.outcome_row[picked] % A, target, mdp.probability[picked], reward))
    state, stock = (np.concatenate(x) for x in zip(*found))
    n = len(state)
    moved = np.zeros(n, bool)
    for edge in edges:
        moved[edge[0]] = True
    still = np.repeat(np.flatnonzero(~moved), A)
    edges.append((still, np.tile(np.arange(A), len(still) // A), still, np.ones(len(still)), np.zeros((len(still), *mdp.reward.shape[1:]))))
    source, action, target, probability, reward = (np.concatenate(x) for x in zip(*edges))
    pairs = MDP.from_outcomes(n, A, source, action, target, probability, reward, None, depth, mdp.discount)
    return Augmented(pairs, state, stock, depth, keys)


def achievable_returns(mdp: MDP, horizon: int | None = None) -> np.ndarray:
    """Sorted distinct discounted returns that some course of actions and chance can yield from the initial states. Scalar rewards."""
    horizon = mdp.horizon if horizon is None else horizon
    if mdp.reward.ndim != 1 or horizon is None:
        raise UserError("achievable_returns needs a scalar reward and a horizon")
    state, total = np.flatnonzero(mdp.initial), np.zeros(np.count_nonzero(mdp.initial))
    done = []
    for t in range(horizon):
        ended = mdp.absorbing[state]
        done.append(total[ended])
        state, total = state[~ended], total[~ended]
        picked, counts = spans(mdp.offsets[::mdp.actions], state)
        state, total = mdp.next_state[picked], np.repeat(total, counts) + mdp.discount**t * mdp.reward[picked]
        _, kept = np.unique(np.stack([state, np.round(total, DECIMALS)]), axis=1, return_index=True)
        state, total = state[kept], total[kept]
    returns = np.concatenate([*done, total])
    return returns[np.unique(np.round(returns, DECIMALS), return_index=True)[1]]


def _keys(state, stock) -> list[bytes]:
    rows = np.column_stack([state.astype(float), np.round(stock, DECIMALS) + 0.0])  # + 0.0 makes -0.0 and 0.0 one key
    return [r.tobytes() for r in rows]


def _number(state, stock, keys: dict, found: list) -> np.ndarray:
    """The number of every pair; pairs not met before get the next ones and are appended to `found` as a layer."""
    new, numbers = [], np.empty(len(state), np.int64)
    for i, key in enumerate(_keys(state, stock)):
        if key not in keys:
            keys[key] = len(keys)
            new.append(i)
        numbers[i] = keys[key]
    found.append((state[new], stock[new]))
    return numbers
