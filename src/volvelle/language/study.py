"""Large-sample evaluation: what a policy can solve at all, by many samples to each problem. The instrument behind studies of trained policies.

The unit is the problem: `right` is [P problems, n samples], and intervals are percentile bootstraps over problems.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from volvelle.core.errors import UserError
from volvelle.core.files import read_lines, write_text
from volvelle.core.statistics import Interval, curve_band, pass_at_k

from .batching import make_batch, split
from .records import Prompt, Rollout
from .sampling import Sampling, generate

TOGETHER = 256  # responses drawn at a time
BINS = ("0", *(f"({i / 10:g}, {(i + 1) / 10:g}]" for i in range(9)), "(0.9, 1)", "1")  # of accuracy_histogram


# ------------------------------------------------------------------------------------------------------------------- sampling

@dataclass
class Outcomes:
    """Samples of one policy. ids [P]; right [P, n] bool; seeds: those they were drawn with; setting: what else decides them (task, split,
    temperature, top_p, max_tokens, policy); kept: for each problem a few responses as drawn; correct: for each problem a few right texts."""

    ids: list[str]
    right: np.ndarray
    seeds: tuple[int, ...]
    setting: dict
    kept: list[Rollout] = field(default_factory=list)
    correct: dict[str, list[str]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return self.right.shape[1]

    @property
    def accuracy(self) -> np.ndarray:
        """[P] share of right samples."""
        return self.right.mean(1)

    def curve(self, ks: Sequence[int]) -> np.ndarray:
        """[P, K] unbiased pass@k of every problem."""
        return pass_at_k(self.n, self.right.sum(1)[:, None], np.asarray(ks)[None])

    def only(self, keep: np.ndarray) -> "Outcomes":
        """Those of some problems; keep [P] bool."""
        ids = [i for i, k in zip(self.ids, keep) if k]
        return dataclasses.replace(self, ids=ids, right=self.right[keep], kept=[r for r in self.kept if r.prompt.id in set(ids)],
                                   correct={i: self.correct[i] for i in ids if i in self.correct})

    def save(self, path: Path) -> None:
        head = {"seeds": list(self.seeds), "setting": self.setting}
        rows = [{"id": i, "right": "".join("01"[int(v)] for v in row), "correct": self.correct.get(i, []),
                 "kept": [{"ids": r.ids, "text": r.text, "finish": r.finish} for r in self.kept if r.prompt.id == i]} for i, row in zip(self.ids, self.right)]
        write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in [head, *rows]))


def read_outcomes(path: Path, prompts: list[Prompt]) -> Outcomes:
    """What `save` wrote; `prompts` are the problems it speaks of."""
    head, *rows = read_lines(path)
    by_id = {p.id: p for p in prompts}
    kept = [Rollout(by_id[r["id"]], k["ids"], k["text"], torch.full((len(k["ids"]),), torch.nan), k["finish"], exact=False) for r in rows for k in r["kept"]]
    return Outcomes([r["id"] for r in rows], np.array([[c == "1" for c in r["right"]] for r in rows]), tuple(head["seeds"]), head["setting"], kept,
                    {r["id"]: r["correct"] for r in rows if r["correct"]})


def seeded(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little"))


def draw_outcomes(policy, task, prompts: list[Prompt], n: int, sampling: Sampling, seed: int, setting: dict | None = None, keep: int = 4,
                  progress: Callable[[int, int], None] | None = None) -> Outcomes:
    """n independent responses to each prompt, judged by the task. `keep`: responses and right texts held per problem."""
    rng, right, kept, correct = seeded(seed, "study"), {p.id: [] for p in prompts}, [], {p.id: [] for p in prompts}
    size = max(1, TOGETHER // n)
    for i in range(0, len(prompts), size):
        some, left = prompts[i:i + size], n
        while left:
            count = min(TOGETHER, left)
            for j, r in enumerate(generate(policy, some, count, sampling, rng)):
                verdict, texts = task.solved(task.score(r.prompt, r.text)), correct[r.prompt.id]
                right[r.prompt.id].append(verdict)
                if left == n and j % count < keep:
                    kept.append(r)
                if verdict and len(texts) < keep:
                    texts.append(r.text)
            left -= count
        if progress:
            progress(min(i + size, len(prompts)), len(prompts))
    return Outcomes(list(right), np.array(list(right.values()), dtype=bool), (seed,), dict(setting or {}), kept, {i: t for i, t in correct.items() if t})


def merge(parts: Sequence[Outcomes]) -> Outcomes:
    """Samples of several seeds side by side. UserError if two were drawn with one seed (the same samples twice) or in different settings."""
    first, seen = parts[0], set()
    for part in parts:
        if again := seen & set(part.seeds):
            raise UserError(f"outcomes: seed {min(again)} is there twice; the same samples again add no information, draw with another seed")
        seen |= set(part.seeds)
        if part.setting != first.setting or part.ids != first.ids:
            odd = next((k for k in first.setting if part.setting.get(k) != first.setting[k]), "problems")
            raise UserError(f"outcomes: {odd} differs ({part.setting.get(odd)!r} against {first.setting.get(odd)!r}); only samples of one setting can be joined")
    correct = {i: sum((p.correct.get(i, []) for p in parts), []) for i in first.ids}
    return Outcomes(first.ids, np.concatenate([p.right for p in parts], 1), tuple(s for p in parts for s in p.seeds), first.setting,
                    [r for p in parts for r in p.kept], {i: t for i, t in correct.items() if t})


# ---------------------------------------------------------------------------------------------------------- derived quantities

def over_problems(values: np.ndarray) -> Interval:
    """Mean of values [P] with its 95 % percentile bootstrap over problems."""
    if len(values) < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"), len(values))
    mean, low, high = curve_band(np.asarray(values, float)[:, None], np.random.default_rng(0))
    return Interval(float(mean[0]), float(low[0]), float(high[0]), len(values))


def crossover(ks: Sequence[int], base: Sequence[float], tuned: Sequence[float]) -> int | None:
    """The smallest k at which the base is at least as good; None if it never is."""
    return next((int(k) for k, b, t in zip(ks, base, tuned) if b >= t), None)


def coverage(base: Outcomes, tuned: Outcomes) -> dict[str, list[str]]:
    """Problem ids by who solved them in at least one of n samples: both, base, tuned (that one only), neither. UserError on unequal n."""
    if base.n != tuned.n:
        raise UserError(f"coverage: {base.n} samples against {tuned.n}; what counts as solved depends on n, draw equally many")
    a, b = base.right.any(1), tuned.right.any(1)
    return {name: [i for i, m in zip(base.ids, mask) if m] for name, mask in
            (("both", a & b), ("base", a & ~b), ("tuned", ~a & b), ("neither", ~a & ~b))}


def accuracy_histogram(accuracy: np.ndarray) -> np.ndarray:
    """[12] numbers of problems with accuracy 0, in (0, .1], (.1, .2], …, (.8, .9], (.9, 1), and 1."""
    a = np.asarray(accuracy, float)
    place = np.where(a <= 0, 0, np.where(a >= 1, 11, np.clip(np.ceil(a * 10 - 1e-9), 1, 10))).astype(int)
    return np.bincount(place, minlength=12)


@torch.no_grad()
def perplexity(policy, rollouts: list[Rollout], micro_tokens: int = 8192) -> np.ndarray:
    """[N] exp(-mean log-prob) of each response's own tokens given prompt and past, at temperature 1. Prompt tokens are not averaged in."""
    batch = make_batch(policy, rollouts, 0, next(policy.module.parameters()).device)
    total = torch.zeros(len(batch))
    for rows in split(batch, micro_tokens, False):
        micro = batch.select(rows)
        total[rows.cpu()] = (policy.score(micro, micro.mask).logps * micro.mask).sum(1).cpu()
    return torch.exp(-total / batch.lengths.cpu()).double().numpy()


def mean_entropy(policy, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> float:
    """Entropy of the sampling distribution per token, averaged over the tokens of `samples` responses to each prompt."""
    rng, total, tokens = seeded(seed, "entropy"), 0.0, 0
    size = max(1, TOGETHER // samples)
    for i in range(0, len(prompts), size):
        for r in generate(policy, prompts[i:i + size], samples, sampling, rng, entropy=True):
            total, tokens = total + float(r.entropy.sum()), tokens + len(r.ids)
    return total / tokens


def matching_temperature(policy, prompts: list[Prompt], samples: int, sampling: Sampling, target: float, seed: int, highest: float = 4.0,
                         tolerance: float = 0.02) -> float | None:
    """The temperature above `sampling.temperature` at which `mean_entropy` reaches `target` (to `tolerance`, relative); by bisection.

    None where the policy's entropy is that high already, or still lower at `highest`.
    """
    def entropy(t: float) -> float:
        return mean_entropy(policy, prompts, samples, dataclasses.replace(sampling, temperature=t), seed)

    low, high = sampling.temperature, highest
    if entropy(low) >= target or entropy(high) < target:
        return None
    for _ in range(12):
        middle = (low + high) / 2
        found = entropy(middle)
        if abs(found - target) <= tolerance * target:
            return middle
        low, high = (middle, high) if found < target else (low, middle)
    return (low + high) / 2


def without_reasoning(prompts: list[Prompt], template: str) -> list[Prompt]:
    """The prompts in a template that asks for the bare answer; `{prompt}` is where the question goes."""
    if "{prompt}" not in template:
        raise UserError(f"guess={template!r}: expected a text with {{prompt}} where the question goes")
    out = []
    for p in prompts:
        if p.messages is None:
            out.append(dataclasses.replace(p, text=template.replace("{prompt}", p.text)))
        else:
            last = {**p.messages[-1], "content": template.replace("{prompt}", p.messages[-1]["content"])}
            out.append(dataclasses.replace(p, messages=[*p.messages[:-1], last]))
    return out
