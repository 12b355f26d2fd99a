"""How alike two token sequences are: edit distance, longest common subsequence (ROUGE-L), shared suffix. Plain integers in, no model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

Tokens = Sequence[Hashable]


def _positions(a: Tokens) -> dict[Hashable, int]:
    """token -> bits of the places where it stands in a."""
    found: dict[Hashable, int] = {}
    for i, token in enumerate(a):
        found[token] = found.get(token, 0) | 1 << i
    return found


def edit_distance(a: Tokens, b: Tokens) -> int:
    """Levenshtein distance: insertions, deletions and substitutions that turn a into b.

    Bit-parallel: one column of the table is two integers (Hyyrö 2003), so that a window of fifty tokens takes microseconds.
    """
    if not a:
        return len(b)
    where, full, last = _positions(a), (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)
    for token in b:
        match = where.get(token, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        rise, fall = down | (~(diagonal | up) & full), diagonal & up
        distance += bool(rise & last) - bool(fall & last)
        rise, fall = (rise << 1 | 1) & full, (fall << 1) & full
        up, down = fall | (~(diagonal | rise) & full), rise & diagonal & full
    return distance


def common_subsequence(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence (bit-parallel, Hyyrö 2004)."""
    where, full = _positions(a), (1 << len(a)) - 1
    row = full
    for token in b:
        match = row & where.get(token, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()


def rouge_l(a: Tokens, b: Tokens) -> float:
    """ROUGE-L F1: twice the longest common subsequence over the summed lengths; 1 for equal sequences, 0 if both are empty."""
    return 2 * common_subsequence(a, b) / (len(a) + len(b)) if a or b else 0.0


def suffix_found(a: Tokens, b: Tokens) -> int:
    """Length of the longest suffix of a that occurs anywhere in b."""
    best = 0
    for end in range(len(b)):
        length = 0
        while length <= end and length < len(a) and a[-1 - length] == b[end - length]:
            length += 1
        best = max(best, length)
    return best


def suffix_match(a: Tokens, b: Tokens) -> float:
    """The longer of both directions of `suffix_found`, over the length; a and b equally long and not empty."""
    return max(suffix_found(a, b), suffix_found(b, a)) / len(a)
