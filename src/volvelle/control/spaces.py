"""What observations and actions look like to a network, read from Gymnasium spaces."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from torch import Tensor

from volvelle.core.errors import UserError

Observation = Tensor | dict[str, Tensor]


def is_image(space: gym.Space) -> bool:
    """Three axes, of bytes or booleans or real numbers."""
    return isinstance(space, gym.spaces.Box) and len(space.shape) == 3


@dataclass(frozen=True)
class Layout:
    """An observation: `vector` float32 numbers and named images (channels, height, width), kept in their own dtype.

    Only a vector: tensors [..., vector]. One image named "image" and nothing else: tensors [..., C, H, W]. Else dicts by name.
    goal: so many numbers at the end of the vector are the goal that is commanded (see volvelle.offline.goals).
    """

    vector: int = 0
    images: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    categorical: tuple[int, ...] = ()
    goal: int = 0

    @classmethod
    def of(cls, space: gym.Space) -> Layout:
        """The layout of an encoded space (see envs.encoded): a Box, or a Dict of Boxes with "vector" and images."""
        found = space.spaces if isinstance(space, gym.spaces.Dict) else {"image" if is_image(space) else "vector": space}
        images = {k: tuple(s.shape) for k, s in found.items() if k != "vector"}
        return cls(found["vector"].shape[0] if "vector" in found else 0, images, {k: str(found[k].dtype) for k in images})

    @property
    def size(self) -> int:
        """Numbers in all."""
        return self.vector + sum(math.prod(s) for s in self.images.values())

    @property
    def single(self) -> bool:
        """Whether one tensor holds the observation."""
        return not self.images or (not self.vector and len(self.images) == 1)

    def fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every part, by name."""
        parts = {"vector": ((self.vector,), np.dtype(np.float32))} if self.vector else {}
        return parts | {k: (s, np.dtype(self.dtypes[k])) for k, s in self.images.items()}

    def describe(self) -> str:
        words = [f"{self.vector} numbers" + (f" ({self.goal} of them the goal)" if self.goal else "")] if self.vector else []
        return " and ".join(words + [f"an image {'x'.join(map(str, s))}" for s in self.images.values()])


@dataclass(frozen=True)
class Actions:
    """An action: `codes` are the sizes of its discrete parts, `low` and `high` the bounds of its continuous ones.

    Discrete alone: int64 [...]. Several discrete parts: int64 [..., k]. Continuous: float32 [..., d]. Both: float32 [..., d + k], codes last.
    """

    codes: tuple[int, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    plain: bool = True  # one discrete part without an axis of its own

    @classmethod
    def of(cls, space: gym.Space) -> Actions:
        """The actions of a simple space: Discrete, MultiDiscrete or Box."""
        if isinstance(space, gym.spaces.Discrete):
            return cls((int(space.n),))
        if isinstance(space, gym.spaces.MultiDiscrete):
            return cls(tuple(map(int, space.nvec)), plain=False)
        return cls((), tuple(map(float, space.low)), tuple(map(float, space.high)), plain=False)

    @property
    def continuous(self) -> int:
        return len(self.low)

    @property
    def kind(self) -> str:
        """"discrete" (one code), "codes" (several), "continuous" or "mixed"."""
        return "mixed" if self.codes and self.low else "continuous" if self.low else "discrete" if self.plain else "codes"

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.plain else (self.continuous + len(self.codes),)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.low else np.int64)

    @property
    def bounded(self) -> bool:
        return all(map(math.isfinite, (*self.low, *self.high)))

    def describe(self) -> str:
        words = [f"{self.continuous} continuous numbers in [{min(self.low):g}, {max(self.high):g}]"] if self.low else []
        if self.codes:
            words.append(f"{self.codes[0]} choices" if len(self.codes) == 1 else f"{len(self.codes)} choices of sizes {', '.join(map(str, self.codes))}")
        return " and ".join(words)

    def only(self, kind: str, who: str) -> None:
        """UserError unless the actions are of that kind."""
        if self.kind != kind:
            other = {"discrete": "dqn, c51, qr-dqn, sac-discrete or ppo", "continuous": "sac, td3 or ppo-continuous"}.get(self.kind, "ppo")
            raise UserError(f"{who} needs {kind} actions; this task has {self.describe()}; accepted for them: {other}")


@dataclass(frozen=True)
class Spec:
    """What an agent must know of a task."""

    observations: Layout
    actions: Actions

    def data(self) -> dict[str, Any]:
        """As plain data, for policy.json."""
        return {"observations": {k: dict(v) if isinstance(v, dict) else v for k, v in vars(self.observations).items()}, "actions": dict(vars(self.actions))}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Spec:
        o, a = data["observations"], data["actions"]
        return cls(Layout(o["vector"], {k: tuple(v) for k, v in o["images"].items()}, o["dtypes"], tuple(o["categorical"]), o.get("goal", 0)),
                   Actions(tuple(a["codes"]), tuple(a["low"]), tuple(a["high"]), a["plain"]))

    def describe(self) -> str:
        return f"observations of {self.observations.describe()} and actions of {self.actions.describe()}"

    def require(self, other: Spec, who: str, where: str) -> None:
        """UserError when `who`, made for `other`, meets this task."""
        if (self.observations, self.actions) != (other.observations, other.actions):
            raise UserError(f"{who} was made for {other.describe()}; {where} has {self.describe()}")
