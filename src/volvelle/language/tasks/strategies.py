"""Shared strategies: the smallest task on which learning one problem changes the others, because all share what is learnt.

A response names a strategy and then comes out right or wrong. How likely each strategy solves each problem is fixed; only the policy's
preference among strategies is learnt, one vector for all problems. One rarely used strategy solves most problems; the others solve few each
but different ones. What reinforcement learning does to pass@k (arXiv 2504.13837) and what a single example teaches (arXiv 2504.20571) can
be seen here in seconds, with every probability in closed form.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from volvelle.core.errors import UserError, unknown
from volvelle.core.parts import part
from volvelle.core.tasks import Model

from ..policies import Policy
from ..records import Prompt
from ..slots import LanguageTask
from ..splits import SPLITS
from ..tabular import PrefixTable, TabularPolicy

Count = Annotated[int, Field(gt=0)]
Chance = Annotated[float, Field(ge=0, le=1)]
NEVER = -1e4  # logit of a token that cannot come


@part("strategies")
class Strategies(LanguageTask):
    """`train` and `test` problems (validation is test), `strategies` ways to answer, of which the last is the good one.

    good, other: share of the problems that the good strategy, and each other one, can solve at all (every problem has one that can);
    where one can, it does with a chance drawn from Beta(7, 3) (good) or Beta(2, 3) (other). seed: which. A response is two tokens, such as `s4 right`.
    Demonstrations are a teacher's: right answers by a strategy that solves the problem, each as often as it does.
    """

    default_model: ClassVar[str] = "strategies"
    max_tokens: ClassVar[int] = 2
    gives = frozenset({"binary_rewards"})
    train: Count = 200
    test: Count = 200
    strategies: Annotated[int, Field(gt=1)] = 12
    good: Chance = 0.75
    other: Chance = 0.2
    seed: Annotated[int, Field(ge=0)] = 0

    @cached_property
    def success(self) -> np.ndarray:
        """[train + test, strategies]: the chance that a strategy solves a problem."""
        rng, n, k = np.random.default_rng(self.seed), self.train + self.test, self.strategies
        able = rng.random((n, k)) < np.where(np.arange(k) == k - 1, self.good, self.other)
        left = ~able.any(1)
        able[left, rng.integers(k - 1, size=left.sum())] = True
        return able * np.where(np.arange(k) == k - 1, rng.beta(7, 3, (n, k)), rng.beta(2, 3, (n, k)))

    @cached_property
    def _prompts(self) -> list[Prompt]:
        return [Prompt(f"strategies/{i}", text=f"problem {i}", row={"index": i}) for i in range(self.train + self.test)]

    def split(self, name):
        if name not in SPLITS:
            raise unknown("split", name, SPLITS, " of strategies")
        return self._prompts[: self.train] if name == "train" else self._prompts[self.train:]

    def score(self, prompt, text):
        return float(text.endswith(" right"))

    def demonstration(self, prompt, rng):
        chance = self.success[prompt.row["index"]]
        return f"s{rng.choice(self.strategies, p=chance / chance.sum())} right"

    def exact_pass_at_k(self, leaf_probabilities: torch.Tensor, ks) -> dict[str, float]:
        """pass@k on the test problems, and pass@1 on the training problems, from the probability of every response [problems, V^2]."""
        width = self.strategies + 2
        p = leaf_probabilities.double().unflatten(1, (width, width))[:, :, -1].sum(1).clamp(max=1.0)
        out = {f"pass@{k}": float((1 - (1 - p[self.train:]) ** k).mean()) for k in ks}
        return out | {"train_pass@1": float(p[: self.train].mean())}


class StrategyTable(PrefixTable):
    """A PrefixTable of depth two in which only one vector `logits` [K] is learnt; tokens: K strategies, wrong, right."""

    def __init__(self, success: torch.Tensor, prior: torch.Tensor):
        torch.nn.Module.__init__(self)
        problems, k = success.shape
        self.vocabulary, self.depth, self.starts = k + 2, 2, [0, 1, k + 3]
        self.logits = torch.nn.Parameter(prior.log())
        outcomes = torch.stack([1 - success, success], -1).log().clamp(min=NEVER)
        fixed = torch.full((problems, k + 2, k + 2), NEVER)
        fixed[:, :k, k:] = outcomes
        fixed[:, k:] = 0.0
        self.register_buffer("outcomes", fixed)

    @property
    def table(self) -> torch.Tensor:
        first = torch.nn.functional.pad(self.logits, (0, 2), value=NEVER)
        return torch.cat([first.expand(len(self.outcomes), 1, -1), self.outcomes], 1)


class StrategyPolicy(TabularPolicy):
    """A StrategyTable as a policy."""

    def __init__(self, task: Strategies, prior: torch.Tensor):
        self.vocabulary, self.depth, self.context, self.prompts = task.strategies + 2, 2, 3, task.train + task.test
        self.module = StrategyTable(torch.from_numpy(task.success).float(), prior)
        self.words = [*(f"s{i}" for i in range(task.strategies)), "wrong", "right"]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)

    def encode_text(self, text):
        return [self.words.index(word) for word in text.split()]

    def save(self, folder):
        save_file({"logits": self.module.logits.detach().cpu()}, str(Path(folder) / "strategies.safetensors"))

    def read(self, folder):
        with torch.no_grad():
            self.module.logits.copy_(load_file(str(Path(folder) / "strategies.safetensors"))["logits"])


@part("strategies")
class StrategyModel(Model):
    """The policy over shared strategies: the good one with probability `rare`, the others Dirichlet(`concentration`), drawn with the run's seed."""

    rare: Annotated[float, Field(gt=0, lt=1)] = 0.03
    concentration: Annotated[float, Field(gt=0)] = 0.6

    def load(self, run) -> Policy:
        task = run.config.task
        if not isinstance(task, Strategies):
            raise UserError(f"model strategies fits the task strategies only, not {task.label()!r}")
        others = run.rng("initial weights").dirichlet([self.concentration] * (task.strategies - 1)).clip(min=1e-6)
        prior = np.append(others / others.sum() * (1 - self.rare), self.rare)
        return StrategyPolicy(task, torch.from_numpy(prior).float())
