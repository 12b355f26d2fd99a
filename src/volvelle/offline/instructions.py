"""Instructions as numbers: text embedders, and a small world in which an instruction says what to do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import gymnasium as gym
import numpy as np
from pydantic import Field

from volvelle.control.slots import ControlTask
from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part, preset

from .behaviours import Behaviour
from .tasks import Generated

NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class TextEmbedder(Part):
    """Slot: `encode(texts)` gives unit vectors [len(texts), width]. A sentence encoder of the user's own is a part with these two names."""

    slot: ClassVar[str] = "embedder"
    width: int

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        raise NotImplementedError


@part("hashed-words")
class HashedWords(TextEmbedder):
    """Words and pairs of neighbouring words, hashed with signs into `width` numbers: always the same, nothing to download."""

    width: Annotated[int, Field(gt=0)] = 64

    def encode(self, texts):
        made = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(made, texts, strict=True):
            words = text.lower().split()
            for word in [*words, *map(" ".join, zip(words, words[1:]))]:
                number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
                row[(number >> 1) % self.width] += 1 if number & 1 else -1
        return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-8)


TARGETS = {f"move to the {v} {h} corner": np.array([x, y]) for v, y in (("upper", 0.8), ("lower", -0.8)) for h, x in (("left", -0.8), ("right", 0.8))}


class PointInstructed(gym.Env):
    """Observation: place (x, y), then the embedded instruction. Action: a push in [-1, 1]^2; a step moves by a tenth of it.

    Every episode has one of four instructions, each naming a corner; it ends within 0.08 of that corner. info: success.
    """

    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, embedder: TextEmbedder):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2 + embedder.width,), np.float32)
        self.codes, self.target, self.place, self.instruction = embedder.encode(list(TARGETS)), np.zeros(2), np.zeros(2), ""

    def seen(self) -> np.ndarray:
        return np.concatenate([self.place, self.code]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        number = int(self.np_random.integers(len(TARGETS)))
        self.instruction, self.target = list(TARGETS.items())[number]
        self.code, self.place = self.codes[number], self.np_random.uniform(-0.9, 0.9, 2)
        return self.seen(), {"success": 0.0}

    def step(self, action):
        self.place = self.place + 0.1 * np.clip(action, -1, 1)
        there = bool(np.linalg.norm(self.place - self.target) < 0.08)
        return self.seen(), 0.0 if there else -1.0, there, False, {"success": float(there)}


@part("instructed")
class Instructed(ControlTask):
    """The point that is told where to go. Metrics: success, return, length."""

    metric: ClassVar[str] = "success"
    info: ClassVar[tuple[str, ...]] = ("success",)
    embedder: TextEmbedder = HashedWords(width=16)
    time_limit: Annotated[int, Field(gt=0)] = 24

    def make(self, render: str | None = None, training: bool = False) -> gym.Env:
        if render is not None:
            raise UserError("task instructed: its environment draws no pictures")
        return gym.wrappers.TimeLimit(PointInstructed(self.embedder), self.time_limit)

    def measure(self, ends: dict[str, np.ndarray]) -> dict[str, float]:
        return {"success": float(ends["success"].mean())}


@part("obedient")
class Obedient(Behaviour):
    """A scripted driver that does what the instruction says; noise: deviations of the push, one of them per episode; fumbles: share of steps that go the wrong way."""

    noise: tuple[NonNegative, ...] = (0.1,)
    fumbles: Share = 0.0

    def pilot(self, task: Any, env: gym.Env, spec: Any, rng: np.random.Generator):
        inner = env.unwrapped
        if not isinstance(inner, PointInstructed):
            raise UserError(f"behaviour=obedient follows instructions; {task.label()} gives none; accepted: instructed")
        return _Follow(self, inner, rng)


class _Follow:
    def __init__(self, part: Obedient, env: PointInstructed, rng: np.random.Generator):
        self.part, self.env, self.rng, self.noise = part, env, rng, part.noise[0]

    def begin(self) -> None:
        self.noise = self.part.noise[int(self.rng.integers(len(self.part.noise)))]

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        push = np.clip((self.env.target - obs[:2]) / 0.1, -1, 1) * (-1 if self.rng.random() < self.part.fumbles else 1)
        return np.clip(push + self.rng.normal(0, self.noise, 2), -1, 1).astype(np.float32)


preset("instructed-expert", Generated(env=Instructed(), behaviour=Obedient(noise=(0.2,)), quality="expert", steps=2500))
preset("instructed-fumbling", Generated(env=Instructed(), behaviour=Obedient(noise=(0.1, 0.5, 1.0), fumbles=0.2), quality="expert", steps=4000))
