"""What the goal-conditioned value methods share: their losses, how a policy is drawn out of a value, and one optimiser for all networks.

Form and defaults are those of OGBench (arXiv 2410.20092): three layers of 512, GELU and then layer normalisation in values but not in actors, two
heads, a Gaussian policy of fixed deviation, one Adam on the sum of all losses.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from volvelle.control.heads import PolicyHead
from volvelle.control.learner import NonNegative, Positive
from volvelle.control.networks import MLP, Network
from volvelle.control.spaces import Spec
from volvelle.control.speed import descent
from volvelle.control.stacked import Streams, joint
from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part
from volvelle.core.trainable import Adam, Optimiser

from .goals import Goals, together
from .heads import AroundMean
from .learner import GoalOffline
from .losses import advantage_weights, scaled_policy_gradient
from .policies import HeadPolicy
from .samplers import BatchSampler

Level = Annotated[float, Field(gt=0, lt=1)]
Tau = Annotated[float, Field(gt=0, le=1)]
LAST_GAIN = 0.1  # an actor's last layer starts with a hundredth of the usual variance


# ---------------------------------------------------------------------------------------------- losses

def implicit_value_loss(values: Tensor, here: Tensor, following: Tensor, rewards: Tensor, masks: Tensor, gamma: float, level: float) -> Tensor:
    """Expectile regression of V without a Q: sum over heads of mean w (r + gamma m Vbar_k(s') - V_k(s))^2, per seed [S].

    w = |level - 1(A < 0)| with A = r + gamma m min_k Vbar_k(s') - mean_k Vbar_k(s). values, here, following: V(s), Vbar(s), Vbar(s'), [S, heads, B];
    rewards, masks: [S, B]. arXiv 2410.20092, after 2307.11949.
    """
    targets = (rewards.unsqueeze(1) + gamma * masks.unsqueeze(1) * following).detach()
    advantages = rewards + gamma * masks * following.amin(1) - here.mean(1)
    weights = torch.where(advantages < 0, 1 - level, level).detach()
    return (weights.unsqueeze(1) * (targets - values).square()).mean(-1).sum(-1)


# ---------------------------------------------------------------------------------------------- policies from values

@contextlib.contextmanager
def fixed(*modules: nn.Module):
    """Context in which modules pass gradients through but take none."""
    parameters = [p for m in modules for p in m.parameters()]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class Extraction(Part):
    """Slot: how a goal-conditioned policy is drawn out of a value. `loss(agent, batch)` per seed [S]; goals are the batch's "actor_goals"."""

    slot: ClassVar[str] = "extraction"

    def loss(self, agent: ReachingAgent, batch: dict[str, Any]) -> Tensor:
        raise NotImplementedError


@part("awr")
class WeightedCloning(Extraction):
    """Advantage-weighted regression: -mean min(exp(temperature A), cap) log pi(a | s, g). For any actions."""

    temperature: NonNegative = 10.0
    cap: Positive = 100.0

    def loss(self, agent, batch):
        with torch.no_grad():
            weights = advantage_weights(agent.advantages(batch), self.temperature, self.cap)
        return -(weights * agent.module.log_prob(together(batch["obs"], batch["actor_goals"]), batch["actions"])).mean(-1)


@part("ddpg-bc")
class AscentAndCloning(Extraction):
    """-mean Q(s, pi(s, g), g) / (mean |Q| + 1e-6) - weight mean log pi(a | s, g): follow the critic's slope, stay near the data. Continuous actions only.

    The action is the mode cut to the bounds; for a policy with a deviation of its own, a sample.
    """

    weight: NonNegative = 0.3

    def loss(self, agent, batch):
        both, policy = together(batch["obs"], batch["actor_goals"]), agent.module
        outputs = policy(both)
        actions = policy.head.sample(outputs, agent.streams.noise(policy.head, both.shape[1]).to(both.device)) if policy.head.free else policy.head.mode(outputs)
        with fixed(*agent.judges()):
            ascent = scaled_policy_gradient(agent.worth(batch, actions), 1e-6)
        return ascent - self.weight * policy.head.log_prob(outputs, batch["actions"]).mean(-1)


# ---------------------------------------------------------------------------------------------- recipe and agent

@dataclass(frozen=True, eq=False)
class Reaching(GoalOffline):
    """network: of the actor; value_network: of values and critics; optimiser: one for all; tau: of the lagged copies, where there are any."""

    batch: int = 1024
    sampler: BatchSampler = Goals()
    network: Network = MLP(hidden=(512, 512, 512), activation="gelu", init="fan-avg")
    value_network: Network = MLP(hidden=(512, 512, 512), activation="gelu", layer_norm=True, init="fan-avg")
    head: PolicyHead = AroundMean(tanh=False, std="one")
    optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    tau: Tau = 0.005

    def actor(self, spec, seeds):
        return HeadPolicy(self.network, self.head, spec, seeds, gain=LAST_GAIN)


class Inner(NamedTuple):
    """A network inside a joint module, as `run.lagged` takes it."""

    name: str
    module: nn.Module


class ReachingAgent:
    """Base: `networks` names the networks beside the actor, `losses` the losses per seed; an update is one step on their sum.

    What extractions ask: `advantages(batch)` of the recorded actions and `worth(batch, actions)`, both [S, B] for the actor's goals; `judges()` are the
    networks behind the latter.
    """

    def __init__(self, run, part: Reaching, spec: Spec):
        self.part, self.spec, self.seeds = part, spec, part.seeds
        if isinstance(getattr(part, "extraction", None), AscentAndCloning) and spec.actions.kind != "continuous":
            raise UserError(f"extraction=ddpg-bc needs continuous actions; this task has {spec.actions.describe()}; accepted for them: awr")
        self.module = part.actor(spec, part.seeds)
        self.streams = Streams(run, "policy", part.seeds)
        self.all = joint(run, "networks", {"actor": (self.module, 1), **self.networks()}, part.optimiser, part.seeds)
        self.net = self.all.module
        self.targets = {k: run.lagged(Inner(k, self.net[k]), tau=part.tau, name=f"target-{k}") for k in self.lags()}
        self.size = sum(p.numel() for p in self.net.parameters())
        self.descend = descent(run, self.all, self.total, compilable=not isinstance(getattr(part, "extraction", None), AscentAndCloning))

    def networks(self) -> dict[str, tuple[nn.Module, int]]:
        raise NotImplementedError

    def lags(self) -> tuple[str, ...]:
        """Names of the networks that have lagged copies, kept in `targets`."""
        return ()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        raise NotImplementedError

    def advantages(self, batch: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def worth(self, batch: dict[str, Any], actions: Tensor) -> Tensor:
        raise NotImplementedError

    def judges(self) -> tuple[nn.Module, ...]:
        raise NotImplementedError

    def heads(self, net: nn.Module, *inputs: Tensor) -> Tensor:
        """What a network of several heads says, [S, heads, B]."""
        return net(*inputs).squeeze(-1).unflatten(0, (self.seeds, -1))

    def total(self, batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses, and each."""
        losses = self.losses(batch)
        return sum(losses.values()), losses

    def update(self, batch):
        losses = self.descend(batch)[1]
        norm = self.all.step()
        for target in self.targets.values():
            target.update()
        return {f"loss/{k}": v for k, v in losses.items()} | {"gradient_norm": norm}

    def report(self, made):
        return dict(made)
