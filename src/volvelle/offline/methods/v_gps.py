"""V-GPS: a frozen policy steered by a value function when it acts.

Problem: a policy that cannot or must not be trained further (a robot foundation model) has good actions among its samples, but does not pick them
reliably.
Idea: draw K actions from it, score each with a critic trained once by offline RL, and execute the best, or one drawn from softmax(Q / beta). The critic
learns from demonstrations alone, each labelled -1 per step and 0 in its last steps; Cal-QL keeps it from over-valuing actions that nobody tried, without
sinking below the demonstrations' own returns. The same critic serves every policy.
Pick it when several actions can be sampled per step and they differ. Not for a deterministic policy, nor where all samples are wrong in the same way, nor
where the critic's data do not cover the scene.
Source: arXiv 2410.13816; the critic is arXiv 2303.05479. Q - V would pick the same action as Q, so there is no such option. Instructions are numbers behind the
state (see volvelle.offline.instructions). Critics read actions in the environment's own units; `units` translates for policies that do not, and
volvelle.offline.steering.Steering steers policies outside this library.
Measured on ten seeds: critics from an expert's demonstrations and from the policy's own data lift it alike. With 1200 updates instead of 3000 the iql critic made
the policy worse.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.actorcritic import Critics
from volvelle.control.evaluation import Evaluation
from volvelle.control.learner import Count, NonNegative
from volvelle.control.networks import MLP, Network
from volvelle.control.stacked import Streams
from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import Recipe, method, part
from volvelle.core.trainable import Adam, Optimiser

from ..bases import BasePolicy, BuiltRecipe, RunBase
from ..data.dataset import Dataset
from ..heads import AroundMean
from ..instructions import PointInstructed  # noqa: F401  (registers the world of the claim)
from ..learner import Offline
from ..samplers import BatchSampler, reserved
from ..steering import Scale, Steered
from .bc import BC
from .cql import CQL, CQLAgent
from .iql import IQL


def labels(length: int, success_steps: int, gamma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rewards, masks, returns) of a demonstration, each [length]: -1 and 1, but 0 and 0 in its last `success_steps`; G_t = r_t + gamma m_t G_{t+1}."""
    masks = np.ones(length, np.float32)
    masks[length - min(success_steps, length) :] = 0
    return -masks, masks, discounted(-masks, masks, gamma)


def discounted(rewards: np.ndarray, masks: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma m_t G_{t+1}, with 0 behind the end."""
    made, following = np.zeros(len(rewards), np.float32), 0.0
    for t in range(len(rewards) - 1, -1, -1):
        made[t] = following = rewards[t] + gamma * masks[t] * following
    return made


def calibrated(values: Tensor, returns: Tensor, uniform: int) -> Tensor:
    """Values [..., n] of sampled actions, all but the first `uniform` lifted to the return [...] where they are below it."""
    return torch.cat([values[..., :uniform], torch.maximum(values[..., uniform:], returns.unsqueeze(-1))], -1)


@part("labelled-demonstrations")
class Demonstrations(BatchSampler):
    """Steps of successful episodes with the rewards of `labels`; recorded: with those of the dataset instead. The batch has `returns` too."""

    success_steps: Count = 3
    recorded: bool = False

    def build(self, table, rng, batch, gamma):
        reserved(table.data, ("returns",))
        if self.recorded:
            table.data.require("sampler.recorded", "rewards")
        return _Demonstrations(self, table, rng, batch, gamma)


class _Demonstrations:
    def __init__(self, part: Demonstrations, table, rng: Streams, batch: int, gamma: float):
        self.table, self.rng, self.batch, self.gamma, data = table, rng, batch, gamma, table.data
        self.steps, self.columns = data.rows, np.zeros((int(data.lasts[-1]) + 1, 3), np.float32)
        for first, last in zip(data.firsts, data.lasts):
            if part.recorded:
                rewards, masks = np.asarray(data.fields["rewards"][first:last]), 1 - np.asarray(data.fields["terminated"][first:last])
                made = rewards, masks, discounted(rewards, masks, gamma)
            else:
                made = labels(last - first, part.success_steps, gamma)
            self.columns[first:last] = np.stack(made, 1)

    def draw(self):
        table, rows = self.table, self.steps[self.rng.integers(len(self.steps), self.batch)]
        rewards, masks, returns = torch.from_numpy(self.columns[rows]).to(table.device).unbind(-1)
        return {"obs": table.states(rows), "next_obs": table.states(rows + 1), "actions": table.field("actions", rows),
                "rewards": rewards, "discounts": self.gamma * masks, "returns": returns, "rows": torch.from_numpy(rows)}


@part("calibrated-q")
class CalQL(CQL):
    """Conservative Q-learning whose sampled policy actions are not pushed below the return of the recorded behaviour; calibrate=false is plain CQL."""

    network: Network = MLP(hidden=(256, 256), activation="relu")
    sampler: BatchSampler = Demonstrations()
    critic_weight: float = 0.5
    weight: NonNegative = 5.0
    samples: Count = 4
    max_target: bool = True
    actor_optimiser: Optimiser = Adam(lr=1e-4, clip=None, warmup=2000)
    alpha_optimiser: Optimiser = Adam(lr=1e-4, clip=None)
    calibrate: bool = True

    def check(self, recipe):
        super().check(recipe)
        if not isinstance(self.sampler, Demonstrations):
            raise UserError(f"sampler={self.sampler.part_name}: a calibrated critic needs returns; accepted: labelled-demonstrations")

    def agent(self, run, spec, data):
        spec.actions.only("continuous", "calibrated-q")
        return CalQLAgent(run, self, spec)


class CalQLAgent(CQLAgent):
    """CQL's update with calibration."""

    def lifted(self, values, batch):
        return calibrated(values, batch["returns"].unsqueeze(1), self.part.samples) if self.part.calibrate else values


@part("value-guided")
class VGPS(BuiltRecipe, Offline):
    """base: the policy to steer. critic: the recipe that learns Q (calibrated-q, conservative-q, implicit-q); its loop is that of the fields here.

    candidates: K; beta: temperature of the choice, on the scale of Q (0: the best); score: lagged critics' "min" or "mean"; units: of the base's actions,
    if not the environment's; primitives: actions that are always among the candidates.
    """

    acting: ClassVar[tuple[str, ...]] = ("candidates", "beta", "score")
    base: BasePolicy = RunBase()
    critic: Recipe = CalQL()
    sampler: BatchSampler = Demonstrations()
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.98
    candidates: Count = 10
    beta: NonNegative = 0.0
    score: Literal["min", "mean"] = "min"
    units: Scale | None = None
    primitives: tuple[tuple[float, ...], ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*Offline.needs, "returns") if isinstance(self.critic, CalQL) and self.critic.calibrate else Offline.needs

    def check(self, recipe):
        super().check(recipe)
        if not isinstance(self.critic, (CQL, IQL)):
            raise UserError(f"critic={self.critic.part_name}: accepted: calibrated-q, conservative-q, implicit-q")
        for f in fields(Offline):
            if f.name != "sampler" and getattr(self.critic, f.name) != getattr(type(self.critic)(), f.name):
                raise UserError(f"critic.{f.name}: the critic learns in this recipe's loop; accepted: {f.name}={getattr(self.critic, f.name)} instead")

    @property
    def learner(self) -> Recipe:
        """The critic's recipe with this one's loop."""
        return self.critic.replace(seeds=self.seeds, period=self.period, batch=self.batch, gamma=self.gamma)

    def actor(self, spec, seeds):
        return Steered(self, spec, seeds)

    def agent(self, run, spec, data):
        return VGPSAgent(run, self, spec, data)


class VGPSAgent:
    """Trains the critic by its own recipe's agent; the base policy stays as it is, and the critic's helper actor is not kept."""

    def __init__(self, run, part: VGPS, spec, data: Dataset):
        self.module = part.actor(spec, part.seeds).to(run.device)
        self.module.open(data.label())
        self.inner = part.learner.agent(run, spec, data)
        critics: Critics = self.inner.critics
        self.module.critic = critics.target.module
        self.size = self.inner.size

    def update(self, batch: dict[str, Any]):
        return self.inner.update(batch)

    def report(self, made):
        return self.inner.report(made)


small = MLP(hidden=(64, 64), activation="relu")
SMALL = VGPS(critic=CalQL(network=small, actor_optimiser=Adam(lr=3e-4, clip=None, warmup=200)), batch=128, period=1200, evaluation=Evaluation(episodes=50))
OWN = "instructed-fumbling"  # what the base policy was trained on; the other critics learn from an expert's demonstrations
claim = Claim(
    says="a critic learnt from demonstrations lifts a frozen, fumbling policy, even one learnt from that policy's own data; an untrained critic does not",
    prepare=BC(network=small, head=AroundMean(), period=1500, batch=128), prepare_steps=1, take={"recipe.base.path": "policy"},
    arms={"base": Arm(SMALL(candidates=1, period=1), task=OWN), "v-gps": SMALL, "own-data": Arm(SMALL, task=OWN),
          "iql": Arm(SMALL(critic=IQL(network=small, value_network=small), period=3000), task=OWN), "untrained-critic": SMALL(period=1)},
    expects=("v-gps > base + 0.1 on success", "own-data > base + 0.1 on success", "iql > base + 0.1 on success", "v-gps > untrained-critic + 0.1 on success"),
    task="instructed-expert", steps=1, seeds=10, first_seed=10, equal="steps", minutes=12)
v_gps = method("v-gps", VGPS(), title="value-guided policy steering", source="arXiv 2410.13816", claim=claim)
