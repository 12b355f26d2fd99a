"""Any task with one solved training example in front of every prompt: what the example gives in context, without training on it."""

from __future__ import annotations

import numpy as np

from volvelle.core.errors import UserError
from volvelle.core.parts import part
from volvelle.core.tasks import Task, task_reader

from ..records import Prompt
from ..slots import LanguageTask


@part("shown")
class Shown(LanguageTask):
    """`base`, every prompt of it preceded by one training example (`example`: its id; the first if not given) and its demonstration."""

    base: Task = None  # type: ignore[assignment]
    example: str | None = None
    default_model = property(lambda self: self.base.default_model)
    gives = property(lambda self: self.base.gives)
    stop = property(lambda self: self.base.stop)
    max_tokens = property(lambda self: self.base.max_tokens)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.base, LanguageTask):
            raise UserError(f"task shown:{self.base.label()}: expected a task of prompts after the colon, for example shown:gcd-easy")

    def label(self):
        return f"shown:{self.base.label()}"

    def split(self, name):
        train = self.base.split("train")
        found = next((p for p in train if self.example in (None, p.id)), None)
        if found is None:
            raise UserError(f"task.example={self.example!r}: no such prompt in the train split of {self.base.label()}")
        answer = self.base.demonstration(found, np.random.default_rng(0))
        return [self._after(found, answer, p) for p in self.base.split(name)]

    def _after(self, example: Prompt, answer: str, prompt: Prompt) -> Prompt:
        if prompt.messages is not None:
            turns = [*example.messages, {"role": "assistant", "content": answer}, *prompt.messages]
            return Prompt(prompt.id, messages=turns, row=prompt.row, domain=prompt.domain)
        return Prompt(prompt.id, text=f"{example.text}{answer}\n{prompt.text}", row=prompt.row, domain=prompt.domain)

    def score(self, prompt, text):
        return self.base.score(prompt, text)

    def solved(self, score):
        return self.base.solved(score)


@task_reader("shown")
def _shown(name: str) -> Shown:
    """The task after the colon, every prompt preceded by one solved training example."""
    return Shown(base=name)
