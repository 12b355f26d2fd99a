"""Limit of RLVR: does reinforcement learning widen what a model can solve? (arXiv 2504.13837)

Problem. A trained model answers better at the first try. Does it solve anything its base model could not, given enough tries?
Idea. A measurement, no new update rule: draw many samples (hundreds) per problem from the base and from each trained policy, under the same prompt,
temperature and top-p, and compare unbiased pass@k from k = 1 up to n. The paper finds the trained model ahead at k = 1, the base level at tens
of samples and ahead at hundreds, for six algorithms: training sharpens the sampling of paths the base already has. Distillation widens.
    sampling-efficiency gap = pass@256 of the base - pass@1 of the tuned      crossover = smallest k at which the base is as good
    coverage: which problems base, tuned, both or neither solve in n samples
    perplexity of the tuned model's (and a teacher's) responses under the base; temperature matched in entropy; guess control
`volvelle study limit-of-rlvr --base MODEL --tuned RUN --tuned RUN` does this for any models and task. Read it for tasks on which guessing
does not pay: with ten possible answers the base reaches 1 by chance (`guess=` drops such problems), and verifier errors add up with k.
Narrowing needs problems that share parameters: on independent prompt trees (`--task tree`) training loses nothing at large k.

Deviations: the paper's 12 bins, n and k are kept, checkpoints are given as runs (`--tuned` once per number of steps). Its text states gaps that
its own table does not give; ours are computed from the curves.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import UserError
from volvelle.core.files import write_json, write_text
from volvelle.core.parts import coerce, method, to_config
from volvelle.core.state import fingerprint
from volvelle.core.tasks import Task
from volvelle.core.trainable import Adam
from volvelle.core.trainer import start, threads
from volvelle.core.verbs import configure, open_run

from ..fittings import Updates, ValueCritic
from ..recipe import Evaluation
from ..samplers import Plain, forced
from ..sampling import Sampling
from ..study import (Outcomes, accuracy_histogram, coverage, crossover, draw_outcomes, matching_temperature, mean_entropy, merge, over_problems,
                     perplexity, read_outcomes, without_reasoning)
from ..study_page import write_study
from .dapo import dapo
from .grpo import grpo
from .ppo import ppo
from .reinforce_pp import reinforce_pp
from .remax import WithGreedy, remax
from .rloo import rloo
from .sft import sft


@dataclass
class Study:
    """A finished study: everything measured, and the page."""

    summary: dict
    outcomes: dict[str, Outcomes]
    report: Path


@dataclass
class _Policy:
    policy: Any
    task: Any
    steps: int | None
    seed: int
    recipe: Any
    learner: Any


def study(base: str, tuned: Sequence[str] = (), task=None, *, distilled: Sequence[str] = (), samples: int = 256, prompts: int = 64, split: str = "test",
          temperature: float = 0.6, top_p: float = 0.95, seeds: Sequence[int] = (0,), temperatures: Sequence[float] = (), match_entropy: bool = True,
          guess: str | None = None, gap_at: int = 256, responses: int = 4, folder: str | Path = "runs/limit-of-rlvr", allow_code: Sequence[str] = (),
          dtype: str = "float32", device: str = "auto", progress: Callable[[int, int, str], None] | None = None) -> Study:
    """Compare a base model with policies trained from it by large-sample evaluation; writes study.json, outcomes/, inspect.jsonl, report.html.

    base: a model (as for train) or a run; tuned, distilled: run folders, or NAME=FOLDER; task: that of the first run if not given.
    samples: per problem and seed, the same for every policy; seeds: all different, joined; temperatures: a further sweep; match_entropy:
    also sample each tuned policy at the temperature at which its entropy is the base's; guess: a template with {prompt} that asks for the
    bare answer: problems the base guesses now and then (0 to 5 %) are dropped; responses: per problem, for perplexity. Outcomes that an earlier
    call left in the folder are read back. UserError on unknown names, one name twice, no tuned policy, a seed twice.
    """
    named = [("base", "base", base), *_named(tuned, "tuned"), *_named(distilled, "distilled")]
    if len(named) < 2:
        raise UserError("study: nothing to compare with the base; give at least one --tuned RUN")
    if len({n for n, _, _ in named}) < len(named):
        raise UserError(f"study: one name twice among {', '.join(n for n, _, _ in named)}; name them, for example --tuned first=runs/x")
    if prompts < 2 or samples < 1 or not seeds:
        raise UserError(f"study: prompts={prompts}, samples={samples}, seeds={list(seeds)}: expected at least two problems, one sample and one seed")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"study: seeds={list(seeds)}: one seed twice gives the same samples twice; expected different seeds")
    folder, first = Path(folder), _open(named[1][2], None, None, allow_code, dtype, device)
    task = first.task if task is None else coerce(Task, task, "task")
    root = _open(base, task, first.seed, allow_code, dtype, device)
    chosen, setting = task.split(split)[:prompts], {"task": json.dumps(to_config(task), sort_keys=True), "split": split, "top_p": top_p}
    drawing = Sampling(temperature, 0, top_p, 0.0, task.max_tokens, tuple(task.stop))

    def drawn(name: str, p: _Policy, t: float, problems: list) -> Outcomes:
        here = setting | {"temperature": t, "samples": samples, "policy": fingerprint(p.policy.module.state_dict())}
        parts = []
        for seed in seeds:
            path = folder / "outcomes" / f"{name}-t{t:.4g}-s{seed}.jsonl"
            found = read_outcomes(path, problems) if path.is_file() else None
            if found is None or found.setting != here or found.ids != [q.id for q in problems]:
                tell = (lambda done, total, n=f"{name} at temperature {t:.3g}": progress(done, total, n)) if progress else None
                with threads(None, p.learner):
                    found = draw_outcomes(p.policy, task, problems, samples, dataclasses.replace(drawing, temperature=t), seed, here, responses, tell)
                found.save(path)
            parts.append(dataclasses.replace(found, setting={k: v for k, v in here.items() if k != "policy"}))
        return merge(parts)

    dropped: dict[str, float] = {}
    if guess is not None:
        rate = drawn("guess", root, temperature, without_reasoning(chosen, guess)).accuracy
        dropped = {p.id: float(r) for p, r in zip(chosen, rate) if 0 < r < 0.05}
        chosen = [p for p in chosen if p.id not in dropped]
        if not chosen:
            raise UserError("study: every problem is guessed now and then; choose a task with a larger answer space, or leave out the guess control")
    outcomes, kinds, steps, swept, matched, confused = {"base": drawn("base", root, temperature, chosen)}, {"base": "base"}, {"base": root.steps}, {}, {}, {}
    swept["base"] = {t: drawn("base", root, t, chosen) for t in temperatures}
    own = outcomes["base"].kept
    confused["base responses"] = {"base": perplexity(root.policy, own)}
    teacher = _teacher(root.policy, task, chosen)
    if teacher:
        confused["teacher"] = {"base": perplexity(root.policy, teacher)}
    aim = mean_entropy(root.policy, chosen, responses, drawing, seeds[0]) if match_entropy else None
    for name, kind, source in named[1:]:
        p = first if source == named[1][2] else _open(source, None, None, allow_code, dtype, device)
        outcomes[name], kinds[name], steps[name] = drawn(name, p, temperature, chosen), kind, p.steps
        swept[name] = {t: drawn(name, p, t, chosen) for t in temperatures}
        confused[f"{name} responses"] = {"base": perplexity(root.policy, outcomes[name].kept), name: perplexity(p.policy, outcomes[name].kept)}
        confused["base responses"][name] = perplexity(p.policy, own)
        if teacher:
            confused["teacher"][name] = perplexity(p.policy, teacher)
        if match_entropy:
            t = matching_temperature(p.policy, chosen, responses, drawing, aim, seeds[0])
            matched[name] = (t, drawn(name, p, t, chosen)) if t is not None else None
    summary = summarise(outcomes, kinds, steps, gap_at) | {
        "task": task.label(), "split": split, "temperature": temperature, "top_p": top_p, "seeds": list(seeds), "dropped": dropped, "base_entropy": aim,
        "perplexity": {source: {under: np.quantile(v, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist() for under, v in row.items()} for source, row in confused.items()},
        "temperatures": {name: {str(t): _curve(o) for t, o in row.items()} for name, row in swept.items() if row},
        "matched": {name: None if found is None else {"temperature": found[0], "curve": _curve(found[1])} for name, found in matched.items()}}
    texts = {p.id: p.text or p.messages for p in chosen}
    hard = [{"policy": name, "id": i, "accuracy": float(a), "prompt": texts[i], "response": t} for name, o in outcomes.items()
            for i, a in zip(o.ids, o.accuracy) if 0 < a < 0.05 for t in o.correct.get(i, [])]
    write_text(folder / "inspect.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in hard))
    write_json(folder / "study.json", summary)
    return Study(summary, outcomes, write_study(folder / "report.html", summary, outcomes, {n: f for n, f in matched.items() if f}, confused))


def summarise(outcomes: dict[str, Outcomes], kinds: dict[str, str], steps: dict[str, int | None], gap_at: int = 256) -> dict:
    """Curves at every k, crossovers, gaps with intervals, coverage and histograms; `outcomes["base"]` is the base."""
    base, out = outcomes["base"], {}
    ks = list(range(1, base.n + 1))
    far = min(gap_at, base.n)
    for name, found in outcomes.items():
        curve = found.curve(ks)
        row = {"kind": kinds[name], "steps": steps[name], "curve": curve.mean(0).tolist(), "histogram": accuracy_histogram(found.accuracy).tolist()}
        if name != "base":
            shared = coverage(base, found)
            gap = over_problems(base.curve([far])[:, 0] - found.accuracy)
            mine = shared["both"] + shared["tuned"]
            row |= {"crossover": crossover(ks, base.curve(ks).mean(0), curve.mean(0)), "coverage": shared,
                    "within_base": len(shared["both"]) / len(mine) if mine else None, "gap": dataclasses.asdict(gap)}
        out[name] = row
    return {"n": base.n, "problems": len(base.ids), "gap_at": far, "models": out}


def _curve(found: Outcomes) -> dict[str, float]:
    ks = [2**i for i in range(found.n.bit_length())]
    return dict(zip(map(str, ks), found.curve(ks).mean(0).tolist()))


def _named(sources: Sequence[str], kind: str) -> list[tuple[str, str, str]]:
    out = []
    for text in sources:
        name, sign, path = text.partition("=")
        if not sign:
            name, path = Path(text).name, text
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"study: {name!r} cannot be the name of a policy; expected letters, digits and .+-_")
        out.append((name, kind, path))
    return out


def _open(source: str, task, seed: int | None, allow_code, dtype: str, device: str) -> _Policy:
    """A policy from a run's folder, or (with a task) from a model."""
    if (Path(source) / "config.yaml").is_file():
        run, learner = open_run(source, allow_code=allow_code)
        if "policy" not in learner.product():
            raise UserError(f"{source}: a run without a policy; expected a run of the language wing")
        return _Policy(learner.product()["policy"], run.config.task, run.step, run.seed, run.config.recipe, learner)
    if task is None:
        raise UserError(f"{source}: not the folder of a run (no config.yaml there)")
    run, learner = start(configure("language/grpo", task, source, seed=seed or 0, dtype=dtype, device=device), Path("."))
    return _Policy(learner.policy, task, 0, run.seed, None, learner)


def _teacher(policy, task, chosen) -> list:
    """One demonstration to each problem, where the task has them."""
    rng = np.random.default_rng(0)
    try:
        return [forced(policy, p, task.demonstration(p, rng)) for p in chosen]
    except UserError:
        return []


quick_adam = Updates(optimiser=Adam(lr=0.05))
far = dict(prompts=16, updates=quick_adam, evaluation=Evaluation(samples=256, ks=(1, 4, 16, 64, 256)))
ALGORITHMS = {"ppo": ppo(**far, critic=ValueCritic(optimiser=Adam(lr=0.05)), sampler=Plain(group=8), kl=None), "grpo": grpo(**far),
              "reinforce++": reinforce_pp(**far, sampler=Plain(group=8), kl=None), "rloo": rloo(**far, kl=None),
              "remax": remax(**far, sampler=WithGreedy(group=8)), "dapo": dapo(**far)}

claim = Claim(
    says="six algorithms raise pass@1 and lower pass@256 below the base; distillation raises both",
    arms={"base": Arm(grpo(**far), steps=0), **ALGORITHMS, "distilled": sft(**far)}, task="strategies", steps=150, seeds=5, minutes=6,
    expects=(*(f"{name} > base on pass@1" for name in ALGORITHMS), *(f"{name} < base on pass@256" for name in ALGORITHMS),
             "distilled > base on pass@1", "distilled > base on pass@256"))

limit_of_rlvr = method("limit-of-rlvr", grpo(kl=None, prompts=128), title="Measuring what training adds: pass@k at large k", source="arXiv 2504.13837", claim=claim)
