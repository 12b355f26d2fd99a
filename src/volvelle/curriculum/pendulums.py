"""Many pendulums at once: the equations of Gymnasium's Pendulum-v1 on arrays, and policies found by the cross-entropy method."""

from __future__ import annotations

import numpy as np

HIDDEN, STEPS, TORQUE, SPEED = 8, 150, 2.0, 8.0
WIDTH = 3 * HIDDEN + HIDDEN + HIDDEN + 1
WORST, BEST = -1400.0, -100.0


def rollout(policies: np.ndarray, lengths: np.ndarray, angles: np.ndarray, speeds: np.ndarray, steps: int = STEPS) -> np.ndarray:
    """Returns [..., E] of networks 3-8-1 (tanh) with weights [..., WIDTH] on pendulums of `lengths` [...] from E starts (angles, speeds [E])."""
    shape = np.broadcast_shapes(policies.shape[:-1], lengths.shape)
    w1 = policies[..., : 3 * HIDDEN].reshape(*policies.shape[:-1], HIDDEN, 3)
    b1, w2, b2 = policies[..., 3 * HIDDEN : 4 * HIDDEN], policies[..., 4 * HIDDEN : 5 * HIDDEN], policies[..., 5 * HIDDEN :]
    theta, omega = (np.broadcast_to(x, (*shape, len(x))).copy() for x in (angles, speeds))
    length, total = lengths[..., None], np.zeros(theta.shape)
    for _ in range(steps):
        hidden = np.tanh(w1 @ np.stack([np.cos(theta), np.sin(theta), omega], -2) + b1[..., None])
        torque = TORQUE * np.tanh((w2[..., None, :] @ hidden)[..., 0, :] + b2)
        wrapped = (theta + np.pi) % (2 * np.pi) - np.pi
        total -= wrapped**2 + 0.1 * omega**2 + 0.001 * torque**2
        omega = np.clip(omega + (15.0 / length * np.sin(theta) + 3.0 / length**2 * torque) * 0.05, -SPEED, SPEED)
        theta = theta + omega * 0.05
    return total


def starts(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.uniform(-np.pi, np.pi, count), rng.uniform(-1, 1, count)


def train(draw, count: int, population: int, iterations: int, rng: np.random.Generator, episodes: int = 4) -> np.ndarray:
    """[count, WIDTH]: mean of the final elite of `count` cross-entropy searches side by side. draw() gives the lengths [count, episodes] of an iteration."""
    mean, spread, elite = np.zeros((count, WIDTH)), np.full((count, WIDTH), 1.5), population // 8
    for _ in range(iterations):
        candidates = mean[:, None] + spread[:, None] * rng.standard_normal((count, population, WIDTH))
        lengths, total = draw(), 0.0
        if (lengths == lengths[:, :1]).all():
            total = rollout(candidates, lengths[:, :1], *starts(episodes, rng)).sum(-1)
        else:
            for e in range(episodes):
                total = total + rollout(candidates, lengths[:, e : e + 1], *starts(1, rng)).sum(-1)
        best = np.take_along_axis(candidates, np.argsort(-total, 1)[:, :elite, None], 1)
        mean, spread = best.mean(1), best.std(1) + 0.05
    return mean


def transfer(lengths: np.ndarray, population: int, iterations: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(scores [N, N] of a policy per length on every length, [N] of one policy trained on a mixture of all), from 12 fixed starts.

    Every search, the mixture's too, sees the same number of episodes.
    """
    policies = train(lambda: np.repeat(lengths[:, None], 4, 1), len(lengths), population, iterations, rng)
    mixture = train(lambda: rng.uniform(lengths[0], lengths[-1], (1, 4)), 1, population, iterations, rng)
    both = np.concatenate([policies, mixture])
    returns = rollout(both[:, None], lengths[None], *starts(12, np.random.default_rng(12))).mean(-1)
    scores = np.clip((returns - WORST) / (BEST - WORST), 0, 1)
    return scores[:-1], scores[-1]
