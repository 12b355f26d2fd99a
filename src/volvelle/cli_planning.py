"""The verb of the planning wing: `horizon` (will random exploration do?). `cli.py` registers it."""

from __future__ import annotations

import json
import math
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table


def register(app: typer.Typer, out: Console) -> None:
    @app.command()
    def horizon(task: Annotated[str, typer.Argument(help="FrozenLake-v1, MiniGrid-DoorKey-5x5-v0, mdp:FILE.npz, lock, …")],
                overrides: Annotated[Optional[list[str]], typer.Argument(help="fields of the task: task.horizon=50 task.repeat=.25 task.actions=[0,1,2]")] = None,
                budget: Annotated[int, typer.Option(min=1, help="environment steps within which it should be solved")] = 100_000,
                seeds: Annotated[int, typer.Option(min=1)] = 3,
                as_json: Annotated[bool, typer.Option("--json", help="print data instead of a table")] = False) -> None:
        """Say how hard an enumerable environment is for random exploration (k, action gaps, effective horizon), and whether PPO or DQN should solve it.

        Example: `volvelle horizon MiniGrid-Empty-5x5-v0 task.horizon=30 task.repeat=.25`
        """
        from volvelle.core.registry import registry
        from volvelle.core.tasks import Task
        from volvelle.core.verbs import configure
        from volvelle.planning.methods.sqirl_tables import foretell

        registry.load()
        named = ":" in task or task in registry.table(Task)
        found = foretell(configure("planning/effective-horizon", task if named else f"table:{task}", overrides=overrides or []).task, budget, seeds)
        if as_json:
            print(json.dumps({k: None if isinstance(v, float) and math.isinf(v) else v for k, v in found.items()}))
            return
        table = Table("what", "found")
        for name, value in found.items():
            if name != "expected":
                table.add_row(name.replace("_", " "), f"more than {budget}" if name.startswith("sqirl") and value > budget else f"{value:.6g}" if isinstance(value, float) else str(value))
        out.print(table)
        out.print(f"learners that explore at random (PPO, DQN) are {'expected' if found['expected'] else 'not expected'} to reach 95 % of the optimum within {budget} steps")
