"""Networks that read a past: a gated recurrent unit over the rows of an observation, oldest first.

The past is part of the observation (`task.sees=walk`, `task.frames=8`), so every loop, buffer and method works on it as on any other; what lies before it is not remembered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from volvelle.core.errors import UserError
from volvelle.core.parts import part

from .networks import Dense, Flat, MLP, Width, initialise


class Recurrent(nn.Module):
    """torch.nn.GRU's update for every copy, then dense layers on the last state: [C, B, steps * features (+ extra)] -> [C, B, width].

    r, z = sigmoid(W x + b + U h + c), n = tanh(W x + b + r (U h + c)), h <- (1 - z) n + z h. Rows of zeros are steps that have not been: h stays.
    """

    def __init__(self, copies: int, features: int, units: int, dense: Dense, steps: int):
        super().__init__()
        self.features, self.units, self.steps, self.dense, self.width = features, units, steps, dense, dense.width
        self.into, self.back = nn.Parameter(torch.zeros(copies, features, 3 * units)), nn.Parameter(torch.zeros(copies, units, 3 * units))
        self.bias, self.back_bias = (nn.Parameter(torch.zeros(copies, 1, 3 * units)) for _ in range(2))

    def reset(self, generators: Sequence[torch.Generator]) -> None:
        """torch.nn.GRU's start: everything uniform in +-1 / sqrt(units)."""
        for into, back, bias, back_bias, generator in zip(self.into, self.back, self.bias, self.back_bias, generators, strict=True):
            initialise(into, bias, "torch", 1.0, self.units, 3 * self.units, generator)
            initialise(back, back_bias, "torch", 1.0, self.units, 3 * self.units, generator)

    def forward(self, x: Tensor) -> Tensor:
        copies, batch = x.shape[:2]
        rows = x[..., : self.steps * self.features].unflatten(-1, (self.steps, self.features))
        been = (rows != 0).any(-1, keepdim=True)                                                       # [C, B, steps, 1]
        given = torch.baddbmm(self.bias, rows.flatten(1, 2), self.into).unflatten(1, (batch, self.steps))
        state = x.new_zeros(copies, batch, self.units)
        for t in range(self.steps):
            now, was = given[:, :, t], torch.baddbmm(self.back_bias, state, self.back)
            reset, keep = torch.sigmoid(now[..., : 2 * self.units] + was[..., : 2 * self.units]).chunk(2, -1)
            fresh = torch.tanh(now[..., 2 * self.units :] + reset * was[..., 2 * self.units :])
            state = torch.where(been[:, :, t], torch.lerp(fresh, state, keep), state)
        return self.dense(torch.cat([state, x[..., self.steps * self.features :]], -1))


@part("gru")
class GRU(MLP):
    """A gated recurrent unit (arXiv 1406.1078) over an observation that holds several steps, then dense layers.

    features: numbers per step, of which the observation's must be a multiple (a walk's has three, stacked frames what one frame has); units: of the state.
    """

    features: Width = 3
    units: Width = 128
    hidden: tuple[Width, ...] = ()

    def build(self, layout, copies, extra=0):
        if layout.images or layout.size % self.features:
            raise UserError(f"network.features={self.features}: the observations are {layout.describe()}; accepted: a divisor of their length, for example "
                            "task.sees=walk with 3, or task.frames=8 with the numbers of one frame")
        dense = Dense(copies, self.units + extra, self.hidden, self.activation, self.layer_norm, self.init)
        return Flat(Recurrent(copies, self.features, self.units, dense, layout.size // self.features))
