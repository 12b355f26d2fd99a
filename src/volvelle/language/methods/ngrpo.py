"""NGRPO: negative-enhanced group relative policy optimisation (arXiv 2509.18851).

Problem. When every response of a group is wrong, GRPO's advantages are all zero: nothing is learnt on exactly the hardest prompts.
Idea.
    1. Advantage calibration: the group's mean and deviation are taken as if K further responses with the largest possible reward had been
       sampled. An all-wrong group then gets one common, bounded, negative advantage and the policy moves away from what it answers now.
    2. Asymmetric clipping: this adds a lasting downward pressure, so negative updates are clipped tighter (1 - 0.16) than positive (1 + 0.24).
    3. All-correct groups are dropped and replaced by fresh prompts; all-wrong groups stay.
    No KL.
Pick it when a large share of the groups is all wrong. It buys little when most groups are mixed, and on easy data only makes negatives heavier.

The paper prints the population deviation; its figure and its code use the sample deviation: `ddof` (default 1, the code's).
The released code cuts surplus rows before the statistics, so that one group per batch can be incomplete; here groups are always whole.
Its inherited entropy bonus of 0.001, which the paper does not mention, is `terms.entropy=entropy` here and off.

The claim runs on the prompt tree, without refilling, so that both arms draw the same number of samples. With 5 seeds it gave pass@256 +0.109
[+0.041, +0.177] and solved +0.084 [-0.004, +0.173], inconclusive; it runs 10 seeds since. Clip-higher alone (0.2 / 0.28) changes nothing there:
with two updates per batch the ratios stay inside the window.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from volvelle.core.claims import Claim
from volvelle.core.parts import method, part, preset
from volvelle.core.trainable import Adam

from ..advantages import group_index, group_low, outcome
from ..fittings import Drop, Updates
from ..objectives import Clipped
from ..recipe import Evaluation, LanguageRecipe
from ..records import Batch
from ..slots import Advantage
from .grpo import grpo


def calibrated(rewards: torch.Tensor, groups: torch.Tensor, max_reward: float, virtual: int, ddof: int, epsilon: float) -> torch.Tensor:
    """[N] advantages (r - mu') / (sigma' + epsilon), mu' and sigma' taken over each group and `virtual` samples of reward max_reward.

    rewards, groups [N]; divisor of the variance: group size + virtual - ddof. With virtual=0 this is GRPO.
    """
    index, count = group_index(groups)
    n, low = count + virtual, group_low(rewards, index, count)  # sums are taken from the smallest reward: equal rewards give exact means
    total = torch.zeros_like(low)
    mean = low + (total.index_add(0, index, rewards - low[index]) + virtual * (max_reward - low)) / n
    square = total.index_add(0, index, (rewards - mean[index]) ** 2) + virtual * (max_reward - mean) ** 2
    deviation = (square / (n - ddof).clamp(min=1)).sqrt() * (n > ddof)
    return (rewards - mean[index]) / (deviation[index] + epsilon)


@part("ngrpo")
class Calibrated(Advantage):
    """NGRPO's calibrated advantage: `virtual` imagined responses of reward `max_reward` join every group's statistics."""

    max_reward: float = 1.0
    virtual: Annotated[int, Field(ge=0)] = 1
    ddof: Annotated[int, Field(ge=0, le=1)] = 1
    epsilon: Annotated[float, Field(ge=0)] = 1e-6

    def __call__(self, batch: Batch) -> torch.Tensor:
        return calibrated(outcome(batch), batch.groups, self.max_reward, self.virtual, self.ddof, self.epsilon)


@part("signed-return")
class SignedReturn(Advantage):
    """PSR, NSR and W-REINFORCE (arXiv 2506.01347), the baselines of NGRPO's code: positive * r for correct responses (r > 0),
    negative * (r - 1) for the others, no group statistics. PSR (1, 0), NSR (0, 1), W-REINFORCE (0.1, 1)."""

    positive: float = 1.0
    negative: float = 1.0

    def __call__(self, batch: Batch) -> torch.Tensor:
        reward = outcome(batch)
        return torch.where(reward > 0, self.positive * reward, self.negative * (reward - 1))


psr = preset("psr", SignedReturn(1.0, 0.0))
nsr = preset("nsr", SignedReturn(0.0, 1.0))
w_reinforce = preset("w-reinforce", SignedReturn(0.1, 1.0))
asymmetric = preset("ngrpo", Clipped(clip_low=0.16, clip_high=0.24))
drop_all_correct = preset("ngrpo", Drop(which="correct"))

ngrpo_parts = dict(advantage=Calibrated(), objective=asymmetric)
tree = dict(prompts=128, updates=Updates(optimiser=Adam(lr=0.05), minibatch=64), evaluation=Evaluation(samples=256, ks=(1, 4, 16, 64, 256)))

claim = Claim(
    says="learns from groups in which every answer is wrong: more of the hardest prompts get solved from the same number of samples",
    arms={"grpo": grpo(**tree),
          "ngrpo": grpo(**tree, **ngrpo_parts, filter=Drop(which="correct", refill=False))},
    task="tree", model="tabular", steps=100, seeds=10, minutes=4,
    expects=("ngrpo > grpo on solved", "ngrpo > grpo on pass@256"))

ngrpo = method("ngrpo", LanguageRecipe(**ngrpo_parts, filter=drop_all_correct), title="Credit for groups in which every answer is wrong",
               source="arXiv 2509.18851", claim=claim)
