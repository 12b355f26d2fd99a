"""The verb of the control wing: `watch` (see a policy act). `cli.py` registers it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console


def register(app: typer.Typer, out: Console) -> None:
    @app.command()
    def watch(folder: Annotated[Path, typer.Argument(help="a run's folder")],
              task: Annotated[Optional[str], typer.Option("--task", "-t", help="another task of the same shape")] = None,
              episodes: Annotated[int, typer.Option(min=1)] = 1, seed: Annotated[int, typer.Option(min=0, help="of the episodes")] = 0,
              save: Annotated[Optional[Path], typer.Option(help="film into this .mp4 or .gif instead of opening a window")] = None,
              member: Annotated[int, typer.Option(min=0, help="which of the seeds trained side by side")] = 0,
              best: Annotated[bool, typer.Option("--best", help="the best checkpoint instead of the last")] = False,
              explore: Annotated[bool, typer.Option("--explore", help="act as while training, not greedily")] = False,
              allow_code: Annotated[Optional[list[str]], typer.Option("--allow-code", help="a module that a config.yaml may import functions from")] = None,
              as_json: Annotated[bool, typer.Option("--json", help="print data instead of text")] = False) -> None:
        """See a policy act in its environment, in a window or filmed.

        Example: `volvelle watch runs/ppo-CartPole-v1-s0 --save cartpole.mp4`
        """
        from volvelle.control.watching import watch

        returns = watch(folder, task=task, episodes=episodes, seed=seed, save=save, member=member, best=best, explore=explore, allow_code=tuple(allow_code or ()))
        if as_json:
            print(json.dumps({"returns": returns, "video": str(save) if save else None}))
            return
        out.print("\n".join(f"episode {i}: return {r:.4g}" for i, r in enumerate(returns)) + (f"\nvideo: {save}" if save else ""))
