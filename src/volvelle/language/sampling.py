"""Drawing tokens: `Sampling` says how, `draw` does it, `generate` runs a policy's stepper until every response has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from volvelle.core.errors import RunStopped

from .records import Prompt, Rollout


@dataclass(frozen=True)
class Sampling:
    """temperature 0 = greedy; top_k 0, top_p 1, min_p 0 = off; stop: strings that end a response; max_tokens: its cap."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Drawn from the policy itself, with nothing cut away."""
        return self.top_k == 0 and self.top_p >= 1.0 and self.min_p == 0.0 and self.temperature > 0


def truncate(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [A, V] with what top-k, top-p and min-p cut away at -inf (in that order, as transformers does)."""
    if sampling.top_k:
        floor = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        cut = (probs.cumsum(-1) - probs) >= sampling.top_p  # the first token always stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, index, cut), -torch.inf)
    if sampling.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return logits


def draw(logits: torch.Tensor, sampling: Sampling, rng: torch.Generator, entropy: bool = False):
    """One token per row of logits [A, V] -> (tokens [A], log-probs [A] of what was drawn from, entropies [A] or None).

    Inverse-CDF sampling: over a large vocabulary a cumulative sum and a binary search are several times cheaper than a multinomial.
    Greedy tokens report the log-prob under temperature 1.
    """
    logits = logits.float()
    if sampling.temperature <= 0:
        logp = logits.log_softmax(-1)
        token = logits.argmax(-1)
    else:
        logp = truncate(logits / sampling.temperature if sampling.temperature != 1.0 else logits, sampling).log_softmax(-1)
        cdf = logp.exp().cumsum(-1)
        u = torch.rand(len(logits), 1, generator=rng).to(cdf) * cdf[:, -1:]
        token = torch.searchsorted(cdf, u, right=True).squeeze(1).clamp_(max=cdf.shape[1] - 1)
    chosen = logp.gather(1, token[:, None]).squeeze(1)
    spread = None
    if entropy:
        spread = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    return token, chosen, spread


def encode_all(policy: Any, prompts: list[Prompt], max_tokens: int) -> list[list[int]]:
    """Token ids of every prompt. RunStopped on an empty prompt, or one that does not fit into the context with `max_tokens` more."""
    encoded = [policy.encode(p) for p in prompts]
    for prompt, ids in zip(prompts, encoded):
        if len(ids) + max_tokens > policy.context:
            raise RunStopped(f"prompt {prompt.id!r} has {len(ids)} tokens; with max_tokens={max_tokens} "
                             f"it exceeds the policy's context of {policy.context}")
        if not ids:
            raise RunStopped(f"prompt {prompt.id!r} is empty")
    return encoded


@torch.no_grad()
def generate(policy: Any, prompts: list[Prompt], count: int, sampling: Sampling, rng: torch.Generator, entropy: bool = False) -> list[Rollout]:
    """`count` responses to each prompt, in prompt order, with the log-probs of the sampled tokens.

    The prompt is computed once per group. A response ends with the policy's end token, at a stop string, or at max_tokens.
    Raises RunStopped when a prompt and its response would not fit into the policy's context.
    """
    encoded = encode_all(policy, prompts, sampling.max_tokens)
    stepper = policy.stepper(encoded, [count] * len(prompts), sampling.max_tokens)
    total = len(prompts) * count
    ids = torch.zeros(total, sampling.max_tokens, dtype=torch.long)
    logps = torch.zeros(total, sampling.max_tokens)
    spreads = torch.zeros(total, sampling.max_tokens) if entropy else None
    length = torch.zeros(total, dtype=torch.long)
    active = torch.arange(total)
    stops = policy.stops(sampling.stop)
    for t in range(sampling.max_tokens):
        token, logp, spread = draw(stepper.logits, sampling, rng, entropy)
        token, logp = token.cpu(), logp.cpu()
        ids[active, t], logps[active, t] = token, logp
        if entropy:
            spreads[active, t] = spread.cpu()
        length[active] = t + 1
        over = stops.ended(token, ids, active, t)
        if t + 1 == sampling.max_tokens or over.all():
            break
        if over.any():
            keep = (~over).nonzero().squeeze(1)
            stepper.select(keep)
            active, token = active[keep], token[keep]
        stepper.advance(token)
    out = []
    for i in range(total):
        row = ids[i, : length[i]].tolist()
        text, finished = stops.text(row)
        finished = finished or len(row) == policy.complete_at
        out.append(Rollout(prompts[i // count], row, text, logps[i, : length[i]].clone(), "stop" if finished else "length",
                           entropy=spreads[i, : length[i]].clone() if entropy else None, exact=sampling.plain, group=i // count))
    return out


class Stops:
    """Knows when a response has ended. Only tokens that could complete a stop string cause any text to be decoded."""

    def __init__(self, policy: Any, stop: tuple[str, ...]):
        self.policy, self.stop = policy, stop
        self.end = torch.zeros(policy.vocabulary, dtype=torch.bool)
        self.end[list(policy.end_ids)] = True
        self.may_close = torch.zeros(policy.vocabulary, dtype=torch.bool)
        if stop:
            last = {s[-1] for s in stop}
            for i, piece in enumerate(policy.pieces()):
                self.may_close[i] = any(c in piece for c in last) or "\ufffd" in piece

    def ended(self, token: torch.Tensor, ids: torch.Tensor, active: torch.Tensor, t: int) -> torch.Tensor:
        over = self.end[token]
        if self.stop:
            for j in (self.may_close[token] & ~over).nonzero().squeeze(1).tolist():
                text = self.policy.decode(ids[active[j], : t + 1].tolist())
                over[j] = any(s in text for s in self.stop)
        return over

    def text(self, ids: list[int]) -> tuple[str, bool]:
        """(text without end token and stop string, whether it ended by itself)."""
        finished = bool(ids) and bool(self.end[ids[-1]])
        text = self.policy.decode(ids[:-1] if finished else ids)
        cuts = [text.find(s) for s in self.stop if s in text]
        return (text[: min(cuts)], True) if cuts else (text, finished)
