"""Rewards that every method can use: the task's verifier, mathematics, penalties, a format, and weighted mixtures of any of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any

import torch
from pydantic import Field

from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import Part, coerce, part
from volvelle.core.schedule import Schedule, at

from .matching import mathematics
from .records import Rollout
from .slots import LanguageTask, Reward, finite

BINARY = frozenset({"binary_rewards"})


def each(name: str, rollouts: list[Rollout], one: Callable[[Rollout], float]) -> dict[str, torch.Tensor]:
    """One number per rollout, [n] float32. RunStopped naming reward and prompt where `one` raises or gives no finite number."""
    values = []
    for rollout in rollouts:
        where = f"reward {name!r} on prompt {rollout.prompt.id!r}"
        try:
            value = one(rollout)
        except (RunStopped, UserError):
            raise
        except Exception as error:
            raise RunStopped(f"{where} raised {type(error).__name__}: {error}") from error
        values.append(finite(value, where))
    return {name: torch.tensor(values, dtype=torch.float32)}


@part("verifier")
class Verifier(Reward):
    """The task's own score. Binary where the task is."""

    def start(self, run):
        return LiveVerifier(run.config.task)


class LiveVerifier:
    def __init__(self, task: LanguageTask):
        self.task = task

    def score(self, rollouts):
        return each("verifier", rollouts, lambda r: self.task.score(r.prompt, r.text))

    def total(self, scores, meta, step):
        return sum(scores.values())


@part("math")
class Mathematics(Reward):
    """1 where the response's answer equals the prompt's column `answer` as mathematics (math-verify), else 0."""

    gives = BINARY
    column: str = "answer"

    def score(self, rollouts):
        return each("math", rollouts, self._one)

    def _one(self, rollout: Rollout) -> float:
        row = rollout.prompt.row
        if self.column not in row:
            raise RunStopped(f"reward 'math' on prompt {rollout.prompt.id!r}: no column {self.column!r}; there are: {', '.join(row) or 'none'}")
        return float(mathematics(rollout.text, str(row[self.column])))


@part("format")
class Format(Reward):
    """1 where the whole response (or with `anywhere` some part of it) matches a regular expression, in which `.` is any character."""

    gives = BINARY
    pattern: str = r"\s*<think>.+?</think>\s*<answer>.+?</answer>\s*"
    anywhere: bool = False

    def __post_init__(self):
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"pattern={self.pattern!r}: not a regular expression ({error})") from None

    def score(self, rollouts):
        match = re.compile(self.pattern, re.DOTALL)
        return each("format", rollouts, lambda r: float(bool((match.search if self.anywhere else match.fullmatch)(r.text))))


@part("overlong")
class Overlong(Reward):
    """Soft penalty for length (DAPO, arXiv 2503.14476): 0 up to cap - buffer tokens, then falling in a line to -factor at the cap.

    cap: None = the length cap of sampling; buffer: None = a fifth of the cap, as in the paper. Lengths count the end token.
    """

    cap: Annotated[int, Field(gt=0)] | None = None
    buffer: Annotated[int, Field(gt=0)] | None = None
    factor: Annotated[float, Field(ge=0)] = 1.0

    def start(self, run):
        cap = self.cap or getattr(run.config.recipe.sampler, "max_tokens", None) or run.config.task.max_tokens
        return self.replace(cap=cap, buffer=self.buffer or max(1, cap // 5))

    def __post_init__(self):
        super().__post_init__()
        if self.cap is not None and self.buffer is not None and self.buffer > self.cap:
            raise UserError(f"buffer={self.buffer}: must not exceed the cap of {self.cap} tokens")

    def penalty(self, length: int) -> float:
        """What a response of `length` tokens is worth, in [-factor, 0] up to the cap."""
        return -max(0, length - (self.cap - self.buffer)) / self.buffer * self.factor

    def score(self, rollouts):
        return each("overlong", rollouts, lambda r: self.penalty(len(r.ids)))


@part("missing_eos")
class MissingEnd(Reward):
    """`-penalty` for a response that was cut off at the length cap instead of ending by itself, else 0."""

    penalty: Annotated[float, Field(ge=0)] = 1.0

    def score(self, rollouts):
        return each("missing_eos", rollouts, lambda r: 0.0 if r.finish == "stop" else -self.penalty)


# ---------------------------------------------------------------------------------------------------------------------- mixtures

@part("weighted")
class Weighted(Part):
    """A reward with its weight in a mixture; the weight may follow a schedule."""

    slot = "weighted"
    reward: Reward = Verifier()
    weight: float | Schedule = 1.0

    @classmethod
    def from_text(cls, text: str, path: str = "reward") -> Weighted:
        return cls(coerce(Reward, text, path))


@part("mix")
class Mix(Reward):
    """The weighted sum of several rewards: `reward=mix reward.parts.right=verifier reward.parts.short=overlong reward.parts.short.weight=0.1`.

    parts: name -> reward (a part, a function, or a Weighted). Each is logged under its name, without its weight.
    """

    parts: dict[str, Weighted] = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.parts, dict):
            wrapped = {k: v if isinstance(v, (Weighted, str, dict)) else Weighted(v) for k, v in self.parts.items()}
            object.__setattr__(self, "parts", wrapped)
        super().__post_init__()
        for name in self.parts:
            if "/" in name or not name:
                raise UserError(f"parts: {name!r} cannot be the name of a reward; it may not be empty or hold a '/'")
        object.__setattr__(self, "needs", frozenset().union(*(w.reward.needs for w in self.parts.values())))

    def check(self, recipe):
        if not self.parts:
            raise UserError("reward=mix is empty; add rewards with reward.parts.NAME=…")

    def start(self, run):
        return LiveMix(self, {name: run.start(f"parts.{name}.reward", w.reward) for name, w in self.parts.items()})


class LiveMix:
    """Scores are named by their part, or `part/score` where a part gives several. State: which names belong to which part."""

    def __init__(self, description: Mix, live: dict[str, Any]):
        self.weights = {name: w.weight for name, w in description.parts.items()}
        self.live = live
        self.names: dict[str, dict[str, str]] = {}

    def score(self, rollouts):
        out = {}
        for part_name, reward in self.live.items():
            found = reward.score(rollouts)
            self.names[part_name] = {(part_name if len(found) == 1 else f"{part_name}/{k}"): k for k in found}
            out |= {logged: found[k] for logged, k in self.names[part_name].items()}
        return out

    def total(self, scores, meta, step):
        total = 0.0
        for part_name, reward in self.live.items():
            own = {k: scores[logged] for logged, k in self.names[part_name].items()}
            total = total + at(self.weights[part_name], step) * reward.total(own, meta, step)
        return total

    def state_dict(self):
        return {"names": self.names}

    def load_state_dict(self, state):
        self.names = state["names"]
