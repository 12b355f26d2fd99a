"""Policies that a method builds on and never changes: those of earlier runs, or functions of the user's.

`base=run base.path=RUN` takes the policy of any run of the control or offline wing; `base=module:function` a function from observations [N, ...] to
actions [N, ...]. A part of the user's own gives whatever object has the two methods of `Frozen`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from volvelle.control.envs import each
from volvelle.control.policy import Deciding, Policy, as_tensors
from volvelle.control.spaces import Observation, Spec
from volvelle.control.stacked import Streams
from volvelle.core.errors import UserError
from volvelle.core.parts import Part, Recipe, part

from .policies import repeated


class Frozen(Protocol):
    """A policy as it is; observations [S, B, ...] are raw. `saved()`: what a policy built on it must keep of it, None if nothing."""

    def best(self, observations: Observation, streams: Streams | None) -> Tensor:
        """Its best actions, [S, B, d]."""

    def propose(self, observations: Observation, count: int, streams: Streams) -> Tensor:
        """`count` independent samples per row, [S, B, count, d]."""

    def saved(self) -> dict[str, Any] | None: ...


class BasePolicy(Part):
    """Slot: `open(spec, seeds, where)` gives the frozen policy."""

    slot: ClassVar[str] = "base"
    call: ClassVar[tuple[str, ...]] = ("observations",)

    @classmethod
    def from_function(cls, function, call):
        return FunctionBase(function, call.name)

    def open(self, spec: Spec, seeds: int, where: str) -> Frozen:
        raise NotImplementedError


@part("run")
class RunBase(BasePolicy):
    """The policy of a run of the control or offline wing: RUN, RUN/policy or RUN/best/policy. It must hold as many seeds as are trained here."""

    path: str = ""

    def open(self, spec, seeds, where):
        if not self.path:
            raise UserError("base.path: which policy? Give the folder of a run, for example base.path=runs/td3-bc-pendulum-medium-s0")
        folder = Path(self.path)
        made = Policy.load(folder / "policy" if (folder / "policy").is_dir() else folder, spec, where)
        if made.seeds != seeds:
            raise UserError(f"base.path={self.path}: holds {made.seeds} seeds; accepted: seeds={made.seeds}, not seeds={seeds}")
        return FrozenRun(made)


class FrozenRun:
    """A saved policy; its parameters take no gradient."""

    def __init__(self, policy: Policy):
        self.policy = policy
        policy.module.requires_grad_(False).eval()

    def _seen(self, observations: Observation) -> Observation:
        if self.policy.normaliser is None:
            return observations
        return as_tensors(self.policy.normaliser(each(lambda x: x.cpu().numpy(), observations)), self.policy.module.device)

    @torch.no_grad()
    def best(self, observations, streams):
        return self.policy.module.greedy(self._seen(observations), streams)

    @torch.no_grad()
    def propose(self, observations, count, streams):
        return self.policy.module.explore(repeated(self._seen(observations), count), streams).unflatten(1, (-1, count))

    def saved(self):
        return self.policy.data()


class FunctionBase:
    """A plain function of observations [N, ...] (arrays) as a policy without parameters; its samples are all alike unless it is random itself."""

    def __init__(self, function, name: str):
        self.function, self.name = function, name

    def open(self, spec: Spec, seeds: int, where: str) -> FunctionBase:
        self.shape = spec.actions.shape
        return self

    def best(self, observations, streams):
        rows = each(lambda x: x.reshape(-1, *x.shape[2:]).cpu().numpy(), observations)
        seeds, count = (observations if isinstance(observations, Tensor) else next(iter(observations.values()))).shape[:2]
        made = np.asarray(self.function(rows))
        if made.shape != (seeds * count, *self.shape):
            raise UserError(f"base={self.name}: returned actions of shape {made.shape}; expected {(seeds * count, *self.shape)}")
        return torch.as_tensor(made.astype(np.float32) if made.dtype.kind == "f" else made).view(seeds, count, *self.shape)

    def propose(self, observations, count, streams):
        return self.best(repeated(observations, count), streams).unflatten(1, (-1, count))

    def saved(self):
        return None


class Built(Deciding):
    """Base class of modules that act through a frozen policy. It is no submodule, so it has no parameters here; but it is saved and loaded with them."""

    def __init__(self, base: BasePolicy, spec: Spec, seeds: int):
        super().__init__()
        self.description, self.spec, self.seeds = base, spec, seeds
        self.base: Frozen | None = None

    def open(self, where: str) -> None:
        """Find the policy to build on. UserError if it was made for another task."""
        self.base = self.description.start(None).open(self.spec, self.seeds, where)

    def weights(self):
        return {"own": dict(self.state_dict()), "base": self.base.saved()}

    def load_weights(self, saved, where):
        super().load_weights(saved["own"], where)
        if saved["base"] is None:
            self.open(where)
        else:
            self.base = FrozenRun(Policy.from_data(saved["base"], where))


class BuiltRecipe:
    """Checks that recipes on a frozen policy share."""

    base: BasePolicy

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)  # type: ignore[misc]
        if self.normalise_observations:  # type: ignore[attr-defined]
            raise UserError("normalise_observations: the base policy sees observations as they are recorded, and normalises them if it was trained so; accepted: false")
