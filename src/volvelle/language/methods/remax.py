"""ReMax: REINFORCE with the greedy response's reward as baseline (arXiv 2310.10505).

Problem. REINFORCE needs a baseline; a critic costs a second model, and a group costs many responses per prompt.
Idea. Let the policy answer once more, greedily, and subtract what that earns: A_i = r(sample i) - r(greedy), the same for every token.
Pick it when one or two samples per prompt are all you can afford. With larger groups their own mean (`rloo`) is as good and needs no extra row.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import method, part

from ..advantages import group_index, outcome
from ..objectives import PolicyGradient
from ..recipe import LanguageRecipe, name_of
from ..samplers import LivePlain, Plain
from ..slots import Advantage


@part("remax")
class WithGreedy(Plain):
    """`group` ordinary responses to each prompt and, before them, one greedy response without loss (meta `greedy` = 1)."""

    group: Annotated[int, Field(gt=0)] = 1

    def start(self, run):
        return LiveWithGreedy(self, run)


class LiveWithGreedy(LivePlain):
    def sample(self, prompts):
        prompts = self.fitting(prompts)
        samples, size = super().sample(prompts), self.part.group
        greedy = self.rollouts(prompts, 1, dataclasses.replace(self.sampling, temperature=0.0), self.rng, self.entropy)
        for r in greedy:
            r.train, r.meta["greedy"] = False, 1.0
        return [r for i, g in enumerate(greedy) for r in (g, *samples[i * size:(i + 1) * size])]


def over_greedy(rewards: torch.Tensor, greedy: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[N] rewards minus the reward of the group's greedy response; greedy [N] bool, exactly one in each group."""
    index, count = group_index(groups)
    return rewards - torch.zeros(len(count), dtype=rewards.dtype, device=rewards.device).index_add(0, index, rewards * greedy)[index]


@part("remax")
class OverGreedy(Advantage):
    """The reward minus what the greedy response to the same prompt earned (arXiv 2310.10505)."""

    def check(self, recipe):
        if not isinstance(getattr(recipe.sampler, "base", recipe.sampler), WithGreedy):
            raise UserError(f"advantage=remax needs a greedy response in every group, and sampler={name_of(recipe.sampler)} makes none; use sampler=remax")

    def __call__(self, batch):
        return over_greedy(outcome(batch), batch.meta["greedy"] > 0, batch.groups)


remax = method("remax", LanguageRecipe(sampler=WithGreedy(), advantage=OverGreedy(), objective=PolicyGradient(), prompts=64),
               title="REINFORCE with a greedy baseline", source="arXiv 2310.10505")
