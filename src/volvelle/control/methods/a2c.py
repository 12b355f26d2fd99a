"""Advantage actor-critic: short rollouts, one gradient step each.

Problem: policy gradients from whole episodes are noisy and come late.
Idea: bootstrap after a few steps with a learnt value. Every 5 steps of many environments, advantages are n-step returns minus values (GAE with
lambda 1), and actor and critic make one joint step with RMSprop.
Pick it as the simplest actor-critic and for very cheap environments in large numbers; ppo is nearly always the better use of the same data.
Source: arXiv 1602.01783 (the asynchronous form); this is the synchronous one of the reference implementations.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from volvelle.core.parts import method, part
from volvelle.core.schedule import Schedule, at
from volvelle.core.trainable import Optimiser

from ..credit import GAE, PolicyGradient
from ..networks import MLP
from ..onpolicy import OnPolicy


@part("rmsprop")
class RMSprop(Optimiser):
    """Gradients divided by a running root mean square; eps is added outside the root."""

    lr: Annotated[float, Field(gt=0)] | Schedule = 7e-4
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    eps: Annotated[float, Field(gt=0)] = 1e-5
    clip: Annotated[float, Field(gt=0)] | None = 0.5
    warmup: Annotated[int, Field(ge=0)] = 0

    def build(self, parameters):
        return torch.optim.RMSprop(parameters, lr=at(self.lr, 0), alpha=self.decay, eps=self.eps)


a2c = method("a2c", OnPolicy(
    envs=16, length=5, advantage=GAE(lam=1.0), objective=PolicyGradient(), entropy=0.0, value_weight=0.5,
    optimiser=RMSprop(lr=7e-4, decay=0.99, eps=1e-5, clip=0.5), network=MLP(hidden=(64, 64), activation="tanh", init="orthogonal")),
    title="advantage actor-critic", source="arXiv 1602.01783")
