"""Fork worlds: long texts with a few places where the wording forks and a few where the meaning does. The smallest task on which it matters
which forks of a text a sampler follows; every probability of an outcome has a closed form.

A text of `length` tokens passes `synonyms` forks after which both sides say the same again, and `semantic` forks after which everything is
different, at random places; elsewhere the next token is certain. The last token names the outcome, one of 2^semantic.
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

from ..policies import Policy, scores_from
from ..records import Prompt
from ..slots import LanguageTask
from ..splits import SPLITS

Count = Annotated[int, Field(gt=0)]
Chance = Annotated[float, Field(gt=0, lt=1)]
NEVER = -1e4  # logit of a token that cannot come


@part("forks")
class Forks(LanguageTask):
    """`worlds` prompts, each with one right outcome drawn from `seed`. Validation and test are the same prompts as train."""

    shares_prompts: ClassVar[bool] = True
    default_model: ClassVar[str] = "forks"
    gives = frozenset({"binary_rewards"})
    worlds: Count = 64
    length: Annotated[int, Field(gt=1)] = 60
    semantic: Count = 3
    synonyms: Count = 6
    vocabulary: Annotated[int, Field(gt=8)] = 128
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self):
        super().__post_init__()
        if self.semantic + self.synonyms >= self.length or self.outcomes + 2 >= self.vocabulary:
            raise UserError(f"forks: {self.semantic} + {self.synonyms} forks and {self.outcomes} outcomes need a longer text (length={self.length}) "
                            f"or a larger vocabulary ({self.vocabulary})")

    @property
    def outcomes(self) -> int:
        return 2**self.semantic

    @property
    def max_tokens(self) -> int:
        return self.length

    @cached_property
    def _prompts(self) -> list[Prompt]:
        right = np.random.default_rng(self.seed).integers(self.outcomes, size=self.worlds)
        return [Prompt(f"forks/{i}", text=f"world {i}", row={"index": i, "outcome": int(r)}) for i, r in enumerate(right)]

    def split(self, name):
        if name not in SPLITS:
            raise unknown("split", name, SPLITS, " of forks")
        return list(self._prompts)

    def outcome(self, text: str) -> int | None:
        """What a text comes to; None unless it is complete."""
        words = text.split()
        return int(words[-1]) - (self.vocabulary - self.outcomes) if len(words) == self.length else None

    def score(self, prompt, text):
        return float(self.outcome(text) == prompt.row["outcome"])

    def exact_pass_at_k(self, leaf_probabilities: torch.Tensor, ks) -> dict[str, float]:
        """pass@k from the exact probability of every outcome [worlds, outcomes]."""
        right = torch.tensor([p.row["outcome"] for p in self._prompts])
        p = leaf_probabilities.double()[torch.arange(len(right)), right]
        return {f"pass@{k}": float((1 - (1 - p) ** k).mean()) for k in ks}


class ForkTable(torch.nn.Module):
    """Log-odds of the first side of every fork: meaning [worlds, 2^semantic - 1] (states in heap order, the root is 0), wording [worlds, synonyms].

    places [worlds, semantic] and again [worlds, synonyms]: where the forks stand.
    """

    def __init__(self, task: Forks, meaning: float, wording: float, rng: torch.Generator):
        super().__init__()
        self.task = task
        drawn = torch.stack([torch.randperm(task.length - 1, generator=rng)[: task.semantic + task.synonyms] for _ in range(task.worlds)])
        self.register_buffer("places", drawn[:, : task.semantic].sort(1).values)
        self.register_buffer("again", drawn[:, task.semantic:])
        self.meaning = torch.nn.Parameter(torch.full((task.worlds, task.outcomes - 1), meaning).logit())
        self.wording = torch.nn.Parameter(torch.full((task.worlds, task.synonyms), wording).logit())

    def word(self, world, state, place) -> torch.Tensor:
        """The token on the first side; the second side is the next id."""
        plain = self.task.vocabulary - self.task.outcomes
        hashed = (world * 7919 + state * 104729 + place * 1299709 + world * state * place * 31) % (plain - 1)
        return torch.where(place == self.task.length - 1, plain + state - (self.task.outcomes - 1), hashed)

    def states(self, world: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[N, T+1]: the state of meaning before each position and after the last, from tokens [N, T]."""
        state = torch.zeros(len(ids), ids.shape[1] + 1, dtype=torch.long)
        for j in range(self.task.semantic):
            place = self.places[world, j]
            inside = place < ids.shape[1]
            here = place.clamp(max=max(ids.shape[1] - 1, 0))[:, None]
            if not inside.any():
                break
            before = state.gather(1, here).squeeze(1)
            second = (ids.gather(1, here).squeeze(1) != self.word(world, before, place)).long()
            after = (torch.arange(state.shape[1])[None] > place[:, None]) & inside[:, None]
            state = torch.where(after, (2 * before + 1 + second)[:, None], state)
        return state

    def odds(self, world: torch.Tensor, state: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """[M] log-odds of the first side; where there is no fork, a constant that makes it certain."""
        there, wordy = self.places[world] == place[:, None], self.again[world] == place[:, None]
        found = torch.full(world.shape, -NEVER)
        found = torch.where(there.any(1), self.meaning[world, state.clamp(max=self.task.outcomes - 2)], found)
        return torch.where(wordy.any(1), (self.wording[world] * wordy).sum(1), found)


class ForkPolicy(Policy):
    """A ForkTable as a policy; text is the ids with spaces between."""

    def __init__(self, task: Forks, meaning: float, wording: float, rng: torch.Generator):
        self.task, self.module = task, ForkTable(task, meaning, wording, rng)
        self.vocabulary, self.context = task.vocabulary, task.length + 1

    def encode(self, prompt):
        return [self.vocabulary + prompt.row["index"]]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def encode_text(self, text):
        return [int(word) for word in text.split()]

    def stepper(self, prompts, members, max_tokens):
        return ForkStepper(self, prompts, members)

    def score(self, batch, keep, needs=frozenset(), temperature=1.0):
        world = (batch.prompt_ids[batch.prompt_of, -1] - self.vocabulary)
        rows, cols = keep.nonzero(as_tuple=True)
        state, token = self.module.states(world, batch.ids)[rows, cols], batch.ids[rows, cols]
        odds = self.module.odds(world[rows], state, cols) / temperature
        first = token == self.module.word(world[rows], state, cols)
        log_p, log_q = torch.nn.functional.logsigmoid(odds), torch.nn.functional.logsigmoid(-odds)
        found = {"logps": torch.where(first, log_p, log_q)}
        if "entropy" in needs:
            found["entropy"] = -(log_p.exp() * log_p + log_q.exp() * log_q)
        return scores_from(found, keep.shape, rows, cols)

    @torch.no_grad()
    def leaf_probabilities(self) -> torch.Tensor:
        """[worlds, outcomes]: the exact probability of every outcome."""
        total, first = torch.ones(self.task.worlds, 1), self.module.meaning.sigmoid()
        for level in range(self.task.semantic):
            p = first[:, 2**level - 1: 2 ** (level + 1) - 1]
            total = torch.stack([total * p, total * (1 - p)], -1).flatten(1)
        return total

    def save(self, folder):
        save_file({k: v.detach().contiguous() for k, v in self.module.state_dict().items()}, str(Path(folder) / "forks.safetensors"))

    def read(self, folder):
        self.module.load_state_dict(load_file(str(Path(folder) / "forks.safetensors")))


class ForkStepper:
    """See CausalStepper."""

    def __init__(self, policy: ForkPolicy, prompts, members):
        self.module, self.vocabulary, self.step = policy.module, policy.vocabulary, 0
        self.world = torch.tensor([p[0] - policy.vocabulary for p, m in zip(prompts, members) for _ in range(m)])
        self.state = torch.zeros_like(self.world)
        self._look()

    @torch.no_grad()
    def _look(self):
        place, rows = torch.full_like(self.world, self.step), torch.arange(len(self.world))
        odds = self.module.odds(self.world, self.state, place)
        self.first = self.module.word(self.world, self.state, place)
        self.logits = torch.full((len(rows), self.vocabulary), NEVER)
        self.logits[rows, (self.first + 1) % self.vocabulary] = torch.nn.functional.logsigmoid(-odds).clamp(min=NEVER)
        self.logits[rows, self.first] = torch.nn.functional.logsigmoid(odds)

    def advance(self, tokens):
        forked = (self.module.places[self.world] == self.step).any(1)
        self.state = torch.where(forked, 2 * self.state + 1 + (tokens != self.first).long(), self.state)
        self.step += 1
        self._look()

    def select(self, index):
        self.world, self.state, self.first, self.logits = (v[index] for v in (self.world, self.state, self.first, self.logits))


@part("forks")
class ForkModel(Model):
    """The policy of the fork worlds: the first side of a fork in meaning comes with probability `meaning`, of one in wording with `wording`.

    The run's seed decides where the forks are.
    """

    meaning: Chance = 0.56
    wording: Chance = 0.54

    def load(self, run) -> Policy:
        if not isinstance(run.config.task, Forks):
            raise UserError(f"model forks fits the task forks only, not {run.config.task.label()!r}")
        return ForkPolicy(run.config.task, self.meaning, self.wording, run.torch_rng("initial weights"))
