"""RL-PLUS: hybrid-policy optimisation with external demonstrations (arXiv 2508.00222).

Problem. On-policy training re-weighs what the model samples already: pass@1 rises, while pass@k for large k falls below the base model.
Idea. Some rows of every group are external demonstrations, verified like the others and members of the same group statistics.
    1. Multiple importance sampling: nobody knows the demonstrator's probability w of a token, so it is estimated as half the old policy, half a
       uniform density U, and the ratio's denominator mixes it with the old policy:   r_m = 2 p / (w + p_old),  w = (p_old + U) / 2.
       p_old in the denominator keeps r_m bounded (at most 4/3 of p / p_old).
    2. Exploration-based advantage: external tokens carry A (1 - sg[p])^gamma, so that right tokens the policy finds unlikely dominate.
    3. The policy's own tokens carry r A with r = p / p_old. Nothing is clipped.
Pick it when verified demonstrations (a teacher's, say) exist for prompts that the policy cannot solve. Without them it is unclipped Dr. GRPO;
against bad ones only the reward protects. Keep the updates per batch few (2): no ratio is limited.

Paper and released code disagree on U: 1 / |V| in the paper (the default here), 1 in the code (`objective.uniform=1`), which damps a token at
p = 0.01 by a factor of 34 against the paper's form. The paper divides advantages by the group's deviation, the released run does not (the default
here; `advantage=grpo` divides). The loss is a sum over tokens divided by the length cap, not by the number of responses: a learning rate does
not carry over to another aggregation. The released run's entropy bonus of 0.001 is `terms.entropy=entropy` here and off.
Demonstrations are columns of the prompt (`demonstrations`: texts, or mappings with text and the teacher's logps), or come from the task.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import torch
from pydantic import Field

from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import method, part, preset
from volvelle.core.trainable import Adam

from ..advantages import Fraction, group_index, group_normalised, outcome
from ..fittings import Updates
from ..models import Tabular, Tiny
from ..objectives import NLL, Aggregation, AtLeast0, Positive, log_ratio, per_token
from ..recipe import Evaluation, LanguageRecipe
from ..records import FORCED, POLICY, Batch, Prompt, Rollout, Scores
from ..samplers import Count, Plain, continued, demonstrated, demonstrations
from ..slots import Advantage, Objective, Sampler
from ..tasks.tree import Tree
from .grpo import grpo


# ----------------------------------------------------------------------------------------------------------------------- sampler

@part("rl-plus")
class WithDemonstrations(Sampler):
    """`external` demonstrations join the responses of `base` in every group, as FORCED tokens.

    prefix_low, prefix_high: the share of a demonstration that is forced, drawn uniformly; the policy writes the rest, as POLICY tokens.
    missing: for a prompt without demonstrations stop, or sample so many responses more. The group counts both: base.group + external.
    """

    base: Sampler = Plain(group=7)
    external: Count = 1
    prefix_low: Fraction = 1.0
    prefix_high: Fraction = 1.0
    missing: Literal["stop", "sample"] = "stop"

    group = property(lambda self: self.base.group + self.external)
    temperature = property(lambda self: self.base.temperature)
    max_tokens = property(lambda self: getattr(self.base, "max_tokens", None))
    needs = property(lambda self: self.base.needs)
    gives = property(lambda self: self.base.gives - {"entropy"})  # nobody recorded it for demonstrations
    makes = property(lambda self: (*self.base.makes, FORCED))

    def __post_init__(self):
        super().__post_init__()
        if self.prefix_low > self.prefix_high:
            raise UserError(f"prefix_low={self.prefix_low}: must not exceed prefix_high={self.prefix_high}")

    def check(self, recipe):
        if not any(FORCED in getattr(o, "acts_on", ()) for o in recipe.losses().values()):
            raise UserError("sampler=rl-plus: no loss acts on demonstrations; choose objective=rl-plus, or add terms.nll=nll")

    def start(self, run):
        return LiveWithDemonstrations(self, run)


class LiveWithDemonstrations:
    def __init__(self, description: WithDemonstrations, run):
        self.part, self.policy, self.task = description, run.policy, run.config.task
        self.base = run.start("base", description.base)
        self.fill = run.start("fill", description.base.replace(group=description.external)) if description.missing == "sample" else None
        self.rng, self.torch_rng = run.rng("demonstrations"), run.torch_rng("demonstrations")
        self.sampling = getattr(self.base, "sampling", None)
        if self.sampling is None and description.prefix_low < 1:
            raise UserError(f"sampler.prefix_low={description.prefix_low}: sampler.base={description.base.part_name} cannot go on from a prefix; "
                            "expected sampler.base=plain, or prefix_low=1")

    def sample(self, prompts: list[Prompt]) -> list[Rollout]:
        """The base's responses and the demonstrations, group by group."""
        groups: dict[int, list[Rollout]] = {}
        for r in self.base.sample(prompts):
            groups.setdefault(r.group, []).append(r)
        begun, without = [], []
        for group, rows in groups.items():
            shown = demonstrations(self.task, rows[0].prompt, self.part.external, self.rng, required=self.fill is None)
            if not shown:
                without.append(group)
            for demonstration in shown:
                row = demonstrated(self.policy, rows[0].prompt, demonstration, group)
                kept = int(len(row.ids) * self.rng.uniform(self.part.prefix_low, self.part.prefix_high))
                if kept == len(row.ids):
                    rows.append(row)
                else:
                    begun.append(shortened(row, kept))
        extra = continued(self.policy, begun, self.sampling, self.torch_rng) if begun else []
        if without:
            filled = self.fill.sample([groups[g][0].prompt for g in without])
            extra += [dataclasses.replace(r, group=without[r.group]) for r in filled]
        for r in extra:
            groups[r.group].append(r)
        return [r for rows in groups.values() for r in rows]


def shortened(row: Rollout, kept: int) -> Rollout:
    """The first `kept` tokens of a demonstration; no external row any more if none is kept."""
    meta = {"external": float(kept > 0), "teacher_logps": row.meta["teacher_logps"][:kept]}
    return dataclasses.replace(row, ids=row.ids[:kept], logps=row.logps[:kept], role=row.role[:kept], turn=row.turn[:kept], meta=meta)


# --------------------------------------------------------------------------------------------------------------------- advantage

def own_statistics(rewards: torch.Tensor, groups: torch.Tensor, own: torch.Tensor, scale: str, epsilon: float) -> torch.Tensor:
    """[N]: (r - mean) / (deviation + epsilon), both over the group's rows marked in own [N] bool; scale "none": no division.

    A single own row counts as mean 0 and deviation 1, a deviation of 0 as 1 (the released code). ValueError if a group has no own row.
    """
    index, count = group_index(groups)
    number = torch.zeros(len(count), device=rewards.device).index_add(0, index, own.float())
    if (number == 0).any():
        raise ValueError("a group has none of the policy's own responses")
    mean = torch.zeros_like(number).index_add(0, index, rewards * own) / number
    square = torch.zeros_like(number).index_add(0, index, (rewards - mean[index]) ** 2 * own)
    deviation = (square / (number - 1).clamp(min=1)).sqrt()
    single = number == 1
    centred = rewards - torch.where(single, 0.0, mean)[index]
    return centred if scale == "none" else centred / (torch.where(single | (deviation == 0), 1.0, deviation) + epsilon)[index]


@part("rl-plus")
class HybridAdvantage(Advantage):
    """r - group mean, demonstrations being members like any other (`statistics="own"`: only what the policy sampled counts, as the code's
    "split"). scale="group" divides by the deviation, as in the paper. external, own: weights of demonstration and of policy tokens."""

    scale: Literal["none", "group"] = "none"
    statistics: Literal["group", "own"] = "group"
    epsilon: AtLeast0 = 1e-6
    external: AtLeast0 = 1.0
    own: AtLeast0 = 1.0

    def __call__(self, batch: Batch) -> torch.Tensor:
        rewards = outcome(batch)
        if self.statistics == "own":
            own = batch.meta.get("external", torch.zeros_like(rewards)) == 0
            found = own_statistics(rewards, batch.groups, own, self.scale, self.epsilon)
        else:
            found = group_normalised(rewards, batch.groups, self.scale, epsilon=self.epsilon)
        if self.external == self.own == 1:
            return found
        return found[:, None] * torch.where(batch.role == FORCED, self.external, self.own)


# --------------------------------------------------------------------------------------------------------------------- objective

def mis_ratio(logps: torch.Tensor, old: torch.Tensor, uniform: float, prior: float = 0.5) -> torch.Tensor:
    """2 p / (w + p_old) per token, with w = prior p_old + (1 - prior) uniform the estimate of the demonstrator's probability."""
    before = old.exp()
    return 2 * logps.exp() / (prior * before + (1 - prior) * uniform + before)


def exploration(logps: torch.Tensor, gamma: float) -> torch.Tensor:
    """(1 - p)^gamma per token, without gradient: 1 for tokens that the policy would never write, 0 for those it is sure of."""
    return (1 - logps.detach().exp()).clamp(min=0) ** gamma


@part("rl-plus")
class HybridObjective(Objective):
    """-A r on the policy's tokens and -A (1 - p)^gamma r_ext on demonstration tokens, nothing clipped.

    ratio of external tokens: "mis" (uniform: the density U, none = 1 / |V|; prior: the old policy's share in the estimate), "probability" p
    (the demonstrator taken as certain, as LUFFY, arXiv 2504.14945, without its shaping), "teacher" p / (p_teacher + 1e-6) from stored logps.
    clamp_low, clamp_high: bounds of that ratio; drop_above: tokens of either kind with p above it get no loss.
    """

    gamma: AtLeast0 = 0.5
    uniform: Positive | None = None
    prior: Fraction = 0.5
    ratio: Literal["mis", "probability", "teacher"] = "mis"
    clamp_low: AtLeast0 = 0.0
    clamp_high: Positive | None = None
    drop_above: Fraction | None = None
    aggregation: Aggregation = "padded"
    length: Annotated[int, Field(gt=0)] | None = None
    needs = frozenset({"old", "advantages"})
    acts_on = (POLICY, FORCED)

    def start(self, run):
        return self if self.uniform is not None else self.replace(uniform=1 / run.policy.vocabulary)

    def external(self, scores: Scores, batch: Batch, shown: torch.Tensor) -> torch.Tensor:
        """[n, t]: the ratio of demonstration tokens."""
        if self.ratio == "mis":
            found = mis_ratio(scores.logps, batch.old.logps, self.uniform, self.prior)
        elif self.ratio == "probability":
            found = scores.logps.exp()
        else:
            teacher = batch.meta.get("teacher_logps")
            if shown.any() and (teacher is None or not teacher[shown].isfinite().all()):
                raise RunStopped("objective.ratio=teacher: a demonstration comes without its logps; expected row['demonstrations'] with text and logps")
            found = scores.logps.exp() / ((0.0 if teacher is None else teacher.exp()) + 1e-6)
        return found.clamp(self.clamp_low, self.clamp_high)

    def __call__(self, scores: Scores, batch: Batch) -> torch.Tensor:
        shown = batch.role == FORCED
        credit = per_token(batch.advantages, scores.logps)
        own = log_ratio(scores.logps, batch.old.logps).exp() * credit
        loss = -torch.where(shown, self.external(scores, batch, shown) * exploration(scores.logps, self.gamma) * credit, own)
        return loss if self.drop_above is None else torch.where(scores.logps.detach().exp() <= self.drop_above, loss, 0.0)


certain = preset("certain-demonstrator", HybridObjective(ratio="probability", gamma=0.0))

tree = dict(prompts=128, updates=Updates(optimiser=Adam(lr=0.05), minibatch=64), evaluation=Evaluation(samples=256, ks=(1, 16, 256)))
text = dict(prompts=16, updates=Updates(optimiser=Adam(lr=2e-4), minibatch=8), evaluation=Evaluation(prompts=100, samples=32, ks=(1, 32)))
with_nll = grpo(sampler=WithDemonstrations(), advantage=HybridAdvantage(scale="group", statistics="own"), terms={"nll": NLL()})
rl_plus = LanguageRecipe(sampler=WithDemonstrations(), advantage=HybridAdvantage(), objective=HybridObjective(), prompts=32, updates=Updates(minibatch=16))


def on_tree(recipe: LanguageRecipe) -> Arm:
    return Arm(recipe(**tree), Tree(winners=4), Tabular(scale=1.3), 60)


claim = Claim(
    says="demonstrations with mixed ratios teach what sampling does not find, faster than an NLL term or the ratio of a certain demonstrator, and "
         "keep pass@32 on text, where GRPO loses it",
    arms={"grpo": on_tree(grpo), "nll": on_tree(with_nll), "certain": on_tree(rl_plus(objective=certain)),
          "no-eaf": on_tree(rl_plus(objective=HybridObjective(gamma=0.0))), "rl-plus": on_tree(rl_plus),
          "text-grpo": grpo(**text), "text-no-eaf": rl_plus(**text, objective=HybridObjective(gamma=0.0)), "text-rl-plus": rl_plus(**text)},
    task="countdown-text", model=Tiny(layers=2, width=64, heads=2, warmup=1000), steps=60, seeds=5, minutes=9,
    quick={"steps": 2, "seeds": 2, "model": Tiny(layers=2, width=64, heads=2, warmup=2)},
    expects=("rl-plus > grpo on pass@1", "rl-plus > grpo on pass@256", "rl-plus > nll on pass@1", "rl-plus > certain on pass@1",
             "text-rl-plus > text-grpo on pass@32"))

method("rl-plus", rl_plus, title="External demonstrations with mixed importance ratios and a focal advantage", source="arXiv 2508.00222", claim=claim)
