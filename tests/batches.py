"""Batches by hand, for tests of pure functions."""

import torch

from volvelle.language.records import PAD, POLICY, Batch, Prompt, Rollout, Scores


def batch(lengths, rewards=None, groups=None, width=None, **fields) -> Batch:
    """A batch of responses of the given lengths, every token the policy's, one prompt each unless `prompt_of` is given."""
    n, t = len(lengths), width or max(lengths)
    role = torch.full((n, t), PAD, dtype=torch.int8)
    for i, length in enumerate(lengths):
        role[i, :length] = POLICY
    rollouts = [Rollout(Prompt(str(i), text="", row={"index": i}), [0] * length, "", torch.zeros(length)) for i, length in enumerate(lengths)]
    made = dict(prompt_ids=torch.zeros(n, 1, dtype=torch.long), prompt_mask=torch.ones(n, 1, dtype=torch.bool), prompt_of=torch.arange(n),
                ids=torch.zeros(n, t, dtype=torch.long), role=role, turn=torch.zeros(n, t, dtype=torch.int16),
                rewards=torch.tensor(rewards or [0.0] * n, dtype=torch.float32), groups=torch.tensor(groups or [0] * n), train=torch.ones(n, dtype=torch.bool),
                exact=torch.ones(n, dtype=torch.bool), finished=torch.ones(n, dtype=torch.bool), behaviour=Scores(torch.zeros(n, t)),
                domain=[""] * n, meta={"length": torch.tensor(lengths, dtype=torch.float32)}, rollouts=rollouts)
    return Batch(**made | fields)


def scores(logps, **fields) -> Scores:
    """Scores with gradient."""
    return Scores(torch.as_tensor(logps, dtype=torch.float32).clone().requires_grad_(), **fields)
