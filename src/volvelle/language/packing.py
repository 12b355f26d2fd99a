"""Shared prefixes for scoring: one prompt and several of its responses in one row, so that the prompt is computed once.

A row holds a prompt (padded on the left) and the tokens of some of its responses one after the other. A response sees the prompt and its
own past, never its neighbours; its positions count on from the prompt. The last token of a response is nobody's past and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .records import Batch

LONGEST_ROW = 4096


@dataclass
class Packed:
    """ids, positions [R, L]; mask [R, 1, L, L] additive float; source: flat index into [R*L] of the state that predicts each kept token;
    rows, cols: where those tokens stand in the batch's [N, T]."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    source: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor


def bins(prompt_length: int, lengths: list[int], width: int) -> list[list[int]]:
    """Which responses of one prompt share a row. Joining a row with S response tokens saves the prompt's pass and costs attention
    between neighbours that is masked away; it is done while the saving is larger (`width`: hidden size)."""
    out: list[list[int]] = []
    filled: list[int] = []
    for i, length in sorted(enumerate(lengths), key=lambda pair: -pair[1]):
        gain = prompt_length * (3 * width + prompt_length / 2)
        fits = [b for b, s in enumerate(filled) if s * max(length, 1) < gain and prompt_length + s + length <= LONGEST_ROW]
        if fits:
            out[fits[0]].append(i)
            filled[fits[0]] += length
        else:
            out.append([i])
            filled.append(length)
    return out


def pack(batch: Batch, keep: torch.Tensor, width: int, dtype: torch.dtype = torch.float32) -> Packed:
    """Lay out a batch for one forward pass.

    keep [N, T] bool: tokens whose log-probabilities are wanted. Only what they depend on is laid out.
    """
    prompt_lengths = batch.prompt_mask.sum(1).tolist()
    columns = torch.arange(keep.shape[1], device=keep.device)
    needed = torch.where(keep.any(1), (keep * (columns + 1)).amax(1) - 1, torch.zeros(len(keep), dtype=torch.long, device=keep.device)).tolist()
    members: list[list[int]] = [[] for _ in prompt_lengths]
    for n, p in enumerate(batch.prompt_of.tolist()):
        members[p].append(n)
    layout = [(p, [members[p][i] for i in group]) for p in range(len(members)) if members[p]
              for group in bins(prompt_lengths[p], [needed[n] for n in members[p]], width)]
    prefix = max(prompt_lengths[p] for p, _ in layout)
    length = prefix + max(sum(needed[n] for n in group) for _, group in layout)
    ids = torch.zeros(len(layout), length, dtype=torch.long)
    positions = torch.zeros(len(layout), length, dtype=torch.long)
    owner = torch.full((len(layout), length), -2, dtype=torch.long)  # -2 padding, -1 prompt, else the response
    before = torch.zeros(len(keep), keep.shape[1], dtype=torch.long)  # flat index of the state that predicts token t
    host, prompts = batch.ids.cpu(), batch.prompt_ids.cpu()
    span = torch.arange(max(length, keep.shape[1]))
    for r, (p, group) in enumerate(layout):
        lp = prompt_lengths[p]
        start = prefix - lp
        ids[r, start:prefix] = prompts[p, prompts.shape[1] - lp:]
        positions[r, start:prefix] = span[:lp]
        owner[r, start:prefix] = -1
        at = prefix
        for n in group:
            k = needed[n]
            ids[r, at:at + k] = host[n, :k]
            positions[r, at:at + k] = lp + span[:k]
            owner[r, at:at + k] = n
            before[n, 0] = r * length + prefix - 1
            before[n, 1:k + 1] = r * length + at + span[:k]
            at += k
    device = batch.ids.device
    rows, cols = keep.nonzero(as_tuple=True)
    return Packed(ids.to(device), positions.to(device), tree_mask(owner, positions, prefix, dtype).to(device),
                  before.to(device)[rows, cols], rows, cols)


def tree_mask(owner: torch.Tensor, positions: torch.Tensor, prefix: int, dtype: torch.dtype) -> torch.Tensor:
    """[R, 1, L, L] additive mask: causal within the prompt, each response over the prompt and its own past."""
    length = owner.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    query, key = owner[:, :, None], owner[:, None, :]
    seen = ((key == -1) | (query == key)) & causal & (key != -2)
    seen |= torch.eye(length, dtype=torch.bool)  # a padding row sees itself: softmax stays finite
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
