"""Datasets with known contents for the tests of the offline wing."""

import gymnasium as gym
import numpy as np

from volvelle.control.spaces import Actions, Layout, Spec
from volvelle.offline.data.dataset import Dataset


def counting(lengths=(3, 5, 2), rewards=True, terminate=(0,), **extra):
    """Observations (episode, time), actions time / 10, rewards equal to the time; episodes in `terminate` end truly."""
    obs = np.array([[e, t] for e, n in enumerate(lengths) for t in range(n + 1)], np.float32)
    last = np.array([t == n for n in lengths for t in range(n + 1)])
    fields = {"obs": obs, "actions": np.where(last[:, None], 0, obs[:, 1:] / 10).astype(np.float32)}
    if rewards:
        fields["rewards"] = np.where(last, 0, obs[:, 1]).astype(np.float32)
    ends = np.array([t == n - 1 for n in lengths for t in range(n + 1)])
    over = np.isin(obs[:, 0], terminate) & ends
    fields |= {"terminated": over.astype(np.float32), "truncated": (ends & ~over).astype(np.float32), **extra}
    box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    act = gym.spaces.Box(-1, 1, (1,), np.float32)
    return Dataset(fields, np.array(lengths, np.int64), Spec(Layout(2), Actions.of(act)), frozenset({"obs"} | set(extra)), box, act, {})

