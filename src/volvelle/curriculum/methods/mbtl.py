"""MBTL: model-based transfer learning, choosing the few contexts to train in (arXiv 2408.04498, NeurIPS 2024).

Problem: tasks differ in a context (a length, a mass, a speed limit). A policy for every context is dear, one for all is mediocre.
Idea: train few policies, each in one context, and use in every context the best of them as it is. Where to train next is Bayesian optimisation with
an explicit model of transfer. A Gaussian process predicts J(x), the score reached when training in x; a policy loses c |x - x'| on the way to x'.
The next context maximises the expected marginal gain

    a(x) = mean over x' of  max( mu(x) + lambda sigma(x) - c |x - x'| - V(x'), 0 ),      V(x') = best score observed in x' so far

with mu, sigma of the process fitted to the scores so far and lambda = sqrt(ln(k + 1)) after k trainings; the first context is the middle one.
Pick it where contexts are few ordered numbers, transfer fades with distance, and testing is cheap beside training. Not for unordered or
many-dimensional contexts, nor where one policy covers everything already.
Distances and c are in steps of the grid, as in the released code. More than one parameter (Euclidean distance) is our extension.
The claim's three trainings were chosen after six pilot seeds of up to six trainings; gap filling (greedy, equidistant) does as well there, and after five
or six trainings random choice had caught up with it: with many trainings the slope of the paper, .005, says too little about these pendulums.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from volvelle.control.evaluation import Evaluation
from volvelle.control.methods.a2c import a2c
from volvelle.control.methods.dqn import dqn
from volvelle.control.methods.ppo import ppo, ppo_continuous
from volvelle.control.methods.sac import sac
from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import Recipe, method, part, preset

from ..choosers import MIXTURE, Chooser, Equidistant, Greedy, History, Independent, Multitask, Oracle, RandomChooser
from ..families import Family
from ..pictures import Trainings
from ..transfer import Children, SwingUp, TransferTask, check_trainable

NonNegative = Annotated[float, Field(ge=0)]


def distances(coordinates: np.ndarray) -> np.ndarray:
    """[N, N]: Euclidean, in steps of the grid."""
    return np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)


def marginal_gain(optimistic: np.ndarray, distance: np.ndarray, slope: float, best: np.ndarray) -> np.ndarray:
    """a(x) [N] of optimistic set points [N] (mu + lambda sigma), distances [N, N], and the best scores so far [N]."""
    return np.maximum(optimistic[:, None] - slope * distance - best, 0.0).mean(1)


def fit(coordinates: np.ndarray, targets: np.ndarray, everywhere: np.ndarray, noise: float, restarts: int, seed: int, mean: float = 0.0):
    """(mu, sigma) [N] everywhere, of a Gaussian process with a squared-exponential kernel fitted by marginal likelihood to targets [k]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel

    kernel = ConstantKernel(1.0, (1e-3, 1e3)) * RBF(1.0, (1e-2, 1e2))
    process = GaussianProcessRegressor(kernel, alpha=noise**2, n_restarts_optimizer=restarts, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # with one or two points the length scale ends at a bound
        mu, sigma = process.fit(coordinates, targets - mean).predict(everywhere, return_std=True)
    return mu + mean, sigma


def fitted_slope(history: History) -> float:
    """Least squares through 0 of |score lost| on distance, over the rows trained so far."""
    distance = distances(history.coordinates)
    d = np.concatenate([distance[i] for i in history.trained])
    lost = np.concatenate([np.abs(row - row[i]) for i, row in zip(history.trained, history.rows)])
    return float(d @ lost / (d @ d))


@part("mbtl")
class ModelBased(Chooser):
    """Gaussian process for the score, linear loss with distance.

    slope: score lost per step of the grid, or "fit" (least squares on the rows so far). noise: deviation of the process's noise. optimism: lambda,
    log sqrt(ln(k + 1)), none 0, one 1, decay 1/(k + 1), sampled |normal| averaged over 500 draws. acquisition: gain (above), or without transfer:
    improvement (mean predicted score above the best so far), ucb, lcb (1.96 deviations), variance. prior: mean of the process far from data.
    tolerance: stop when the largest gain is below it.
    """

    slope: NonNegative | Literal["fit"] = 0.005
    noise: Annotated[float, Field(gt=0)] = 0.1
    optimism: Literal["log", "none", "one", "decay", "sampled"] = "log"
    acquisition: Literal["gain", "improvement", "ucb", "lcb", "variance"] = "gain"
    prior: Literal["zero", "running"] = "zero"
    restarts: Annotated[int, Field(ge=0)] = 9
    tolerance: NonNegative = 0.0

    def start(self, run):
        return _ModelBased(self, run.rng("process"))

    def factors(self, k: int, rng: np.random.Generator) -> np.ndarray:
        """lambda after k trainings; several are averaged over."""
        return np.abs(rng.standard_normal(500)) if self.optimism == "sampled" else np.array(
            [{"log": np.sqrt(np.log(k + 1)), "none": 0.0, "one": 1.0, "decay": 1 / (k + 1)}[self.optimism]])


class _ModelBased:
    deploy = "best"

    def __init__(self, part: ModelBased, rng: np.random.Generator):
        self.part, self.rng = part, rng

    def slope(self, history: History) -> float:
        return fitted_slope(history) if self.part.slope == "fit" else self.part.slope

    def model(self, history: History) -> tuple[np.ndarray, np.ndarray]:
        """(mu, sigma). The targets are the scores by which a context was served when it was trained."""
        targets = np.array(history.served)
        mean = float(targets.mean()) if self.part.prior == "running" else 0.0
        return fit(history.coordinates[history.trained], targets, history.coordinates, self.part.noise, self.part.restarts, int(self.rng.integers(2**31)), mean)

    def gains(self, history: History) -> np.ndarray:
        part, (mu, sigma) = self.part, self.model(history)
        if part.acquisition == "improvement":
            return np.maximum(mu - max(history.served), 0.0)
        if part.acquisition != "gain":
            return {"ucb": mu + 1.96 * sigma, "lcb": mu - 1.96 * sigma, "variance": sigma}[part.acquisition]
        distance, slope = distances(history.coordinates), self.slope(history)
        return np.mean([marginal_gain(mu + f * sigma, distance, slope, history.best) for f in part.factors(len(history.trained), self.rng)], 0)

    def next(self, history):
        if not history.trained:
            return history.middle
        if len(history.trained) == len(history.coordinates):
            return None
        gains = self.gains(history)
        gains[history.trained] = -np.inf
        return None if self.part.acquisition == "gain" and gains.max() < self.part.tolerance else int(gains.argmax())


@part("mbtl")
class Mbtl(Recipe):
    """One step chooses a context, trains a policy there and tests it everywhere; as many steps as trainings are affordable.

    recipe, child_steps: how a policy is trained (families of environments only); chooser: which context is next; gap: how scores not yet observed
    are predicted in the metric `predicted` (linear: `slope`; fitted: least squares; none: no loss); evaluation.episodes: per context.
    """

    wing: ClassVar[str] = "curriculum"
    recipe: Recipe = ppo_continuous
    child_steps: Annotated[int, Field(gt=0)] = 30
    chooser: Chooser = ModelBased()
    gap: Literal["linear", "fitted", "none"] = "linear"
    slope: NonNegative = 0.005
    evaluation: Evaluation = Evaluation(episodes=4)

    def validate(self, task=None):
        super().validate(task)
        if isinstance(task, TransferTask):
            return
        if not isinstance(task, Family):
            raise UserError(f"mbtl: task {task.label() if task else None} has no contexts; accepted: a family such as family:Pendulum-v1?l=0.3..2.2, "
                            "transfer:FILE.npz, or swing-up")
        check_trainable("mbtl", self.recipe, task)

    def start(self, run):
        return _Live(self, run)


class _Live:
    def __init__(self, part: Mbtl, run):
        task = run.config.task
        self.part = part
        self.source = task.source(run.seed) if isinstance(task, TransferTask) else Children(run, task, part.recipe, part.child_steps, part.evaluation.episodes)
        self.chooser = run.start("chooser", part.chooser)
        self.history = History(self.source.coordinates, run.config.steps, self.source.known)
        self.curve: list[float] = []
        self.finished = False

    def step(self):
        chosen = self.chooser.next(self.history)
        if chosen is None:
            self.finished = True
            return {"trainings": len(self.history.trained)}
        self.history.add(chosen, self.source.mixture() if chosen == MIXTURE else self.source.row(chosen))
        self.curve.append(self.zero_shot())
        self.finished = len(self.history.trained) == (1 if chosen == MIXTURE else len(self.history.coordinates))
        return {"context": float(chosen), "zero_shot": self.curve[-1], "trainings": len(self.history.trained)}

    def zero_shot(self) -> float:
        """Mean over contexts of the score of the policy that serves it."""
        if self.chooser.deploy == "own":
            return float(np.mean([row[i] for i, row in zip(self.history.trained, self.history.rows)]))
        return float(self.history.best.mean())

    def predicted(self) -> tuple[np.ndarray, np.ndarray]:
        """(predicted score [N], index of the policy that promises it [N]) from own scores and the gap model: for contexts that cannot be tested."""
        history = self.history
        slope = {"linear": self.part.slope, "fitted": fitted_slope(history), "none": 0.0}[self.part.gap]
        promised = np.array([row[i] - slope * distances(history.coordinates)[i] for i, row in zip(history.trained, history.rows)])
        return promised.max(0), promised.argmax(0)

    def evaluate(self):
        """zero_shot: with the best observed policy per context; mean_zero_shot: averaged over the trainings so far; untested: policies picked by the model
        instead of by testing; predicted: what the model promises; bound: the best of all trainings, where known."""
        history = self.history
        if not history.trained:
            return {"zero_shot": 0.0, "trainings": 0.0}
        found = {"zero_shot": self.curve[-1], "mean_zero_shot": float(np.mean(self.curve)), "trainings": float(len(self.curve))}
        if MIXTURE not in history.trained:
            promised, picked = self.predicted()
            found |= {"predicted": float(promised.mean()), "untested": float(np.array(history.rows)[picked, np.arange(len(picked))].mean())}
        return found | ({"bound": float(history.known.max(0).mean())} if history.known is not None else {})

    def product(self) -> dict[str, Any]:
        return {"curriculum": Trainings(self.source, self.history, self.curve)}

    def state_dict(self):
        return {"trained": list(self.history.trained), "rows": np.array(self.history.rows), "served": list(self.history.served), "curve": list(self.curve)}

    def load_state_dict(self, state):
        self.history.trained, self.history.rows = list(state["trained"]), list(state["rows"])
        self.history.served, self.curve = list(state["served"]), list(state["curve"])


for _name, _recipe in {"ppo": ppo, "ppo-continuous": ppo_continuous, "a2c": a2c, "dqn": dqn, "sac": sac}.items():
    preset(_name, _recipe)  # recipe=dqn: what trains the policies, by name

mbtl, grid = Mbtl(), SwingUp().points
claim = Claim(
    says="three pendulum lengths chosen by a model of transfer serve all 24 lengths better than three random ones, than one policy trained on all lengths, and than "
         "a policy trained for each",
    arms={"mbtl": mbtl, "random": mbtl(chooser=RandomChooser()), "equidistant": mbtl(chooser=Equidistant()), "greedy": mbtl(chooser=Greedy()),
          "oracle": mbtl(chooser=Oracle()), "multitask": mbtl(chooser=Multitask()), "independent": Arm(mbtl(chooser=Independent()), steps=grid)},
    task="swing-up", steps=3, seeds=20, equal="trainings", minutes=3, run={"checkpoint_every": 0},
    quick={"seeds": 2, "task": SwingUp(points=5, iterations=2, population=16), "arms": {"mbtl": mbtl, "random": mbtl(chooser=RandomChooser()), "multitask": mbtl(chooser=Multitask()),
                                                                                     "independent": Arm(mbtl(chooser=Independent()), steps=5)}},
    expects=("mbtl > random on mean_zero_shot", "mbtl > multitask on zero_shot", "mbtl > independent on zero_shot"))

method("mbtl", mbtl, title="Model-based transfer: choosing the few contexts to train in", source="arXiv 2408.04498", claim=claim)
