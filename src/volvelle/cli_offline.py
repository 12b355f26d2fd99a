"""The verb of the offline wing: `data info|check|collect|mix`. `cli.py` registers it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

Dataset = Annotated[str, typer.Argument(help="a dataset's path (Minari folder, D4RL .hdf5, OGBench .npz, mapped folder), or the name of one that is generated")]
Json = Annotated[bool, typer.Option("--json", help="print data instead of text")]
Layout = Annotated[Optional[str], typer.Option(help="minari, d4rl, ogbench or mapped [by the name's ending]")]


def register(app: typer.Typer, out: Console) -> None:
    data = typer.Typer(no_args_is_help=True, help="Datasets of recorded episodes: what they hold, whether they are sound, making and mixing them.")
    app.add_typer(data, name="data")

    def opened(name: str):
        from volvelle.core.parts import coerce
        from volvelle.core.registry import registry
        from volvelle.core.tasks import Task
        from volvelle.offline.data.files import open_dataset
        from volvelle.offline.tasks import OfflineTask

        registry.load()
        task = coerce(Task, name, "dataset") if not Path(name).expanduser().exists() and (name in registry.table(Task) or name.startswith("offline:")) else None
        return task.dataset(lambda line: typer.echo(line, err=True)) if isinstance(task, OfflineTask) else open_dataset(name, lambda line: typer.echo(line, err=True))

    @data.command()
    def info(dataset: Dataset, as_json: Json = False) -> None:
        """Sizes, returns, and the mean, deviation and range of every field.

        Example: `volvelle data info data/pendulum`
        """
        found = opened(dataset)
        numbers = found.statistics()
        if as_json:
            print(json.dumps({"spec": found.spec.describe(), "meta": found.meta, **numbers}))
            return
        out.print(f"{found.label()}: {numbers['episodes']} episodes, {numbers['steps']} steps; {found.spec.describe()}")
        for key in ("length", "return"):
            if key in numbers:
                out.print(f"{key}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers[key].items()))
        out.print(f"ends: {numbers['terminated']} terminated, {numbers['truncated']} truncated" + ("" if "return" in numbers else "; no rewards recorded"))
        table = Table("field", "shape", "type", "mean", "std", "min", "max")
        for name, row in numbers["fields"].items():
            table.add_row(name, "x".join(map(str, row["shape"])) or "-", row["dtype"], *(_short(row.get(k)) for k in ("mean", "std", "min", "max")))
        out.print(table)

    @data.command()
    def check(dataset: Annotated[Path, typer.Argument(help="a dataset's path")], as_json: Json = False) -> None:
        """List everything wrong with a dataset, by episode and field. Exit code 1 if there is anything.

        Example: `volvelle data check data/mine.hdf5`
        """
        from volvelle.offline.data.files import open_source
        from volvelle.offline.data.source import faults

        source = open_source(dataset)
        found = [str(f) for f in faults(source)]
        if as_json:
            print(json.dumps({"faults": found, "notes": source.notes}))
        else:
            for note in source.notes:
                out.print(f"note: {note}", markup=False)
            out.print("\n".join(found) if found else "sound: no faults found", markup=False)
        raise typer.Exit(1 if found else 0)

    @data.command()
    def collect(task: Annotated[str, typer.Argument(help="an environment: Pendulum-v1, maze:medium, ogbench:pointmaze-medium-v0 …")],
                to: Annotated[Path, typer.Option("--out", "-o", help="where: a folder (Minari's layout), .hdf5 (D4RL) or .npz (OGBench)")],
                by: Annotated[str, typer.Option("--by", help="who acts: RUN (a run's folder), random, walker, pendulum-swing, cartpole-balance")] = "random",
                quality: Annotated[str, typer.Option("--quality", "-q", help="random, medium, medium-replay, expert, medium-expert, expert:0.1+random:0.9; navigate, play, stitch, explore for goals")] = "expert",
                steps: Annotated[int, typer.Option(min=1)] = 10_000, seed: Annotated[int, typer.Option(min=0)] = 0,
                length: Annotated[Optional[int], typer.Option(min=1, help="steps per episode of goal data")] = None,
                noise: Annotated[Optional[float], typer.Option(min=0, help="action noise of goal data, in units of half the action range")] = None, layout: Layout = None) -> None:
        """Record episodes of a run's policy or a scripted driver at a level of quality.

        Example: `volvelle data collect Pendulum-v1 --by runs/sac-Pendulum-v1-s0 -q medium-replay --steps 20000 -o data/pendulum`
        """
        from volvelle.control.slots import ControlTask
        from volvelle.core.errors import UserError
        from volvelle.core.parts import coerce
        from volvelle.core.registry import registry
        from volvelle.core.tasks import Task
        from volvelle.offline.behaviours import Behaviour, FromRun
        from volvelle.offline.data.collect import collect as make
        from volvelle.offline.data.files import write_dataset

        registry.load()
        world = coerce(Task, task, "task")
        if not isinstance(world, ControlTask):
            raise UserError(f"task {world.label()} belongs to the {world.wing} wing; data are collected in environments, for example Pendulum-v1")
        behaviour = FromRun(path=by) if Path(by).is_dir() else coerce(Behaviour, by, "--by")
        if to.exists():
            raise UserError(f"{to}: exists already; name another path, or delete it")
        made = make(world, behaviour, quality, steps, seed, length, noise)
        out.print(f"written: {write_dataset(made, to, layout)} ({len(made)} episodes, {made.steps} steps)")

    @data.command()
    def mix(parts: Annotated[list[str], typer.Argument(help="datasets, each with the share of its episodes: data/expert:0.1 data/random")],
            to: Annotated[Path, typer.Option("--out", "-o")], seed: Annotated[int, typer.Option(min=0)] = 0, layout: Layout = None) -> None:
        """Put whole episodes of several datasets together, shuffled; with one dataset, copy it into another layout.

        Example: `volvelle data mix data/expert:0.1 data/random -o data/mixed`
        """
        import numpy as np

        from volvelle.core.errors import UserError
        from volvelle.offline.data.dataset import mix as put
        from volvelle.offline.data.files import write_dataset

        found = []
        for word in parts:
            path, _, share = word.rpartition(":")
            try:
                found.append((opened(path), float(share)) if path and not Path(word).exists() and share.replace(".", "", 1).isdigit() else (opened(word), 1.0))
            except ValueError:
                raise UserError(f"mix {word!r}: expected PATH or PATH:SHARE") from None
        made = found[0][0] if len(found) == 1 and found[0][1] == 1 else put(found, np.random.default_rng(seed))
        out.print(f"written: {write_dataset(made, to, layout)} ({len(made)} episodes, {made.steps} steps)")


def _short(value) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(f"{v:.3g}" for v in value[:4]) + (" …" if len(value) > 4 else "")
    return f"{value:.4g}"
