"""Teachers that keep boxes of contexts instead of mixtures: RIAC's regions, ADR's growing bounds, and a window that somebody who knows moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import part

from .teachers import CHANCE, LiveTeacher, Origin, Share, Teacher, pick

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]


# ---- RIAC

@part("riac")
class Riac(Teacher):
    """Split the space where learning progress differs (Baranes & Oudeyer 2009, settings of arXiv 1910.07224). A region with `size` results is cut in
    two, by the best of `tries` random cuts: the product of the halves' sizes times how much their progress differs. random, worst: shares of uniform
    draws, and of contexts close to the worst recent one of an interesting region; the rest is uniform inside a region chosen by its progress."""

    size: Annotated[int, Field(ge=6)] = 200
    tries: Count = 50
    random: Share = 0.2
    worst: Share = 0.1
    narrowest: Share = 1 / 6

    def __post_init__(self):
        super().__post_init__()
        if self.random + self.worst > 1:
            raise UserError(f"riac: random={self.random} and worst={self.worst} are shares of one whole; expected at most 1 together")

    def live(self, bounds, rng, run=None, parameters=()):
        return RiacTeacher(self, bounds, rng)


@dataclass
class Region:
    low: np.ndarray
    high: np.ndarray
    members: list[int] = field(default_factory=list)  # indices of results

    def inside(self, context: np.ndarray) -> bool:
        return bool((context >= self.low).all() and (context <= self.high).all())


def halves_progress(results: np.ndarray) -> float:
    """|mean of the later half - mean of the earlier half| of results [n] in order of time; 0 for fewer than three."""
    half = len(results) // 2
    return float(abs(results[-half:].mean() - results[-2 * half : -half].mean())) if len(results) > 2 else 0.0


class RiacTeacher(LiveTeacher):
    def __init__(self, part: Riac, bounds, rng):
        super().__init__(bounds, rng)
        self.part, self.regions = part, [Region(self.low.copy(), self.high.copy())]

    def progress(self) -> np.ndarray:
        return np.array([halves_progress(self.results[r.members]) for r in self.regions])

    def draw(self):
        mode = self.rng.random()
        if mode < self.part.random:
            return self.uniform(), CHANCE
        i = pick(self.progress(), self.rng)
        region = self.regions[i]
        if mode < self.part.random + self.part.worst and region.members:
            recent = region.members[-50:]
            worst = self.contexts[recent[int(self.results[recent].argmin())]]
            near = worst + self.rng.normal(0.0, 0.1 * (region.high - region.low))
            return np.clip(near, region.low, region.high), Origin(1, 0, i)
        return self.rng.uniform(region.low, region.high), Origin(1, 0, i)

    def learn(self, context, result, origin):
        super().learn(context, result, origin)
        region = next(r for r in self.regions if r.inside(context))
        region.members.append(self.count - 1)
        if len(region.members) >= self.part.size and not self.split(region):
            del region.members[: self.part.size // 4]  # nowhere to cut: the oldest quarter goes

    def split(self, region: Region) -> bool:
        best, found, fewest = 0.0, None, max(3, self.part.size // 10)
        members = np.array(region.members)
        for _ in range(self.part.tries):
            d, low, high = int(self.rng.integers(len(self.low))), region.low, region.high
            cut = self.rng.uniform(low[d], high[d])
            if min(cut - low[d], high[d] - cut) < self.part.narrowest * (self.high - self.low)[d]:
                continue
            below = self.contexts[members, d] <= cut
            one, other = members[below], members[~below]
            if min(len(one), len(other)) < fewest:
                continue
            score = len(one) * len(other) * abs(halves_progress(self.results[one]) - halves_progress(self.results[other]))
            if score > best:
                best, found = score, (d, cut, one.tolist(), other.tolist())
        if found is None:
            return False
        d, cut, one, other = found
        upper, lower = region.high.copy(), region.low.copy()
        upper[d] = lower[d] = cut
        at = self.regions.index(region)
        self.regions[at : at + 1] = [Region(region.low, upper, one), Region(lower, region.high, other)]
        return True

    def metrics(self):
        return {"regions": float(len(self.regions))}

    def state_dict(self):
        return super().state_dict() | {"regions": [{"low": r.low, "high": r.high, "members": list(r.members)} for r in self.regions]}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.regions = [Region(r["low"], r["high"], list(r["members"])) for r in state["regions"]]


# ---- ADR

@part("adr")
class Adr(Teacher):
    """Automatic domain randomisation (arXiv 1910.07113): a box that starts at one context, `start` (shares of the ranges, easiest first; the middle if left
    out), and grows by `step` of the range at a bound whose last `queue` results average at least `good`, and shrinks below `bad`. boundary: share of
    contexts on a bound, the others uniform inside the box."""

    start_at: tuple[float, ...] = ()
    step: Positive = 0.1
    good: Share = 0.75
    bad: Share | None = None
    boundary: Share = 0.5
    queue: Count = 10

    def live(self, bounds, rng, run=None, parameters=()):
        if self.start_at and len(self.start_at) != bounds.shape[1]:
            raise UserError(f"adr: start_at={self.start_at}; expected {bounds.shape[1]} shares, one per parameter")
        return AdrTeacher(self, bounds, rng)


class AdrTeacher(LiveTeacher):
    """box [2, d]: the lower and upper bounds now; queues[side][d]: results on each of them."""

    def __init__(self, part: Adr, bounds, rng):
        super().__init__(bounds, rng)
        d = len(self.low)
        self.part, share = part, np.array(part.start_at or (0.5,) * d)
        self.box = np.stack([self.low + share * (self.high - self.low)] * 2)
        self.queues: list[list[list[float]]] = [[[] for _ in range(d)] for _ in range(2)]

    def draw(self):
        context = self.rng.uniform(self.box[0], self.box[1])
        if self.rng.random() >= self.part.boundary:
            return context, CHANCE
        side, d = int(self.rng.integers(2)), int(self.rng.integers(len(self.low)))
        context[d] = self.box[side, d]
        return context, Origin(1, side, d)

    def learn(self, context, result, origin):
        super().learn(context, result, origin)
        if origin.source != 1:
            return
        side, d = origin.mixture, origin.gaussian
        queue = self.queues[side][d]
        queue.append(float(result))
        if len(queue) < self.part.queue:
            return
        mean, outward = float(np.mean(queue)), (-1, 1)[side] * self.part.step * (self.high - self.low)[d]
        queue.clear()
        if mean >= self.part.good:
            self.box[side, d] = np.clip(self.box[side, d] + outward, self.low[d], self.high[d])
        elif self.part.bad is not None and mean < self.part.bad:
            moved = self.box[side, d] - outward
            self.box[side, d] = max(moved, self.box[0, d]) if side else min(moved, self.box[1, d])

    def metrics(self):
        return {"volume": float(np.prod((self.box[1] - self.box[0]) / (self.high - self.low)))}

    def state_dict(self):
        return super().state_dict() | {"box": self.box.copy(), "queues": [[list(q) for q in side] for side in self.queues]}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.box, self.queues = state["box"].copy(), [[list(q) for q in side] for side in state["queues"]]


# ---- the oracle's window

@part("window")
class Window(Teacher):
    """The oracle of arXiv 1910.07224: somebody knows which way contexts get harder. A window, `width` of every range wide, moves by `step` of the range along
    `harder` (+1, -1 or 0 per parameter: from low to high, the other way, or the whole range at once) when, at every `every`th episode, the last `every` results average at least `good`."""

    harder: tuple[float, ...] = ()
    width: Share = 1 / 6
    step: Positive = 0.02
    good: Share = 0.75
    every: Count = 50

    def live(self, bounds, rng, run=None, parameters=()):
        if len(self.harder) != bounds.shape[1] or any(h not in (-1, 0, 1) for h in self.harder):
            raise UserError(f"window: harder={self.harder}; expected {bounds.shape[1]} of -1, 0 or 1: which way each parameter gets harder")
        return WindowTeacher(self, bounds, rng)


class WindowTeacher(LiveTeacher):
    """place: how far the window has gone, between 0 and 1 - width of the range."""

    def __init__(self, part: Window, bounds, rng: np.random.Generator):
        super().__init__(bounds, rng)
        self.part, self.place = part, 0.0

    def window(self) -> tuple[np.ndarray, np.ndarray]:
        harder, width, span = np.array(self.part.harder), self.part.width, self.high - self.low
        start = np.where(harder > 0, self.place, np.where(harder < 0, 1 - width - self.place, 0.0))
        return self.low + start * span, self.low + np.where(harder == 0, 1.0, start + width) * span

    def draw(self):
        return self.rng.uniform(*self.window()), CHANCE

    def learn(self, context, result, origin):
        super().learn(context, result, origin)
        if self.count % self.part.every == 0 and self.results[-self.part.every :].mean() >= self.part.good:
            self.place = min(1 - self.part.width, self.place + self.part.step)

    def metrics(self) -> dict[str, Any]:
        return {"place": float(self.place)}

    def state_dict(self):
        return super().state_dict() | {"place": self.place}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.place = state["place"]
