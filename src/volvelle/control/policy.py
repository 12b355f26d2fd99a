"""What a control run makes: a policy with its normalisation, saved without pickle, ready to act, be evaluated and be watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from volvelle.core.errors import UserError
from volvelle.core.parts import Recipe, from_config, to_config
from volvelle.core.state import load_state, save_state
from volvelle.core.trainable import copy_weights

from .encoding import Vocabulary
from .normalise import ObservationNormaliser
from .slots import Act
from .spaces import Observation, Spec
from .stacked import Streams


class Deciding(nn.Module):
    """What acts inside a policy: observations [S, N, ...] (normalised) to actions [S, N, ...].

    One that `remembers` is asked by recall(observations, memory, streams) -> (actions, memory) instead, with memory None where everything begins;
    forget(memory, row) -> memory tells that row of S * N begins a new episode.
    """

    remembers: ClassVar[bool] = False

    def best(self, observations: Observation) -> Tensor:
        raise NotImplementedError

    def greedy(self, observations: Observation, streams: Streams) -> Tensor:
        """What evaluation plays: the best actions, unless a policy's best is itself random."""
        return self.best(observations)

    def explore(self, observations: Observation, streams: Streams) -> Tensor:
        """Actions as while training, with random numbers from `streams`."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def weights(self) -> dict[str, Any]:
        """What a saved policy keeps of it."""
        return dict(self.state_dict())

    def load_weights(self, saved: dict[str, Any], where: str) -> None:
        copy_weights(saved, dict(self.state_dict(keep_vars=True)), where)


def as_tensors(observations: Any, device="cpu") -> Observation:
    if isinstance(observations, dict):
        return {k: as_tensors(v, device) for k, v in observations.items()}
    return torch.as_tensor(observations, device=device)


class Policy:
    """An Actor: `act(observations)` on encoded, raw observations [S, N, ...] (arrays or tensors). S trained seeds act side by side."""

    def __init__(self, module: Deciding, recipe: Recipe, spec: Spec, seeds: int, normaliser: ObservationNormaliser | None = None,
                 vocabulary: Vocabulary | None = None, task: dict | None = None):
        self.module, self.recipe, self.spec, self.seeds = module, recipe, spec, seeds
        self.normaliser, self.vocabulary, self.task = normaliser, vocabulary if vocabulary is not None else Vocabulary(), task
        self.streams = Streams.fixed("policy", range(seeds))

    @torch.no_grad()
    def act(self, observations: Any, memory: Any = None, explore: bool = False) -> Act:
        if self.normaliser is not None:
            observations = self.normaliser(observations)
        tensors = as_tensors(observations, self.module.device)
        if self.module.remembers:
            return Act(*self.module.recall(tensors, memory, self.streams))
        return Act(self.module.explore(tensors, self.streams) if explore else self.module.greedy(tensors, self.streams), memory)

    def forget(self, memory: Any, row: int) -> Any:
        """The memory after row `row` of S * N has begun a new episode."""
        return self.module.forget(memory, row) if self.module.remembers else memory

    def save(self, folder: str | Path) -> None:
        """Weights, normalisation, vocabulary and the recipe that rebuilds the network, as safetensors and JSON."""
        save_state(Path(folder), {
            "weights": self.module.weights(), "recipe": to_config(self.recipe), "task": self.task, "spec": self.spec.data(), "seeds": self.seeds,
            "normaliser": self.normaliser.state_dict() if self.normaliser is not None else None, "vocabulary": list(self.vocabulary.codes)})

    @classmethod
    def load(cls, folder: str | Path, spec: Spec | None = None, where: str = "the task") -> Policy:
        """Read what `save` wrote. `spec` is that of the task it shall act in: UserError if the policy was made for another."""
        folder = Path(folder)
        if not (folder / "state.json").is_file():
            raise UserError(f"{folder}: no policy there; expected a folder written by a control run (RUN/policy or RUN/best/policy)")
        state = load_state(folder)
        if "recipe" not in state or "spec" not in state:
            raise UserError(f"{folder}: not a policy of the control wing")
        made_for = Spec.from_data(state["spec"])
        if spec is not None:
            spec.require(made_for, f"policy {folder}", where)
        recipe = from_config(Recipe, state["recipe"], "recipe")
        module = recipe.actor(made_for, state["seeds"])
        module.load_weights(state["weights"], f"policy {folder}")
        normaliser = None
        if state["normaliser"] is not None:
            normaliser = ObservationNormaliser(state["seeds"], made_for.observations.vector)
            normaliser.load_state_dict(state["normaliser"])
        return cls(module, recipe, made_for, state["seeds"], normaliser, Vocabulary(state["vocabulary"], closed=True), state["task"])


def to_environment(actions: Tensor) -> np.ndarray:
    """[S, N, ...] -> [S * N, ...] as the environments take it."""
    return actions.reshape(-1, *actions.shape[2:]).cpu().numpy()
