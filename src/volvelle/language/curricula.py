"""Which prompts are practised: every prompt once per epoch, independent draws, or a fixed few."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from volvelle.core.errors import RunStopped, UserError, unknown
from volvelle.core.parts import part

from .records import Prompt
from .slots import Curriculum


@part("shuffle")
class Shuffle(Curriculum):
    """Epochs over the train split: every prompt once, in a new random order each time. A draw may reach into the next epoch."""

    def start(self, run):
        return LiveShuffle(run.config.task.split("train"), run.rng("curriculum"))


class LiveShuffle:
    def __init__(self, prompts: list[Prompt], rng: np.random.Generator):
        self.prompts, self.rng = prompts, rng
        self.order, self.position, self.epoch = np.zeros(0, dtype=np.int64), 0, 0

    def draw(self, count: int) -> list[Prompt]:
        out = []
        while len(out) < count:
            if self.position == len(self.order):
                self.order, self.position, self.epoch = self.rng.permutation(len(self.prompts)), 0, self.epoch + 1
            chosen = self.order[self.position : self.position + count - len(out)]
            self.position += len(chosen)
            out += [self.prompts[i] for i in chosen]
        return out

    def update(self, batch):
        pass

    def state_dict(self):
        return {"order": self.order, "position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state):
        if len(state["order"]) not in (0, len(self.prompts)):
            raise RunStopped(f"the train split has {len(self.prompts)} prompts now and had {len(state['order'])} when the checkpoint was "
                             "written; a run can only be resumed on the same data")
        self.order, self.position, self.epoch = np.asarray(state["order"], dtype=np.int64), state["position"], state["epoch"]


@part("uniform")
class Uniform(Curriculum):
    """Independent draws from the train split; the same prompt may come twice in one step."""

    def start(self, run):
        return LiveUniform(run.config.task.split("train"), run.rng("curriculum"))


class LiveUniform:
    def __init__(self, prompts: list[Prompt], rng: np.random.Generator):
        self.prompts, self.rng = prompts, rng

    def draw(self, count: int) -> list[Prompt]:
        return [self.prompts[i] for i in self.rng.integers(len(self.prompts), size=count)]

    def update(self, batch):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@part("fixed")
class Fixed(Curriculum):
    """A few prompts of the train split over and over, in order: the `first` so many, or those with the given `ids`.

    A single prompt fills the whole batch with copies of itself, each with its own group (one-shot RLVR, arXiv 2504.20571).
    """

    first: Annotated[int, Field(gt=0)] = 1
    ids: tuple[str, ...] = ()

    def start(self, run):
        prompts = run.config.task.split("train")
        if not self.ids:
            if self.first > len(prompts):
                raise UserError(f"curriculum.first={self.first}: the train split has {len(prompts)} prompts")
            return LiveFixed(prompts[: self.first])
        known = {p.id: p for p in prompts}
        for name in self.ids:
            if name not in known:
                raise unknown("prompt", name, known, " in the train split")
        return LiveFixed([known[name] for name in self.ids])


class LiveFixed:
    def __init__(self, prompts: list[Prompt]):
        self.prompts, self.position = prompts, 0

    def draw(self, count: int) -> list[Prompt]:
        out = [self.prompts[(self.position + i) % len(self.prompts)] for i in range(count)]
        self.position = (self.position + count) % len(self.prompts)
        return out

    def update(self, batch):
        pass

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
