"""Seeing a run's policy act: on the screen, or filmed into a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from volvelle.core.errors import UserError
from volvelle.core.parts import coerce
from volvelle.core.run import read_config
from volvelle.core.tasks import Task
from volvelle.core.verbs import open_run

from .envs import probe
from .evaluation import play, record
from .policy import Policy
from .slots import ControlTask


def policy_of(folder: str | Path, best: bool = False, allow_code: Sequence[str] = ()) -> tuple[Policy, ControlTask]:
    """The policy of a run folder, finished or not, and the task it was trained in; `best`: the one kept in best/."""
    folder = Path(folder)
    config = read_config(folder, tuple(allow_code))
    if not isinstance(config.task, ControlTask):
        raise UserError(f"{folder}: a run of the {config.recipe.wing} wing; only policies that act in environments can be watched")
    if best and not (folder / "best" / "policy").is_dir():
        raise UserError(f"{folder}: no best/ there; it is kept when evaluate_every is set and the metric rises")
    saved = folder / "best" / "policy" if best else folder / "policy"
    return (Policy.load(saved) if saved.is_dir() else open_run(folder, allow_code=tuple(allow_code))[1].product()["policy"]), config.task


def watch(folder: str | Path, *, task: str | Task | None = None, episodes: int = 1, seed: int = 0, member: int = 0, best: bool = False, explore: bool = False,
          save: str | Path | None = None, allow_code: Sequence[str] = ()) -> list[float]:
    """Play a run's policy and return the returns. save: film into that .mp4 or .gif instead of opening a window.

    task: another task of the same shape; member: which of the seeds trained side by side. UserError without a display to open a window on.
    """
    policy, own = policy_of(folder, best, allow_code)
    shown = own if task is None else coerce(Task, task, "task")
    if task is not None:
        if not isinstance(shown, ControlTask):
            raise UserError(f"task {shown.label()} belongs to the {shown.wing} wing; expected an environment")
        probe(shown).require(policy.spec, f"the policy of {folder}", shown.label())
    how = {"episodes": episodes, "seed": seed, "member": member, "explore": explore}
    if save is not None:
        return record(policy, shown, save, **how)
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise UserError("watch: there is no display to open a window on; film it instead with --save FILE.mp4")
    return play(policy, shown, render="human", **how)
