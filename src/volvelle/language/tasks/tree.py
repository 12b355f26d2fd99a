"""Prompt trees: the smallest task on which reinforcement learning with groups behaves as it does on text, and everything is exact.

Each prompt is its own tree of depth D over V tokens; W of its V^D leaves win. With a table of logits per prefix (`--model tabular`) every
probability has a closed form, so pass@k is computed and not sampled. Nothing is shared between prompts: what a large model loses on one
problem by learning another (arXiv 2504.13837) does not happen here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field

from volvelle.core.errors import UserError, unknown
from volvelle.core.parts import part

from ..records import Prompt
from ..slots import LanguageTask
from ..splits import SPLITS

Count = Annotated[int, Field(gt=0)]


@part("tree")
class Tree(LanguageTask):
    """`prompts` independent trees of `depth` over `vocabulary` tokens, each with `winners` winning leaves drawn at random from `seed`.

    Validation and test are THE SAME PROMPTS as train: a table cannot generalise, and what is measured is learning, not transfer. The
    label says so, and `shares_prompts` tells whoever asks that splits are disjoint. A response is `depth` token ids with spaces
    between, without an end token; `row["index"]` is the prompt's row in the table.
    """

    shares_prompts: ClassVar[bool] = True
    default_model: ClassVar[str] = "tabular"
    gives = frozenset({"binary_rewards"})
    prompts: Count = 128
    vocabulary: Annotated[int, Field(gt=1)] = 8
    depth: Count = 3
    winners: Count = 1
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self):
        super().__post_init__()
        if self.winners > self.leaves:
            raise UserError(f"winners={self.winners}: a tree of depth {self.depth} over {self.vocabulary} tokens has {self.leaves} leaves")

    @property
    def leaves(self) -> int:
        return self.vocabulary**self.depth

    @property
    def max_tokens(self) -> int:
        return self.depth

    def label(self):
        return "tree-on-train"

    @cached_property
    def winning(self) -> torch.Tensor:
        """[prompts, winners] indices of the winning leaves in base-V order, each row sorted."""
        rng = np.random.default_rng(self.seed)
        rows = [np.sort(rng.choice(self.leaves, self.winners, replace=False)) for _ in range(self.prompts)]
        return torch.from_numpy(np.stack(rows))

    @cached_property
    def _prompts(self) -> list[Prompt]:
        return [Prompt(f"tree/{i}", text=f"tree {i}", row={"index": i}) for i in range(self.prompts)]

    def split(self, name):
        if name not in SPLITS:
            raise unknown("split", name, SPLITS, " of tree")
        return list(self._prompts)

    def leaf(self, text: str) -> int | None:
        """The leaf that a response reaches; None unless it is exactly `depth` token ids."""
        words = text.split()
        if len(words) != self.depth or not all(w.isascii() and w.isdigit() and int(w) < self.vocabulary for w in words):
            return None
        leaf = 0
        for word in words:
            leaf = leaf * self.vocabulary + int(word)
        return leaf

    def path(self, leaf: int) -> str:
        """The response that reaches a leaf."""
        return " ".join(str(leaf // self.vocabulary ** (self.depth - 1 - i) % self.vocabulary) for i in range(self.depth))

    def score(self, prompt, text):
        return float(self.leaf(text) in self.winning[prompt.row["index"]].tolist())

    def demonstration(self, prompt, rng):
        """A winning response, each equally likely."""
        return self.path(int(rng.choice(self.winning[prompt.row["index"]].numpy())))

    def exact_pass_at_k(self, leaf_probabilities: torch.Tensor, ks: Iterable[int]) -> dict[str, float]:
        """pass@k = mean over prompts of 1 - (1 - p)^k, p the probability of winning, from leaf probabilities [prompts, V^D].

        Also: `distinct_winners`, how many different winning leaves 64 draws are expected to hold (mean over prompts), and `solved`, the
        share of prompts that are won more often than not.
        """
        won = leaf_probabilities.double().gather(1, self.winning.to(leaf_probabilities.device))
        p = won.sum(1).clamp(max=1.0)
        out = {f"pass@{k}": float(-torch.expm1(k * torch.log1p(-p)).mean()) for k in ks}
        distinct = -torch.expm1(64 * torch.log1p(-won.clamp(max=1.0)))
        return out | {"distinct_winners": float(distinct.sum(1).mean()), "solved": float((p > 0.5).double().mean())}
