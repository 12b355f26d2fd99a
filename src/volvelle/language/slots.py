"""The slots of the language wing: what each wheel and fitting is asked, and what a plain function in its place takes.

Order of a step: draw -> sample -> score -> total -> filter (refill) -> old, reference and value passes -> KL in the reward ->
advantage -> improve -> update.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import torch

from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import Part
from volvelle.core.tasks import Task

from .records import POLICY, Batch, Prompt, Rollout, Scores


class LanguageTask(Task):
    """Prompts in three splits that never overlap, and a verifier.

    `stop`: strings that end a completion; `max_tokens`: its length cap unless the sampler sets one.
    """

    wing: ClassVar[str] = "language"
    metric: ClassVar[str] = "pass@1"
    stop: tuple[str, ...] = ()
    max_tokens: int = 64

    def split(self, name: str) -> list[Prompt]:
        """The prompts of "train", "validation" or "test"."""
        raise NotImplementedError

    def score(self, prompt: Prompt, text: str) -> float:
        """How right a completion is, in [0, 1]."""
        raise NotImplementedError

    def demonstration(self, prompt: Prompt, rng) -> str:
        """A correct completion, for supervised warm-up. UserError where the task has none."""
        raise UserError(f"task {self.label()} has no demonstrations")

    def solved(self, score: float) -> bool:
        """Whether a score counts as solved, for pass@k."""
        return score >= 1.0


class Curriculum(Part):
    """Decides which prompts are practised: `draw(n)`; `update(batch)` sees what came of it."""

    slot: ClassVar[str] = "curriculum"


class Sampler(Part):
    """Makes rollouts: the live object has `sample(prompts) -> list[Rollout]`, grouped by prompt (Rollout.group is set by the loop).

    `group` is the number of rollouts per prompt; `temperature` the one at which the policy is trained and scored; `makes`: roles of the tokens
    that can carry loss in what it makes.
    """

    slot: ClassVar[str] = "sampler"
    makes: ClassVar[tuple[int, ...]] = (POLICY,)
    temperature = 1.0
    gives = frozenset({"entropy"})  # of the distribution at every token, when somebody needs it


class Reward(Part):
    """Scores rollouts. `score(rollouts) -> {name: [n]}` is slow and local; `total(scores, batch_meta, step) -> [N]` is small and sees
    the whole batch. A plain function `reward(prompt, response, **row) -> float` can stand here; `row` holds the prompt's columns;
    -> bool says that it gives 0 or 1 only, as some objectives need.
    """

    slot: ClassVar[str] = "reward"
    call: ClassVar[tuple[str, ...]] = ("prompt", "response")

    @classmethod
    def from_function(cls, function, call):
        return FunctionReward(function, call.name)

    def score(self, rollouts: list[Rollout]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def total(self, scores: dict[str, torch.Tensor], meta: dict[str, Any], step: int) -> torch.Tensor:
        return sum(scores.values())


class FunctionReward:
    """A plain function as a live reward. What it returns must be one finite number per response."""

    def __init__(self, function, name: str):
        self.function, self.name = function, name.rpartition(":")[2]
        parameters = inspect.signature(function).parameters.values()
        self.takes_row = any(p.kind == p.VAR_KEYWORD for p in parameters)

    def score(self, rollouts):
        return {self.name: torch.tensor([self._one(r) for r in rollouts], dtype=torch.float32)}

    def _one(self, rollout: Rollout) -> float:
        prompt = rollout.prompt
        row = {k: v for k, v in prompt.row.items() if k not in ("prompt", "response")} if self.takes_row else {}
        where = f"reward {self.name!r} on prompt {prompt.id!r}"
        try:
            value = self.function(prompt.text if prompt.text is not None else prompt.messages, rollout.text, **row)
        except Exception as error:
            raise RunStopped(f"{where} raised {type(error).__name__}: {error}") from error
        return finite(value, where)

    def total(self, scores, meta, step):
        return sum(scores.values())


def finite(value: Any, where: str) -> float:
    """`value` as a float; RunStopped naming `where` if it is None, not one number, NaN or infinite."""
    if not isinstance(value, (int, float)) and hasattr(value, "item") and math.prod(value.shape) == 1:
        value = value.item()
    if not isinstance(value, (int, float)):
        raise RunStopped(f"{where} returned {type(value).__name__} {value!r}; expected one number")
    if not math.isfinite(value):
        raise RunStopped(f"{where} returned {value}; expected a finite number")
    return float(value)


class Advantage(Part):
    """Turns scores into credit: `advantage(batch) -> [N] or [N, T]`, without gradient, on the whole batch."""

    slot: ClassVar[str] = "advantage"
    call: ClassVar[tuple[str, ...]] = ("batch",)

    @classmethod
    def from_function(cls, function, call):
        return function

    def __call__(self, batch: Batch) -> torch.Tensor:
        raise NotImplementedError


class Objective(Part):
    """Turns credit into a loss: `objective(scores, batch) -> [n, t] (per token) or [n] (per sequence)`, pure.

    acts_on: roles of the tokens that get loss; aggregation: how the loss matrix becomes one number (see objectives.aggregate);
    old_needs: statistics (entropy, mean_logp) that the pass for the old policy must deliver too. A live object (from `start`) may keep
    state; those three are read from the description.
    """

    slot: ClassVar[str] = "objective"
    call: ClassVar[tuple[str, ...]] = ("scores", "batch")
    acts_on: ClassVar[tuple[int, ...]] = (POLICY,)
    old_needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_function(cls, function, call):
        return function

    def __call__(self, scores: Scores, batch: Batch) -> torch.Tensor:
        raise NotImplementedError


class Filter(Part):
    """Keeps or drops whole groups, and mutes single rows: the live object maps a batch to (keep [N] bool, train [N] bool).

    refill: sample again until the batch is full; max_rounds: give up with an error after so many rounds (0: never). A live object (from
    `start`) may keep state; those two are read from the description.
    """

    slot: ClassVar[str] = "filter"
    refill = False
    max_rounds = 0


class Critic(Part):
    """A second trained model: the live object has `values(batch) -> [N, T]` and `fit(batch) -> metrics`."""

    slot: ClassVar[str] = "critic"
    gives: ClassVar[frozenset[str]] = frozenset({"values"})
