"""Networks whose every parameter has a leading axis of copies: several seeds, or several critics of a seed, run as one model.

Inputs are [C, B, ...], outputs [C, B, width]; copy c sees only slice c. C = seeds * members, seeds first (see `repeat`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part

from .spaces import Layout, Observation
import itertools

Width = Annotated[int, Field(gt=0)]
Initial = Literal["torch", "orthogonal", "fan-avg"]
Activation = Literal["tanh", "relu", "gelu", "silu"]
# tanh and relu need only their result to be differentiated, so they may overwrite what the linear layer has just made
ACTIVATIONS = {"tanh": torch.tanh_, "relu": torch.relu_, "gelu": F.gelu, "silu": F.silu}


def repeat(x: Observation, members: int) -> Observation:
    """[S, B, ...] -> [S * members, B, ...]: every member of a seed's ensemble sees the same input."""
    if members == 1:
        return x
    if isinstance(x, dict):
        return {k: repeat(v, members) for k, v in x.items()}
    if len(x) == 1:
        return x.expand(members, *x.shape[1:])
    return x.repeat_interleave(members, 0)


def initialise(weight: Tensor, bias: Tensor | None, how: Initial, gain: float, fan_in: int, fan_out: int, generator: torch.Generator) -> None:
    """Fill one copy's weight [fan_in, fan_out] (or a convolution's [out, in, k, k]) and bias.

    torch: PyTorch's default (uniform +-1/sqrt(fan_in), bias alike); orthogonal with `gain`, bias 0; fan-avg: uniform variance scaling, bias 0.
    """
    with torch.no_grad():
        if how == "orthogonal":
            nn.init.orthogonal_(weight, gain, generator=generator)
        else:
            bound = math.sqrt(1 / fan_in) if how == "torch" else gain * math.sqrt(6 / (fan_in + fan_out))
            weight.uniform_(-bound, bound, generator=generator)
        if bias is not None:
            if how == "torch":
                bias.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
            else:
                bias.zero_()


class Linear(nn.Module):
    """y = x W + b for every copy: [C, B, in] -> [C, B, out]."""

    def __init__(self, copies: int, fan_in: int, fan_out: int, how: Initial = "torch", gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(copies, fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(copies, 1, fan_out))
        self.how, self.gain = how, gain

    def reset(self, generators: Sequence[torch.Generator]) -> None:
        _, fan_in, fan_out = self.weight.shape
        for weight, bias, generator in zip(self.weight, self.bias, generators, strict=True):
            initialise(weight, bias, self.how, self.gain, fan_in, fan_out, generator)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with its own scale and shift per copy."""

    def __init__(self, copies: int, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(copies, 1, width))
        self.shift = nn.Parameter(torch.zeros(copies, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, self.scale, F.layer_norm(x, x.shape[-1:]))


class Conv(nn.Module):
    """Convolution for every copy, as one grouped convolution: [B, C * in, H, W] -> [B, C * out, H', W']."""

    def __init__(self, copies: int, fan_in: int, fan_out: int, size: int, stride: int = 1, padding: int = 0, how: Initial = "orthogonal"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(copies, fan_out, fan_in, size, size))
        self.bias = nn.Parameter(torch.zeros(copies, fan_out))
        self.stride, self.padding, self.how = stride, padding, how

    def reset(self, generators: Sequence[torch.Generator]) -> None:
        _, fan_out, fan_in, size, _ = self.weight.shape
        for weight, bias, generator in zip(self.weight, self.bias, generators, strict=True):
            initialise(weight, bias, self.how, math.sqrt(2), fan_in * size * size, fan_out * size * size, generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.flatten(0, 1), self.bias.flatten(), self.stride, self.padding, groups=len(self.weight))


def reset(module: nn.Module, generators: Sequence[torch.Generator]) -> nn.Module:
    """Draw every copy's initial weights from its own generator; returns the module."""
    for child in module.modules():
        if child is not module and hasattr(child, "reset"):
            child.reset(generators)
    return module


# ---------------------------------------------------------------------------------------------- bodies

class Dense(nn.Module):
    """Hidden layers on flat inputs: linear, activation, then layer normalisation if asked for."""

    def __init__(self, copies: int, fan_in: int, hidden: Sequence[int], activation: Activation, layer_norm: bool, how: Initial):
        super().__init__()
        widths = [fan_in, *hidden]
        gain = math.sqrt(2) if how == "orthogonal" else 1.0
        self.layers = nn.ModuleList(Linear(copies, i, o, how, gain) for i, o in itertools.pairwise(widths))
        self.norms = nn.ModuleList(LayerNorm(copies, o) for o in hidden) if layer_norm else None
        self.activation, self.width = ACTIVATIONS[activation], widths[-1]
        self.pairs = [(layer.bias, layer.weight) for layer in self.layers]  # the same parameters, without the cost of a module call each

    def forward(self, x: Tensor) -> Tensor:
        for i, (bias, weight) in enumerate(self.pairs):
            x = self.activation(torch.baddbmm(bias, x, weight))
            if self.norms is not None:
                x = self.norms[i](x)
        return x


def flat(x: Observation) -> Tensor:
    """All parts of an observation side by side, [C, B, D]; whole-number images are scaled to [0, 1]."""
    if isinstance(x, dict):
        return torch.cat([flat(v) for v in x.values()], -1)
    if x.ndim > 3:
        return scaled(x).flatten(2)
    return x if x.is_floating_point() else x.float()


def scaled(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


class Flat(nn.Module):
    """A dense body for any observation."""

    def __init__(self, dense: nn.Module):
        super().__init__()
        self.dense, self.width = dense, dense.width

    def forward(self, x: Observation) -> Tensor:
        return self.dense.forward(x if isinstance(x, Tensor) and x.ndim == 3 and x.dtype == torch.float32 else flat(x))


class Visual(nn.Module):
    """Convolutions per image, then dense layers on their outputs and the flat part together. `towers` by image name."""

    def __init__(self, towers: dict[str, nn.Module], dense: Dense):
        super().__init__()
        self.towers = nn.ModuleDict({f"of {name}": tower for name, tower in towers.items()})
        self.names, self.dense, self.width = tuple(towers), dense, dense.width

    def forward(self, x: Observation) -> Tensor:
        parts = x if isinstance(x, dict) else {self.names[0]: x}
        found = []
        for name, value in parts.items():
            if name in self.names:
                copies, batch = value.shape[:2]
                image = scaled(value).transpose(0, 1).flatten(1, 2)                     # [B, C * channels, H, W]
                found.append(self.towers[f"of {name}"](image).reshape(batch, copies, -1).transpose(0, 1))
            else:
                found.append(flat(value))
        return self.dense(found[0] if len(found) == 1 else torch.cat(found, -1))


class Residual(nn.Module):
    def __init__(self, copies: int, channels: int, how: Initial):
        super().__init__()
        self.first, self.second = (Conv(copies, channels, channels, 3, 1, 1, how) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


# ---------------------------------------------------------------------------------------------- the slot

class Network(Part):
    """Slot: the body between observation and output layers. `build` returns a module with `width` features."""

    slot: ClassVar[str] = "network"
    init: Initial = "torch"

    def build(self, layout: Layout, copies: int, extra: int = 0) -> nn.Module:
        """A body for observations of that layout, with `extra` further flat inputs (an action) behind them."""
        raise NotImplementedError


@part("mlp")
class MLP(Network):
    """Dense layers; images are flattened."""

    hidden: tuple[Width, ...] = (64, 64)
    activation: Activation = "tanh"
    layer_norm: bool = False
    init: Initial = "torch"

    def build(self, layout, copies, extra=0):
        return Flat(Dense(copies, layout.size + extra, self.hidden, self.activation, self.layer_norm, self.init))


class _Waves(nn.Module):
    """Every input x and sin, cos of 2 pi x 2^i / period for i below `octaves`, then a dense body."""

    def __init__(self, dense: nn.Module, period: float, octaves: int):
        super().__init__()
        self.dense, self.width, self.scales = dense, dense.width, [2 * math.pi * 2**i / period for i in range(octaves)]

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.cat([x * s for s in self.scales], -1)
        return self.dense(torch.cat([x, turned.sin(), turned.cos()], -1))


@part("fourier-mlp")
class FourierMLP(MLP):
    """Dense layers that also see every input through sines and cosines: for values that differ much where inputs hardly do, as on both sides of a wall.

    period: of the longest wave, a little more than the range of the inputs; octaves: how many waves, each half as long as the one before. After
    arXiv 2206.04672, with fixed frequencies.
    """

    period: Annotated[float, Field(gt=0)] = 16.0
    octaves: Width = 4

    def build(self, layout, copies, extra=0):
        dense = Dense(copies, (layout.size + extra) * (1 + 2 * self.octaves), self.hidden, self.activation, self.layer_norm, self.init)
        return Flat(_Waves(dense, self.period, self.octaves))


class _Skips(nn.Module):
    """A dense layer, then blocks x + W2 f(W1 f(x)), each with layer normalisation at its start."""

    def __init__(self, copies: int, fan_in: int, width: int, blocks: int, how: Initial):
        super().__init__()
        gain = math.sqrt(2) if how == "orthogonal" else 1.0
        self.first, self.width = Linear(copies, fan_in, width, how, gain), width
        self.blocks = nn.ModuleList(nn.ModuleList([LayerNorm(copies, width), *(Linear(copies, width, width, how, gain) for _ in range(2))]) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, one, two in self.blocks:
            x = x + two(F.relu(one(F.relu(norm(x)))))
        return F.relu(x)


@part("residual-mlp")
class ResidualMLP(Network):
    """Dense layers with residual blocks of two layers, all of the same width; images are flattened."""

    width: Width = 256
    blocks: Width = 2

    def build(self, layout, copies, extra=0):
        return Flat(_Skips(copies, layout.size + extra, self.width, self.blocks, self.init))


class _Images(Network):
    def tower(self, shape: tuple[int, int, int], copies: int) -> nn.Module:
        raise NotImplementedError

    def build(self, layout, copies, extra=0):
        if not layout.images:
            raise UserError(f"network={self.part_name} needs images; the observations are {layout.describe()}; accepted: mlp")
        towers, width = {}, layout.vector + extra
        for name, shape in layout.images.items():
            towers[name] = self.tower(shape, copies)
            with torch.no_grad():
                width += towers[name](torch.zeros(1, copies * shape[0], *shape[1:])).numel() // copies
        return Visual(towers, Dense(copies, width, self.hidden, "relu", False, self.init))


@part("cnn")
class CNN(_Images):
    """Convolutions (channels, kernel, stride), each with ReLU, then dense layers. The default is the Atari network of DQN."""

    convolutions: tuple[tuple[Width, Width, Width], ...] = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
    hidden: tuple[Width, ...] = (512,)
    init: Initial = "torch"

    def tower(self, shape, copies):
        layers: list[nn.Module] = []
        channels, height, width = shape
        for out, size, stride in self.convolutions:
            height, width = (height - size) // stride + 1, (width - size) // stride + 1
            if min(height, width) < 1:
                raise UserError(f"network=cnn: images of {shape[1]}x{shape[2]} are too small for the convolutions {self.convolutions}; "
                                "for example network=small-cnn")
            layers += [Conv(copies, channels, out, size, stride, 0, self.init), nn.ReLU()]
            channels = out
        return nn.Sequential(*layers)


@part("small-cnn")
class SmallCNN(CNN):
    """One 3x3 convolution for small grids (MinAtar)."""

    convolutions: tuple[tuple[Width, Width, Width], ...] = ((16, 3, 1),)
    hidden: tuple[Width, ...] = (128,)


@part("resnet")
class ResNet(_Images):
    """The residual network of IMPALA (arXiv 1802.01561): per stage a convolution, a 3x3 pooling of stride 2, residual blocks."""

    channels: tuple[Width, ...] = (16, 32, 32)
    blocks: Width = 2
    hidden: tuple[Width, ...] = (256,)
    init: Initial = "torch"

    def tower(self, shape, copies):
        layers: list[nn.Module] = []
        before = shape[0]
        for channels in self.channels:
            layers += [Conv(copies, before, channels, 3, 1, 1, self.init), nn.MaxPool2d(3, 2, 1)]
            layers += [Residual(copies, channels, self.init) for _ in range(self.blocks)]
            before = channels
        return nn.Sequential(*layers, nn.ReLU())


# ---------------------------------------------------------------------------------------------- whole networks

class Output(nn.Module):
    """A body with one linear layer behind it: [S, B, ...] -> [S * members, B, width]. `extra` inputs come as a second argument."""

    def __init__(self, body: nn.Module, copies: int, width: int, how: Initial = "torch", gain: float = 1.0, members: int = 1):
        super().__init__()
        self.body, self.out, self.members = body, Linear(copies, body.width, width, how, gain), members

    def forward(self, x: Observation, extra: Tensor | None = None) -> Tensor:
        if extra is not None:
            x = {**x, "extra": extra} if isinstance(x, dict) else torch.cat([x, extra], -1) if x.ndim == 3 else {"image": x, "extra": extra}
        return torch.baddbmm(self.out.bias, self.body(repeat(x, self.members)), self.out.weight)


class Dueling(nn.Module):
    """Value and advantage streams (arXiv 1511.06581): Q = V + A - mean A, per output of a value head. -> [C, B, actions * width]."""

    def __init__(self, body: nn.Module, copies: int, actions: int, width: int, how: Initial = "torch"):
        super().__init__()
        self.body, self.actions = body, actions
        self.value, self.advantage = Linear(copies, body.width, width, how), Linear(copies, body.width, actions * width, how)

    def forward(self, x: Observation) -> Tensor:
        features = self.body(x)
        advantage = self.advantage(features).unflatten(-1, (self.actions, -1))
        return (self.value(features).unsqueeze(-2) + advantage - advantage.mean(-2, keepdim=True)).flatten(-2)
