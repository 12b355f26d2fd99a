"""The tabular Markov decision process of the planning wing, and its classical dynamic programming.

One type serves every exact method. An outcome is one way a step can end: (next state, reward) with a probability. Outcomes are stored flat,
grouped by row, where row = state * actions + action, so dense problems and large sparse ones share one layout and every operator is a
vectorised pass over arrays. Rewards belong to outcomes, hence a random reward is kept as such; `expected_reward` averages it. A reward may be
a vector of m components.

Time runs 0..T-1 for a horizon T. Episodes that end early move to an absorbing state: every action loops with reward zero.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import spsolve

from volvelle.core.errors import UserError

SUM_TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False)
class MDP:
    """states S, actions A, and M outcomes.

    offsets [S*A+1] (outcomes of row i are offsets[i]:offsets[i+1]), next_state [M], probability [M], reward [M] or [M, m], initial [S],
    horizon (steps, None for an endless problem), discount in [0, 1]. Raises UserError, naming the array and the row, for anything malformed.
    """
    states: int
    actions: int
    offsets: np.ndarray
    next_state: np.ndarray
    probability: np.ndarray
    reward: np.ndarray
    initial: np.ndarray
    horizon: int | None = None
    discount: float = 1.0

    def __post_init__(self):
        for name, kind in (("offsets", np.int64), ("next_state", np.int64), ("probability", float), ("reward", float), ("initial", float)):
            object.__setattr__(self, name, _array(name, getattr(self, name), kind))
        _check(self)

    # ---- loading -------------------------------------------------------------------------------------------------------------------
    @classmethod
    def from_outcomes(cls, states, actions, state, action, next_state, probability, reward, initial=None, horizon=None, discount=1.0) -> MDP:
        """Successor-list form: five flat arrays, one entry per outcome, in any order. `initial` is a state or a distribution [S]; default state 0."""
        state, action = _array("state", state, np.int64), _array("action", action, np.int64)
        next_state, probability, reward = (_array(n, v, k) for n, v, k in
                                           (("next_state", next_state, np.int64), ("probability", probability, float), ("reward", reward, float)))
        for name, values, limit in (("state", state, states), ("action", action, actions)):
            if values.shape != probability.shape or values.ndim != 1:
                raise UserError(f"{name} has shape {values.shape}; one entry per outcome is needed, as in probability {probability.shape}")
            if values.size and not (0 <= values.min() and values.max() < limit):
                raise UserError(f"{name} runs from {values.min()} to {values.max()}; accepted: 0 to {limit - 1}")
        if len(reward) != len(probability):
            raise UserError(f"reward has shape {reward.shape}; its first axis must match probability {probability.shape}")
        row = state * actions + action
        order = np.argsort(row, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=states * actions))])
        return cls(states, actions, offsets, next_state[order], probability[order], reward[order], _initial(initial, states), horizon, discount)

    @classmethod
    def from_arrays(cls, transition, reward, initial=None, horizon=None, discount=1.0) -> MDP:
        """Dense form: transition [S, A, S]; reward [S, A], [S, A, S] or, for vector rewards, [S, A, S, m]. Zero entries are dropped."""
        transition, reward = _array("transition", transition, float), _array("reward", reward, float)
        if transition.ndim != 3 or transition.shape[0] != transition.shape[2]:
            raise UserError(f"transition has shape {transition.shape}; accepted: (states, actions, states)")
        states, actions, _ = transition.shape
        if reward.shape == (states, actions):
            reward = np.broadcast_to(reward[:, :, None], transition.shape)
        elif reward.shape[:3] != transition.shape or reward.ndim > 4:
            raise UserError(f"reward has shape {reward.shape}; accepted: {(states, actions)}, {transition.shape} or {transition.shape + ('m',)}")
        kept = np.nonzero(transition)
        return cls.from_outcomes(states, actions, *kept, transition[kept], reward[kept], initial, horizon, discount)

    @classmethod
    def from_successors(cls, table, initial=None, horizon=None, discount=1.0) -> MDP:
        """Nested successor lists in Gymnasium's toy-text layout: table[state][action] = [(probability, next state, reward, terminated), ...].

        One absorbing end state is appended (index S-1); an outcome that terminates leads there, whatever next state it names, because some toy-text
        tables let the agent walk out of a terminal cell.
        """
        states, actions = len(table), len(table[0])
        outcomes = []
        for s in range(states):
            if len(table[s]) != actions:
                raise UserError(f"state {s} lists {len(table[s])} actions; state 0 lists {actions}, all must agree")
            for a in range(actions):
                outcomes += [(s, a, states if ended else t, p, r) for p, t, r, ended in table[s][a] if p > 0]
        outcomes += [(states, a, states, 1.0, 0.0) for a in range(actions)]
        start = _initial(initial, states)
        return cls.from_outcomes(states + 1, actions, *zip(*outcomes), np.append(start, 0.0), horizon, discount)

    @classmethod
    def from_gymnasium(cls, env, horizon=None, discount=1.0, **options) -> MDP:
        """From an environment id or an environment whose `unwrapped` holds a table `P` (FrozenLake, CliffWalking, Taxi, ...)."""
        if isinstance(env, str):
            import gymnasium
            try:
                env = gymnasium.make(env, **options)
            except gymnasium.error.Error as error:
                raise UserError(f"environment {env!r} cannot be made: {error}") from None
        table = getattr(env.unwrapped, "P", None)
        if table is None:
            name = env.spec.id if env.spec else type(env.unwrapped).__name__
            raise UserError(f"environment {name!r} has no transition table `P`; enumerate it with volvelle.planning.worlds, or take a toy-text id")
        return cls.from_successors(table, getattr(env.unwrapped, "initial_state_distrib", None), horizon, discount)

    # ---- views ---------------------------------------------------------------------------------------------------------------------
    @cached_property
    def transition(self) -> sp.csr_matrix:
        """[S*A, S] sparse."""
        return sp.csr_matrix((self.probability, self.next_state, self.offsets), shape=(self.states * self.actions, self.states))

    @cached_property
    def outcome_row(self) -> np.ndarray:
        """[M]: the row each outcome belongs to."""
        return np.repeat(np.arange(self.states * self.actions), np.diff(self.offsets))

    @cached_property
    def expected_reward(self) -> np.ndarray:
        """[S, A], or [S, A, m] for vector rewards."""
        weighted = self.reward * (self.probability if self.reward.ndim == 1 else self.probability[:, None])
        return np.add.reduceat(weighted, self.offsets[:-1]).reshape(self.states, self.actions, *self.reward.shape[1:])

    @cached_property
    def absorbing(self) -> np.ndarray:
        """[S] bool: every action stays with reward zero."""
        quiet = self.next_state == self.outcome_row // self.actions
        quiet &= ~np.any(self.reward.reshape(len(quiet), -1), axis=1)
        return np.logical_and.reduceat(quiet, self.offsets[:-1]).reshape(self.states, self.actions).all(1)

    @property
    def deterministic(self) -> bool:
        return bool((self.offsets[1:] - self.offsets[:-1] == 1).all())

    def with_(self, **changes) -> MDP:
        """A copy with another horizon, discount, initial distribution, ..."""
        return replace(self, **changes)

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """(transition [S, A, S], expected reward [S, A]) for small problems."""
        return self.transition.toarray().reshape(self.states, self.actions, self.states), self.expected_reward


class Solution(NamedTuple):
    """values [S] or [T+1, S], q [S, A] or [T, S, A], policy (integer actions) [S] or [T, S]; sweeps is the number of operator applications."""
    values: np.ndarray
    q: np.ndarray
    policy: np.ndarray
    sweeps: int


def backup(mdp: MDP, values) -> np.ndarray:
    """r + discount * P v, [S, A]; values [S]."""
    return _scalar_reward(mdp) + mdp.discount * (mdp.transition @ values).reshape(mdp.states, mdp.actions)


def backward_induction(mdp: MDP) -> Solution:
    """The optimal values, Q and policy of a finite-horizon problem; the smallest optimal action wins ties. O(T M)."""
    horizon = _horizon(mdp)
    values, q = np.zeros((horizon + 1, mdp.states)), np.empty((horizon, mdp.states, mdp.actions))
    for t in reversed(range(horizon)):
        q[t] = backup(mdp, values[t + 1])
        values[t] = q[t].max(-1)
    return Solution(values, q, q.argmax(-1), horizon)


def value_iteration(mdp: MDP, tolerance: float = 1e-10) -> Solution:
    """The optimal values of a discounted problem, each within `tolerance` of the truth (a change of e leaves an error of at most e d / (1 - d))."""
    if mdp.discount >= 1:
        raise UserError(f"value_iteration: discount {mdp.discount} does not contract; give a discount below 1, or a horizon and backward_induction")
    values, sweeps = np.zeros(mdp.states), 0
    while True:
        q, sweeps = backup(mdp, values), sweeps + 1
        values, before = q.max(-1), values
        if np.abs(values - before).max() * mdp.discount <= tolerance * (1 - mdp.discount):
            q = backup(mdp, values)
            return Solution(q.max(-1), q, q.argmax(-1), sweeps + 1)


def policy_evaluation(mdp: MDP, policy) -> np.ndarray:
    """Values of a policy: [T+1, S] for a horizon T, else the exact solution [S] of (I - discount P_pi) v = r_pi.

    policy: integer actions [S] or [T, S], or probabilities [S, A] or [T, S, A].
    """
    weights, reward = policy_probabilities(mdp, policy), _scalar_reward(mdp)
    if mdp.horizon is None:
        if weights.ndim != 2:
            raise UserError(f"policy has shape {np.shape(policy)}; a problem without a horizon takes one policy for all time")
        spread = sp.csr_matrix((weights.ravel(), (np.repeat(np.arange(mdp.states), mdp.actions), np.arange(weights.size))),
                               shape=(mdp.states, weights.size))
        system = sp.identity(mdp.states, format="csc") - mdp.discount * (spread @ mdp.transition).tocsc()
        return np.atleast_1d(spsolve(system, (weights * reward).sum(-1)))
    values = np.zeros((mdp.horizon + 1, mdp.states))
    for t in reversed(range(mdp.horizon)):
        values[t] = ((weights if weights.ndim == 2 else weights[t]) * backup(mdp, values[t + 1])).sum(-1)
    return values


def policy_probabilities(mdp: MDP, policy) -> np.ndarray:
    """Integer actions [S] or [T, S] as probabilities [..., S, A]; probabilities are checked and passed through."""
    policy = np.asarray(policy)
    if np.issubdtype(policy.dtype, np.integer):
        lead, ok = policy.shape[:-1], policy.ndim in (1, 2) and policy.shape[-1] == mdp.states
        if ok and policy.size and not (0 <= policy.min() and policy.max() < mdp.actions):
            raise UserError(f"policy holds actions {policy.min()} to {policy.max()}; accepted: 0 to {mdp.actions - 1}")
        weights = np.eye(mdp.actions)[policy] if ok else policy
    else:
        weights, lead = policy.astype(float), policy.shape[:-2]
        ok = policy.ndim in (2, 3) and policy.shape[-2:] == (mdp.states, mdp.actions)
        if ok and (weights.min() < 0 or np.abs(weights.sum(-1) - 1).max() > SUM_TOLERANCE):
            raise UserError("policy: some rows of the probabilities are negative or do not sum to one")
    if not ok or (lead and lead != (mdp.horizon,)):
        raise UserError(f"policy has shape {policy.shape}; accepted: actions ({mdp.states},) or ({mdp.horizon}, {mdp.states}), "
                        f"probabilities with a last axis of {mdp.actions} added")
    return weights


def unroll(mdp: MDP) -> MDP:
    """The same problem with the time in the state: state t*S + s for t < T, then one absorbing end. Stationary methods then solve finite horizons."""
    horizon, n = _horizon(mdp), mdp.states
    state, action = np.divmod(mdp.outcome_row, mdp.actions)
    end, clock = horizon * n, np.repeat(np.arange(horizon), len(state))
    target = np.where(clock == horizon - 1, end, (clock + 1) * n + np.tile(mdp.next_state, horizon))
    loops, zero = np.arange(mdp.actions), np.zeros((mdp.actions, *mdp.reward.shape[1:]))
    return MDP.from_outcomes(
        end + 1, mdp.actions, np.append(clock * n + np.tile(state, horizon), np.full(mdp.actions, end)),
        np.append(np.tile(action, horizon), loops), np.append(target, np.full(mdp.actions, end)),
        np.append(np.tile(mdp.probability, horizon), np.ones(mdp.actions)),
        np.concatenate([np.tile(mdp.reward, (horizon,) + (1,) * (mdp.reward.ndim - 1)), zero]),
        np.append(mdp.initial, np.zeros(end + 1 - n)), horizon, mdp.discount)


# ---- checks ------------------------------------------------------------------------------------------------------------------------
def _array(name, values, kind) -> np.ndarray:
    try:
        array = np.ascontiguousarray(values, dtype=kind)
        if kind is np.int64 and not np.array_equal(array, np.asarray(values)):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"{name} cannot be read as an array of {'whole numbers' if kind is np.int64 else 'numbers'}") from None
    if kind is float and not np.isfinite(array).all():
        raise UserError(f"{name} holds a value that is not finite")
    return array


def _initial(initial, states) -> np.ndarray:
    if initial is None or np.ndim(initial) == 0:
        index = 0 if initial is None else int(initial)
        if not 0 <= index < states:
            raise UserError(f"initial state {initial}; accepted: 0 to {states - 1}, or a distribution of length {states}")
        return np.eye(1, states, index)[0]
    return _array("initial", initial, float)


def _check(mdp: MDP):
    S, A, M = mdp.states, mdp.actions, len(mdp.probability)
    if S < 1 or A < 1:
        raise UserError(f"states {S}, actions {A}: both must be at least 1")
    for name, shape in (("offsets", (S * A + 1,)), ("next_state", (M,)), ("probability", (M,)), ("initial", (S,))):
        if getattr(mdp, name).shape != shape:
            raise UserError(f"{name} has shape {getattr(mdp, name).shape}; accepted: {shape}")
    if mdp.reward.ndim not in (1, 2) or len(mdp.reward) != M:
        raise UserError(f"reward has shape {mdp.reward.shape}; accepted: {(M,)} or {(M, 'm')}")
    counts = np.diff(mdp.offsets)
    if mdp.offsets[0] != 0 or mdp.offsets[-1] != M or counts.min() < 0:
        raise UserError(f"offsets must rise from 0 to {M}, the number of outcomes")
    if (counts == 0).any():
        s, a = divmod(int(np.argmin(counts)), A)
        raise UserError(f"state {s}, action {a} has no outcome; every row needs probabilities that sum to one")
    if not (0 <= mdp.next_state.min() and mdp.next_state.max() < S):
        raise UserError(f"next_state runs from {mdp.next_state.min()} to {mdp.next_state.max()}; accepted: 0 to {S - 1}")
    if mdp.probability.min() < 0:
        raise UserError(f"probability holds {mdp.probability.min():g}; accepted: 0 to 1")
    sums = np.add.reduceat(mdp.probability, mdp.offsets[:-1])
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > SUM_TOLERANCE:
        raise UserError(f"transition probabilities of state {worst // A}, action {worst % A} sum to {sums[worst]:.10g}; they must sum to one")
    if mdp.initial.min() < 0 or abs(mdp.initial.sum() - 1) > SUM_TOLERANCE:
        raise UserError(f"initial distribution sums to {mdp.initial.sum():.10g} with smallest entry {mdp.initial.min():g}; "
                        "it must be non-negative and sum to one")
    if mdp.horizon is not None and (int(mdp.horizon) != mdp.horizon or mdp.horizon < 1):
        raise UserError(f"horizon {mdp.horizon}; accepted: a whole number of steps, at least 1, or None")
    if not 0 <= mdp.discount <= 1:
        raise UserError(f"discount {mdp.discount}; accepted: 0 to 1")
    if mdp.horizon is None and mdp.discount == 1:
        raise UserError("horizon None with discount 1: an endless undiscounted problem has no value; give a horizon or a discount below 1")


def _scalar_reward(mdp: MDP) -> np.ndarray:
    if mdp.reward.ndim != 1:
        raise UserError(f"reward has {mdp.reward.shape[1]} components; this solver takes a scalar reward")
    return mdp.expected_reward


def _horizon(mdp: MDP) -> int:
    if mdp.horizon is None:
        raise UserError("horizon None: this solver needs a finite horizon")
    return mdp.horizon
