"""Evaluation with commanded goals: every task of the environment is played equally often; success is the share of episodes that reach the goal."""

from __future__ import annotations

from typing import Any

import numpy as np

from volvelle.control.encoding import Vocabulary
from volvelle.control.evaluation import Evaluator
from volvelle.control.slots import ControlTask

from .commands import GoalTask


class GoalEvaluator:
    """One of control's evaluators per goal. `episodes` are played per goal and seed; an episode's return is 1 if it reached the goal."""

    def __init__(self, task: GoalTask, make, seeds: int, episodes: int, vocabulary: Vocabulary | None = None, report=lambda line: None):
        numbers = [task.goal] if task.goal is not None else range(1, task.goals() + 1)
        self.each = {n: Evaluator(make(n), seeds, episodes, vocabulary, report) for n in numbers}
        self.vocabulary, self.seeds = vocabulary if vocabulary is not None else Vocabulary(), seeds

    def __call__(self, actor: Any, seed: int, step: int = 0, explore: bool = False) -> dict[str, float]:
        """success (the mean over goals), success/N per goal, length; `success@k` of seed k when there are several."""
        played = {n: evaluator(actor, seed, step, explore) for n, evaluator in self.each.items()}
        ends = [""] if self.seeds == 1 else ["", *(f"@{s}" for s in range(self.seeds))]
        found: dict[str, float] = {}
        for end in ends:
            found[f"success{end}"] = float(np.mean([p[f"return{end}"] for p in played.values()]))
            found[f"length{end}"] = float(np.mean([p[f"length{end}"] for p in played.values()]))
            found |= {f"success/{n}{end}": p[f"return{end}"] for n, p in played.items()} if len(played) > 1 else {}
        return found


def normalised(found: dict[str, float], low: float, high: float) -> dict[str, float]:
    """Adds "score": 100 (return - low) / (high - low), D4RL's normalised score, to every return that was measured."""
    scores = {k.replace("return", "score", 1): 100 * (v - low) / (high - low) for k, v in found.items() if k.startswith("return")}
    return found | scores


def fitting(task: ControlTask) -> GoalTask | None:
    """The task with goals behind a task, if there is one."""
    return task if isinstance(task, GoalTask) else None
