"""Gradient-boosted trees as a Trainable: one tree per step, fitted to the gradients at the outputs (arXiv 2407.08250).

theta_k(x) = theta_{k-1}(x) - lr * h_k(x); a leaf of h_k holds the mean gradient of its samples. Autograd stops at the outputs: they are the
parameters. Trees, split search and files are those of the package gbrl.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import Part, part

Count = Annotated[int, Field(gt=0)]
LOWEST = 1e-8  # the learning rate at which a linear schedule ends
JUNK = (slice(20, 24), slice(32, 40))  # bytes of a gbrl 1.1.9 file that mean nothing: padding, and the reserved capacity


@part("trees")
class Trees(Part):
    """How trees grow. depth: tests on a path; bins: candidate thresholds per number; grow: one test per level ("oblivious") or per node ("greedy").

    score: "cosine" on raw gradients, or "l2" on gradients standardised per output, which keeps large value gradients from deciding every
    split; candidates: thresholds at quantiles of the batch or spaced uniformly; least: samples a leaf must have; control_variates: the momentum (decay
    cv_decay) of past leaf values as a baseline of the gradients; weights: of the features, in split search;
    outputs: "sgd", or "adam" with moments rolled over the trees at prediction; distil_above: once an ensemble has more trees than this, it
    is fitted by squared error with `distil_to` trees of depth `distil_depth` and step size `distil_lr` (None: never).
    """

    slot: ClassVar[str] = "trees"
    depth: Annotated[int, Field(ge=1, le=12)] = 4
    bins: Count = 256
    grow: Literal["oblivious", "greedy"] = "oblivious"
    score: Literal["cosine", "l2"] = "cosine"
    candidates: Literal["quantile", "uniform"] = "quantile"
    least: Annotated[int, Field(ge=0)] = 0
    control_variates: bool = False
    cv_decay: Annotated[float, Field(gt=0, lt=1)] = 0.9
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    outputs: Literal["sgd", "adam"] = "sgd"
    distil_above: Count | None = None
    distil_to: Count = 100
    distil_depth: Annotated[int, Field(ge=1, le=12)] = 4
    distil_lr: Annotated[float, Field(gt=0, le=1)] = 0.1


def engine():
    """The package's C++ class."""
    try:
        from gbrl import GBRL_CPP
    except ImportError:
        raise UserError("boosted trees need the package gbrl; pip install 'volvelle[control]'") from None
    return GBRL_CPP


@contextlib.contextmanager
def quiet():
    """Without what the C++ library prints when it reads a file."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def to_bytes(model: Any) -> bytes:
    """The model's own file format; the same trees always give the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gbrl_model"
        if model.save(str(path)) != 0:
            raise RunStopped("the tree ensemble could not be written")
        found = bytearray(path.read_bytes())
    for junk in JUNK:
        found[junk] = bytes(junk.stop - junk.start)
    return bytes(found)


def from_bytes(blob: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gbrl_model"
        path.write_bytes(blob)
        try:
            with quiet():
                return engine().load(str(path))
        except RuntimeError as error:
            raise RunStopped(f"the tree ensemble cannot be read: {error}") from error


class Ensemble:
    """One ensemble: arrays [N, features] -> [N, width]. `rates`: (start, stop, learning rate) per slice of the outputs.

    categorical: columns of codes, tested for equality; total: trees over which the rates fall linearly to 0 (None: constant);
    rows: the most samples that a step fits: more quantiles than rows - 1 are the same thresholds again, and gbrl's search takes as long as it has bins.
    After a distillation, `student` holds the fitted trees and `model` those grown since.
    """

    def __init__(self, part: Trees, features: int, categorical: Sequence[int], width: int, rates: Sequence[tuple[int, int, float]], total: int | None = None,
                 rows: int | None = None):
        if part.weights is not None and len(part.weights) != features:
            raise UserError(f"trees.weights: has {len(part.weights)} numbers; the observations have {features}")
        if part.weights is not None and part.grow == "greedy" and 0 < len(categorical) < features:
            raise UserError("trees.weights with trees.grow=greedy: gbrl orders features of two kinds otherwise there; accepted: trees.grow=oblivious")
        if part.control_variates and part.outputs == "adam":
            raise UserError("trees.control_variates needs leaf values, which adam hides; accepted: trees.outputs=sgd")
        self.part, self.features, self.width, self.rates, self.total = part, features, width, list(rates), total
        self.categorical = list(categorical)
        self.bins = part.bins if rows is None or part.candidates != "quantile" else max(1, min(part.bins, rows - 1))
        self.numerical = [i for i in range(features) if i not in set(categorical)]
        self.words = np.array([b"-1"], "S128")
        self.student: Any = None
        self.before = 0  # trees that a distillation has replaced
        self.model = self.grow()

    def grow(self) -> Any:
        """A model without trees that goes on where `before` trees left off."""
        p = self.part
        model = engine()(input_dim=self.features, output_dim=self.width, policy_dim=self.width, max_depth=p.depth, min_data_in_leaf=p.least, n_bins=self.bins,
                         par_th=2**30, split_score_func=p.score, generator_type=p.candidates, use_control_variates=False,
                         grow_policy=p.grow, verbose=0, device="cpu")
        for start, stop, rate in self.rates:
            schedule: dict[str, Any] = {"scheduler": "Const", "init_lr": self.rate(rate, self.before)}
            if self.total is not None and self.before < self.total:
                schedule |= {"scheduler": "Linear", "stop_lr": LOWEST, "T": self.total - self.before}
            model.set_optimizer(algo={"sgd": "SGD", "adam": "Adam"}[p.outputs], start_idx=start, stop_idx=stop, **schedule)
        return self.prepared(model)

    def prepared(self, model: Any) -> Any:
        mask = np.ones(self.features, bool)
        mask[self.categorical] = False
        place = np.where(mask, np.cumsum(mask) - 1, np.cumsum(~mask) - 1).astype(np.int32)
        model.set_feature_mapping(np.ascontiguousarray(place), mask)
        model.set_feature_weights(np.asarray(self.part.weights if self.part.weights is not None else np.ones(self.features), np.float32))
        model.set_bias(np.zeros(self.width, np.float32))
        return model

    def split(self, x: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """[N, features] -> the numbers, and the categories as the fixed strings that gbrl compares (None where there are none)."""
        if not self.categorical:
            return np.ascontiguousarray(x, np.float32), None
        codes = x[:, self.categorical].astype(np.int64) + 1
        if (most := int(codes.max(initial=0))) >= len(self.words):
            self.words = np.array([str(i - 1).encode() for i in range(most + 64)], "S128")
        return (np.ascontiguousarray(x[:, self.numerical], np.float32) if self.numerical else None), np.ascontiguousarray(self.words[codes])

    @property
    def trees(self) -> int:
        return self.model.get_num_trees() + (self.student.get_num_trees() if self.student is not None else 0)

    def predict(self, x: np.ndarray) -> np.ndarray:
        numbers, words = self.split(x)
        made = np.asarray(self.model.predict(numbers, words, 0, 0)).reshape(len(x), self.width)
        if self.student is not None:
            made = made + np.asarray(self.student.predict(numbers, words, 0, 0)).reshape(len(x), self.width)
        return made

    def step(self, x: np.ndarray, gradients: np.ndarray) -> None:
        """Fit one tree to per-sample gradients [N, width]."""
        numbers, words = self.split(x)
        if self.part.control_variates and self.model.get_num_trees():
            gradients = control_variates(gradients, self.momentum(numbers, words))
        try:
            self.model.step(obs=numbers, categorical_obs=words, grads=np.ascontiguousarray(gradients, np.float32))
        except MemoryError:
            raise RunStopped(f"gbrl cannot reserve the memory of trees with trees.depth={self.part.depth} trees.grow={self.part.grow}; make trees.depth smaller") from None

    def momentum(self, numbers, words) -> np.ndarray:
        """Exponential mean of the leaf values in which each sample fell, over the trees so far, newest weighing most; [N, width].

        Trees that would weigh less than e^-100 are left out.
        """
        beta, trees = self.part.cv_decay, self.model.get_num_trees()
        first = max(0, trees - int(100 / (1 - beta)))
        total: Any = 0.0
        for k in range(first, trees):
            rates = np.concatenate([np.full(stop - start, self.rate(rate, self.before + k)) for start, stop, rate in self.rates])
            leaves = -np.asarray(self.model.predict(numbers, words, k, k + 1)).reshape(-1, self.width) / rates
            total = beta * total + (1 - beta) * leaves
        return total / np.sqrt(1 - beta**trees)

    def rate(self, rate: float, k: int) -> float:
        """The learning rate of tree k."""
        return rate if self.total is None else LOWEST + (rate - LOWEST) * max(self.total - k, 0) / self.total

    def distil(self, x: np.ndarray) -> float:
        """Replace all trees by `distil_to` ones fitted to their predictions on x; returns the root mean squared error there."""
        p, wanted = self.part, self.predict(x)
        student = engine()(input_dim=self.features, output_dim=self.width, policy_dim=self.width, max_depth=p.distil_depth, n_bins=p.bins, par_th=2**30,
                           split_score_func="l2", generator_type="quantile", grow_policy="oblivious", verbose=0, device="cpu")
        student.set_optimizer(algo="SGD", scheduler="Const", init_lr=p.distil_lr, start_idx=0, stop_idx=self.width)
        self.prepared(student)
        numbers, words = self.split(x)
        for _ in range(p.distil_to):
            made = np.asarray(student.predict(numbers, words, 0, 0)).reshape(wanted.shape)
            student.step(obs=numbers, categorical_obs=words, grads=np.ascontiguousarray(made - wanted, np.float32))
        self.before += self.model.get_num_trees()
        self.student, self.model = student, self.grow()
        return float(np.sqrt(np.mean((self.predict(x) - wanted) ** 2)))

    def shap(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """SHAP values [N, features, width] and base values [N, width]; base + their sum over features is the prediction."""
        from gbrl.common.utils import get_poly_vectors

        numbers, words = self.split(x)
        values, base = np.zeros((len(x), self.features, self.width)), np.zeros((len(x), self.width))
        for model, depth in ((self.model, self.part.depth), (self.student, self.part.distil_depth)):
            if model is None or not model.get_num_trees():
                continue
            points, norms, offset = (np.ascontiguousarray(v) for v in get_poly_vectors(depth, np.dtype("float32")))
            phi, start = model.ensemble_shap_and_base(numbers, words, norms, points, offset)
            values += np.asarray(phi).reshape(values.shape)
            base += np.asarray(start).reshape(base.shape)
        return values, base

    def state_dict(self) -> dict[str, Any]:
        model = to_bytes(self.model) if self.model.get_num_trees() else None  # an empty model's file does not know its features
        return {"model": model, "student": to_bytes(self.student) if self.student is not None else None, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before, self.student = state["before"], from_bytes(state["student"]) if state["student"] is not None else None
        self.model = from_bytes(state["model"]) if state["model"] is not None else self.grow()
        data = self.model.get_metadata()
        if (data["input_dim"], data["output_dim"]) != (self.features, self.width):
            raise RunStopped(f"the tree ensemble maps {data['input_dim']} features to {data['output_dim']} outputs; expected {self.features} and {self.width}")


class Forest(nn.Module):
    """An ensemble per seed: [S, N, features] -> [S, N, width]. With gradients on, the outputs are leaves of the graph, kept for `Boosted.step`."""

    def __init__(self, seeds: int, part: Trees, features: int, categorical: Sequence[int], width: int, rates: Sequence[tuple[int, int, float]],
                 rows: int | None = None):
        super().__init__()
        self.ensembles = [Ensemble(part, features, categorical, width, rates, rows=rows) for _ in range(seeds)]
        self.part, self.rates = part, list(rates)
        self.last: tuple[np.ndarray, Tensor] | None = None

    def anneal(self, total: int) -> None:
        """Let the learning rates fall linearly over `total` trees. Only before the first tree."""
        for e in self.ensembles:
            e.total = total
            e.model = e.grow()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().cpu().numpy()
        outputs = torch.from_numpy(np.stack([e.predict(r) for e, r in zip(self.ensembles, rows, strict=True)])).to(x.device)
        if torch.is_grad_enabled():
            self.last = rows, outputs.requires_grad_()
        return outputs

    @property
    def trees(self) -> int:
        """Trees of the largest ensemble."""
        return max(e.trees for e in self.ensembles)

    def shap(self, x: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[S, N, features] -> SHAP values [S, N, features, width], base values [S, N, width]."""
        made = [e.shap(np.asarray(r)) for e, r in zip(self.ensembles, np.asarray(x), strict=True)]
        return np.stack([v for v, _ in made]), np.stack([b for _, b in made])

    def blobs(self) -> dict[str, Any]:
        return {str(i): e.state_dict() for i, e in enumerate(self.ensembles)}

    def load_blobs(self, blobs: dict[str, Any], where: str) -> None:
        if len(blobs) != len(self.ensembles):
            raise RunStopped(f"{where}: holds {len(blobs)} tree ensembles; expected {len(self.ensembles)}")
        for i, e in enumerate(self.ensembles):
            e.load_state_dict(blobs[str(i)])


def control_variates(gradients: np.ndarray, momentum: np.ndarray) -> np.ndarray:
    """g - alpha (m - mean m) with alpha = clip(cov(g, m) / var(m), -1, 1) per output: less variance, the same mean. Both [N, width]."""
    centred = momentum - momentum.mean(0)
    variance = np.square(centred).mean(0)
    covariance = ((gradients - gradients.mean(0)) * centred).mean(0)
    alpha = np.clip(np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 0), -1, 1)
    return gradients - alpha * centred


def clip_rows(gradients: Tensor, bound: float | None) -> Tensor:
    """Rows [..., D] scaled to an L2 norm of at most `bound` each."""
    if bound is None:
        return gradients
    return gradients * (bound / gradients.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)


class Boosted:
    """The Trainable over a Forest: `backward` reaches the outputs, `step` fits one tree to N times their gradients and forgets them.

    clips: (start, stop, how, bound) per slice of the outputs; how: "row" (L2 norm of each sample's) or "element". RunStopped if a gradient is not finite.
    """

    def __init__(self, name: str, module: Forest, clips: Sequence[tuple[int, int, Literal["row", "element"], float | None]] = ()):
        self.name, self.module, self.clips, self.steps = name, module, tuple(clips), 0

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a mean loss per seed [S] or of one number."""
        loss.backward(torch.ones_like(loss) if loss.ndim else None)

    def gradients(self) -> Tensor:
        """Per-sample gradients [S, N, width] of the last outputs: N times that of the mean loss, clipped."""
        _, outputs = self.module.last
        found = (outputs.grad if outputs.grad is not None else torch.zeros_like(outputs)) * outputs.shape[1]
        for start, stop, how, bound in self.clips:
            piece = found[..., start:stop]
            found[..., start:stop] = clip_rows(piece, bound) if how == "row" else piece if bound is None else piece.clamp(-bound, bound)
        return found

    def step(self, scale: float = 1.0) -> float:
        """Returns the largest norm of a sample's gradient. Learning rates are the ensemble's (a function of the tree's number); `scale` is not used."""
        rows, found = self.module.last[0], self.gradients()
        self.module.last = None
        norm = float(found.norm(dim=-1).max())
        if not np.isfinite(norm):
            raise RunStopped(f"a sample's gradient of {self.name} is {norm}")
        for ensemble, x, g in zip(self.module.ensembles, rows, found.cpu().numpy(), strict=True):
            ensemble.step(x, g)
        self.steps += 1
        return norm

    def distil(self, x: Tensor) -> float | None:
        """Distil ensembles that have grown beyond the bound, on observations [S, N, features]; the worst error, None if none had."""
        above, errors = self.module.part.distil_above, []
        for ensemble, rows in zip(self.module.ensembles, x.detach().cpu().numpy(), strict=True):
            if above is not None and ensemble.trees > above:
                errors.append(ensemble.distil(rows))
        return max(errors, default=None)

    def state_dict(self) -> dict[str, Any]:
        return {"trees": self.module.blobs(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_blobs(state["trees"], self.name)
        self.steps = state["steps"]
