"""What a step of every language method costs, as a multiple of GRPO's step of the same sizes.

    python benchmarks/methods.py [--rounds 5] [--model tiny] [NAME ...]

One process and one thread; the methods take turns, round after round, so that whatever else the machine does falls on all of them. Sizes are
GRPO's for everyone: prompts, group, completion length, one update per batch. Also printed: model passes beyond sampling and the loss's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

from volvelle.core.errors import RunStopped, UserError  # noqa: E402
from volvelle.core.run import Run, RunConfig  # noqa: E402
from volvelle.core.verbs import configure, methods  # noqa: E402


def learner(name: str, task: str, model: str, prompts: int, group: int):
    words = [f"prompts={prompts}"]
    config = configure(name, task, model, words)
    sampler = config.recipe.sampler
    if hasattr(sampler, "base"):  # demonstrations take places of the group
        config = config.override(**{"recipe.sampler.base.group": group - (sampler.group - sampler.base.group)})
    elif hasattr(sampler, "group"):
        config = config.override(**{"recipe.sampler.group": group})
    config = config.override(**{"recipe.updates.epochs": 1, "recipe.updates.minibatch": "none"})
    if config.recipe.filter is not None:
        config = config.override(**{"recipe.filter.refill": "false"})
    config.recipe.validate(config.task)
    run = Run(RunConfig(recipe=config.recipe, task=config.task, model=config.model, device="cpu"), Path(tempfile.mkdtemp()))
    run.learner = made = config.recipe.start(run)
    return made


def count_passes(made) -> dict[str, int]:
    """Scoring passes in one step: of the policy without gradient (old), of the reference, of the critic."""
    counts = {"old": 0, "reference": 0, "critic": 0}
    policy, reference = made.policy, made.run._reference
    original = policy.score

    def score(*args, **kwargs):
        counts["old"] += not torch.is_grad_enabled()
        return original(*args, **kwargs)

    policy.score = score
    if reference is not None:
        inner = reference.score
        reference.score = lambda *a, **k: (counts.__setitem__("reference", counts["reference"] + 1), inner(*a, **k))[1]
    if made.critic is not None:
        values = made.critic.values
        made.critic.values = lambda b: (counts.__setitem__("critic", counts["critic"] + 1), values(b))[1]
    made.step()
    made.run.step += 1
    del policy.score
    if reference is not None:
        del reference.score
    return counts


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("names", nargs="*")
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--task", default="sort-digits")
    ask.add_argument("--model", default="tiny")
    ask.add_argument("--prompts", type=int, default=8)
    ask.add_argument("--group", type=int, default=8)
    ask.add_argument("--json", type=Path)
    args = ask.parse_args()
    names = args.names or [m.name for m in methods() if m.wing == "language"]
    made, passes, times = {}, {}, {}
    for name in ["grpo", *(n for n in names if n != "grpo")]:
        try:
            made[name] = learner(name, args.task, args.model, args.prompts, args.group)
            passes[name] = count_passes(made[name])
            times[name] = []
        except (UserError, RunStopped) as error:
            print(f"{name}: left out ({error})")
    for _ in range(args.rounds):
        for name, one in made.items():
            if name in times:
                began = time.perf_counter()
                metrics = one.step()
                one.run.step += 1
                seconds = time.perf_counter() - began
                times[name].append(seconds / max(metrics.get("tokens", 1.0), 1.0))
    base = statistics.median(times["grpo"])
    rows = {n: {"ratio": statistics.median(t) / base, "passes": {k: v for k, v in passes[n].items() if v}} for n, t in times.items()}
    print("| method | cost per sampled token, x GRPO | extra passes |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['ratio']:.2f} | {', '.join(row['passes']) or 'none'} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
