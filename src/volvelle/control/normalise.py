"""Running mean and variance of observations, and running scale of rewards, one per seed; saved with the policy."""

from __future__ import annotations

from typing import Any

import numpy as np

EPS = 1e-8


class Moments:
    """Mean and variance of everything seen, per seed: [S, D], in float64. Batches are [S, N, D]."""

    def __init__(self, seeds: int, *shape: int):
        self.mean, self.var, self.count = np.zeros((seeds, *shape)), np.ones((seeds, *shape)), 1e-4

    def update(self, batch: np.ndarray) -> None:
        n = batch.shape[1]
        mean = batch.mean(1, dtype=np.float64)
        spread = batch - mean[:, None]
        delta, total = mean - self.mean, self.count + n
        squares = self.var * self.count + np.square(spread).sum(1) + np.square(delta) * (self.count * n / total)
        self.mean += delta * (n / total)
        self.var, self.count = squares / total, total

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.copy(), "var": self.var.copy(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.var, self.count = state["mean"].copy(), state["var"].copy(), state["count"]


class ObservationNormaliser:
    """(x - mean) / sqrt(var + 1e-8), clipped to +-10; only the vector part of an observation."""

    def __init__(self, seeds: int, size: int, clip: float = 10.0):
        self.moments, self.clip = Moments(seeds, size), clip
        self._refresh()

    def _refresh(self) -> None:
        self.shift = self.moments.mean.astype(np.float32)[:, None]
        self.scale = (1 / np.sqrt(self.moments.var + EPS)).astype(np.float32)[:, None]

    def __call__(self, x: Any, update: bool = False) -> Any:
        """x: [S, N, D], or a dict with "vector". `update` takes x into the statistics first."""
        if isinstance(x, dict):
            return {**x, "vector": self(x["vector"], update)} if "vector" in x else x
        if update:
            self.moments.update(x)
            self._refresh()
        return np.clip((x - self.shift) * self.scale, -self.clip, self.clip)

    def state_dict(self):
        return self.moments.state_dict()

    def load_state_dict(self, state):
        self.moments.load_state_dict(state)
        self._refresh()


class RewardNormaliser:
    """Rewards divided by the deviation of the discounted return, clipped to +-10. Keeps a running return per environment."""

    def __init__(self, seeds: int, count: int, gamma: float, clip: float = 10.0):
        self.moments, self.gamma, self.clip = Moments(seeds), gamma, clip
        self.returns = np.zeros((seeds, count))

    def __call__(self, rewards: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """rewards, ended: [S, N]."""
        self.returns = self.returns * self.gamma + rewards
        self.moments.update(self.returns)
        self.returns[ended] = 0.0
        return np.clip(rewards / np.sqrt(self.moments.var + EPS)[:, None], -self.clip, self.clip).astype(np.float32)

    def restart(self) -> None:
        self.returns[:] = 0.0

    def state_dict(self):
        return self.moments.state_dict()

    def load_state_dict(self, state):
        self.moments.load_state_dict(state)
        self.restart()
