"""REGRESS: what stands between sampled targets and a Q function.

A regressor is called as regress(observations [n, ...], actions [n], targets [n], n_actions) and returns a function from observations [n, ...] to
Q [n, n_actions].
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np


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
