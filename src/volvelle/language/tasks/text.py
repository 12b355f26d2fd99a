"""Small character-level tasks for a model trained from scratch: prompts under 24 characters, responses under 32, exact verifiers.

Every task can show worked solutions. `noise` is the share of demonstrations that are plausible and wrong, so that a model warm-started
on them is neither hopeless nor perfect and reinforcement learning has something to do.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from volvelle.core.errors import UserError, unknown
from volvelle.core.parts import part

from ..expressions import arithmetic, numbers_used
from ..records import Prompt
from ..slots import LanguageTask
from ..splits import SPLITS, Stream, not_empty

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, eq=False)
class TextTask(LanguageTask):
    """What these tasks share. A subclass says how to draw a question, what solves it, and how it goes wrong.

    train, validation, test: numbers of questions, all different; data_seed: which ones; noise: share of wrong demonstrations.
    """

    default_model: ClassVar[str] = "tiny"
    gives: ClassVar = frozenset({"binary_rewards"})
    max_tokens: ClassVar[int] = 32
    train: Size = 2000
    validation: Count = 100
    test: Count = 200
    data_seed: Count = 0
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0

    def split(self, name):
        if name not in SPLITS:
            raise unknown("split", name, SPLITS, f" of {self.label()}")
        region = questions(self).region(name)
        return not_empty([Prompt(f"{self.part_name}/{name}-{i}", text=self.ask(q), row={"question": q, "answer": self.right(q)},
                                 domain=self.part_name) for i, q in enumerate(region)], name, self.label())

    def draw(self, rng: np.random.Generator) -> Any:
        """One question, as plain data."""
        raise NotImplementedError

    def ask(self, question: Any) -> str:
        """The prompt's text."""
        raise NotImplementedError

    def right(self, question: Any) -> str:
        """The answer that is accepted (or, where several are, one that is)."""
        raise NotImplementedError

    def solution(self, question: Any, rng: np.random.Generator) -> str:
        """A worked response that scores 1."""
        raise NotImplementedError

    def slip(self, question: Any, rng: np.random.Generator) -> str:
        """A response that looks like a solution and scores 0."""
        raise NotImplementedError

    def score(self, prompt, text):
        return float(text.rpartition(">")[2].strip() == self.right(prompt.row["question"]))

    def demonstration(self, prompt, rng):
        """A solution, or with probability `noise` a slip."""
        question = prompt.row["question"]
        return self.slip(question, rng) if rng.random() < self.noise else self.solution(question, rng)


@functools.lru_cache(maxsize=16)
def questions(task: TextTask) -> Stream:
    regions = {"test": task.test, "validation": task.validation, "train": task.train}
    return Stream(_draws(task), lambda q: task.ask(q), regions, task.label())


def _draws(task: TextTask) -> Iterator[Any]:
    rng = np.random.default_rng([task.data_seed, *task.part_name.encode()])
    while True:
        yield task.draw(rng)


def _digits(rng: np.random.Generator, low: int, high: int) -> str:
    return "".join(map(str, rng.integers(0, 10, size=int(rng.integers(low, high + 1)))))


def _ordered(low: int, high: int, what: str, most: int) -> None:
    if not low <= high <= most:
        raise UserError(f"min_{what}={low}, max_{what}={high}: expected min <= max <= {most}")


@part("digit-sum")
class DigitSum(TextTask):
    """`sum 5827:` -> `5,13,15,22>22`, the running sums and then the sum. A slip adds one digit wrongly and goes on from there."""

    min_digits: Size = 3
    max_digits: Size = 5

    def __post_init__(self):
        super().__post_init__()
        _ordered(self.min_digits, self.max_digits, "digits", 8)

    def draw(self, rng):
        return _digits(rng, self.min_digits, self.max_digits)

    def ask(self, question):
        return f"sum {question}:"

    def right(self, question):
        return str(sum(map(int, question)))

    def solution(self, question, rng):
        return self._worked(list(itertools.accumulate(map(int, question))))

    def slip(self, question, rng):
        steps = list(map(int, question))
        place = int(rng.integers(len(steps)))
        steps[place] += int(rng.choice([d for d in (-2, -1, 1, 2) if sum(steps[: place + 1]) + d >= 0]))
        return self._worked(list(itertools.accumulate(steps)))

    def _worked(self, sums: list[int]) -> str:
        return f"{','.join(map(str, sums))}>{sums[-1]}"


@part("sort-digits")
class SortDigits(TextTask):
    """`sort 5283:` -> `2358`. A slip exchanges two different neighbours of the sorted digits."""

    min_digits: Size = 4
    max_digits: Size = 7

    def __post_init__(self):
        super().__post_init__()
        _ordered(self.min_digits, self.max_digits, "digits", 16)
        if self.min_digits < 2:
            raise UserError(f"min_digits={self.min_digits}: expected at least 2")

    def draw(self, rng):
        while len(set(digits := _digits(rng, self.min_digits, self.max_digits))) < 2:
            pass
        return digits

    def ask(self, question):
        return f"sort {question}:"

    def right(self, question):
        return "".join(sorted(question))

    def solution(self, question, rng):
        return self.right(question)

    def slip(self, question, rng):
        text = self.right(question)
        i = int(rng.choice([i for i in range(len(text) - 1) if text[i] != text[i + 1]]))
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


@part("reverse")
class Reverse(TextTask):
    """`rev kxqa:` -> `aqxk`. A slip exchanges two different neighbours."""

    min_letters: Size = 4
    max_letters: Size = 8

    def __post_init__(self):
        super().__post_init__()
        _ordered(self.min_letters, self.max_letters, "letters", 18)
        if self.min_letters < 2:
            raise UserError(f"min_letters={self.min_letters}: expected at least 2")

    def draw(self, rng):
        size = int(rng.integers(self.min_letters, self.max_letters + 1))
        while len(set(word := "".join(chr(97 + i) for i in rng.integers(0, 26, size=size)))) < 2:
            pass
        return word

    def ask(self, question):
        return f"rev {question}:"

    def right(self, question):
        return question[::-1]

    def solution(self, question, rng):
        return self.right(question)

    slip = SortDigits.slip


@part("pause")
class Pause(TextTask):
    """`max 5283:` -> `...>8`: as many dots as one likes, up to `most`, then the largest digit. Dots hold no information.

    right_short, right_long: the share of right demonstrations with no dot and with `most` dots (in between: a straight line), so that a
    warm-started model is right more often after longer pauses, or after shorter ones. How long to pause, and to be right after any pause,
    are then both there to be learnt. A slip answers with another digit of the question. `noise` lowers both shares.
    """

    most: Annotated[int, Field(gt=0, le=24)] = 7
    right_short: Annotated[float, Field(ge=0, le=1)] = 0.3
    right_long: Annotated[float, Field(ge=0, le=1)] = 0.8

    def draw(self, rng):
        while len(set(digits := _digits(rng, 4, 4))) < 2:
            pass
        return digits

    def ask(self, question):
        return f"max {question}:"

    def right(self, question):
        return max(question)

    def solution(self, question, rng):
        return f"{'.' * int(rng.integers(self.most + 1))}>{self.right(question)}"

    def slip(self, question, rng):
        wrong = str(rng.choice(sorted(set(question) - {self.right(question)})))
        return f"{'.' * int(rng.integers(self.most + 1))}>{wrong}"

    def score(self, prompt, text):
        dots, sign, answer = text.partition(">")
        return float(bool(sign) and not dots.strip(".") and answer == self.right(prompt.row["question"]))

    def demonstration(self, prompt, rng):
        """Dots, and an answer that is right with the share that goes with their number."""
        dots = int(rng.integers(self.most + 1))
        share = (self.right_short + (self.right_long - self.right_short) * dots / self.most) * (1 - self.noise)
        said = self.solution if rng.random() < share else self.slip
        return "." * dots + said(prompt.row["question"], rng).lstrip(".")


@part("modular")
class Modular(TextTask):
    """`17*23 mod 7:` -> `391>6`, the product and then its remainder. A slip takes the product wrongly, or answers without it.

    Factors up to `max_factor`, moduli 2 to `max_modulus`. Guessing is right once in about `modulus` times.
    """

    max_factor: Annotated[int, Field(gt=1, le=999)] = 20
    max_modulus: Annotated[int, Field(gt=1, le=99)] = 9
    train: Size = 1500

    def draw(self, rng):
        return [int(rng.integers(2, self.max_factor + 1)), int(rng.integers(2, self.max_factor + 1)), int(rng.integers(2, self.max_modulus + 1))]

    def ask(self, question):
        a, b, m = question
        return f"{a}*{b} mod {m}:"

    def right(self, question):
        a, b, m = question
        return str(a * b % m)

    def solution(self, question, rng):
        a, b, _ = question
        return f"{a * b}>{self.right(question)}"

    def slip(self, question, rng):
        a, b, m = question
        wrong = int(rng.choice([n for n in range(max(0, a * b - m), a * b + m) if (n - a * b) % m]))
        return f"{wrong}>{wrong % m}" if rng.random() < 0.5 else f">{wrong % m}"


@part("countdown-text")
class CountdownText(TextTask):
    """`3 7 2=13:` -> `3*2+7`: each number once, with + - * and parentheses, to reach the target. Any right expression scores 1.

    Numbers 1 to `max_number`, targets 1 to `max_target`. A slip uses each number once and misses the target.
    """

    numbers: Annotated[int, Field(ge=2, le=4)] = 3
    max_number: Annotated[int, Field(gt=1, le=99)] = 12
    max_target: Annotated[int, Field(gt=1, le=999)] = 50
    train: Size = 1500

    def draw(self, rng):
        while True:
            numbers = sorted(int(n) for n in rng.integers(1, self.max_number + 1, size=self.numbers))
            reachable = sorted({v for _, v in expressions(tuple(numbers)) if 1 <= v <= self.max_target})
            if reachable:
                return [numbers, int(rng.choice(reachable))]

    def ask(self, question):
        numbers, target = question
        return f"{' '.join(map(str, numbers))}={target}:"

    def right(self, question):
        numbers, target = question
        return next(text for text, value in expressions(tuple(numbers)) if value == target)

    def solution(self, question, rng):
        numbers, target = question
        return str(rng.choice([text for text, value in expressions(tuple(numbers)) if value == target]))

    def slip(self, question, rng):
        numbers, target = question
        return str(rng.choice([text for text, value in expressions(tuple(numbers)) if value != target]))

    def score(self, prompt, text):
        numbers, target = prompt.row["question"]
        return float(arithmetic(text) == target and numbers_used(text) == sorted(numbers))


@functools.lru_cache(maxsize=4096)
def expressions(numbers: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """Every way to combine all the numbers with + - *, as (text, value), sorted; parentheses only where they are needed."""
    found = {_text(tree): _value(tree) for order in set(itertools.permutations(numbers)) for tree in _trees(order)}
    return tuple(sorted(found.items()))


def _trees(order: tuple[int, ...]) -> Iterator[Any]:
    if len(order) == 1:
        yield order[0]
    for cut in range(1, len(order)):
        for left, right in itertools.product(_trees(order[:cut]), _trees(order[cut:])):
            yield from ((op, left, right) for op in "+-*")


def _value(tree: Any) -> int:
    if isinstance(tree, int):
        return tree
    op, left, right = tree
    a, b = _value(left), _value(right)
    return a + b if op == "+" else a - b if op == "-" else a * b


def _text(tree: Any, inside: str = "", on_right: bool = False) -> str:
    if isinstance(tree, int):
        return str(tree)
    op, left, right = tree
    text = f"{_text(left, op)}{op}{_text(right, op, True)}"
    weak = op in "+-" and (inside == "*" or (inside == "-" and on_right))
    return f"({text})" if weak else text
