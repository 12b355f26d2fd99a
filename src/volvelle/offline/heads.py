"""Policy heads of offline methods: Gaussians that score recorded actions, whatever their bounds.

Actions are scored in units of half the action range, so that a standard deviation of 1 means the same in every task.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from volvelle.control.heads import HALF_LOG_TWO_PI, Categorical, Distribution, PolicyHead
from volvelle.control.spaces import Actions
from volvelle.core.errors import UserError
from volvelle.core.parts import part


class Around(Distribution):
    """A Gaussian around a mean in units of half the action range; actions are cut to the bounds only when acting."""

    def __init__(self, actions: Actions, tanh: bool, free: bool, low: float, high: float):
        self.size = self.width = self.noise_width = actions.continuous
        self.free, self.start = (self.size if free else 0), 0.0
        self.tanh, self.low, self.high = tanh, low, high
        bounds = torch.tensor([actions.low, actions.high], dtype=torch.float32)
        self.scale, self.bias = (bounds[1] - bounds[0]) / 2, (bounds[1] + bounds[0]) / 2

    def to(self, device) -> Around:
        self.scale, self.bias = self.scale.to(device), self.bias.to(device)
        return self

    def parts(self, outputs) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, in units of half the action range."""
        mean, log_std = outputs if isinstance(outputs, tuple) else (outputs, torch.zeros_like(outputs[..., :1]))
        return (mean.tanh() if self.tanh else mean), log_std.clamp(self.low, self.high)

    def mode(self, outputs):
        mean, _ = self.parts(outputs)
        return torch.addcmul(self.bias, mean.clamp(-1, 1), self.scale)

    def sample(self, outputs, noise):
        mean, log_std = self.parts(outputs)
        return torch.addcmul(self.bias, (mean + log_std.exp() * noise).clamp(-1, 1), self.scale)

    def log_prob(self, outputs, actions):
        mean, log_std = self.parts(outputs)
        z = ((actions - self.bias) / self.scale - mean) * (-log_std).exp()
        return -(0.5 * z.square() + log_std + HALF_LOG_TWO_PI).sum(-1)

    def entropy(self, outputs):
        return (self.parts(outputs)[1] + 0.5 + HALF_LOG_TWO_PI).expand(*self.parts(outputs)[0].shape).sum(-1)


@part("around")
class AroundMean(PolicyHead):
    """A Gaussian for offline methods; discrete actions get a softmax.

    tanh: the mean goes through a tanh (the distribution does not); std: "free" (parameters, the same in every state, clipped to exp of [low, high])
    or "one" (fixed at half the action range: the loss is a squared error).
    """

    tanh: bool = True
    std: Literal["free", "one"] = "free"
    low: float = -5.0
    high: float = 2.0

    def bind(self, actions):
        if actions.kind in ("discrete", "codes"):
            return Categorical().bind(actions)
        if actions.kind != "continuous" or not actions.bounded:
            raise UserError(f"head=around needs discrete actions, or continuous ones with finite bounds; this task has {actions.describe()}")
        return Around(actions, self.tanh, self.std == "free", self.low, self.high)
