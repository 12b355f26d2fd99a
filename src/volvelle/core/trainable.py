"""Models that a run owns: `Trainable` (something with `backward` and `step`) and `Lagged` copies.

A part that needs a model asks the run for it and calls these verbs; placing, clipping, stepping and checkpointing happen here.
"""

from __future__ import annotations

import copy
import math
from typing import Annotated, Any

import torch
from pydantic import Field

from .errors import RunStopped
from .parts import Part, part
from .schedule import Schedule, at

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Optimiser(Part):
    """How a Trainable's parameters move. `clip` bounds the gradient norm (None: no bound)."""

    slot = "optimiser"

    def build(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        raise NotImplementedError


@part("adamw")
class AdamW(Optimiser):
    """Adam with decoupled weight decay. lr may be a schedule over optimiser steps; `warmup` rises linearly from 0."""

    lr: Annotated[float, Field(gt=0)] | Schedule = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Positive | None = 1.0
    warmup: Annotated[int, Field(ge=0)] = 0

    def build(self, parameters):
        return torch.optim.AdamW(parameters, lr=at(self.lr, 0), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True)


@part("adam")
class Adam(AdamW):
    """Adam (weight decay, if any, as an L2 penalty)."""

    lr: Annotated[float, Field(gt=0)] | Schedule = 3e-4

    def build(self, parameters):
        return torch.optim.Adam(parameters, lr=at(self.lr, 0), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True)


@part("sgd")
class SGD(Optimiser):
    """Plain stochastic gradient descent with optional momentum."""

    lr: Annotated[float, Field(gt=0)] | Schedule = 1e-2
    momentum: Fraction = 0.0
    clip: Positive | None = None
    warmup: Annotated[int, Field(ge=0)] = 0

    def build(self, parameters):
        return torch.optim.SGD(parameters, lr=at(self.lr, 0), momentum=self.momentum)


class Trainable:
    """A torch module with, if it learns, its optimiser.

    Call it like the module. `backward(loss)` adds gradients; `step()` clips, moves the parameters, clears the gradients and
    returns the gradient norm before clipping. RunStopped if that norm is not finite: the parameters are then untouched.
    """

    def __init__(self, name: str, module: torch.nn.Module, optimiser: Optimiser | None, device: torch.device | str = "cpu"):
        self.name, self.part = name, optimiser
        self.module = module.to(device)
        self.steps = 0
        if optimiser is None:
            self.module.requires_grad_(False).eval()
            self.parameters, self.optimiser = [], None
        else:
            self.parameters = [p for p in module.parameters() if p.requires_grad]
            self.optimiser = optimiser.build(self.parameters)

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`. A loss with a leading seed axis is summed: seeds do not share parameters."""
        if loss.requires_grad:
            (loss if loss.ndim == 0 else loss.sum()).backward()

    def step(self) -> float:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
        if not math.isfinite(norm):
            self.optimiser.zero_grad(set_to_none=True)
            raise RunStopped(f"the gradient norm of {self.name} is {norm}")
        if grads:
            if self.part.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.part.clip, torch.tensor(norm, device=grads[0].device))
            rise = min(1.0, (self.steps + 1) / self.part.warmup) if self.part.warmup else 1.0
            for group in self.optimiser.param_groups:
                group["lr"] = at(self.part.lr, self.steps) * rise * group.get("share", 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        self.steps += 1
        return norm

    def reset_optimiser(self) -> None:
        """Forget momenta and step count (PACS's hard reset, a new stage)."""
        self.optimiser, self.steps = self.part.build(self.parameters), 0

    def weights(self) -> dict[str, torch.Tensor]:
        """What training can have changed: parameters that take gradients, and buffers."""
        learnt = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        kept = self.module.state_dict(keep_vars=True)
        return learnt | {n: b for n, b in self.module.named_buffers() if n in kept}

    def state_dict(self) -> dict[str, Any]:
        if self.optimiser is None:
            return {}
        return {"weights": dict(self.weights()), "optimiser": self.optimiser.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.optimiser is None:
            return
        copy_weights(state["weights"], self.weights(), self.name)
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps = state["steps"]


def copy_weights(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor], name: str) -> None:
    """Copy tensors by name; a missing, extra or differently shaped one stops with its name."""
    if odd := set(source) ^ set(target):
        raise RunStopped(f"weights of {name} do not fit: {sorted(odd)[0]!r} is on one side only")
    with torch.no_grad():
        for key, tensor in target.items():
            if tensor.shape != source[key].shape:
                raise RunStopped(f"weights of {name} do not fit: {key!r} is {tuple(source[key].shape)}, expected {tuple(tensor.shape)}")
            tensor.copy_(source[key])


class Lagged:
    """A frozen copy of a Trainable that follows it: every `every` calls of `update`, or by Polyak averaging with `tau`.

    `.module` is the copy. `refresh()` copies at once.
    """

    def __init__(self, source: Trainable, every: int | None = None, tau: float | None = None,
                 module: torch.nn.Module | None = None):
        if every is not None and tau is not None:
            raise ValueError("give every or tau, not both; neither means that only refresh() copies")
        self.source, self.every, self.tau, self.count, self._pairs = source, every, tau, 0, None
        self.module = (copy.deepcopy(source.module) if module is None else module).requires_grad_(False).eval()

    def __call__(self, *args, **kwargs):
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def refresh(self, tau: float = 1.0) -> None:
        """Parameters: target <- (1 - tau) target + tau source. Buffers (batch statistics) are copied."""
        if self._pairs is None:
            def pairs(kind: str):
                mine, theirs = dict(getattr(self.module, kind)()), dict(getattr(self.source.module, kind)())
                return [mine[k] for k in theirs], [*theirs.values()]

            self._pairs = pairs("named_parameters"), pairs("named_buffers")
        (mine, theirs), (buffers, originals) = self._pairs
        with torch.no_grad():
            if tau == 1.0:
                torch._foreach_copy_(mine, theirs)
            else:
                torch._foreach_lerp_(mine, theirs, tau)
            if buffers:
                torch._foreach_copy_(buffers, originals)

    def update(self) -> None:
        self.count += 1
        if self.tau is not None:
            self.refresh(self.tau)
        elif self.every is not None and self.count % self.every == 0:
            self.refresh()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "weights": dict(self.module.named_parameters()) | dict(self.module.named_buffers())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_weights(state["weights"], dict(self.module.named_parameters()) | dict(self.module.named_buffers()), f"lagged {self.source.name}")
        self.count = state["count"]
