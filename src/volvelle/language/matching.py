"""When a response gives the right answer: word for word, by its last number, or as mathematics (math-verify)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from decimal import Decimal

from .extract import last_number, lenient, marked

SECONDS = 5  # for reading or comparing one expression, where this can be limited (the main thread)


def exact(text: str, answer: str) -> bool:
    """The marked answer, or the whole text, is `answer` up to surrounding blanks."""
    return lenient(text) == answer.strip()


def number(text: str, answer: str) -> bool:
    """The last number of the marked answer, or of the whole text, equals the last number of `answer`. ValueError if that has none."""
    right = last_number(answer)
    if right is None:
        raise ValueError(f"the answer {answer!r} holds no number")
    found = last_number(lenient(text, numeric=True))
    return found is not None and Decimal(found) == Decimal(right)


def mathematics(text: str, answer: str) -> bool:
    """The marked answer, or the last expression of the text, equals `answer` as mathematics. ValueError if `answer` cannot be read."""
    right = _read(answer)
    if not right:
        raise ValueError(f"the answer {answer!r} cannot be read as mathematics")
    found = marked(text)
    return _equal(right, _read(text) if found is None else _read(found))


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> tuple:
    """What math-verify reads in a text, as plain expressions first, then as LaTeX without its dollar signs."""
    from math_verify import parse

    latex = "\\" in text or "^" in text
    bare = not any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
    for attempt in ([f"${text}$", text] if latex and bare else [text, f"${text}$"] if bare else [text]):
        if found := parse(attempt, parsing_timeout=_limit()):
            return tuple(found)
    return ()


def _equal(right: tuple, found: tuple) -> bool:
    from math_verify import verify

    return bool(found) and bool(verify(list(right), list(found), timeout_seconds=_limit()))


def _limit() -> int | None:
    return SECONDS if threading.current_thread() is threading.main_thread() else None


MATCHES: dict[str, Callable[[str, str], bool]] = {"exact": exact, "number": number, "math": mathematics}
