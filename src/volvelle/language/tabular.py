"""Tabular policies: one row of logits per (prompt, prefix). The prompt-tree miniatures run through the real loop with these, in seconds,
and every probability can be computed exactly."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from volvelle.core.errors import RunStopped

from .policies import Policy, scores_from, statistics
from .records import Scores


class PrefixTable(torch.nn.Module):
    """Logits for the next token after every prefix shorter than `depth`. Prompts are told apart by their first "token", vocab + index.

    table: [prompts, 1 + V + V^2 + … + V^(depth-1), outputs].
    """

    def __init__(self, prompts: int, vocabulary: int, depth: int, outputs: int | None = None):
        super().__init__()
        self.vocabulary, self.depth = vocabulary, depth
        self.starts = [sum(vocabulary**j for j in range(level)) for level in range(depth + 1)]
        self.table = torch.nn.Parameter(torch.zeros(prompts, self.starts[depth], outputs or vocabulary))

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """Prefix indices [B, L] of input ids [B, L] (the prompt's token first): column j is the prefix of the first j response tokens."""
        state = torch.zeros(ids.shape, dtype=torch.long, device=ids.device)
        code = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        for j in range(1, ids.shape[1]):
            code = code * self.vocabulary + ids[:, j]
            state[:, j] = self.starts[j] + code
        return state

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [B, L], L <= depth -> logits [B, L, outputs]."""
        return self.table[(input_ids[:, 0] - self.vocabulary)[:, None], self.states(input_ids)]


class TabularPolicy(Policy):
    """A PrefixTable as a policy. Responses have exactly `depth` tokens and no end token; text is the ids with spaces between."""

    width, dtype = 1, "float32"

    def __init__(self, prompts: int, vocabulary: int, depth: int, scale: float, rng: torch.Generator):
        self.vocabulary, self.depth, self.prompts = vocabulary, depth, prompts
        self.context = depth + 1
        self.complete_at = depth
        self.module = PrefixTable(prompts, vocabulary, depth)
        with torch.no_grad():
            self.module.table.normal_(generator=rng).mul_(scale)

    def encode(self, prompt):
        index = prompt.row.get("index")
        if index is None or not 0 <= index < self.prompts:
            raise RunStopped(f"prompt {prompt.id!r}: a tabular policy needs row['index'] in 0..{self.prompts - 1}, got {index}")
        return [self.vocabulary + index]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def encode_text(self, text):
        return [int(word) for word in text.split()]

    def stepper(self, prompts, members, max_tokens):
        if max_tokens > self.depth:
            raise RunStopped(f"max_tokens={max_tokens} exceeds the depth {self.depth} of the tabular policy")
        return TabularStepper(self, prompts, members)

    def _rows(self, batch, keep, module):
        ids = torch.cat([batch.prompt_ids[batch.prompt_of, -1:], batch.ids], 1)
        rows, cols = keep.nonzero(as_tuple=True)
        state = module.states(ids[:, : keep.shape[1]])[rows, cols]
        return module.table[ids[rows, 0] - self.vocabulary, state], rows, cols

    def score(self, batch, keep, needs=frozenset(), temperature=1.0) -> Scores:
        logits, rows, cols = self._rows(batch, keep, self.module)
        found = statistics(logits / temperature, batch.ids[rows, cols], needs)
        names = ["logps"] + [n for n in ("entropy", "mean_logp") if n in needs]
        return scores_from(dict(zip(names, found)), keep.shape, rows, cols)

    def value_module(self):
        return _TabularValues(self)

    @torch.no_grad()
    def leaf_probabilities(self) -> torch.Tensor:
        """[prompts, V^depth]: the exact probability of every complete response, in base-V order."""
        total = torch.zeros(self.prompts, 1)
        for level in range(self.depth):
            first, last = self.module.starts[level], self.module.starts[level + 1]
            logp = self.module.table[:, first:last].log_softmax(-1)
            total = (total[:, :, None] + logp).flatten(1)
        return total.exp()

    def save(self, folder: Path) -> None:
        save_file({"table": self.module.table.detach().cpu().contiguous()}, str(Path(folder) / "table.safetensors"))

    def read(self, folder: Path) -> None:
        with torch.no_grad():
            self.module.table.copy_(load_file(str(Path(folder) / "table.safetensors"))["table"])


class _TabularValues(torch.nn.Module):
    def __init__(self, policy: TabularPolicy):
        super().__init__()
        self.values = PrefixTable(policy.prompts, policy.vocabulary, policy.depth, outputs=1)
        self._policy = [policy]

    def forward(self, batch, keep):
        found, rows, cols = self._policy[0]._rows(batch, keep, self.values)
        return scores_from({"logps": found.squeeze(-1)}, keep.shape, rows, cols).logps


class TabularStepper:
    """See CausalStepper."""

    @torch.no_grad()
    def __init__(self, policy: TabularPolicy, prompts, members):
        self.policy = policy
        self.ids = torch.tensor([p for p, m in zip(prompts, members) for _ in range(m)])
        self._look()

    def _look(self):
        if self.ids.shape[1] <= self.policy.depth:
            with torch.no_grad():
                self.logits = self.policy.module(self.ids)[:, -1]

    def advance(self, tokens):
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self._look()

    def select(self, index):
        self.ids, self.logits = self.ids[index], self.logits[index]
