"""The off-policy recipe and its loop: act, store, and learn from sampled past transitions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.errors import UserError

from .buffers import Fields, Replay, ReplayPart, Uniform
from .envs import each
from .learner import ControlLearner, ControlRecipe, Count
from .normalise import ObservationNormaliser
from .policy import Deciding, as_tensors
from .slots import Relabel, Shaper
from .spaces import Observation, Spec
from .stacked import Streams


class OffPolicyAgent(Protocol):
    """What the loop asks of an agent. `module` is what acts; `size` its number of trained parameters."""

    module: Deciding
    size: int

    def noise(self, steps: int, envs: int) -> list[Any]:
        """Random numbers for so many time steps, one item per step."""

    def explore(self, observations: Observation, noise: Any, env_steps: int) -> np.ndarray:
        """Actions [S, N, ...] while training, after `env_steps` steps per seed."""

    def update(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One gradient step; returns what `report` and `errors` need."""

    def report(self, made: dict[str, Any]) -> dict[str, Tensor | float]:
        """Metrics of an update, from what it returned."""

    def errors(self, made: dict[str, Any]) -> Tensor:
        """Absolute errors [S, B] for prioritised replay, from what an update returned."""


@dataclass(frozen=True, eq=False)
class OffPolicy(ControlRecipe):
    """Fields of every off-policy recipe; steps are environment steps per seed.

    period: steps per learner step; warmup: steps before the first update; every: steps between rounds of `updates` gradient steps;
    relabels: changes of stored transitions, in order.
    """

    envs: Count = 1
    period: Count = 1000
    warmup: Annotated[int, Field(ge=0)] = 1000
    every: Count = 1
    updates: Count = 1
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99
    replay: ReplayPart = Uniform()
    normalise_observations: bool = False
    relabels: dict[str, Relabel] = field(default_factory=dict)
    shapers: dict[str, Shaper] = field(default_factory=dict)

    def check(self, recipe):
        super().check(recipe)
        if self.period % self.envs:
            raise UserError(f"period={self.period}: must be a multiple of envs={self.envs}")

    def agent(self, run, spec: Spec) -> OffPolicyAgent:
        raise NotImplementedError

    def start(self, run):
        return OffPolicyLearner(run, self)

    def total(self, run) -> int:
        """Environment steps per seed of the whole run, for schedules that end with it."""
        return run.config.steps * self.period


class OffPolicyLearner(ControlLearner):
    """step = `period` environment steps with the gradient steps due among them."""

    def __init__(self, run, part: OffPolicy):
        super().__init__(run, part, part.envs)
        if part.normalise_observations and self.spec.observations.vector:
            self.normaliser = ObservationNormaliser(part.seeds, self.spec.observations.vector)
        self.agent = part.agent(run, self.spec)
        self.size = self.agent.size
        extra: Fields = {k: ((), np.float32) for k in self.envs.keys}
        self.replay: Replay = part.replay.build(part.seeds, part.envs, part.gamma, self.spec, extra, Streams(run, "replay", part.seeds))
        self.gradient_steps = 0

    def module_policy(self):
        return self.agent.module

    def observe(self, raw, update=False):
        """Raw rows, kept as they are: stored transitions are normalised when they are sampled."""
        rows = each(np.copy, self.rows(raw))
        if self.normaliser is not None and update:
            self.normaliser(rows, update=True)
        return rows

    def seen(self, observations: Any) -> Observation:
        """Raw [S, N, ...] as the networks see it."""
        return as_tensors(self.normaliser(observations) if self.normaliser is not None else observations, self.device)

    def step(self):
        part, envs, replay, agent = self.part, self.envs, self.replay, self.agent
        count, seeds = part.envs, part.seeds
        made: dict[str, Any] | None = None
        obs = self.current()
        for noise in agent.noise(part.period // count, count):
            with torch.no_grad():
                actions = agent.explore(self.seen(obs), noise, self.env_steps)
            raw, rewards, terminated, truncated = envs.step(actions.reshape(seeds * count, *actions.shape[2:]))
            following = self.observe(raw, update=True)
            final = following if not envs.finals else self._with_finals(following)
            self._store(obs, actions, rewards, terminated, terminated | truncated, final)
            obs = following
            before, self.env_steps = self.env_steps, self.env_steps + count
            if self.env_steps >= part.warmup:
                for _ in range((self.env_steps // part.every - before // part.every) * part.updates):
                    made = self.learn()
        self.obs = obs
        self.update_relabels(replay)
        metrics = agent.report(made) if made is not None else {}
        return self.episode_metrics() | {k: float(v.mean() if isinstance(v, Tensor) else v) for k, v in metrics.items()}

    def learn(self) -> dict[str, Any]:
        """One sampled batch, one update."""
        batch = self.replay.sample(self.gradient_steps)
        for relabel in self.relabels.values():
            if relabel.when == "sample":
                batch = relabel(batch)
        if self.normaliser is not None or self.device.type != "cpu":
            batch = {k: each(lambda x: x.to(self.device), v) for k, v in batch.items()}
            if self.normaliser is not None:
                for k in ("obs", "next_obs"):
                    batch[k] = as_tensors(self.normaliser(each(lambda x: x.cpu().numpy(), batch[k])), self.device)
        made = self.agent.update(batch)
        if self.replay.wants_errors:
            self.replay.learnt(batch, self.agent.errors(made))
        self.gradient_steps += 1
        return made

    def _store(self, obs, actions, rewards, terminated, ended, following) -> None:
        shape = (self.part.seeds, self.part.envs)
        row = {"obs": obs, "actions": actions, "rewards": rewards.reshape(shape), "terminated": terminated.reshape(shape), "ended": ended.reshape(shape),
               "next_obs": following, **{k: v.reshape(shape) for k, v in self.envs.infos.items()}}
        for relabel in self.relabels.values():
            if relabel.when == "store":
                row = {k: each(lambda x: x.numpy() if isinstance(x, Tensor) else x, v) for k, v in relabel({k: as_tensors(v) for k, v in row.items()}).items()}
        self.replay.add(**row)

    def _with_finals(self, following: Any) -> Any:
        """The true next observations: final ones where an episode ended."""
        made, count = each(np.copy, following), self.part.envs
        for row, final in self.envs.finals:
            where = (row // count, row % count)
            if isinstance(made, dict):
                for k in made:
                    made[k][where] = final[k]
            else:
                made[where] = final
        return made

    # ---- checkpoints

    def before_checkpoint(self):
        super().before_checkpoint()
        self.replay.cut()
        self.replay.save(self.run.folder / "replay")

    def state_dict(self):
        return super().state_dict() | {"replay": self.replay.state_dict(), "gradient_steps": self.gradient_steps}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.replay.load(state["replay"], self.run.folder / "replay")
        self.gradient_steps = state["gradient_steps"]
