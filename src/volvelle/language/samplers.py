"""Samplers that every method can use: plain sampling from the policy, and logged text."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import part

from .engines import VLLMEngine
from .records import FORCED, Prompt, Rollout
from .sampling import Sampling, generate
from .slots import Sampler

Count = Annotated[int, Field(gt=0)]


@part("plain")
class Plain(Sampler):
    """`group` independent responses to each prompt.

    max_tokens, stop: None = the task's. overlong: what to do with a prompt that does not fit into the context with its response.
    engine: transformers steps through the policy here; vllm samples faster where it is installed.
    """

    group: Count = 8
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_tokens: Count | None = None
    stop: tuple[str, ...] | None = None
    overlong: Literal["stop", "skip"] = "stop"
    engine: Literal["transformers", "vllm"] = "transformers"

    def start(self, run):
        return LivePlain(self, run)

    def sampling(self, task) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.max_tokens or task.max_tokens,
                        task.stop if self.stop is None else self.stop)


class LivePlain:
    """sample(prompts) -> rollouts, `group` to each prompt, in prompt order."""

    def __init__(self, description: Plain, run):
        self.part, self.run = description, run
        self.rng = run.torch_rng("sampler")
        self.sampling = description.sampling(run.config.task)
        self.rollouts = VLLMEngine(run.policy).rollouts if description.engine == "vllm" else functools.partial(generate, run.policy)
        self.entropy = "entropy" in run.config.recipe.sampling_needs

    def fitting(self, prompts: list[Prompt]) -> list[Prompt]:
        if self.part.overlong == "stop":
            return prompts
        return [p for p in prompts if len(self.run.policy.encode(p)) + self.sampling.max_tokens <= self.run.policy.context]

    def sample(self, prompts: list[Prompt]) -> list[Rollout]:
        prompts = self.fitting(prompts)
        if not prompts:
            raise RunStopped("every prompt drawn is longer than the policy's context allows")
        return self.rollouts(prompts, self.part.group, self.sampling, self.rng, self.entropy)


@part("logged")
class Logged(Sampler):
    """Text that is there already: demonstrations as FORCED tokens, `group` to each prompt. Supervised training uses this."""

    group: Count = 1
    temperature: float = 1.0
    makes = (FORCED,)
    gives = frozenset()

    def start(self, run):
        return LiveLogged(self, run)


class LiveLogged:
    def __init__(self, description: Logged, run):
        self.part, self.policy, self.task = description, run.policy, run.config.task
        self.rng = run.rng("sampler")

    def sample(self, prompts: list[Prompt]) -> list[Rollout]:
        return [demonstrated(self.policy, p, d, i) for i, p in enumerate(prompts) for d in demonstrations(self.task, p, self.part.group, self.rng)]


def demonstrations(task, prompt: Prompt, count: int, rng: np.random.Generator, required: bool = True) -> list[Any]:
    """`count` demonstrations of a prompt: from its column `demonstrations` (drawn without repeats where there are enough), or else from the task.

    None are left out silently: RunStopped or the task's UserError where there are none, unless they are not required ([]).
    """
    given = prompt.row.get("demonstrations")
    if given is None:
        try:
            return [task.demonstration(prompt, rng) for _ in range(count)]
        except UserError:
            if required:
                raise
            return []
    if not isinstance(given, (list, tuple)):
        raise RunStopped(f"prompt {prompt.id!r}: row['demonstrations'] is a {type(given).__name__}; expected a list")
    if not given and required:
        raise RunStopped(f"prompt {prompt.id!r} has no demonstrations: its row['demonstrations'] is empty")
    return [given[i] for i in rng.choice(len(given), count, replace=len(given) < count)] if given else []


def demonstrated(policy, prompt: Prompt, demonstration: Any, group: int = 0) -> Rollout:
    """A demonstration (a text, or a mapping with `text` and the teacher's `logps` per token) as a rollout of FORCED tokens.

    meta teacher_logps: those, NaN where unknown. RunStopped where it is no text, does not fit the context, or the logps do not match.
    """
    given = demonstration if isinstance(demonstration, dict) else {"text": demonstration}
    if not isinstance(given.get("text"), str):
        raise RunStopped(f"prompt {prompt.id!r}: the demonstration {demonstration!r} is neither a text nor a mapping with one")
    made = forced(policy, prompt, given["text"], group)
    length = len(made.ids)
    size = len(policy.encode(prompt)) + length
    if size > policy.context:
        raise RunStopped(f"prompt {prompt.id!r} and its demonstration have {size} tokens, more than the policy's context of {policy.context}")
    logps = given.get("logps", [torch.nan] * length)
    if len(logps) != length:
        raise RunStopped(f"prompt {prompt.id!r}: its demonstration has {len(logps)} logps; expected {length}, the end token's among them")
    made.meta["teacher_logps"] = torch.tensor(logps, dtype=torch.float32)
    return made


def forced(policy, prompt: Prompt, text: str, group: int = 0, **meta) -> Rollout:
    """A given text as a rollout of FORCED tokens, closed by the policy's end token if it has one."""
    ids = policy.encode_text(text) + list(policy.end_ids[:1])
    return Rollout(prompt, ids, text, torch.full((len(ids),), torch.nan), "stop", role=[FORCED] * len(ids), exact=False, group=group,
                   meta={"external": 1.0, **meta})


def continued(policy, begun: list[Rollout], sampling: Sampling, rng: torch.Generator) -> list[Rollout]:
    """Let the policy go on from the tokens that each rollout holds so far, up to `sampling.max_tokens` in all (one more token at least).

    The new tokens are POLICY tokens with their log-probs; per-token meta (tensors) is 0 on them. A response that begins with no token
    is an ordinary sample, apart from its meta.
    """
    out: dict[int, Rollout] = {}
    for size in sorted({len(r.ids) for r in begun}):
        rows = [i for i, r in enumerate(begun) if len(r.ids) == size]
        prompts = [replace(begun[i].prompt) for i in rows]  # copies, so that each stands for its own beginning
        extended = _Extended(policy, {id(p): begun[i].ids for p, i in zip(prompts, rows)})
        left = replace(sampling, max_tokens=max(1, sampling.max_tokens - size))
        for i, new in zip(rows, generate(extended, prompts, 1, left, rng)):
            r, ids = begun[i], begun[i].ids + new.ids
            meta = {k: torch.cat([v, torch.zeros(len(new.ids))]) if isinstance(v, torch.Tensor) else v for k, v in r.meta.items()}
            out[i] = replace(r, ids=ids, text=policy.stops(sampling.stop).text(ids)[0], logps=torch.cat([r.logps, new.logps]), finish=new.finish,
                             role=r.role + new.role, turn=r.turn + new.turn, exact=new.exact, meta=meta)
    return [out[i] for i in range(len(begun))]


class _Extended:
    """A policy whose prompts are followed by the beginning of a response."""

    def __init__(self, policy, beginnings: dict[int, list[int]]):
        self._policy, self._beginnings = policy, beginnings

    def __getattr__(self, name):
        return getattr(self._policy, name)

    def encode(self, prompt):
        return self._policy.encode(prompt) + self._beginnings[id(prompt)]
