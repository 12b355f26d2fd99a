"""The language recipe: five wheels (curriculum, sampler, reward, advantage, objective) and five fittings (filter, critic, kl, terms, updates)."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cached_property
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import Call, Part, Recipe, part

from .advantages import GroupNormalised
from .curricula import Shuffle
from .fittings import KL, Updates
from .objectives import Clipped
from .records import FORCED, POLICY, TOOL
from .rewards import Verifier
from .samplers import Plain
from .slots import Advantage, Critic, Curriculum, Filter, LanguageTask, Objective, Reward, Sampler

Count = Annotated[int, Field(gt=0)]


@part("evaluation")
class Evaluation(Part):
    """How the policy is measured: `samples` responses to each of `prompts` held-out prompts, unbiased pass@k for every k in `ks`.

    split: validation while training (test is for `volvelle eval`); temperature 0 with one sample is greedy accuracy.
    log: training responses per step, and evaluated prompts, written to samples.jsonl.
    """

    slot = "evaluation"
    prompts: Count = 64
    samples: Count = 4
    ks: tuple[Count, ...] = (1, 4)
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    split: Literal["train", "validation", "test"] = "validation"
    log: Annotated[int, Field(ge=0)] = 4

    def __post_init__(self):
        super().__post_init__()
        if not self.ks or max(self.ks) > self.samples:
            raise UserError(f"evaluation.ks={list(self.ks)}: pass@k needs evaluation.samples >= k, and samples={self.samples}")


@part("language")
class LanguageRecipe(Recipe):
    """RL for token policies. `prompts`: how many prompts each step practises.

    The order of a step: draw -> sample -> score -> total -> filter (refill) -> old, reference and value passes -> KL in the reward ->
    advantage -> improve -> update.
    """

    wing: ClassVar[str] = "language"
    curriculum: Curriculum = Shuffle()
    sampler: Sampler = Plain()
    reward: Reward | None = Verifier()
    filter: Filter | None = None
    advantage: Advantage | None = GroupNormalised()
    objective: Objective | None = Clipped()
    critic: Critic | None = None
    kl: KL | None = None
    terms: dict[str, Objective] = dataclasses.field(default_factory=dict)
    updates: Updates = Updates()
    evaluation: Evaluation = Evaluation()
    prompts: Count = 8

    def losses(self) -> dict[str, Objective]:
        named = {"objective": self.objective} if self.objective is not None else {}
        return named | self.terms

    @cached_property
    def loss_needs(self) -> frozenset[str]:
        """What scoring for the loss must deliver."""
        return frozenset().union(*(o.needs for o in self.losses().values()))

    @cached_property
    def sampling_needs(self) -> frozenset[str]:
        """What advantages, filters, rewards and the curriculum need of the sampler."""
        others = (self.advantage, self.filter, self.reward, self.curriculum)
        return frozenset().union(*(o.needs for o in others if o is not None))

    @cached_property
    def needs(self) -> frozenset[str]:
        asked = self.loss_needs | self.sampling_needs | self.sampler.needs
        return asked | (self.kl.needs | {"old"} if self.kl is not None else frozenset())

    def validate(self, task=None):
        """Refuse meaningless combinations in one line, before anything is written."""
        if task is not None and not isinstance(task, LanguageTask):
            raise UserError(f"task {task.label()!r} belongs to the {type(task).wing} wing; a language recipe needs prompts with a verifier")
        if not self.losses():
            raise UserError("objective=none with no terms trains nothing; give an objective or terms.NAME=…")
        wants = "advantages" in self.loss_needs
        if wants and self.advantage is None:
            raise UserError(f"objective={name_of(self.objective)} needs advantages, and advantage is none; choose an advantage")
        if self.advantage is not None and not wants:
            raise UserError(f"advantage={name_of(self.advantage)} would be ignored: objective={name_of(self.objective)} uses no advantages; say advantage=none")
        if self.critic is not None and "values" not in self.needs:
            raise UserError(f"critic={name_of(self.critic)} would be ignored: advantage={name_of(self.advantage)} uses no values; say critic=none")
        if "values" in self.needs and self.critic is None:
            raise UserError(f"advantage={name_of(self.advantage)} needs values, and critic is none; add critic=value")
        if self.reward is None and wants:
            raise UserError(f"advantage={name_of(self.advantage)} needs rewards, and reward is none; choose a reward")
        if "entropy" in self.sampling_needs and "entropy" not in self.sampler.gives:
            asks = next(p for p in (self.advantage, self.filter, self.reward, self.curriculum) if p is not None and "entropy" in p.needs)
            raise UserError(f"{type(asks).slot}={name_of(asks)} needs the entropy at every sampled token, which sampler={name_of(self.sampler)} does not record; "
                            "accepted: sampler=plain")
        for path, loss in self.losses().items():
            acts_on = getattr(loss, "acts_on", (POLICY,))
            if not set(acts_on) & set(self.sampler.makes):
                words = {POLICY: "sampled", TOOL: "tool", FORCED: "given"}
                raise UserError(f"{path}={name_of(loss)} acts on {'/'.join(words[r] for r in acts_on)} tokens, and sampler={name_of(self.sampler)} "
                                f"makes {'/'.join(words[r] for r in self.sampler.makes)} ones only: nothing would be trained")
        binary = [p for p in (self.objective, self.advantage, *self.terms.values()) if p is not None and "binary_rewards" in p.needs]
        if binary and not self.gives_binary(task):
            raise UserError(f"{type(binary[0]).slot}={name_of(binary[0])} needs rewards of 0 or 1, and reward={name_of(self.reward)} "
                            f"on task {task.label() if task else '?'} is graded; a function of your own says that it is not by its annotation, -> bool")
        super().validate(task)

    def gives_binary(self, task) -> bool:
        gives = self.reward.gives if self.reward is not None else frozenset()
        said = isinstance(self.reward, Call) and inspect.signature(self.reward.function).return_annotation in (bool, "bool")
        return said or "binary_rewards" in gives or (task is not None and isinstance(self.reward, Verifier) and "binary_rewards" in task.gives)

    def start(self, run):
        from .loop import LanguageLearner

        return LanguageLearner(self, run)


def name_of(found: Part | None) -> str:
    return "none" if found is None else found.part_name
