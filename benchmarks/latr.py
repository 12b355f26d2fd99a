"""LATR's sampler against plain sampling: returned tokens per second at equal returned completions, on the same model and prompts.

    python benchmarks/latr.py [--rounds 5] [--threads 1] [--prompts 8] [--group 8] [--tokens 96] [--json FILE]

A random 4-layer, 256-wide Llama over characters; every completion has exactly `--tokens` tokens on both sides. A random model is undecided
everywhere, so its trees fork as often as they may: `--absolute` and `--relative` say how easily. The rows differ in the share of the
group that comes from the tree (eta) and in pruning; `passes` is the number of tokens computed per token returned: below 1 where branches share what
they have in common, above what is returned only by what pruned branches grew during their lookahead. Sides run in turn; medians over
rounds are reported, in wall time and in CPU time (the one to read on a shared machine), and nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

from volvelle.core.parts import part  # noqa: E402
from volvelle.core.run import Run, RunConfig  # noqa: E402
from volvelle.language.methods.grpo import grpo  # noqa: E402
from volvelle.language.methods.latr import Growth, Latr  # noqa: E402
from volvelle.language.models import Tiny  # noqa: E402
from volvelle.language.records import Prompt  # noqa: E402
from volvelle.language.samplers import Plain  # noqa: E402
from volvelle.language.slots import LanguageTask  # noqa: E402


@part("benchmark-latr")
class Benchmark(LanguageTask):
    prompts: int = 8
    length: int = 64

    def split(self, name):
        return [Prompt(str(i), text="".join(str((37 * j + 11 * i) % 10) for j in range(self.length))) for i in range(self.prompts)]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"rounds": 5, "threads": 1, "prompts": 8, "group": 8, "tokens": 96, "prompt-tokens": 64}.items():
        ask.add_argument(f"--{name}", type=int, default=value)
    ask.add_argument("--absolute", type=float, default=0.02, help="a random model's probabilities are all near 1/60")
    ask.add_argument("--relative", type=float, default=0.5)
    ask.add_argument("--json", type=Path)
    args = ask.parse_args()
    torch.set_num_threads(args.threads)
    tree = Latr(group=args.group, max_tokens=args.tokens, absolute=args.absolute, relative=args.relative)
    sides = {"plain": Plain(group=args.group, max_tokens=args.tokens), "latr, eta 1": tree, "latr, eta 0.5": tree.replace(eta=0.5),
             "latr, eta 1, half pruned at random": tree.replace(prune={"random": "random"}), "latr, eta 1, no pruning": tree.replace(prune={})}
    learners = {}
    for name, sampler in sides.items():
        run = Run(RunConfig(recipe=grpo(sampler=sampler), task=Benchmark(prompts=args.prompts, length=args.__dict__["prompt_tokens"]),
                            model=Tiny(layers=4, width=256, heads=4, context=512, warmup=0), device="cpu"), Path(tempfile.mkdtemp()))
        learners[name] = run.config.recipe.start(run)
        learners[name].policy.end_ids = ()  # every completion has its full length
    seconds, cpu, passes, count = {n: [] for n in sides}, {n: [] for n in sides}, {}, args.prompts * args.group
    for round_ in range(args.rounds + 1):  # the first is a warm-up
        for name in (list(sides) if round_ % 2 else list(sides)[::-1]):
            learner, prompts = learners[name], learners[name].task.split("train")
            began, used = time.perf_counter(), time.process_time()
            made = learner.sampler.sample(prompts)
            if round_:
                seconds[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - used)
            assert len(made) == count and {len(r.ids) for r in made} == {args.tokens}
    for name, sampler in sides.items():
        live = learners[name].sampler
        if isinstance(sampler, Latr):
            growth = Growth(live, learners[name].task.split("train"), round(sampler.eta * args.group))
            growth.grow()
            passes[name] = {"passes": growth.forest.computed / (count * args.tokens), **{k: growth.count[k] for k in ("forks", "pruned", "steps", "empty")}}
        else:
            passes[name] = {"passes": (args.tokens - 1) / args.tokens}
    rows = {name: {"tokens_per_second": count * args.tokens / statistics.median(seconds[name]),
                   "tokens_per_cpu_second": count * args.tokens / statistics.median(cpu[name]), **passes[name]} for name in sides}
    wall, base = rows["plain"]["tokens_per_second"], rows["plain"]["tokens_per_cpu_second"]
    for name, row in rows.items():
        about = ", ".join(f"{k} {row[k]:.0f}" for k in ("forks", "pruned", "steps", "empty") if k in row)
        print(f"{name:36} {row['tokens_per_second']:7.0f} tokens/s ({row['tokens_per_second'] / wall:.2f}x plain), {row['tokens_per_cpu_second']:7.0f} tokens/cpu-s "
              f"({row['tokens_per_cpu_second'] / base:.2f}x), passes {row['passes']:.3f}  {about}")
    if args.json:
        args.json.write_text(json.dumps({"arguments": {k: v for k, v in vars(args).items() if k != "json"}, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
