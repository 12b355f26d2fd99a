"""Splits of generated questions that never overlap: an endless stream without repeats, cut into regions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from volvelle.core.errors import UserError, unknown

SPLITS = ("train", "validation", "test")


class Stream:
    """The distinct items of `draws`, made only as far as somebody asks, in regions that take items in their order.

    Where questions repeat, the likely ones come early in a stream without repeats and the rare ones late, so that regions cut off in order
    would differ in kind (of the distinct gcd questions up to 20, two thirds of the late ones are coprime, a quarter of the early ones). So
    when more than 2 % of the draws for all regions but the last were repeats, every region is dealt from all items at random.
    regions: name -> size; key: what makes two items the same question; owner: for errors, and the seed of the dealing.
    """

    def __init__(self, draws: Iterator[Any], key: Callable[[Any], Any], regions: Mapping[str, int], owner: str):
        self.draws, self.key, self.regions, self.owner = draws, key, dict(regions), owner
        self.items: list[Any] = []
        self.seen: set[Any] = set()
        self.drawn = 0
        self.draws_for: list[int] = []  # how many draws it took to have each item

    def region(self, name: str) -> list[Any]:
        """The items of one region. UserError when the generator has not enough different questions."""
        if name not in self.regions:
            raise unknown("split", name, [r for r in self.regions if r in SPLITS], f" of {self.owner}")
        start = 0
        for other, size in self.regions.items():
            if other == name:
                if self.repetitive:
                    return [self._take(len(self.order))[i] for i in self.order[start:start + size]]
                return self._take(start + size)[start:]
            start += size

    @cached_property
    def repetitive(self) -> bool:
        """Whether more than 2 % of the draws for all regions but the last repeated a question."""
        held = sum(list(self.regions.values())[:-1])
        self._take(held)
        return bool(held) and self.draws_for[held - 1] - held > 0.02 * held

    @cached_property
    def order(self) -> list[int]:
        """A fixed random order of all items; regions take consecutive stretches of it."""
        seed = int.from_bytes(hashlib.sha256(f"{self.owner}/{self.regions}".encode()).digest()[:8], "little")
        return np.random.default_rng(seed).permutation(sum(self.regions.values())).tolist()

    def _take(self, count: int) -> list[Any]:
        repeats = 0
        while len(self.items) < count:
            item = next(self.draws)
            key = self.key(item)
            self.drawn += 1
            if key in self.seen:
                repeats += 1
                if repeats > 1000 + 20 * len(self.items):
                    raise self._too_few()
                continue
            repeats = 0
            self.seen.add(key)
            self.items.append(item)
            self.draws_for.append(self.drawn)
        return self.items[:count]

    def _too_few(self) -> UserError:
        asked, total, found = ", ".join(f"{name}={size}" for name, size in self.regions.items()), sum(self.regions.values()), len(self.items)
        rest = found - (total - self.regions.get("train", 0))
        advice = f"train={rest} would fit" if rest > 0 else "make the splits smaller or the task wider"
        return UserError(f"{self.owner}: only {found} distinct questions (in {self.drawn} draws), and {total} are asked for ({asked}); {advice}")


def not_empty(prompts: list, name: str, owner: str) -> list:
    """The prompts of a split, or a UserError where it was given no size."""
    if not prompts:
        raise UserError(f"{owner}: the {name} split is empty; give it a size (task.{name}=…) or use another split")
    return prompts
