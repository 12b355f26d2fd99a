"""Steppers: a policy's next-token logits for many branches of text that share what they have in common.

Branches of one prompt live in one row of the key-value cache. Which keys a branch sees is a row of booleans, so that forking, reordering and
dropping branches move booleans, never keys; the prompt is computed once, and so is every token that several branches share.
"""

from __future__ import annotations

import functools

import torch

REPACK = 24  # keys in a row per key that a branch sees, beyond which each branch gets a row of its own


@functools.cache
def growing_layer():
    """A cache layer whose buffer grows by doubling: appending a token does not copy the cache."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.used, self.buffers = 0, None
            end = self.used + key_states.shape[-2]
            if self.buffers is None or end > self.buffers[0].shape[-2]:
                size = max(end + 32, 2 * self.used)
                fresh = tuple(s.new_empty(*s.shape[:2], size, s.shape[-1]) for s in (key_states, value_states))
                for new, old in zip(fresh, self.buffers or ()):
                    new[:, :, : self.used] = old[:, :, : self.used]
                self.buffers = fresh
            for buffer, states in zip(self.buffers, (key_states, value_states)):
                buffer[:, :, self.used:end] = states
            self.used = end
            self.keys, self.values = (b[:, :, :end] for b in self.buffers)
            return self.keys, self.values

        def rebuild(self, change) -> None:
            """Replace keys and values by change(tensor)."""
            self.buffers = tuple(change(b[:, :, : self.used]) for b in self.buffers)
            self.used = self.buffers[0].shape[-2]
            self.keys, self.values = self.buffers

    return GrowingLayer


class CausalStepper:
    """Branches of several prompts under a causal policy.

    logits [A, V] float32: next-token logits of the active branches, in order of prompt. `advance(tokens [A])` appends a token to
    each; `select(index)` keeps, repeats, reorders or drops branches (index into the active ones).
    """

    @torch.no_grad()
    def __init__(self, policy, prompts: list[list[int]], members: list[int]):
        from transformers import DynamicCache

        self.policy = policy
        self.device = next(policy.module.parameters()).device
        self.float = torch.bfloat16 if policy.dtype == "bfloat16" else torch.float32
        self.cache = DynamicCache(config=policy.model.config)
        self.cache.layers = [growing_layer()() for _ in self.cache.layers]
        lengths = torch.tensor([len(p) for p in prompts])
        longest = int(lengths.max())
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        valid = torch.arange(longest)[None] >= (longest - lengths)[:, None]
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt):] = torch.tensor(prompt)
        seen = valid[:, None, :] & torch.ones(longest, longest, dtype=torch.bool).tril() | torch.eye(longest, dtype=torch.bool)
        positions = (torch.arange(longest)[None] - (longest - lengths)[:, None]).clamp(min=0)
        hidden = self._forward(ids, positions, seen)
        self.row = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(members))
        self.sees = valid[self.row]
        self.position = lengths[self.row]
        with policy.autocast():
            self.logits = policy.head(hidden[:, -1])[self.row.to(self.device)]

    def _forward(self, ids, positions, seen):
        mask = torch.zeros(seen.shape, dtype=self.float).masked_fill_(~seen, torch.finfo(self.float).min)[:, None]
        with self.policy.autocast():
            return self.policy.forward(ids.to(self.device), positions.to(self.device), mask.to(self.device), self.cache)

    @torch.no_grad()
    def advance(self, tokens: torch.Tensor) -> None:
        """Append tokens [A], one to each active branch, and compute the next logits."""
        rows = self.cache.layers[0].keys.shape[0]
        order = self.row.argsort(stable=True)
        ranked = self.row[order]
        column = torch.empty_like(self.row)
        column[order] = torch.arange(len(ranked)) - torch.searchsorted(ranked, ranked)  # the how-manieth branch of its row
        width, keys = int(column.max()) + 1, self.sees.shape[1]
        ids = torch.zeros(rows, width, dtype=torch.long)
        positions = torch.zeros(rows, width, dtype=torch.long)
        seen = torch.zeros(rows, width, keys + width, dtype=torch.bool)
        seen[:, :, keys:] = torch.eye(width, dtype=torch.bool)
        ids[self.row, column] = tokens.cpu()
        positions[self.row, column] = self.position
        seen[self.row, column, :keys] = self.sees
        hidden = self._forward(ids, positions, seen)
        self.sees = seen[self.row, column]
        self.position = self.position + 1
        with self.policy.autocast():
            self.logits = self.policy.head(hidden[self.row.to(self.device), column.to(self.device)])
        if width > 1 and keys > REPACK * int(self.position.max()):
            self._spread()

    def select(self, index: torch.Tensor) -> None:
        """Keep the active branches named by index [A'] (repetitions fork a branch). No key or value is computed or copied,
        except that rows of the cache without a branch are dropped once they are a quarter of it."""
        index = index.cpu()
        self.row, self.sees, self.position = self.row[index], self.sees[index], self.position[index]
        self.logits = self.logits[index.to(self.device)]
        alive = torch.unique(self.row)
        rows = self.cache.layers[0].keys.shape[0]
        if len(alive) <= 0.75 * rows:
            self._rebuild(lambda b: b[alive.to(b.device)])
            self.row = torch.searchsorted(alive, self.row)

    def _rebuild(self, change) -> None:
        for layer in self.cache.layers:
            layer.rebuild(change)

    def _spread(self) -> None:
        """One row per branch, holding only the keys it sees."""
        count = self.sees.sum(1)
        longest = int(count.max())
        order = self.sees.long().argsort(dim=1, stable=True)[:, -longest:]  # seen keys last, in their order
        row, index = self.row.to(self.device), order.to(self.device)

        def change(buffer):
            picked = index[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            return buffer[row].gather(2, picked)

        self._rebuild(change)
        self.sees = torch.arange(longest)[None] >= (longest - count)[:, None]
        self.row = torch.arange(len(self.row))
