"""How different the responses of a group are: a sampler that keeps the most different ones, and a recipe that is evaluated by the groups its own
sampler makes instead of by ordinary samples."""

from __future__ import annotations

import hashlib
import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from volvelle.core.parts import part

from .loop import LanguageLearner
from .recipe import LanguageRecipe
from .records import Rollout
from .samplers import LivePlain, Plain
from .similarity import edit_distance


def diversity(rollouts: list[Rollout], outcome=None) -> dict[str, float]:
    """Means over groups: `distinct`, the number of different outcomes (texts, if `outcome(text)` is not given); `any_right`, whether a response has a
    positive reward; `mixed`, whether the rewards differ; and `reward`."""
    groups: dict[int, list[Rollout]] = {}
    for r in rollouts:
        groups.setdefault(r.group, []).append(r)
    rows = [(len({outcome(r.text) if outcome else r.text for r in g}), [r.reward for r in g]) for g in groups.values()]
    return {"distinct": float(np.mean([d for d, _ in rows])), "any_right": float(np.mean([max(w) > 0 for _, w in rows])),
            "mixed": float(np.mean([len(set(w)) > 1 for _, w in rows])), "reward": float(np.mean([np.mean(w) for _, w in rows]))}


@part("most-diverse")
class MostDiverse(Plain):
    """Over-generates and keeps: of `factor` times `group` ordinary samples the `group` that lie farthest apart (edit distance between tokens over
    the longer length), each next one farthest from those chosen. What is left is no fair sample, so rows are marked inexact."""

    factor: Annotated[int, Field(gt=1)] = 2

    def start(self, run):
        return LiveMostDiverse(self, run)


class LiveMostDiverse(LivePlain):
    def __init__(self, description: MostDiverse, run):
        super().__init__(description, run)
        self.many = LivePlain(description.replace(group=description.group * description.factor), run)

    def sample(self, prompts):
        made, size, kept = self.many.sample(prompts), self.many.part.group, []
        for at in range(0, len(made), size):
            rows = made[at:at + size]
            kept += [rows[i] for i in farthest([r.ids for r in rows], self.part.group)]
        for r in kept:
            r.exact = False
        return kept


def farthest(texts: list[list[int]], count: int) -> list[int]:
    """Indices of `count` texts, the first one first, each next the one whose nearest chosen text is farthest; ties go to the earlier."""
    chosen, nearest = [0], [math.inf] * len(texts)
    while len(chosen) < count:
        last = texts[chosen[-1]]
        nearest = [min(d, edit_distance(t, last) / max(len(t), len(last), 1)) for d, t in zip(nearest, texts)]
        left = [i for i in range(len(texts)) if i not in chosen]
        chosen.append(max(left, key=lambda i: nearest[i]))
    return sorted(chosen)


@part("groups")
class GroupRecipe(LanguageRecipe):
    """A language recipe whose evaluation draws one group to each of `evaluation.prompts` prompts with the recipe's own sampler."""

    def start(self, run):
        return GroupLearner(self, run)


class GroupLearner(LanguageLearner):
    def evaluate(self, task=None):
        """`diversity` of fresh groups, by `task.outcome(text)` where the task tells outcomes apart. Changes no state."""
        e, task = self.recipe.evaluation, task or self.task
        sampler = self.recipe.sampler.start(self.run)
        sampler.rng = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{self.run.seed}/groups".encode()).digest()[:7], "little"))
        rollouts = sampler.sample(task.split(e.split)[: e.prompts])
        for r in rollouts:
            r.reward = task.score(r.prompt, r.text)
        return diversity(rollouts, getattr(task, "outcome", None))
