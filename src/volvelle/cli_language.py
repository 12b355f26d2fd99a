"""The verbs of the language wing: `select` (which examples to train on) and `study` (what training changed). `cli.py` registers them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from volvelle.core.errors import UserError, unknown

Task = Annotated[Optional[str], typer.Option("--task", "-t", help="the pool to choose from, or the problems to solve")]
Json = Annotated[bool, typer.Option("--json", help="print data instead of a table")]


def _numbers(text: str, option: str, kind: Callable = int) -> list:
    try:
        return [kind(t) for t in text.split(",") if t]
    except ValueError:
        raise UserError(f"{option} {text!r}: expected numbers separated by commas") from None


def register(app: typer.Typer, progress: Callable[[str], contextlib.AbstractContextManager], out: Console) -> None:
    """Add the verbs to the command line. progress(title) gives a callback (done, total, what)."""

    @app.command()
    def select(method: Annotated[str, typer.Argument(help="one-shot")], overrides: Annotated[Optional[list[str]], typer.Argument(help="path=value, as for train")] = None,
               task: Task = None, model: Annotated[Optional[str], typer.Option("--model", "-m")] = None,
               steps: Annotated[int, typer.Option(min=1, help="learner steps on the whole pool")] = 500,
               score: Annotated[str, typer.Option(help="variance (of its accuracies), impact (learning impact), random")] = "variance",
               seed: Annotated[int, typer.Option(min=0)] = 0, top: Annotated[int, typer.Option(min=1, help="examples shown")] = 16,
               folder: Annotated[Optional[Path], typer.Option("--out", "-o", help="the run's folder; ranking.jsonl goes there")] = None, as_json: Json = False) -> None:
        """Train on the whole pool and rank its examples by their history, to train on the first few.

        Example: `volvelle select one-shot --task gcd-easy --model smollm2 --steps 100`, then
        `volvelle train one-shot --task gcd-easy curriculum.ranking=RUN/ranking.jsonl curriculum.first=1`
        """
        from volvelle.language.methods import one_shot

        if method != "one-shot":
            raise unknown("selection", method, ["one-shot"])
        if task is None:
            raise UserError("select: no task; give the pool to choose from, for example --task gcd-easy")
        with progress("training on the pool") as tell:
            path, rows = one_shot.select(task, model, score=score, steps=steps, overrides=overrides or (), seed=seed, folder=folder, progress=tell,
                                         reporter=lambda line: print(line, file=sys.stderr, flush=True))
        if as_json:
            print(json.dumps({"ranking": str(path), "examples": rows[:top]}))
            return
        table = Table("rank", "example", "variance", "impact", "mean accuracy", "visits")
        for row in rows[:top]:
            table.add_row(str(row["rank"]), row["id"], f"{row['variance']:.4f}", f"{row['impact']:.3f}", f"{row['mean']:.3f}", str(len(row["history"])))
        out.print(table)
        out.print(f"ranking: {path} ({len(rows)} examples)\ntrain on the first: volvelle train one-shot --task {task} curriculum.ranking={path} curriculum.first=1")

    @app.command()
    def study(name: Annotated[str, typer.Argument(help="limit-of-rlvr")], base: Annotated[str, typer.Option(help="the base model (as for train --model), or a run")],
              tuned: Annotated[Optional[list[str]], typer.Option(help="a run trained from it, or NAME=RUN; repeat for more")] = None,
              distilled: Annotated[Optional[list[str]], typer.Option(help="a run trained on a teacher's text instead of by rewards")] = None, task: Task = None,
              samples: Annotated[int, typer.Option(min=1, help="to each problem, per seed")] = 256, prompts: Annotated[int, typer.Option(min=2, help="problems")] = 64,
              split: Annotated[str, typer.Option(help="train, validation or test")] = "test", temperature: Annotated[float, typer.Option(min=0.01)] = 0.6,
              top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 0.95, seeds: Annotated[str, typer.Option(help="such as 0,1: samples are joined")] = "0",
              temperatures: Annotated[str, typer.Option(help="a further sweep, such as 0.6,1.0,1.2")] = "",
              match_entropy: Annotated[bool, typer.Option("--match-entropy/--no-match-entropy", help="also compare at the base's entropy")] = True,
              guess: Annotated[Optional[str], typer.Option(help="a template with {prompt} that asks for the bare answer; problems so guessed now and then are dropped")] = None,
              gap_at: Annotated[int, typer.Option(min=1, help="k of the base in the sampling-efficiency gap")] = 256,
              responses: Annotated[int, typer.Option(min=1, help="per problem, for perplexity and entropy")] = 4,
              folder: Annotated[Path, typer.Option("--out", "-o")] = Path("runs/limit-of-rlvr"), dtype: str = "float32", device: str = "auto",
              allow_code: Annotated[Optional[list[str]], typer.Option("--allow-code")] = None, as_json: Json = False) -> None:
        """Measure what training changed by large-sample evaluation: pass@k with intervals, coverage, perplexity; one HTML report.

        Example: `volvelle study limit-of-rlvr --base smollm2 --tuned runs/grpo-gcd-easy-s0 --samples 64 --prompts 32`
        """
        from volvelle.language.methods.limit_of_rlvr import study as run_study

        if name != "limit-of-rlvr":
            raise unknown("study", name, ["limit-of-rlvr"])
        with progress("sampling") as tell:
            made = run_study(base, tuned or [], task, distilled=distilled or [], samples=samples, prompts=prompts, split=split, temperature=temperature, top_p=top_p,
                             seeds=_numbers(seeds, "--seeds"), temperatures=_numbers(temperatures, "--temperatures", float), match_entropy=match_entropy, guess=guess,
                             gap_at=gap_at, responses=responses, folder=folder, allow_code=tuple(allow_code or ()), dtype=dtype, device=device, progress=tell)
        if as_json:
            print(json.dumps({"folder": str(folder), **made.summary}))
            return
        far, models = made.summary["gap_at"], made.summary["models"]
        table = Table("policy", "pass@1", f"pass@{far}", f"gap (base pass@{far} - pass@1)", "crossover at k", "solved by base only / this only")
        for label, row in models.items():
            extra = ["", "", ""]
            if label != "base":
                gap, found = row["gap"], row["coverage"]
                extra = [f"{gap['mean']:.3f} [{gap['low']:.3f}, {gap['high']:.3f}]", str(row["crossover"] or "none"), f"{len(found['base'])} / {len(found['tuned'])}"]
            table.add_row(label, f"{row['curve'][0]:.3f}", f"{row['curve'][far - 1]:.3f}", *extra)
        out.print(table)
        out.print(f"report: {made.report}")
