"""Episodes, sampled: many at once from a tabular MDP, or one after another from a Gymnasium environment.

A sampler is called as sampler(episodes, act, rng) and has `actions` and `horizon`; act(t, observations [n, ...]) returns actions [n] for the episodes
still running at step t. A time limit is a true end, as finite-horizon problems need.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from volvelle.core.errors import UserError

from .mdp import MDP


class Episodes(NamedTuple):
    """observations [n, T+1, ...], actions [n, T], rewards [n, T]; alive [n, T]: the step was taken (never false, then true). Entries beyond are 0."""
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    alive: np.ndarray

    @property
    def steps(self) -> int:
        return int(self.alive.sum())

    def returns_to_go(self, discount: float = 1.0) -> np.ndarray:
        """[n, T]: R_t + discount R_{t+1} + ..."""
        out, later = np.empty_like(self.rewards), np.zeros(len(self.rewards))
        for t in reversed(range(self.rewards.shape[1])):
            out[:, t] = later = self.rewards[:, t] + discount * later
        return out


class TabularSampler:
    """Episodes of an MDP, all in lockstep; observations are state numbers. An episode ends in an absorbing state or at the horizon."""

    def __init__(self, mdp: MDP):
        if mdp.horizon is None or mdp.reward.ndim != 1:
            raise UserError("TabularSampler needs a horizon and a scalar reward")
        self.mdp, self.actions, self.horizon = mdp, mdp.actions, mdp.horizon
        self._cumulated = np.cumsum(mdp.probability)
        self._start = np.cumsum(mdp.initial)

    def __call__(self, episodes: int, act: Callable, rng: np.random.Generator) -> Episodes:
        m, n = self.mdp, episodes
        observations, actions = np.zeros((n, self.horizon + 1), np.int64), np.zeros((n, self.horizon), np.int64)
        rewards, alive = np.zeros((n, self.horizon)), np.zeros((n, self.horizon), bool)
        observations[:, 0] = np.minimum(np.searchsorted(self._start, rng.random(n) * self._start[-1], side="right"), m.states - 1)
        for t in range(self.horizon):
            on = np.flatnonzero(~m.absorbing[observations[:, t]])
            observations[:, t + 1] = observations[:, t]
            if not len(on):
                observations[:, t + 1:] = observations[:, t:t + 1]
                break
            alive[on, t] = True
            actions[on, t] = chosen = np.asarray(act(t, observations[on, t]))
            row = observations[on, t] * m.actions + chosen
            first, last = m.offsets[row], m.offsets[row + 1] - 1
            below = np.where(first > 0, self._cumulated[first - 1], 0.0)
            draw = below + rng.random(len(on)) * (self._cumulated[last] - below)
            outcome = np.clip(np.searchsorted(self._cumulated, draw, side="right"), first, last)
            rewards[on, t], observations[on, t + 1] = m.reward[outcome], m.next_state[outcome]
        return Episodes(observations, actions, rewards, alive)


class EnvironmentSampler:
    """Episodes of a Gymnasium environment with a Discrete action space, at most `horizon` steps each; observations as the environment gives them.

    The environment is seeded from rng at every episode.
    """

    def __init__(self, env, horizon: int):
        if not hasattr(env.action_space, "n") or getattr(env.action_space, "start", 0) != 0:
            raise UserError(f"EnvironmentSampler: action space {env.action_space}; accepted: Discrete from 0")
        self.env, self.actions, self.horizon = env, int(env.action_space.n), horizon

    def __call__(self, episodes: int, act: Callable, rng: np.random.Generator) -> Episodes:
        shape = (episodes, self.horizon)
        observations, actions = [], np.zeros(shape, np.int64)
        rewards, alive = np.zeros(shape), np.zeros(shape, bool)
        for i in range(episodes):
            observation, _ = self.env.reset(seed=int(rng.integers(2**31)))
            seen = [observation]
            for t in range(self.horizon):
                alive[i, t] = True
                actions[i, t] = np.asarray(act(t, np.asarray(observation)[None]))[0]
                observation, rewards[i, t], ended, cut, _ = self.env.step(int(actions[i, t]))
                seen.append(observation)
                if ended or cut:
                    break
            observations.append(np.stack(seen + [seen[-1]] * (self.horizon + 1 - len(seen))))
        return Episodes(np.stack(observations), actions, rewards, alive)


def expected_returns(mdp: MDP, act: Callable, seeds: int = 1) -> np.ndarray:
    """[seeds]: exact discounted returns of deterministic policies side by side, of a problem with a horizon and a scalar reward.

    act(t, states [n]) returns actions [seeds, n]; it is asked only for states that some of the policies can meet at step t.
    """
    mass, total, weight, reward = np.tile(mdp.initial, (seeds, 1)), np.zeros(seeds), 1.0, mdp.expected_reward.ravel()
    for t in range(mdp.horizon):
        states = np.flatnonzero((mass > 0).any(0) & ~mdp.absorbing)
        if not len(states):
            break
        rows, here = states * mdp.actions + np.asarray(act(t, states)), mass[:, states]
        total += weight * (here * reward[rows]).sum(1)
        mass = np.stack([mdp.transition[r].T @ h for r, h in zip(rows, here)])
        weight *= mdp.discount
    return total
