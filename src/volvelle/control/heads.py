"""Policy heads: how a network's outputs stand for a distribution over actions.

A head is bound to an action space. It samples from noise drawn beforehand (one block per rollout, no random calls per step), scores given
actions, and names the mode. Outputs are [..., width], actions as in spaces.Actions, log-probabilities [...].
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part

from .spaces import Actions

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
Outputs = Tensor | tuple[Tensor, Tensor]


class Distribution:
    """A head bound to an action space. `width`: outputs of the network it reads, [..., width]; `noise`: "gumbel", "normal" or "mixed"
    (`normals` normal numbers, then Gumbel ones), `noise_width` numbers per action.

    A head with `free` > 0 also has that many parameters of its own, the same in every state, that start at `start`; its outputs are then
    the pair (network outputs, parameters [S, 1, free]).
    """

    width: int = 0
    free: int = 0
    start: float = 0.0
    noise: str = "normal"
    noise_width: int = 0
    normals: int = 0

    def sample(self, outputs: Outputs, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def mode(self, outputs: Outputs) -> Tensor:
        raise NotImplementedError

    def log_prob(self, outputs: Outputs, actions: Tensor) -> Tensor:
        raise NotImplementedError

    def entropy(self, outputs: Outputs) -> Tensor:
        """[...], or broadcasting to it."""
        raise NotImplementedError

    def score(self, outputs: Outputs, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of the actions, and the entropy."""
        return self.log_prob(outputs, actions), self.entropy(outputs)

    def draw(self, outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A reparameterised sample with its log-probability."""
        raise UserError(f"{type(self).__name__} has no reparameterised sample; accepted: squashed")


class PolicyHead(Part):
    """Slot: `bind(actions)` gives the Distribution for an action space."""

    slot: ClassVar[str] = "head"

    def bind(self, actions: Actions) -> Distribution:
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------- discrete

class Categories(Distribution):
    noise = "gumbel"

    def __init__(self, codes: tuple[int, ...], plain: bool):
        self.codes, self.plain = codes, plain
        self.width = self.noise_width = sum(codes)

    def sample(self, outputs, noise):
        return self.mode(outputs + noise)  # the Gumbel maximum is a sample of the softmax

    def mode(self, outputs):
        if self.plain:
            return outputs.argmax(-1)
        return torch.stack([part.argmax(-1) for part in outputs.split(self.codes, -1)], -1)

    def entropy(self, outputs):
        logps = [part.log_softmax(-1) for part in outputs.split(self.codes, -1)]
        return sum(-(p.exp() * p).sum(-1) for p in logps)

    def log_prob(self, outputs, actions):
        if self.plain:
            return outputs.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return self.score(outputs, actions)[0]

    def score(self, outputs, actions):
        if self.plain:
            logps = outputs.log_softmax(-1)
            return logps.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1)
        total = entropy = 0.0
        for i, part in enumerate(outputs.split(self.codes, -1)):
            logps = part.log_softmax(-1)
            total = total + logps.gather(-1, actions[..., i : i + 1].long()).squeeze(-1)
            entropy = entropy - (logps.exp() * logps).sum(-1)
        return total, entropy


@part("categorical")
class Categorical(PolicyHead):
    """A softmax over the choices; several discrete parts are independent."""

    def bind(self, actions):
        if actions.low:
            raise UserError(f"head=categorical needs discrete actions; this task has {actions.describe()}; accepted: gaussian, squashed, mixed")
        return Categories(actions.codes, actions.plain)


# ---------------------------------------------------------------------------------------------- continuous

class Normal(Distribution):
    """Independent Gaussians; actions are not squashed, the environment gets them clipped to its bounds."""

    def __init__(self, size: int, start: float, state: bool):
        self.size, self.start = size, start
        self.width, self.free, self.noise_width = (2 * size, 0, size) if state else (size, size, size)

    def parts(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation."""
        return outputs if isinstance(outputs, tuple) else outputs.chunk(2, -1)

    def sample(self, outputs, noise):
        mean, log_std = self.parts(outputs)
        return torch.addcmul(mean, log_std.exp(), noise)

    def mode(self, outputs):
        return self.parts(outputs)[0]

    def entropy(self, outputs):
        return self.parts(outputs)[1].sum(-1) + self.size * (0.5 + HALF_LOG_TWO_PI)

    def log_prob(self, outputs, actions):
        mean, log_std = self.parts(outputs)
        z = (actions - mean) * (-log_std).exp()
        return z.square().sum(-1) * -0.5 - (log_std.sum(-1) + self.size * HALF_LOG_TWO_PI)


@part("gaussian")
class Gaussian(PolicyHead):
    """A Gaussian per action dimension. std: "free" (parameters of its own) or "state" (an output of the network); starts at exp(start)."""

    std: Literal["free", "state"] = "free"
    start: float = 0.0

    def bind(self, actions):
        if actions.kind != "continuous":
            raise UserError(f"head=gaussian needs continuous actions; this task has {actions.describe()}; accepted: categorical, mixed")
        return Normal(actions.continuous, self.start, self.std == "state")


class Squash(Distribution):
    """a = tanh(u) * scale + bias with u Gaussian; log pi = log N(u) - sum log(scale * (1 - tanh(u)^2) + 1e-6)."""

    EPS = 1e-6

    def __init__(self, actions: Actions, low: float, high: float, smooth: bool):
        self.size = actions.continuous
        self.width, self.noise_width = 2 * self.size, self.size
        bounds = torch.tensor([actions.low, actions.high], dtype=torch.float32)
        self.scale, self.bias = (bounds[1] - bounds[0]) / 2, (bounds[1] + bounds[0]) / 2
        self.low, self.high, self.smooth = low, high, smooth

    def to(self, device) -> Squash:
        self.scale, self.bias = self.scale.to(device), self.bias.to(device)
        return self

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of u."""
        mean, raw = outputs.chunk(2, -1)
        if self.smooth:
            return mean, self.low + 0.5 * (self.high - self.low) * (raw.tanh() + 1)
        return mean, raw.clamp(self.low, self.high)

    def draw(self, outputs, noise):
        mean, log_std = self.split(outputs)
        squashed = torch.addcmul(mean, log_std.exp(), noise).tanh()
        slack = torch.addcmul(self.scale + self.EPS, squashed.square(), self.scale, value=-1)
        terms = -0.5 * noise.square() - log_std - slack.log()
        return torch.addcmul(self.bias, squashed, self.scale), terms.sum(-1) - self.size * HALF_LOG_TWO_PI

    def sample(self, outputs, noise):
        mean, log_std = self.split(outputs)
        return torch.addcmul(self.bias, torch.addcmul(mean, log_std.exp(), noise).tanh(), self.scale)

    def mode(self, outputs):
        return outputs[..., : self.size].tanh() * self.scale + self.bias

    def log_prob(self, outputs, actions):
        mean, log_std = self.split(outputs)
        squashed = ((actions - self.bias) / self.scale).clamp(-1 + 1e-6, 1 - 1e-6)
        z = (squashed.atanh() - mean) * (-log_std).exp()
        terms = -0.5 * z.square() - log_std - (self.scale * (1 - squashed.square()) + self.EPS).log()
        return terms.sum(-1) - self.size * HALF_LOG_TWO_PI


@part("squashed")
class Squashed(PolicyHead):
    """A Gaussian through tanh, scaled to the action bounds (arXiv 1812.05905).

    The log standard deviation is mapped smoothly by a tanh into [low, high], or clipped there (smooth=false).
    """

    low: float = -5.0
    high: float = 2.0
    smooth: bool = True

    def bind(self, actions):
        if actions.kind != "continuous" or not actions.bounded:
            raise UserError(f"head=squashed needs continuous actions with finite bounds; this task has {actions.describe()}"
                            + ("" if actions.bounded else " without bounds") + "; accepted: categorical, gaussian, mixed")
        return Squash(actions, self.low, self.high, self.smooth)


# ---------------------------------------------------------------------------------------------- both

class Both(Distribution):
    """Continuous and discrete parts of one action, independent given the observation. Noise: normal numbers, then Gumbel ones."""

    noise = "mixed"

    def __init__(self, normal: Normal, codes: Categories):
        self.normal, self.codes, self.split = normal, codes, normal.size
        self.width, self.free, self.start = normal.width + codes.width, normal.free, normal.start
        self.normals, self.noise_width = normal.noise_width, normal.noise_width + codes.noise_width

    def parts(self, outputs: Outputs) -> tuple[Outputs, Tensor]:
        """What the continuous and the discrete part read."""
        made, free = outputs
        return (made[..., : self.split], free), made[..., self.split :]

    def sample(self, outputs, noise):
        normal, logits = self.parts(outputs)
        return torch.cat([self.normal.sample(normal, noise[..., : self.split]), self.codes.sample(logits, noise[..., self.split :]).to(noise.dtype)], -1)

    def mode(self, outputs):
        normal, logits = self.parts(outputs)
        return torch.cat([self.normal.mode(normal), self.codes.mode(logits).to(logits.dtype)], -1)

    def entropy(self, outputs):
        normal, logits = self.parts(outputs)
        return self.normal.entropy(normal) + self.codes.entropy(logits)

    def log_prob(self, outputs, actions):
        normal, logits = self.parts(outputs)
        return self.normal.log_prob(normal, actions[..., : self.split]) + self.codes.log_prob(logits, actions[..., self.split :])


@part("mixed")
class Mixed(PolicyHead):
    """Gaussian and categorical parts side by side, for Dict and Tuple actions with both."""

    start: float = 0.0

    def bind(self, actions):
        if actions.kind != "mixed":
            raise UserError(f"head=mixed needs actions with continuous and discrete parts; this task has {actions.describe()}")
        return Both(Normal(actions.continuous, self.start, False), Categories(actions.codes, False))


@part("auto")
class Auto(PolicyHead):
    """categorical, gaussian or mixed, whichever the actions are."""

    start: Annotated[float, Field()] = 0.0

    def bind(self, actions):
        fitting = {"continuous": Gaussian(start=self.start), "mixed": Mixed(start=self.start)}.get(actions.kind, Categorical())
        return fitting.bind(actions)
