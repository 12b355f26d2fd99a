r"""The user's own prompts: a table of any kind that `datasets` reads, one prompt a row.

`--task file:problems.jsonl` with columns `prompt` and `answer` is enough. JSON lines, CSV and TSV are read here, so that a broken line
can be named by its number; Parquet, Arrow, text files and folders written by `save_to_disk` go through `datasets`.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from volvelle.core.errors import RunStopped, UserError, unknown
from volvelle.core.parts import part
from volvelle.core.tasks import task_reader

from ..matching import MATCHES
from ..records import Prompt
from ..slots import LanguageTask
from ..splits import SPLITS

Share = Annotated[float, Field(ge=0, lt=1)]
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


@part("file")
class File(LanguageTask):
    """Prompts from `path`, with a verifier.

    prompt, answer, messages, domain: names of columns. `messages` (a list of turns with role and content) takes the place of `prompt`;
    answer=none: no verifier, the reward is your own. template: text around the prompt, with {prompt} where it goes; format=chat makes
    it one user turn.
    match: exact = the marked answer (or the whole response) word for word; number = the last number; math = math-verify.
    validation, test: shares of the rows (0 = no such split), or other files of the same kind. split_by: "share" gives exact shares,
    "hash" decides every prompt by itself, so that adding rows moves none. Rows with the same prompt always stay in one split, and a
    prompt that stands in two files is refused: the splits never overlap.
    """

    default_model: ClassVar[str] = "smollm2"
    path: str
    prompt: str = "prompt"
    answer: str | None = "answer"
    messages: str | None = None
    domain: str | None = None
    template: str = "{prompt}"
    format: Literal["plain", "chat"] = "plain"
    match: Literal["exact", "number", "math"] = "exact"
    validation: Share | str = 0.1
    test: Share | str = 0.1
    split_by: Literal["share", "hash"] = "share"
    data_seed: Annotated[int, Field(ge=0)] = 0
    stop: tuple[str, ...] = ()
    max_tokens: Annotated[int, Field(gt=0)] = 256

    def __post_init__(self):
        for name in ("validation", "test"):
            object.__setattr__(self, name, _number(getattr(self, name)))
        super().__post_init__()
        if "{prompt}" not in self.template:
            raise UserError(f"template={self.template!r}: must hold {{prompt}} where the prompt goes")
        if sum(v for v in (self.validation, self.test) if isinstance(v, float)) >= 1:
            raise UserError(f"validation={self.validation} and test={self.test} leave no rows to train on")

    @property
    def gives(self):
        return frozenset({"binary_rewards"}) if self.answer is not None else frozenset()

    def label(self):
        return f"file:{Path(self.path).stem}"

    def split(self, name):
        if name not in SPLITS:
            raise unknown("split", name, SPLITS, f" of {self.label()}")
        stamps = tuple(_stamp(p) for p in (self.path, self.validation, self.test) if isinstance(p, str))
        prompts = _split(self, stamps)[name]
        if not prompts:
            size = sum(map(len, _split(self, stamps).values()))
            raise UserError(f"{self.label()}: no rows for {name} ({size} rows, validation={self.validation}, test={self.test})")
        return list(prompts)

    def score(self, prompt, text):
        if self.answer is None:
            raise RunStopped(f"task {self.label()} has no answers (answer=none) to score prompt {prompt.id!r} with; give reward=module:function")
        try:
            return float(MATCHES[self.match](text, str(prompt.row[self.answer])))
        except ValueError as error:
            raise RunStopped(f"prompt {prompt.id!r}: {error}, so match={self.match} cannot be used") from None

    def demonstration(self, prompt, rng):
        """The answer itself."""
        if self.answer is None:
            raise UserError(f"task {self.label()} has no answers (answer=none), so no demonstrations")
        return str(prompt.row[self.answer])

    def read_prompt(self, row: dict[str, Any], where: str, name: str) -> Prompt:
        """One row as a prompt. UserError naming the row for an empty prompt, a missing answer or turns of another shape."""
        columns = {k: v for k, v in row.items() if k != "prompt"}  # a function reward gets the prompt as its first argument
        domain = str(row[self.domain]) if self.domain else ""
        if self.answer is not None and row[self.answer] is None:
            raise UserError(f"{where}: column {self.answer!r} is empty; give an answer, or say task.answer=none and use your own reward")
        if self.messages is not None:
            turns = row[self.messages]
            good = isinstance(turns, list) and turns and all(isinstance(t, dict) and {"role", "content"} <= set(t) for t in turns)
            if not good:
                raise UserError(f"{where}: column {self.messages!r} must be a list of turns, each with 'role' and 'content'")
            turns = [{"role": t["role"], "content": t["content"]} for t in turns]
            return Prompt(name, messages=turns, row=columns, domain=domain)
        text = row[self.prompt]
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: column {self.prompt!r} must be text, and is {text!r}")
        text = self.template.replace("{prompt}", text)
        if self.format == "chat":
            return Prompt(name, messages=[{"role": "user", "content": text}], row=columns, domain=domain)
        return Prompt(name, text=text, row=columns, domain=domain)


def _number(value: float | str) -> float | str:
    """Text that is a number (from the command line) as that number; other text is a path."""
    try:
        return float(value)
    except ValueError:
        return value


@task_reader("file")
def read(path: str) -> File:
    return File(path)


# ------------------------------------------------------------------------------------------------------------------------ splits

def _stamp(path: str) -> tuple[str, int, int]:
    """What tells one state of a file from another."""
    try:
        found = Path(path).stat()
    except OSError:
        raise UserError(f"file {path!r} does not exist") from None
    return path, found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=8)
def _split(task: File, stamps: tuple) -> dict[str, list[Prompt]]:
    found = {"train": _prompts(task, task.path, Path(task.path).stem)}
    for name in ("validation", "test"):
        if isinstance(own := getattr(task, name), str):
            found[name] = _prompts(task, own, f"{name}:{Path(own).stem}")
    shares = {name: getattr(task, name) for name in ("test", "validation") if name not in found}
    if shares:
        found |= _shares(found["train"], shares, task)
    seen: dict[str, Prompt] = {}
    for name in SPLITS:
        for key, prompt in {_key(p): p for p in found[name]}.items():
            if key in seen:
                raise UserError(f"{task.label()}: prompt {prompt.id} ({name}) also stands in another split, as {seen[key].id}; "
                                "splits may not overlap")
        seen |= {_key(p): p for p in found[name]}
    return found


def _key(prompt: Prompt) -> str:
    return prompt.text if prompt.text is not None else json.dumps(prompt.messages, sort_keys=True)


def _shares(prompts: list[Prompt], shares: dict[str, float], task: File) -> dict[str, list[Prompt]]:
    """Cut by a hash of the prompt: exact shares of the different prompts in the order of their hashes, or each by its own hash."""
    order = {k: hashlib.sha256(f"{task.data_seed}/{k}".encode()).digest() for k in map(_key, prompts)}
    if task.split_by == "share":
        ranked, home, first = sorted(order, key=order.get), {}, 0
        for name, share in shares.items():
            count = max(1, round(share * len(ranked))) if share else 0
            home |= dict.fromkeys(ranked[first : first + count], name)
            first += count
    else:
        test = shares.get("test", 0.0)
        bounds = {"test": (0.0, test), "validation": (test, test + shares.get("validation", 0.0))}
        where = {k: int.from_bytes(h[:8], "big") / 2**64 for k, h in order.items()}
        home = {k: name for k, at in where.items() for name, (low, high) in bounds.items() if low <= at < high}
    out = {name: [] for name in ("train", *shares)}
    for prompt in prompts:
        out[home.get(_key(prompt), "train")].append(prompt)
    return out


# ----------------------------------------------------------------------------------------------------------------------- reading

def _prompts(task: File, path: str, name: str) -> list[Prompt]:
    rows = read_rows(path)
    if not rows:
        raise UserError(f"file {path!r} holds no rows")
    columns = list(rows[0][1])
    wanted = {"messages": task.messages} if task.messages is not None else {"prompt": task.prompt}
    wanted |= {"answer": task.answer, "domain": task.domain}
    for field_name, column in wanted.items():
        if column is not None and column not in columns:
            raise UserError(f"file {path!r} has no column {column!r} (task.{field_name}); there are: {', '.join(columns)}")
    out = []
    for number, row in rows:
        where = f"{path} row {number}"
        if missing := [c for c in wanted.values() if c is not None and c not in row]:
            raise UserError(f"{where}: column {missing[0]!r} is missing; there are: {', '.join(row)}")
        out.append(task.read_prompt(row, where, f"{name}/{number}"))
    return out


def read_rows(path: str) -> list[tuple[int, dict[str, Any]]]:
    """(number, row) of every row. Lines of text formats are counted from 1 as an editor does, rows of tables from 1.

    UserError for a file that is missing, of an unknown kind, or malformed (with the line).
    """
    file = Path(path)
    if not file.exists():
        raise UserError(f"file {path!r} does not exist")
    kind = file.suffix.lower()
    if file.is_dir() or kind in (".parquet", ".arrow", ".txt"):
        return _read_table(file, kind)
    if kind not in KINDS:
        raise UserError(f"file {path!r}: unknown kind {kind or '(no ending)'!r}; accepted: {', '.join(KINDS)}, or a folder of datasets")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"file {path!r} is not UTF-8 text (byte {error.start})") from None
    if kind in (".csv", ".tsv"):
        return _read_csv(path, text, "\t" if kind == ".tsv" else ",")
    if kind == ".json":
        return _read_json(path, text)
    return [(i, _row(path, i, line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _row(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number}: not JSON ({error.msg.lower()} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise UserError(f"{path} line {number}: a {type(row).__name__}; expected an object with named columns")
    return row


def _read_json(path: str, text: str) -> list[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(text or "[]")
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not JSON ({error.msg.lower()}); for one object a line name the file .jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"file {path!r}: expected a JSON list of objects")
    return list(enumerate(rows, 1))


def _read_csv(path: str, text: str, separator: str) -> list[tuple[int, dict[str, Any]]]:
    """Every cell stays text: nothing turns 007 into 7."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, header = [], None
    try:
        for cells in reader:
            if header is None:
                header = cells
            elif cells and len(cells) != len(header):
                raise UserError(f"{path} line {reader.line_num}: {len(cells)} cells; the header has {len(header)} ({', '.join(header)})")
            elif cells:
                rows.append((reader.line_num, dict(zip(header, cells))))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: malformed ({error})") from None
    return rows


def _read_table(file: Path, kind: str) -> list[tuple[int, dict[str, Any]]]:
    import datasets
    import pyarrow

    try:
        if file.is_dir():
            table = datasets.load_from_disk(str(file))
        elif kind == ".arrow":
            table = datasets.Dataset.from_file(str(file))
        elif kind == ".parquet":
            import pyarrow.parquet

            table = datasets.Dataset(pyarrow.parquet.read_table(file))
        else:
            table = datasets.Dataset.from_dict({"prompt": [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]})
    except (OSError, ValueError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"file {str(file)!r} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(table, datasets.Dataset):
        raise UserError(f"folder {str(file)!r} holds several splits ({', '.join(table)}); name one, {file}/{next(iter(table))}")
    return list(enumerate(table.to_list(), 1))
