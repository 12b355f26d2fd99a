"""The three records that flow: `Prompt`, `Rollout`, `Batch`, and the `Scores` of a batch under a policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

PAD, POLICY, TOOL, FORCED = 0, 1, 2, 3  # roles of response tokens


@dataclass
class Prompt:
    """One question to the policy.

    text: plain text to continue, or None when `messages` (chat turns: role, content) is given.
    row: what the verifier needs (answer, metadata) and any further columns; id: unique within the task; domain: for per-domain parts.
    """

    id: str
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    row: dict[str, Any] = field(default_factory=dict)
    domain: str = ""


@dataclass
class Rollout:
    """One response with everything known about how it came to be.

    ids: response token ids, the end token included when it was produced; role, turn: one entry per token;
    text: the response as text, stop string and end token removed; finish: "stop" or "length";
    logps: what the sampler drew from, per token (NaN where unknown); entropy: of that distribution, when asked for;
    exact: `logps` equal the policy's own log-probs at the training temperature under the scored prompt;
    group: index of the prompt among those sampled together (the loop makes it the statistics group);
    scores, reward: what the reward part said of it; train: False for muted rows, which stay in the statistics without loss;
    support: token ids the sampler could choose from, per token, if it restricted them; scored_under: another prompt to score it under;
    meta: further per-rollout facts (numbers or per-token lists).
    """

    prompt: Prompt
    ids: list[int]
    text: str
    logps: torch.Tensor
    finish: str = "stop"
    role: list[int] | None = None
    turn: list[int] | None = None
    entropy: torch.Tensor | None = None
    exact: bool = True
    group: int = 0
    scored_under: Prompt | None = None
    support: list[list[int]] | None = None
    scores: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0
    train: bool = True
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.role is None:
            self.role = [POLICY] * len(self.ids)
        if self.turn is None:
            self.turn = [0] * len(self.ids)


@dataclass
class Scores:
    """Per-token results of scoring a batch, each [N, T] float32 (None when not asked for).

    logps: log-probability of the token that stands there, at the training temperature (renormalised over `support` if there is one);
    raw_logps: the same without the support; entropy: of the whole distribution; mean_logp: mean log-probability over the vocabulary;
    values: output of a scalar head [N].
    """

    logps: torch.Tensor
    raw_logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logp: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def __getitem__(self, rows) -> "Scores":
        return Scores(*(None if v is None else v[rows] for v in vars(self).values()))

    def detach(self) -> "Scores":
        return Scores(*(None if v is None else v.detach() for v in vars(self).values()))


@dataclass
class Batch:
    """The rollouts of one step. P prompts, N responses, T response positions (padded on the right).

    prompt_ids [P, Lp] (padded on the left), prompt_mask [P, Lp] bool, prompt_of [N] index into prompts, ids [N, T],
    role [N, T] int8, turn [N, T] int16, behaviour / old / reference: Scores, rewards [N], token_rewards [N, T] (KL penalties or
    per-turn rewards; the outcome reward is not in it), values [N, T], advantages [N] or [N, T], groups [N], domain [N],
    train [N] bool (muted rows stay in the statistics without loss), exact [N] bool, finished [N] bool (ended before the length cap),
    meta: name -> [N] or [N, T] (always there: length, and group_size, the responses of the row's group in the whole batch),
    step: the learner step.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    prompt_of: torch.Tensor
    ids: torch.Tensor
    role: torch.Tensor
    turn: torch.Tensor
    rewards: torch.Tensor
    groups: torch.Tensor
    train: torch.Tensor
    exact: torch.Tensor
    finished: torch.Tensor
    behaviour: Scores
    old: Scores | None = None
    reference: Scores | None = None
    token_rewards: torch.Tensor | None = None
    values: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    domain: list[str] = field(default_factory=list)
    meta: dict[str, torch.Tensor] = field(default_factory=dict)
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    support: list[list[list[int]]] | None = None
    rollouts: list[Rollout] = field(default_factory=list)
    step: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def mask(self) -> torch.Tensor:
        """[N, T] bool: positions that hold a token (of any role)."""
        return self.role != PAD

    def acted(self, roles=(POLICY,)) -> torch.Tensor:
        """[N, T] bool: positions whose role is among `roles`."""
        found = self.role == roles[0] if len(roles) else torch.zeros_like(self.role, dtype=torch.bool)
        for role in list(roles)[1:]:
            found = found | (self.role == role)
        return found

    @property
    def lengths(self) -> torch.Tensor:
        """[N] number of tokens of each response."""
        return self.mask.sum(1)

    def select(self, rows: torch.Tensor) -> "Batch":
        """The batch of some rows (long index [n]); prompts that no row uses are dropped, T is cut to the longest row."""
        used, prompt_of = torch.unique(self.prompt_of[rows], return_inverse=True)
        width = max(1, int(self.lengths[rows].max())) if len(rows) else 1

        def cut(value):
            if isinstance(value, torch.Tensor):
                return value[rows][:, :width] if value.ndim > 1 and value.shape[1] == self.ids.shape[1] else value[rows]
            if isinstance(value, Scores):
                return Scores(*(None if v is None else cut(v) for v in vars(value).values()))
            if isinstance(value, list):
                return [value[i] for i in rows.tolist()] if len(value) == len(self) else value
            if isinstance(value, dict):
                return {k: cut(v) for k, v in value.items()}
            return value

        kept = {k: cut(v) for k, v in vars(self).items() if k not in ("prompt_ids", "prompt_mask", "prompt_of", "step")}
        mask = self.prompt_mask[used]
        left = int((~mask).all(0).long().cumprod(0).sum()) if len(used) else 0
        left = min(left, mask.shape[1] - 1)
        return Batch(prompt_ids=self.prompt_ids[used][:, left:], prompt_mask=mask[:, left:], prompt_of=prompt_of, step=self.step, **kept)
