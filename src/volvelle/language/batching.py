"""From rollouts to a Batch, and from a batch to mini-batches and micro-batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from .records import PAD, Batch, Rollout, Scores


def make_batch(policy, rollouts: list[Rollout], step: int, device="cpu") -> Batch:
    """Lay rollouts out as tensors. Prompts are stored once; behaviour log-probs are 0 on padding and NaN where unknown."""
    prompts, prompt_of, where = [], [], {}
    for r in rollouts:
        prompt = r.scored_under or r.prompt
        if id(prompt) not in where:
            where[id(prompt)] = len(prompts)
            prompts.append(policy.encode(prompt))
        prompt_of.append(where[id(prompt)])
    longest = max(map(len, prompts))
    prompt_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    prompt_mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for i, ids in enumerate(prompts):
        prompt_ids[i, longest - len(ids):] = torch.tensor(ids)
        prompt_mask[i, longest - len(ids):] = True
    n, t = len(rollouts), max(1, max(len(r.ids) for r in rollouts))

    held = torch.arange(t)[None] < torch.tensor([len(r.ids) for r in rollouts])[:, None]

    def block(values, dtype, fill=0):
        flat = torch.cat(values).to(dtype) if isinstance(values[0], torch.Tensor) else torch.tensor([x for v in values for x in v], dtype=dtype)
        return torch.full((n, t), fill, dtype=dtype).masked_scatter_(held, flat)

    meta = {}
    for key in sorted({k for r in rollouts for k in r.meta}):
        column = [r.meta.get(key, 0.0) for r in rollouts]
        if any(isinstance(v, (list, torch.Tensor)) for v in column):
            meta[key] = block([torch.as_tensor(v, dtype=torch.float32).expand(len(r.ids)) for v, r in zip(column, rollouts)], torch.float32)
        elif all(isinstance(v, (bool, int, float)) for v in column):
            meta[key] = torch.tensor([float(v) for v in column])
    meta["length"] = torch.tensor([float(len(r.ids)) for r in rollouts])
    size = Counter(r.group for r in rollouts)
    meta["group_size"] = torch.tensor([float(size[r.group]) for r in rollouts])
    entropy = block([r.entropy for r in rollouts], torch.float32) if all(r.entropy is not None for r in rollouts) else None
    batch = Batch(
        prompt_ids=prompt_ids, prompt_mask=prompt_mask, prompt_of=torch.tensor(prompt_of), ids=block([r.ids for r in rollouts], torch.long),
        role=block([r.role for r in rollouts], torch.int8, PAD), turn=block([r.turn for r in rollouts], torch.int16),
        rewards=torch.tensor([r.reward for r in rollouts]), groups=torch.tensor([r.group for r in rollouts]),
        train=torch.tensor([r.train for r in rollouts]), exact=torch.tensor([r.exact for r in rollouts]),
        finished=torch.tensor([r.finish != "length" for r in rollouts]),
        behaviour=Scores(block([r.logps for r in rollouts], torch.float32), entropy=entropy),
        domain=[r.prompt.domain for r in rollouts], meta=meta, rollouts=list(rollouts), step=step,
        scores={k: torch.tensor([r.scores.get(k, 0.0) for r in rollouts]) for k in sorted({k for r in rollouts for k in r.scores})},
        support=[r.support for r in rollouts] if any(r.support for r in rollouts) else None)
    return to_device(batch, device)


def to_device(batch: Batch, device) -> Batch:
    if torch.device(device).type == "cpu":
        return batch
    for key, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            setattr(batch, key, value.to(device))
        elif isinstance(value, Scores):
            setattr(batch, key, Scores(*(None if v is None else v.to(device) for v in vars(value).values())))
        elif isinstance(value, dict):
            setattr(batch, key, {k: v.to(device) for k, v in value.items()})
    return batch


def minibatches(batch: Batch, prompts: int | None, rng: np.random.Generator) -> list[torch.Tensor]:
    """Row indices of mini-batches of `prompts` whole groups each, in random order; None: one mini-batch, in order."""
    if prompts is None:
        return [torch.arange(len(batch))]
    names = torch.unique(batch.groups)
    order = names[torch.from_numpy(rng.permutation(len(names))).to(names.device)]
    return [torch.isin(batch.groups, order[i:i + prompts]).nonzero().squeeze(1) for i in range(0, len(order), prompts)]


def split(batch: Batch, tokens: int, whole_groups: bool) -> list[torch.Tensor]:
    """Row indices of micro-batches, each at most `tokens` laid-out tokens where it can be, of similar length.

    Responses to one prompt stay together, so that the prompt is computed once; with whole_groups, groups are never cut.
    """
    length = batch.lengths.tolist()
    prompt_length = batch.prompt_mask.sum(1).tolist()
    key = batch.groups.tolist() if whole_groups else batch.prompt_of.tolist()
    units: dict[int, list[int]] = {}
    for i, k in enumerate(key):
        units.setdefault(k, []).append(i)

    def cost(rows):
        return sum(prompt_length[p] for p in {int(batch.prompt_of[i]) for i in rows}) + sum(length[i] for i in rows)

    pieces = list(units.values())
    if not whole_groups:
        pieces = [p for unit in pieces for p in _halve(sorted(unit, key=lambda i: -length[i]), cost, tokens)]
    pieces.sort(key=cost, reverse=True)
    out: list[list[int]] = []
    widest = 0
    for piece in pieces:
        if out and widest * (count + 1) <= tokens:
            out[-1] += piece
            count += 1
        else:
            out.append(list(piece))
            widest, count = cost(piece), 1
    return [torch.tensor(sorted(rows), device=batch.ids.device) for rows in out]


def _halve(rows: list[int], cost, tokens: int) -> list[list[int]]:
    if len(rows) == 1 or cost(rows) <= tokens:
        return [rows]
    middle = len(rows) // 2
    return _halve(rows[:middle], cost, tokens) + _halve(rows[middle:], cost, tokens)


def deal(batch: Batch, tokens: int, whole_groups: bool, processes) -> list[torch.Tensor]:
    """`split`, as far as it is this process's: micro-batches small enough that every process gets some, dealt in turn, largest first."""
    if processes.count > 1:
        laid = int(batch.prompt_mask.sum()) + int(batch.lengths.sum())
        tokens = min(tokens, -(-laid // processes.count))
    return split(batch, tokens, whole_groups)[processes.rank::processes.count]


def total_of(found: dict[str, torch.Tensor], keep: torch.Tensor, processes) -> dict[str, torch.Tensor]:
    """Sum [N, T] results of micro-batches that were dealt out; a process may have had none."""
    if processes.count == 1:
        return found
    names = sorted(set(processes.gather(list(found))))
    return {name: processes.total(found[name] if name in found else torch.zeros(keep.shape, device=keep.device)) for name in names}
