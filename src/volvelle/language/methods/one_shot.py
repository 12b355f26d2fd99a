"""One-shot RLVR: reinforcement learning with one training example (arXiv 2504.20571).

Problem. How much of what RL with verifiable rewards brings needs its thousands of problems?
Idea. Train the ordinary way on ONE problem, copied until the batch is full; every copy has its own group. Test accuracy rises nearly as with
the whole pool, and goes on rising long after the one problem is always solved.
    Choosing it: train on the pool once, keep each example's accuracy at every visit, rank by the variance of that history (`select`).
    Loss: policy gradient + beta KL - alpha entropy (+ weight decay); every term can be switched off. With the entropy alone (`entropy-only`,
    no reward) accuracy rises too.
Pick it when labels are scarce, or to see whether RL elicits what the base model can already do: it cannot teach what the model never
samples, and it hangs on the example. Early stopping on the training example is useless; it saturates before anything interesting happens.

Choosing by variance costs a run on the whole pool; most examples the model sometimes solves do. The coefficient of the policy gradient in
the released code is `objective=none` at 0, and otherwise the same as dividing alpha and beta by it. The paper speaks of eight updates per
batch, its script makes one: `updates.minibatch`, default one. Keep dynamic sampling off: after saturation it would drop every batch.
Controls: `reward=format`, `reward=label` (a wrong answer), `--task shown:TASK` (the example in the prompt instead of training),
`sampler.temperature`, `ppo curriculum=one-shot`, other models.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import UserError
from volvelle.core.files import read_lines, write_text
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, AdamW

from ..curricula import Fixed, LiveFixed, Shuffle
from ..extract import marked
from ..fittings import KL, Updates
from ..loop import LanguageLearner
from ..matching import MATCHES
from ..objectives import Entropy
from ..recipe import Evaluation, LanguageRecipe
from ..records import Prompt
from ..rewards import BINARY, each
from ..samplers import Plain
from ..slots import Reward

SCORES = ("variance", "impact", "random")
REFLECTION = re.compile(r"\b(?:rethink|recheck|recalculate)", re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------------- which example

def historical_variance(histories: list[list[float]]) -> np.ndarray:
    """[n] population variance of each example's accuracies over its visits. The code ranks by its root: the same order."""
    return np.array([np.var(h) for h in histories])


def learning_impact(histories: list[list[float]]) -> np.ndarray:
    """[n] 1 - sum_e (s_ie - m_e)^2 / sum_e (1 - m_e)^2, m_e the pool's mean accuracy at visit e; histories are cut to the shortest.

    1: the example moves exactly like the pool. UserError where the pool is always right: then nothing is left to tell apart.
    """
    length = min(map(len, histories))
    s = np.array([h[:length] for h in histories])
    mean = s.mean(0)
    if not (mean < 1).any():
        raise UserError("learning impact: every example of the pool was always right; choose a harder task or score=variance")
    return 1 - ((s - mean) ** 2).sum(1) / ((1 - mean) ** 2).sum()


def rank(history: dict[str, list[float]], score: str = "variance", rng: np.random.Generator | None = None) -> list[dict]:
    """Examples visited at least twice, best first: rank, id, variance, deviation, impact, mean, history. score="random" needs `rng`."""
    if score not in SCORES:
        raise UserError(f"score={score!r}: accepted: {', '.join(SCORES)}")
    seen = {name: h for name, h in history.items() if len(h) > 1}
    if not seen:
        raise UserError("select: no example was visited twice; train for more steps, or with more prompts a step")
    variance, impact = historical_variance(list(seen.values())), learning_impact(list(seen.values()))
    key = {"variance": variance, "impact": impact}.get(score)
    order = rng.permutation(len(seen)) if key is None else np.argsort(-key, kind="stable")
    names = list(seen)
    return [{"rank": r + 1, "id": names[i], "variance": float(variance[i]), "deviation": float(variance[i] ** 0.5), "impact": float(impact[i]),
             "mean": float(np.mean(seen[names[i]])), "history": seen[names[i]]} for r, i in enumerate(order)]


@part("one-shot")
class OneShot(Fixed):
    """The `first` so many examples of a ranking that `volvelle select one-shot` wrote, or those with the given `ids`, copied until the batch is
    full. Without either, the first of the train split."""

    ranking: str | None = None

    def start(self, run):
        if self.ranking is None or self.ids:
            return super().start(run)
        path = Path(self.ranking) / "ranking.jsonl" if Path(self.ranking).is_dir() else Path(self.ranking)
        rows = read_lines(path)
        if len(rows) < self.first:
            raise UserError(f"curriculum.ranking={self.ranking}: holds {len(rows)} examples, and curriculum.first={self.first}")
        return self.replace(ids=[row["id"] for row in rows[: self.first]]).start(run)


# ------------------------------------------------------------------------------------------------------------------- the study

@part("one-shot")
class OneShotRecipe(LanguageRecipe):
    """A language recipe that keeps every example's accuracy at every visit, and counts self-reflection and marked answers."""

    def start(self, run):
        return OneShotLearner(self, run)


class OneShotLearner(LanguageLearner):
    """history: prompt id -> mean reward over its responses, one number per visit; groups that a filter drops are counted too."""

    def __init__(self, recipe, run):
        super().__init__(recipe, run)
        self.history: dict[str, list[float]] = {}

    def score(self, rollouts):
        super().score(rollouts)
        visited: dict[str, list[float]] = {}
        for r in rollouts if self.reward is not None else ():
            visited.setdefault(r.prompt.id, []).append(r.reward)
        for name, rewards in visited.items():
            self.history.setdefault(name, []).append(sum(rewards) / len(rewards))

    def describe(self, rollouts):
        texts = [r.text for r in rollouts]
        return super().describe(rollouts) | {"reflection": sum(len(REFLECTION.findall(t)) for t in texts) / len(texts),
                                             "marked": sum(marked(t) is not None for t in texts) / len(texts)}

    def product(self):
        return super().product() | {"ranking": self}

    def save(self, folder):
        """ranking.jsonl, with the prompts; empty while nothing was visited twice."""
        prompts = {p.id: p for p in self.task.split("train")}
        rows = rank(self.history) if any(len(h) > 1 for h in self.history.values()) else []
        write_ranking(Path(folder) / "ranking.jsonl", rows, prompts)

    def state_dict(self):
        return {"history": self.history}

    def load_state_dict(self, state):
        self.history = state["history"]


def write_ranking(path: Path, rows: list[dict], prompts: dict[str, Prompt]) -> Path:
    return write_text(path, "".join(json.dumps({**row, "prompt": prompts[row["id"]].text or prompts[row["id"]].messages}, ensure_ascii=False) + "\n" for row in rows))


def select(task, model=None, *, score: str = "variance", steps: int = 500, out: str | Path | None = None, overrides=(), **options) -> tuple[Path, list[dict]]:
    """Train on the whole pool and rank its examples: (path of ranking.jsonl, its rows).

    score: variance (the paper's), impact (learning impact) or random; out: where the ranking goes (the run's folder); options: as for train.
    """
    from volvelle.core.verbs import train

    if score not in SCORES:
        raise UserError(f"score={score!r}: accepted: {', '.join(SCORES)}")
    made = train(one_shot(curriculum=Shuffle()), task, model, steps=steps, overrides=overrides, **options)
    learner = made.learner
    rows = rank(learner.history, score, np.random.default_rng(learner.run.seed))
    path = write_ranking(Path(out) if out else made.folder / "ranking.jsonl", rows, {p.id: p for p in learner.task.split("train")})
    return path, rows


def saturation(rows: list[dict], level: float = 0.95, window: int = 10, metric: str = "eval/pass@1") -> dict[str, float | None]:
    """From a run's metrics.jsonl: `step`, the first at which the training accuracy averaged over `window` steps reaches `level` (None: never);
    `then`, `final`, `best`: the test metric at the last evaluation up to that step, at the end, and at its best; `gain` = final - then."""
    train = [(r["step"], r["reward"]) for r in rows if "reward" in r]
    test = [(r["step"], r[metric]) for r in rows if metric in r]
    means = [(train[i][0], float(np.mean([v for _, v in train[i - window + 1:i + 1]]))) for i in range(window - 1, len(train))]
    step = next((s for s, mean in means if mean >= level), None)
    then = next((v for s, v in reversed(test) if step is not None and s <= step), None)
    final, best = test[-1][1], max(v for _, v in test)
    return {"step": step, "then": then, "final": final, "best": best, "gain": None if then is None else final - then}


# ----------------------------------------------------------------------------------------------------------------------- controls

@part("label")
class Label(Reward):
    """1 where the response gives `answer`, whatever the right one is: guessable ("4"), unguessable or slightly wrong labels."""

    gives = BINARY
    answer: str = ""
    match: Literal["exact", "number", "math"] = "math"

    def score(self, rollouts):
        return each("label", rollouts, lambda r: float(MATCHES[self.match](r.text, self.answer)))


# ----------------------------------------------------------------------------------------------------------------------- recipes

paper = OneShotRecipe(curriculum=OneShot(), sampler=Plain(temperature=0.6), kl=KL(coefficient=0.001), terms={"entropy": Entropy(0.001)},
                      updates=Updates(optimiser=AdamW(lr=1e-6, weight_decay=0.01)), prompts=128)
small = paper(sampler=Plain(), prompts=16, updates=Updates(optimiser=Adam(lr=0.05)))
no_reward = dict(reward=None, advantage=None, objective=None, kl=None)

claim = Claim(
    says="training on one example, chosen by the variance of its history, comes close to training on the whole pool",
    arms={"base": Arm(small, steps=0), "one": small, "any-one": small(curriculum=OneShot(ids=("strategies/0",))), "sixteen": small(curriculum=OneShot(first=16)),
          "pool": small(curriculum=OneShot(first=200)), "entropy-only": small(**no_reward)},
    prepare=small(curriculum=Shuffle()), prepare_steps=75, take={"recipe.curriculum.ranking": "ranking"}, task="strategies", steps=200, seeds=5, minutes=5,
    expects=("one > base on pass@1", "one >= pool - 0.05 on pass@1"), quick={"steps": 2, "seeds": 2, "prepare_steps": 30})

one_shot = method("one-shot", paper, title="Training on one example, chosen by its history", source="arXiv 2504.20571", claim=claim)
entropy_only = method("entropy-only", paper(**no_reward), title="The entropy bonus alone, without a reward", source="arXiv 2504.20571")
