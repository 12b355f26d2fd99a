r"""Every dataset of the package reasoning-gym as a task: endless generated questions with a verifier (arXiv 2505.24760).

`--task rg:gcd` takes a dataset by name with the generator's own difficulty, `task.config.max_value=20` changes it, and the presets
below (`--task gcd-easy`) are settings at which a model of 135M parameters is right sometimes and not always.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import field
from enum import Enum
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from volvelle.core.errors import UserError, unknown
from volvelle.core.parts import coerce, part
from volvelle.core.tasks import task_reader

from ..expressions import arithmetic, harmless
from ..extract import first_block, first_line, last_number, lenient
from ..generation import config_types, generate, scorer
from ..records import Prompt
from ..slots import LanguageTask
from ..splits import SPLITS, Stream, not_empty

Count = Annotated[int, Field(ge=0)]
EXAMPLES = ("possible_answer", "example_answer", "example_correct_answer")  # where datasets without one right answer keep an example


@part("rg")
class ReasoningGym(LanguageTask):
    """One dataset of reasoning-gym.

    config: difficulty parameters of that dataset; train, validation, test: numbers of questions, all different from each other and
    from the `shots` worked examples; data_seed: which questions. Two questions are the same when their texts are.
    format: plain = "Question: …\\nAnswer:" to be continued, chat = one user turn with `instruction` below the question.
    stop_at: strings that end a response; None = a line break in plain format (an empty line where answers have several lines).
    binary: only a full score counts, as 1; else the dataset's own score in [0, 1].
    Answers are read by `extract`: the first line (plain) or the marked answer, else the last number, else the whole text (chat).
    A response that the dataset's scorer cannot read scores 0.
    """

    preset: ClassVar[dict | None] = None
    default_model: ClassVar[str] = "smollm2"
    dataset: str
    config: dict[str, Any] = field(default_factory=dict)
    train: Annotated[int, Field(gt=0)] = 1024
    validation: Count = 64
    test: Count = 256
    data_seed: Count = 0
    shots: Count = 0
    format: Literal["plain", "chat"] = "plain"
    instruction: str = "Give the final answer between <answer> and </answer>."
    stop_at: tuple[str, ...] | None = None
    max_tokens: Annotated[int, Field(gt=0)] = 64
    binary: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.config != type(self).preset:  # a preset as it is need not be checked: that would import every generator
            object.__setattr__(self, "config", checked(self.dataset, self.config))

    @property
    def gives(self) -> frozenset[str]:
        return frozenset({"binary_rewards"}) if self.binary else frozenset()

    def label(self) -> str:
        return f"rg:{self.dataset}" if type(self) is ReasoningGym else self.part_name

    @property
    def stop(self) -> tuple[str, ...]:
        if self.stop_at is not None or self.format == "chat":
            return self.stop_at or ()
        return ("\n\n", "\nQuestion:") if self.several_lines else ("\n",)

    @property
    def several_lines(self) -> bool:
        """Whether answers have more than one line, seen from the first eight questions."""
        return any("\n" in (item["answer"] or "") for item in stream(self.source).peek(8))

    @property
    def source(self) -> tuple:
        """What decides the questions, and nothing else; equal sources share one stream."""
        sizes = (("shots", self.shots), ("test", self.test), ("validation", self.validation), ("train", self.train))
        return self.dataset, json.dumps(self.config, sort_keys=True), self.data_seed, sizes

    def split(self, name):
        if name not in SPLITS:
            raise unknown("split", name, SPLITS, f" of {self.label()}")
        return not_empty([self.prompt(item, f"{name}-{i}") for i, item in enumerate(stream(self.source).region(name))], name, self.label())

    def prompt(self, item: dict, name: str) -> Prompt:
        row = {"question": item["question"], "answer": item["answer"], "metadata": item["metadata"]}
        examples = [(x["question"], self.answer(x)) for x in stream(self.source).region("shots")]
        if self.format == "plain":
            text = "".join(f"Question: {q}\nAnswer:{_after(a)}\n\n" for q, a in examples) + f"Question: {item['question']}\nAnswer:"
            return Prompt(f"{self.dataset}/{name}", text=text, row=row, domain=self.dataset)
        turns = []
        for question, answer in examples:
            turns += [{"role": "user", "content": self._ask(question)}, {"role": "assistant", "content": f"<answer>{answer}</answer>"}]
        return Prompt(f"{self.dataset}/{name}", messages=[*turns, {"role": "user", "content": self._ask(item["question"])}], row=row,
                      domain=self.dataset)

    def _ask(self, question: str) -> str:
        return f"{question}\n{self.instruction}" if self.instruction else question

    def answer(self, row: Mapping) -> str:
        """A right answer. UserError where the dataset has none to show."""
        if row["answer"] is not None:
            return row["answer"]
        for key in EXAMPLES:
            if (example := row["metadata"].get(key)) is not None:
                return example if isinstance(example, str) else json.dumps(example)
        raise UserError(f"task {self.label()} has no worked answers to show; use shots=0 and no demonstrations")

    def score(self, prompt, text):
        row = prompt.row
        if self.format == "chat":
            found = lenient(text, numeric=row["answer"] is not None and row["answer"] == last_number(row["answer"]))
        else:
            found = first_block(text) if "\n" in (row["answer"] or "") else first_line(text)
        value = graded(self.dataset, self.config, found, row)
        return float(value >= 1.0) if self.binary else value

    def demonstration(self, prompt, rng):
        answer = self.answer(prompt.row)
        return _after(answer) if self.format == "plain" else f"<answer>{answer}</answer>"


def _after(answer: str) -> str:
    """An answer as it follows "Answer:", on lines of its own if it has several."""
    return f"\n{answer}" if "\n" in answer else f" {answer}"


@task_reader("rg")
def read(name: str) -> ReasoningGym:
    return ReasoningGym(name)


# ---------------------------------------------------------------------------------------------------------------- configurations

def checked(dataset: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with every value of the type that the dataset declares. UserError for unknown datasets, fields and refused values."""
    from reasoning_gym.factory import DATASETS

    usable = sorted(set(DATASETS) - {"composite"})
    if dataset not in usable:
        raise unknown("reasoning-gym dataset", dataset, usable)
    types = config_types(dataset)
    plain = {}
    for key, value in config.items():
        if key in ("seed", "size"):
            raise UserError(f"config.{key}: is set by {'data_seed' if key == 'seed' else 'train, validation and test'}")
        if key not in types:
            raise unknown("field", f"config.{key}", [f"config.{t}" for t in types], f" of rg:{dataset}")
        typed = coerce(types[key], value, f"config.{key}")
        plain[key] = typed if isinstance(typed, (bool, int, float, str)) or typed is None else _plain(value)
    try:
        scorer(dataset, plain)
    except Exception as error:  # the datasets check themselves with assertions, and some only when they are made
        raise UserError(f"config {plain}: refused by rg:{dataset} ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from None
    return plain


def _plain(value: Any) -> Any:
    """A value as it can stand in a configuration file."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Enum):
        return value.value
    return value.isoformat() if hasattr(value, "isoformat") else value


# --------------------------------------------------------------------------------------------------------------------- questions

class Questions(Stream):
    def peek(self, count: int) -> list[dict]:
        """The first items of whatever region."""
        return self._take(min(count, sum(self.regions.values())))


@functools.lru_cache(maxsize=8)
def stream(source: tuple) -> Questions:
    dataset, config, seed, sizes = source
    return Questions(_draws(dataset, json.loads(config), seed), lambda item: item["question"], dict(sizes), f"rg:{dataset}")


def _draws(dataset: str, config: dict, seed: int) -> Iterator[dict]:
    """Endless items; blocks grow, since every block of some datasets costs a process."""
    start = int.from_bytes(hashlib.sha256(f"{dataset}/{seed}".encode()).digest()[:4], "little") >> 1
    first = 0
    while True:
        block = min(max(first, 16), 128)  # never across the end of a chunk
        yield from generate(dataset, config, start, first, block)
        first += block


# ----------------------------------------------------------------------------------------------------------------------- scoring

def _near(text: str, row: Mapping) -> bool:
    try:
        return abs(Fraction(text.replace(",", "")) - Fraction(row["answer"])) <= Fraction(1, 10000)
    except (ValueError, ZeroDivisionError):
        return False


# Where a scorer would accept a wrong answer, or would run what the model wrote, the answer must first pass a check of ours.
CHECKS = {
    "countdown": lambda text, row: arithmetic(text) is not None,
    "puzzle24": lambda text, row: arithmetic(text) is not None,
    "simple_integration": lambda text, row: harmless(text),
    "intermediate_integration": lambda text, row: harmless(text),
    "polynomial_multiplication": lambda text, row: harmless(text),
    "complex_arithmetic": lambda text, row: "nan" not in text.lower(),
    "coin_flip": _near,
    "game_of_life_halting": lambda text, row: text.strip().lower() == str(row["answer"]).lower(),
    **dict.fromkeys(("string_insertion", "spiral_matrix", "binary_matrix"), lambda text, row: text.strip() == row["answer"].strip()),
    "n_queens": lambda text, row: text.strip() in row["metadata"]["valid_answers"],
}


def graded(dataset: str, config: Mapping[str, Any], answer: str, row: Mapping) -> float:
    """The dataset's own score of an answer, in [0, 1]; 0 for what its scorer cannot read."""
    if dataset in CHECKS and not CHECKS[dataset](answer, row):
        return 0.0
    try:
        return float(scorer(dataset, dict(config)).score_answer(answer, {k: row[k] for k in ("question", "answer", "metadata")}))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError):
        return 0.0


# ----------------------------------------------------------------------------------------------------------------------- presets

def _preset(name: str, dataset: str, train: int, validation: int, test: int, max_tokens: int = 8, **config: Any) -> None:
    """Register a setting of a dataset as a task of its own name: four worked examples, then the question."""
    fields = {"dataset": (str, dataset), "config": (dict[str, Any], field(default_factory=lambda: dict(config))), "train": (int, train),
              "validation": (int, validation), "test": (int, test), "shots": (int, 4), "max_tokens": (int, max_tokens)}
    words = {"__module__": __name__, "__doc__": f"reasoning-gym's {dataset} with {config}.", "preset": config,
             "__annotations__": {k: t for k, (t, _) in fields.items()}, **{k: v for k, (_, v) in fields.items()}}
    part(name)(type("".join(w.capitalize() for w in name.split("-")), (ReasoningGym,), words))


# Measured with SmolLM2-135M-Instruct, four worked examples: right in 2-84 % of greedy answers, more often in one of eight samples.
_preset("gcd-easy", "gcd", 200, 40, 64, max_value=20)
_preset("lcm-easy", "lcm", 64, 16, 40, max_value=12)
_preset("products-easy", "products", 48, 12, 24, max_digits=1)
_preset("count-bits-easy", "count_bits", 32, 8, 16, max_n=63)
_preset("count-primes-easy", "count_primes", 96, 24, 48, max_n=20)
_preset("chain-sum-easy", "chain_sum", 96, 24, 48, max_terms=2, max_digits=1)
_preset("chain-sum-medium", "chain_sum", 1024, 64, 256, max_terms=3, max_digits=2)
_preset("basic-arithmetic-easy", "basic_arithmetic", 256, 32, 64, max_terms=2, max_digits=1)
_preset("decimal-chain-sum-easy", "decimal_chain_sum", 1024, 64, 256, max_terms=2, max_digits=1, max_decimal_places=1)
_preset("letter-counting-easy", "letter_counting", 1024, 64, 256, min_words=2, max_words=4)
_preset("letter-jumble-easy", "letter_jumble", 512, 64, 128, max_words=1, min_words=1, min_word_len=3, max_word_len=4)
_preset("number-filtering-easy", "number_filtering", 1024, 64, 256, 24, max_numbers=4)
_preset("number-sorting-easy", "number_sorting", 1024, 64, 256, 24, max_numbers=3)
_preset("number-format-easy", "number_format", 1024, 64, 256, 16, max_num_candidates=2)
_preset("fraction-easy", "fraction_simplification", 200, 32, 64, max_value=10, max_factor=10, styles=["plain"])
_preset("simple-equations-easy", "simple_equations", 1024, 64, 256, max_terms=2, max_value=10)
_preset("needle-haystack-easy", "needle_haystack", 1024, 64, 256, min_num_statements=3, max_num_statements=6)
_preset("family-relationships-easy", "family_relationships", 1024, 64, 256, min_family_size=3, max_family_size=4)
_preset("word-sorting-easy", "word_sorting", 1024, 64, 256, 24, max_words=3)
_preset("word-reversal-easy", "word_sequence_reversal", 1024, 64, 256, 24, max_words=3)
_preset("base-conversion-easy", "base_conversion", 512, 64, 128, 12, max_base=3)
