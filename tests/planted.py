"""A recipe whose results are planted, for tests of what is made of results. A module of its own, so that other processes can find it."""

from pathlib import Path

from volvelle.core.errors import RunStopped
from volvelle.core.parts import Recipe, part
from volvelle.core.tasks import Task


@part("planted-task")
class PlantedTask(Task):
    wing = "planted"
    metric = "score"


@part("planted")
class Planted(Recipe):
    """Evaluates to base + gain * step / steps + spread * (seed's own number); stops at step `fails` if that is given."""

    wing = "planted"
    base: float = 0.0
    gain: float = 0.0
    spread: float = 0.0
    fails: int | None = None
    start_from: str = ""

    def start(self, run):
        return PlantedLearner(self, run)


NOISE = (0.30, -0.10, 0.05, -0.20, 0.15, 0.02, -0.07, 0.11)


class PlantedLearner:
    size = 1

    def __init__(self, part, run):
        self.part, self.run, self.total = part, run, 0.0
        if part.start_from:
            self.total = float((Path(part.start_from) / "total.txt").read_text())

    def step(self):
        self.total += float(self.run.rng("work").random())
        if self.part.fails == self.run.step + 1:
            raise RunStopped("planted failure")
        return {"work": self.total}

    def evaluate(self, task=None):
        done = self.run.step / max(1, self.run.config.steps)
        return {"score": self.part.base + self.part.gain * done + self.part.spread * NOISE[self.run.seed], "total": self.total}

    def product(self):
        return {"made": self}

    def save(self, folder):
        (folder / "total.txt").write_text(repr(self.total))

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]
