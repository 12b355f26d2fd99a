"""Who draws the contexts of training: the slot `Teacher`, uniform draws, and the Gaussian mixtures on learning progress that other teachers build on."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from volvelle.core.parts import Part, part

Share = Annotated[float, Field(ge=0, le=1)]
Criterion = Literal["aic", "bic", "aicc"]
NEIGHBOUR_FROM = 6  # results needed before a nearest earlier one is compared with
TREE_FROM = 4096    # earlier results from which on a search tree pays


class Origin(NamedTuple):
    """Where a context came from: source 0 chance, 1 the teacher's own mixture, 2 an expert's; which of its mixtures; which Gaussian of it."""

    source: int = 0
    mixture: int = -1
    gaussian: int = -1


CHANCE = Origin()


class Teacher(Part):
    """Slot: `live(bounds [2, d], rng, run, parameters)` gives a LiveTeacher. run: of the learner that is taught (None outside of one); parameters: numbers
    that tell this learner from others, where they are known."""

    slot: ClassVar[str] = "teacher"

    def live(self, bounds: np.ndarray, rng: np.random.Generator, run: Any = None, parameters: tuple[float, ...] = ()) -> "LiveTeacher":
        raise NotImplementedError

    def check_task(self, task: Any, test_every: int) -> None:
        """UserError if it cannot teach that task, tested every so many steps (0: never)."""


class LiveTeacher:
    """Keeps every context [n, d], result [n] (between 0 and 1) and origin [n, 3]. Subclasses say `draw() -> context [d], origin` and, if they learn from
    results, `learn(context, result, origin)`. Several contexts may be out at a time; each result finds the origin of its context."""

    def __init__(self, bounds: np.ndarray, rng: np.random.Generator):
        self.low, self.high, self.rng = *np.asarray(bounds, float), rng
        d = len(self.low)
        self._rows, self.count = np.zeros((256, d + 4)), 0  # context, result, origin
        self._out: dict[bytes, list[Origin]] = {}

    contexts = property(lambda self: self._rows[: self.count, : len(self.low)])
    results = property(lambda self: self._rows[: self.count, len(self.low)])
    origins = property(lambda self: self._rows[: self.count, len(self.low) + 1 :].astype(np.int64))

    def uniform(self) -> np.ndarray:
        return self.rng.uniform(self.low, self.high)

    def draw(self) -> tuple[np.ndarray, Origin]:
        return self.uniform(), CHANCE

    def sample(self) -> np.ndarray:
        context, origin = self.draw()
        self._out.setdefault(context.tobytes(), []).append(origin)
        return context

    def update(self, context: np.ndarray, result: float) -> None:
        waiting = self._out.get(context.tobytes())
        origin = waiting.pop(0) if waiting else CHANCE
        if waiting == []:
            del self._out[context.tobytes()]
        self.learn(context, result, origin)

    def learn(self, context: np.ndarray, result: float, origin: Origin) -> None:
        if self.count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[self.count] = *context, result, *origin
        self.count += 1

    def forget_open(self) -> None:
        """The contexts now out will not be heard of: their episodes are cut."""
        self._out.clear()

    def tested(self, scores: np.ndarray) -> bool:
        """Hears the learner's test scores [N]; True if the learner shall begin anew."""
        return False

    def metrics(self) -> dict[str, float]:
        return {}

    def record(self) -> dict[str, Any]:
        """What a later teacher may learn from: contexts, results, origins, and the trajectory of mixtures."""
        return {"contexts": self.contexts.copy(), "results": self.results.copy(), "origins": self.origins, "trajectory": []}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows[: self.count].copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows, self.count = np.concatenate([state["rows"], np.zeros((256, len(self.low) + 4))]), len(state["rows"])


@part("uniform")
class Uniform(Teacher):
    """Contexts uniformly from their ranges."""

    def live(self, bounds, rng, run=None, parameters=()):
        return LiveTeacher(bounds, rng)


def absolute_progress(contexts: np.ndarray, results: np.ndarray, context: np.ndarray, result: float) -> float:
    """|result - that of the nearest earlier context|; 0 until more than five results are there. contexts [n, d], results [n]: the earlier ones."""
    if len(results) < NEIGHBOUR_FROM:
        return 0.0
    return float(abs(result - results[np.square(contexts - context).sum(1).argmin()]))


class Nearest:
    """The index of the nearest of many contexts: a tree over the first 2^k of them (so that it depends on their number alone), the others one by one."""

    def __init__(self):
        self.covered, self.tree = 0, None

    def __call__(self, contexts: np.ndarray, context: np.ndarray) -> int:
        wanted = 1 << (len(contexts).bit_length() - 1) if len(contexts) >= TREE_FROM else 0
        if wanted != self.covered:
            from scipy.spatial import cKDTree

            self.tree, self.covered = cKDTree(contexts[:wanted]), wanted
        rest = np.square(contexts[self.covered :] - context).sum(1)
        at = int(rest.argmin()) if len(rest) else 0
        if not self.covered:
            return at
        distance, index = self.tree.query(context)
        return self.covered + at if len(rest) and rest[at] < distance**2 else int(index)


def progress_probabilities(progress: np.ndarray) -> np.ndarray:
    """In proportion to mean progress [k]; uniform if there is none."""
    total = progress.sum()
    return progress / total if total > 0 else np.full(len(progress), 1 / len(progress))


def fit_mixture(points: np.ndarray, most: int, criterion: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(means [k, D], covariances [k, D, D]) of the full-covariance Gaussian mixture with 2 to `most` components that the criterion likes best."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    D, best, chosen = points.shape[1], np.inf, None
    for k in range(2, most + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # cut after 100 rounds, or fewer distinct points than components: still a mixture
            mixture = GaussianMixture(k, covariance_type="full", random_state=seed).fit(points)
        value = mixture.bic(points) if criterion == "bic" else mixture.aic(points)
        if criterion == "aicc":  # the correction's count of parameters is that of the authors' code, with d the dimension of the points
            free = k * (D * (D - 1) / 2 + 2 * D + 1) - 1
            value += 2 * free * (free + 1) / (len(points) - free - 1) if len(points) > free + 1 else np.inf
        if value < best or chosen is None:
            best, chosen = value, mixture
    return chosen.means_, chosen.covariances_


def pick(progress: np.ndarray, rng: np.random.Generator) -> int:
    return int(rng.choice(len(progress), p=progress_probabilities(np.maximum(progress, 0.0))))


def joint_draw(mean: np.ndarray, covariance: np.ndarray, d: int, rng: np.random.Generator, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """A context [d]: a draw from the whole Gaussian, of which the first d coordinates are kept and cut to the bounds."""
    return np.clip((mean + np.linalg.cholesky(covariance) @ rng.standard_normal(len(mean)))[:d], low, high)


@part("alp-gmm")
class AlpGmm(Teacher):
    """Practise where results change most (arXiv 1910.07224): Gaussian mixtures over (context, absolute learning progress), refitted every `fit_every`
    episodes on the last ones; a Gaussian is chosen in proportion to its mean progress. random: share of uniform draws."""

    random: Share = 0.2
    fit_every: Annotated[int, Field(gt=10)] = 250
    components: Annotated[int, Field(ge=2)] = 10
    criterion: Criterion = "aic"

    def live(self, bounds, rng, run=None, parameters=()):
        return AlpGmmTeacher(self, bounds, rng)


class MixtureTeacher(LiveTeacher):
    """Refits a mixture over `points()` every fit_every results; Gaussians are chosen by `interest(means, covariances)` [k]. trajectory: (results before
    the fit, means, covariances) of every fit."""

    def __init__(self, part: Any, bounds: np.ndarray, rng: np.random.Generator):
        super().__init__(bounds, rng)
        self.part = part
        self.trajectory: list[tuple[int, np.ndarray, np.ndarray]] = []

    def points(self) -> np.ndarray:
        raise NotImplementedError

    def interest(self, means: np.ndarray, covariances: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def draw(self):
        if not self.trajectory or self.rng.random() < self.part.random:
            return self.uniform(), CHANCE
        _, means, covariances = self.trajectory[-1]
        i = pick(self.interest(means, covariances), self.rng)
        return joint_draw(means[i], covariances[i], len(self.low), self.rng, self.low, self.high), Origin(1, len(self.trajectory) - 1, i)

    def learn(self, context, result, origin):
        super().learn(context, result, origin)
        if self.count % self.part.fit_every == 0:
            made = fit_mixture(self.points(), self.part.components, self.part.criterion, int(self.rng.integers(2**31)))
            self.trajectory.append((self.count, *made))

    def record(self):
        return super().record() | {"trajectory": [list(t) for t in self.trajectory]}

    def state_dict(self):
        return super().state_dict() | {"trajectory": [list(t) for t in self.trajectory]}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.trajectory = [tuple(t) for t in state["trajectory"]]


class AlpGmmTeacher(MixtureTeacher):
    def __init__(self, part: AlpGmm, bounds, rng):
        super().__init__(part, bounds, rng)
        self.nearest, self.progress, self.latest = Nearest(), np.zeros(0), 0.0
        self._recent: list[float] = []  # progress not yet in the array

    def points(self):
        self.settle()
        every = self.part.fit_every
        return np.column_stack([self.contexts[-every:], self.progress[-every:]])

    def interest(self, means, covariances):
        return means[:, -1]

    def learn(self, context, result, origin):
        late = self.count >= NEIGHBOUR_FROM
        self.latest = float(abs(result - self.results[self.nearest(self.contexts, context)])) if late else 0.0
        self._recent.append(self.latest)
        super().learn(context, result, origin)

    def settle(self) -> None:
        self.progress, self._recent = np.append(self.progress, self._recent), []

    def metrics(self):
        self.settle()
        return {"progress": float(self.progress[-self.part.fit_every :].mean())} if self.count else {}

    def state_dict(self):
        self.settle()
        return super().state_dict() | {"progress": self.progress}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.progress, self._recent = state["progress"], []


@part("covar-gmm")
class CovarGmm(Teacher):
    """Practise where results rise with time (Moulin-Frier et al. 2014): mixtures over (context, result, time), a Gaussian in proportion to its covariance of
    result and time where that is positive. absolute: where they fall, too."""

    random: Share = 0.2
    fit_every: Annotated[int, Field(gt=10)] = 250
    components: Annotated[int, Field(ge=2)] = 10
    criterion: Criterion = "aic"
    absolute: bool = False

    def live(self, bounds, rng, run=None, parameters=()):
        return CovarGmmTeacher(self, bounds, rng)


class CovarGmmTeacher(MixtureTeacher):
    def points(self):
        every = self.part.fit_every
        return np.column_stack([self.contexts[-every:], self.results[-every:], np.linspace(0.0, 1.0, every)])

    def interest(self, means, covariances):
        together = covariances[:, -1, -2]
        return np.abs(together) if self.part.absolute else np.maximum(together, 0.0)
