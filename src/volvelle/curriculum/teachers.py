"""Who draws the contexts of training: the slot `Teacher`, uniform draws, and the Gaussian mixtures on learning progress that other teachers build on."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from volvelle.core.parts import Part, part

Share = Annotated[float, Field(ge=0, le=1)]
NEIGHBOUR_FROM = 6  # results needed before a nearest earlier one is compared with


class Teacher(Part):
    """Slot: `live(bounds [2, d], rng)` gives an object with `sample() -> context [d]`, `update(context, result)` (result between 0 and 1), `metrics()`,
    `state_dict()` and `load_state_dict()`."""

    slot: ClassVar[str] = "teacher"

    def live(self, bounds: np.ndarray, rng: np.random.Generator) -> Any:
        raise NotImplementedError


@part("uniform")
class Uniform(Teacher):
    """Contexts uniformly from their ranges."""

    def live(self, bounds, rng):
        return UniformTeacher(bounds, rng)


class UniformTeacher:
    """Base of live teachers: keeps every context [n, d] and result [n]."""

    def __init__(self, bounds: np.ndarray, rng: np.random.Generator):
        self.low, self.high, self.rng = *np.asarray(bounds, float), rng
        self.contexts, self.results = np.zeros((0, len(self.low))), np.zeros(0)

    def uniform(self) -> np.ndarray:
        return self.rng.uniform(self.low, self.high)

    def sample(self) -> np.ndarray:
        return self.uniform()

    def update(self, context: np.ndarray, result: float) -> None:
        self.contexts, self.results = np.vstack([self.contexts, context]), np.append(self.results, result)

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"contexts": self.contexts, "results": self.results}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.contexts, self.results = state["contexts"], state["results"]


def absolute_progress(contexts: np.ndarray, results: np.ndarray, context: np.ndarray, result: float) -> float:
    """|result - that of the nearest earlier context|; 0 until more than five results are there. contexts [n, d], results [n]: the earlier ones."""
    if len(results) < NEIGHBOUR_FROM:
        return 0.0
    return float(abs(result - results[np.square(contexts - context).sum(1).argmin()]))


def progress_probabilities(progress: np.ndarray) -> np.ndarray:
    """In proportion to mean progress [k]; uniform if there is none."""
    total = progress.sum()
    return progress / total if total > 0 else np.full(len(progress), 1 / len(progress))


def fit_mixture(points: np.ndarray, most: int, criterion: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(means [k, D], covariances [k, D, D]) of the full-covariance Gaussian mixture with 2 to `most` components that the criterion likes best."""
    from sklearn.mixture import GaussianMixture

    D, best, chosen = points.shape[1], np.inf, None
    for k in range(2, most + 1):
        mixture = GaussianMixture(k, covariance_type="full", random_state=seed).fit(points)
        value = mixture.bic(points) if criterion == "bic" else mixture.aic(points)
        if criterion == "aicc":  # the correction's count of parameters is that of the authors' code, with d the dimension of the points
            free = k * (D * (D - 1) / 2 + 2 * D + 1) - 1
            value += 2 * free * (free + 1) / (len(points) - free - 1) if len(points) > free + 1 else np.inf
        if value < best or chosen is None:
            best, chosen = value, mixture
    return chosen.means_, chosen.covariances_


@part("alp-gmm")
class AlpGmm(Teacher):
    """Practise where results change most (arXiv 1910.07224): Gaussian mixtures over (context, absolute learning progress), refitted every `fit_every`
    episodes on the last ones; a Gaussian is chosen in proportion to its mean progress. random: share of uniform draws."""

    random: Share = 0.2
    fit_every: Annotated[int, Field(gt=10)] = 250
    components: Annotated[int, Field(ge=2)] = 10
    criterion: Literal["aic", "bic", "aicc"] = "aic"

    def live(self, bounds, rng):
        return AlpGmmTeacher(self, bounds, rng)


class AlpGmmTeacher(UniformTeacher):
    """trajectory: (episode, means, covariances) of every fit."""

    def __init__(self, part: AlpGmm, bounds: np.ndarray, rng: np.random.Generator):
        super().__init__(bounds, rng)
        self.part, self.progress = part, np.zeros(0)
        self.trajectory: list[tuple[int, np.ndarray, np.ndarray]] = []

    def sample(self):
        if not self.trajectory or self.rng.random() < self.part.random:
            return self.uniform()
        _, means, covariances = self.trajectory[-1]
        return draw(means, covariances, self.rng, self.low, self.high)

    def update(self, context, result):
        self.progress = np.append(self.progress, absolute_progress(self.contexts, self.results, context, result))
        super().update(context, result)
        n, every = len(self.results), self.part.fit_every
        if n % every == 0:
            points = np.column_stack([self.contexts[-every:], self.progress[-every:]])
            self.trajectory.append((n, *fit_mixture(points, self.part.components, self.part.criterion, int(self.rng.integers(2**31)))))

    def metrics(self):
        return {"progress": float(self.progress[-self.part.fit_every :].mean())} if len(self.progress) else {}

    def state_dict(self):
        return super().state_dict() | {"progress": self.progress, "trajectory": [list(t) for t in self.trajectory]}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.progress, self.trajectory = state["progress"], [tuple(t) for t in state["trajectory"]]


def draw(means: np.ndarray, covariances: np.ndarray, rng: np.random.Generator, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """A context [d]: a Gaussian in proportion to the last coordinate of its mean (progress), a joint draw from it, the progress dropped, cut to the bounds."""
    i = rng.choice(len(means), p=progress_probabilities(np.maximum(means[:, -1], 0.0)))
    return np.clip(rng.multivariate_normal(means[i], covariances[i])[:-1], low, high)
