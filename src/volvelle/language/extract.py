r"""The one place where an answer is read out of a response. Every verifier and every paper uses these, so that two of them never disagree.

Of several answers in a response the LAST counts. `None` means that there is no answer of that kind.
"""

from __future__ import annotations

import re

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})+(?:\.\d+)?(?![\w,])|(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?!\w)")


def first_line(text: str) -> str:
    """What stands before the first line break, without surrounding blanks: the answer to a "Question: …, Answer:" prompt."""
    return text.split("\n", 1)[0].strip()


def first_block(text: str) -> str:
    """What stands before the first empty line (a line of blanks is not empty), for answers of several lines."""
    return text.strip().split("\n\n", 1)[0].rstrip()


def tagged(text: str, tag: str = "answer") -> str | None:
    """The content of the last closed `<tag>…</tag>`."""
    found = re.findall(rf"<{re.escape(tag)}>((?:(?!<{re.escape(tag)}>).)*?)</{re.escape(tag)}>", text, flags=re.DOTALL)
    return found[-1].strip() if found else None


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` whose braces balance."""
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}") if text[i - 1] != "\\" else 0
            if depth == 0:
                return text[start:i].strip()
    return None


def last_number(text: str) -> str | None:
    """The last number, thousands separators removed: "so 1,234 in all." -> "1234"; "-3.5" keeps its sign; "7-5" ends in "5"."""
    found = None
    for match in NUMBER.finditer(text):
        signed = match.group()[0] in "+-" and match.start() and text[match.start() - 1] in "0123456789)"
        found = match.group()[1:] if signed else match.group()
    return None if found is None else found.replace(",", "").removeprefix("+")


def marked(text: str) -> str | None:
    r"""The answer that the response itself marks, with `<answer>` tags or `\boxed{}`; where both stand, the later one."""
    box, tag = boxed(text), tagged(text)
    if box is None or tag is None:
        return tag if box is None else box
    if (inside := boxed(tag)) is not None:
        return inside
    return box if text.rfind("\\boxed") > text.rfind("</answer>") else tag


def lenient(text: str, numeric: bool = False) -> str:
    """The marked answer; else, where a number is expected, the last number; else the whole text without surrounding blanks."""
    found = marked(text)
    if numeric:
        number = last_number(text if found is None else found)
        return number if number is not None else (found or text).strip()
    return text.strip() if found is None else found


def section(text: str, start: str | None, end: str | None = None, strict: bool = False) -> str | None:
    """What stands between the first `start` and the first `end` after it.

    A missing mark leaves that side open, or with `strict` means that there is no answer (None). `start=None`: from the beginning.
    """
    if start is not None:
        _, mark, rest = text.partition(start)
        if not mark and strict:
            return None
        text = rest.lstrip() if mark else text
    if end is not None:
        head, mark, _ = text.partition(end)
        if not mark and strict:
            return None
        text = head.rstrip() if mark else text
    return text
