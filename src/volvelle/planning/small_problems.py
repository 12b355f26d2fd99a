"""A collection of small tabular problems, easy and hard for random exploration, as one task: what studies over many problems run on."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from volvelle.core.errors import UserError
from volvelle.core.parts import part
from volvelle.core.tasks import Task

from .tasks import Lock, RandomTable, Share, Sticky, TabularTask, TextGrid, ToyText, Trap


def problems() -> dict[str, Task]:
    """Toy-text, MiniGrid, rooms, locks, locks with a bait, traps, random tables."""
    def lake(horizon, **options):
        return ToyText(horizon=horizon, options=options)

    def grid(name, horizon, actions):
        return ToyText(env=f"MiniGrid-{name}-v0", horizon=horizon, discount=0.99, actions=actions)

    plain = {"lake": lake(20, is_slippery=False), "lake-slippery": lake(20), "lake-slippery-50": lake(50),
             "lake8": ToyText(env="FrozenLake8x8-v1", horizon=60, options={"is_slippery": False}), "lake8-slippery": ToyText(env="FrozenLake8x8-v1", horizon=60),
             "cliff": ToyText(env="CliffWalking-v1", horizon=30), "empty-5": grid("Empty-5x5", 30, (0, 1, 2)), "empty-6": grid("Empty-6x6", 30, (0, 1, 2)),
             "door-key": grid("DoorKey-5x5", 50, (0, 1, 2, 3, 5)), "rooms": TextGrid(), "trap": Trap(), "trap-0.8": Trap(chance=0.8)}
    plain |= {f"lock-{n}": Lock(length=n) for n in (3, 6, 9)} | {f"bait-{n}": Lock(length=n, bait=0.4) for n in (3, 4, 5, 6)}
    sizes = [(5, 2, 5), (10, 3, 10), (20, 4, 10), (20, 3, 20), (30, 4, 15), (40, 2, 20)]
    plain |= {f"random-{i}": RandomTable(instance=i, states=s, actions=a, horizon=t) for i, (s, a, t) in enumerate(sizes)}
    return plain


@part("small-problems")
class SmallProblems(Task):
    """Tabular problems by name, all with sticky actions (`repeat`)."""

    wing: ClassVar[str] = "planning"
    metric: ClassVar[str] = "spearman_learner"
    problems: dict[str, Task] = field(default_factory=problems)
    repeat: Share = 0.25

    def __post_init__(self):
        super().__post_init__()
        if bad := next((n for n, t in self.problems.items() if not isinstance(t, TabularTask)), None):
            raise UserError(f"task.problems.{bad}={self.problems[bad].label()}: has no transition table; accepted: a tabular task such as table:FrozenLake-v1")

    def sticky(self) -> dict[str, TabularTask]:
        return {name: Sticky(base=base, repeat=self.repeat) if self.repeat else base for name, base in self.problems.items()}
