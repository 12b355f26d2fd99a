"""Branches of text that fork, are dropped and end, over one stepper: the bookkeeping of every sampler that grows trees.

A step is `extend` (append tokens, open children), then any `drop` and `copy`, then `advance` (one forward pass for what still grows).
Forking and dropping go to the stepper as one `select`: no key or value is computed twice.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from volvelle.core.parts import Part, part, preset

from .records import Prompt, Rollout
from .sampling import Sampling, encode_all
from .similarity import edit_distance, rouge_l, suffix_match


class Forest:
    """Up to `room` branches to each prompt, held in slots: slot s belongs to prompt s // room.

    ids [P*room, T] tokens so far; length, over (ended), used (branch or empty slot) [P*room]; parent: slot of the parent, -1 for those
    that began with the prompt; birth: step of the first own token; logps, entropy [P*room, T]: as recorded by the caller;
    active: slots of the branches that grow, in the stepper's order; step: tokens appended so far; computed: token passes so far.
    """

    @torch.no_grad()
    def __init__(self, policy: Any, prompts: list[Prompt], room: int, start: list[int], sampling: Sampling):
        """start: the places 0..room-1 that are branches from the beginning, in every prompt."""
        self.prompts, self.room, self.sampling = prompts, room, sampling
        self.stepper = policy.stepper(encode_all(policy, prompts, sampling.max_tokens), [len(start)] * len(prompts), sampling.max_tokens)
        self.stops = policy.stops(sampling.stop)
        total = len(prompts) * room
        self.ids = torch.zeros(total, sampling.max_tokens, dtype=torch.long)
        self.logps, self.entropy = torch.zeros(total, sampling.max_tokens), torch.zeros(total, sampling.max_tokens)
        self.length = torch.zeros(total, dtype=torch.long)
        self.over, self.used = torch.zeros(total, dtype=torch.bool), torch.zeros(total, dtype=torch.bool)
        self.active = torch.tensor([p * room + s for p in range(len(prompts)) for s in start], dtype=torch.long)
        self.used[self.active] = True
        self.parent, self.birth = torch.full((total,), -1), torch.zeros(total, dtype=torch.long)
        self.rows, self.slots, self.token = torch.arange(len(self.active)), self.active, torch.zeros(0, dtype=torch.long)
        self.step = self.computed = 0

    @property
    def logits(self) -> torch.Tensor:
        """[A, V] next-token logits of the active branches."""
        return self.stepper.logits

    def extend(self, token: torch.Tensor, logp: torch.Tensor, entropy: torch.Tensor | None = None,
               forks: list[tuple[int, int, int, float]] = ()) -> None:
        """Append one token to every active branch ([A] each). forks: (row of the parent among the active ones, empty slot of the same
        prompt, token, log-prob) open children that share everything before this token with their parent."""
        for row, slot, _, _ in forks:
            self.copy(int(self.active[row]), slot)
            self.parent[slot], self.birth[slot] = self.active[row], self.step
        slots = torch.cat([self.active, torch.tensor([f[1] for f in forks], dtype=torch.long)])
        order = (slots // self.room).argsort(stable=True)
        self.rows = torch.cat([torch.arange(len(self.active)), torch.tensor([f[0] for f in forks], dtype=torch.long)])[order]
        self.token = torch.cat([token.cpu(), torch.tensor([f[2] for f in forks], dtype=torch.long)])[order]
        self.slots, t = slots[order], self.step
        self.ids[self.slots, t] = self.token
        self.logps[self.slots, t] = torch.cat([logp.cpu(), torch.tensor([f[3] for f in forks], dtype=torch.float32)])[order]
        if entropy is not None:
            self.entropy[self.slots, t] = entropy.cpu()[self.rows]
        self.length[self.slots] = t + 1
        self.over[self.slots] = self.stops.ended(self.token, self.ids, self.slots, t)
        self.step += 1

    def copy(self, source: int, slot: int) -> None:
        """Make an empty slot a copy of a branch as it stands (its own cache row follows with `repeat`)."""
        for held in (self.ids, self.logps, self.entropy, self.length, self.over):
            held[slot] = held[source]
        self.used[slot] = True

    def repeat(self, source: int, slots: list[int]) -> None:
        """After `extend`: fill empty slots with copies of a branch of the same prompt, which go on by themselves."""
        for slot in slots:
            self.copy(source, slot)
            self.parent[slot], self.birth[slot] = source, self.step
        found = (self.slots == source).nonzero().flatten()
        if len(found) and slots:
            at = int(found[0]) + 1
            self.slots = torch.cat([self.slots[:at], torch.tensor(slots), self.slots[at:]])
            self.rows, self.token = (torch.cat([v[:at], v[at - 1].repeat(len(slots)), v[at:]]) for v in (self.rows, self.token))

    def drop(self, slot: int) -> int:
        """Remove a branch and all its descendants, finished ones too; returns how many went."""
        self.used[slot] = False
        children = (self.used & (self.parent == slot)).nonzero().flatten().tolist()
        return 1 + sum(self.drop(c) for c in children)

    def advance(self) -> bool:
        """One pass for every branch that still grows; False when none does or the length cap is reached."""
        keep = (self.used[self.slots] & ~self.over[self.slots]).nonzero().flatten()
        if not len(keep) or self.step == self.sampling.max_tokens:
            self.active = self.slots[keep]
            return False
        index = self.rows[keep]
        if len(index) != len(self.active) or not torch.equal(index, torch.arange(len(index))):
            self.stepper.select(index)
        self.active = self.slots[keep]
        self.stepper.advance(self.token[keep])
        self.computed += len(keep)
        return True

    def rollout(self, slot: int, entropy: bool, exact: bool, **meta) -> Rollout:
        """What stands in a slot, as a rollout."""
        n = int(self.length[slot])
        ids = self.ids[slot, :n].tolist()
        text, finished = self.stops.text(ids)
        return Rollout(self.prompts[slot // self.room], ids, text, self.logps[slot, :n].clone(), "stop" if finished else "length",
                       entropy=self.entropy[slot, :n].clone() if entropy else None, exact=exact, group=slot // self.room, meta=meta)


@part("alike")
class Pruning(Part):
    """When a child has become too like its parent. Presets: edit (distance / length < 0.4), suffix (shared suffix / length > 0.2) and rouge-l
    (F1 > 0.5), which the released code uses together for mathematics, and random (with probability `threshold`; an ablation)."""

    slot = "pruning"
    measure: Literal["edit", "suffix", "rouge-l", "random"] = "edit"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.4

    def __call__(self, child: list[int], parent: list[int], rng: torch.Generator, shift: float = 0.0) -> bool:
        """Windows of one length; shift: added strictness while thresholds adapt."""
        if self.measure == "edit":
            return edit_distance(child, parent) / len(child) < self.threshold + shift
        if self.measure == "random":
            return bool(torch.rand((), generator=rng) < self.threshold)
        return (suffix_match if self.measure == "suffix" else rouge_l)(child, parent) > self.threshold - shift


edit, suffix = preset("edit", Pruning("edit", 0.4)), preset("suffix", Pruning("suffix", 0.2))
rouge, at_random = preset("rouge-l", Pruning("rouge-l", 0.5)), preset("random", Pruning("random", 0.5))
