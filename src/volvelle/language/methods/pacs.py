"""PACS: implicit actor-critic coupling by supervised learning (arXiv 2509.02522).

Problem. GRPO and PPO treat the verifier's 0/1 outcome as a reward to be estimated: they lose entropy, or need a critic.
Idea. The outcome is a label, and the policy itself predicts it.
    1. proxy   rhat_i = beta * sum over tokens of (log p - log p_ref);
    2. score   psi_i = rhat_i - mean of the other rhat of the group, gradient through every member;
    3. loss    w_i * cross-entropy(label_i, sigmoid(psi_i)), averaged over responses; in a group with both labels w_i = G / (2 n_label).
The gradient is a policy gradient weighted by the residual label - sigmoid(psi): large where the policy predicts wrongly, 0 where it already knows.
At the minimum p is p_ref tilted by the log-odds of being correct instead of a point mass. No critic, no KL, no clipping, no advantage.
Pick it for verifiers that say exactly 0 or 1. Graded rewards are refused, groups need two responses, and whole groups share a micro-batch.
beta bounds the step: residuals vanish once log-ratios reach a few / beta, and more entropy than GRPO's is left only if that happens within a batch.
|rhat| grows with length, so long responses are the first to stop learning.

The paper's reference is fixed and now and then reset to the policy, the optimiser with it: `objective.reference=fixed objective.reset_every=N`
(without resets psi saturates). The released code takes the policy at the start of every batch and keeps the optimiser: the default. That code never
clips the gradient; here it is clipped at 1 as everywhere (`updates.optimiser.clip=none`). Differentiating the paper's expectation gives a second
term, the loss times grad log p, which the code leaves out: `actor` (default 0), an estimate that is right at the first update of a batch.

Measured on prompt trees and on text, ten seeds: neither better nor worse than GRPO at one or 64 attempts; the balanced weights change nothing there. More different winners than GRPO at beta 10, fewer at the paper's 1: with three tokens the residuals
do not vanish at 1.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch.nn.functional import binary_cross_entropy_with_logits

from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam

from ..advantages import group_index, group_mean, leave_one_out
from ..fittings import Updates
from ..recipe import Evaluation, LanguageRecipe
from ..models import Tiny
from ..records import POLICY, Batch, Scores
from ..samplers import Plain
from ..slots import Objective
from ..tasks.text import DigitSum
from ..tasks.tree import Tree
from .grpo import grpo

Positive = Annotated[float, Field(gt=0)]


def response_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[N] sum of values [N, T] over the masked positions; what stands elsewhere does not matter."""
    return torch.where(mask, values, 0.0).sum(1)


def relative(proxy: torch.Tensor, groups: torch.Tensor, how: str, epsilon: float = 1e-6) -> torch.Tensor:
    """[N] scores psi of proxies [N] within their groups; gradients flow through mean and deviation.

    leave-one-out: minus the mean of the others; centred: minus the group mean; normalised: divided by sample deviation + epsilon besides
    (in a group of equal proxies, as at the reference, its gradient is 1 / epsilon times larger); raw: as they are. A lone response stays raw.
    """
    if how == "raw":
        return proxy
    if how == "leave-one-out":
        return leave_one_out(proxy, groups)
    index, count = group_index(groups)
    n = count[index]
    centred = torch.where(n == 1, proxy, proxy - group_mean(proxy, groups))
    if how == "centred":
        return centred
    variance = group_mean(centred**2, groups) * n / (n - 1).clamp(min=1)
    spread = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)  # a square root has no gradient at 0
    return torch.where(n == 1, centred, centred / (spread + epsilon))


def class_weights(labels: torch.Tensor, groups: torch.Tensor, how: str = "balanced") -> torch.Tensor:
    """[N] weights of the responses. balanced: G / (2 n_label) in groups with both labels, else 1; positive, negative: 1 or 0; none: 1."""
    if how == "none":
        return torch.ones_like(labels)
    if how != "balanced":
        return (labels == (how == "positive")).to(labels)
    share = group_mean(labels, groups)
    own = torch.where(labels == 1, share, 1 - share)
    return torch.where(own < 1, 0.5 / own, 1.0)


@part("pacs")
class Residual(Objective):
    """PACS's cross-entropy between the verifier's label and a score made of the policy's own log-probs.

    beta: scale of the proxy; proxy: "ratio" (sum of log-ratios to the reference) or "likelihood" (mean log-prob, no reference);
    score: how proxies are compared within a group; weights: balance of the labels; reference: "rollout" (the policy at the start of the batch) or
    "fixed" (the run's reference); reset_every: with "fixed", every so many steps the reference becomes the policy and the optimiser starts
    afresh (0: never); actor: weight of the paper's further term, loss * grad log p. Muted rows, and rows without tokens of the policy, leave
    their group.
    """

    beta: Positive = 1.0
    proxy: Literal["ratio", "likelihood"] = "ratio"
    score: Literal["leave-one-out", "centred", "normalised", "raw"] = "leave-one-out"
    weights: Literal["balanced", "positive", "negative", "none"] = "balanced"
    reference: Literal["rollout", "fixed"] = "rollout"
    reset_every: Annotated[int, Field(ge=0)] = 0
    actor: Annotated[float, Field(ge=0)] = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.proxy == "likelihood" and self.reference == "fixed":
            raise UserError("reference=fixed would be ignored: proxy=likelihood uses no reference; accepted with it: rollout (the default)")
        if self.reset_every and self.reference != "fixed":
            raise UserError(f"reset_every={self.reset_every} would be ignored: reference={self.reference} is new in every batch; say reference=fixed")

    @property
    def needs(self) -> frozenset[str]:
        base = frozenset({"groups", "binary_rewards"})
        if self.proxy == "likelihood":
            return base
        return base | {"old" if self.reference == "rollout" else "reference"}

    def check(self, recipe):
        group = getattr(recipe.sampler, "group", 2)
        if group < 2 and self.score != "raw":
            raise UserError(f"sampler.group={group}: objective.score={self.score} compares responses to one prompt; accepted: 2 or more")
        if recipe.kl is not None and recipe.kl.place == "reward":
            raise UserError("kl.place=reward would be ignored: objective=pacs takes rewards as labels; accepted: kl.place=loss")

    def start(self, run):
        return LiveResidual(self, run) if self.reset_every else self

    def __call__(self, scores: Scores, batch: Batch) -> torch.Tensor:
        acted = batch.acted((POLICY,))
        member = batch.train & acted.any(1)
        whole(batch)
        groups, labels = batch.groups[member], binary(batch.rewards[member])
        proxy = self.beta * self.proxies(scores, batch, acted)[member]
        loss = class_weights(labels, groups, self.weights) * binary_cross_entropy_with_logits(
            relative(proxy, groups, self.score), labels, reduction="none")
        if self.actor:
            loss = loss + self.actor * loss.detach() * response_sum(scores.logps, acted)[member]
        return torch.zeros_like(batch.rewards).masked_scatter(member, loss)

    def proxies(self, scores: Scores, batch: Batch, acted: torch.Tensor) -> torch.Tensor:
        if self.proxy == "likelihood":
            return response_sum(scores.logps, acted) / acted.sum(1).clamp(min=1)
        against = batch.old if self.reference == "rollout" else batch.reference
        return response_sum(scores.logps - against.logps, acted)


def whole(batch: Batch) -> None:
    """RunStopped if a group of the batch is not here with all its responses: the loss of one depends on the others."""
    index, count = group_index(batch.groups)
    size = batch.meta["group_size"]
    if (cut := count[index] != size).any():
        i = int(cut.nonzero()[0])
        raise RunStopped(f"objective=pacs needs whole groups: of group {int(batch.groups[i])} there are {int(count[index[i]])} of {int(size[i])} responses")


def binary(rewards: torch.Tensor) -> torch.Tensor:
    """The rewards as labels; RunStopped where one is not exactly 0 or 1."""
    if (odd := (rewards != 0) & (rewards != 1)).any():
        raise RunStopped(f"objective=pacs takes rewards as labels, 0 or 1; got {float(rewards[odd][0]):g}")
    return rewards


class LiveResidual:
    """With hard resets: the reference follows the policy every `reset_every` steps, and the optimiser forgets."""

    def __init__(self, description: Residual, run):
        self.part, self.policy = description, run.policy
        self.reference = run.policy.lagged(run, every=description.reset_every)
        run.set_reference(self.reference)

    def __call__(self, scores: Scores, batch: Batch) -> torch.Tensor:
        return self.part(scores, batch)

    def update(self, batch: Batch) -> None:
        self.reference.follow.update()
        if self.reference.follow.count % self.part.reset_every == 0:
            self.policy.trainable.reset_optimiser()


pacs_parts = {"advantage": None, "objective": Residual()}
hard = {"prompts": 128, "updates": Updates(optimiser=Adam(lr=0.05), epochs=4), "evaluation": Evaluation(samples=64, ks=(1, 4, 16, 64))}
many = hard | {"sampler": Plain(group=16), "prompts": 64, "updates": Updates(optimiser=Adam(lr=0.1), epochs=8)}


def _many(**changes) -> Arm:
    return Arm(grpo(**many | changes), Tree(prompts=64, winners=12), steps=60)


def _text(**changes) -> Arm:
    """The tiny transformer on noisy sums of digits, one update per batch for both."""
    sizes = {"prompts": 16, "updates": Updates(optimiser=Adam(lr=1e-4))}
    return Arm(grpo(**sizes | changes), DigitSum(noise=0.6), Tiny(), steps=60)


claim = Claim(
    says="solves more than GRPO, at one and at 64 attempts, and keeps more different solutions where residuals vanish within a batch",
    arms={"grpo": grpo(**hard), "pacs": grpo(**hard, **pacs_parts),
          "unweighted": grpo(**hard | pacs_parts | {"objective": Residual(weights="none")}),
          "many-grpo": _many(), "many-pacs": _many(**pacs_parts), "many-pacs-10": _many(**pacs_parts | {"objective": Residual(beta=10.0)}),
          "text-grpo": _text(), "text-pacs": _text(**pacs_parts)},
    task=Tree(), model="tabular", steps=100, seeds=10, first_seed=100, minutes=15,
    expects=("pacs > grpo on pass@1", "text-pacs > text-grpo on pass@1", "pacs > grpo on pass@64", "many-pacs-10 > many-grpo on distinct_winners"))

pacs = method("pacs", LanguageRecipe(**pacs_parts, updates=Updates(minibatch=2)), title="Learning to predict the verdict, with the policy as predictor",
              source="arXiv 2509.02522", claim=claim)
