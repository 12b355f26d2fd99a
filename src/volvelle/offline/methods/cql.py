"""Conservative Q-learning: a critic that is pushed down where there are no data.

Problem: offline Q-learning overestimates actions outside the data, and its policy goes there.
Idea: to the temporal-difference loss add alpha (logsumexp_a Q(s, a) - Q(s, recorded a)): values of all actions go down, the recorded one's up, so
that the learnt value is a lower bound. For continuous actions the logsumexp is estimated from uniform actions and the policy's at s and s',
each with its density; the policy is SAC's, and its entropy stays out of the backup.
Pick it when pessimism must be strong; it costs 30 critic evaluations per row. Discrete actions give the plain form on double DQN.
Source: arXiv 2006.04779. threshold sets the Lagrangian form, in which the weight is tuned until the gap equals the threshold.
"""

from __future__ import annotations

from typing import Annotated, Literal

import math

import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.actorcritic import uniform_actions
from volvelle.control.heads import PolicyHead, Squashed
from volvelle.control.learner import Count, NonNegative, Positive
from volvelle.control.methods.dqn import QNetwork
from volvelle.control.methods.sac import Actor, SACAgent, Temperature
from volvelle.control.networks import MLP, Network
from volvelle.control.speed import descent
from volvelle.control.stacked import make
from volvelle.control.valueheads import MSE, ValueHead
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, Optimiser

from ..learner import Offline
from ..losses import conservative_gap
from ..policies import repeated


@part("conservative-q")
class CQL(Offline):
    """weight: of the conservative term; samples: actions of each kind in its logsumexp; temperature: of the logsumexp.

    threshold: None, or the gap that the Lagrange multiplier (cut at 1e6) tunes towards. backup_entropy: SAC's entropy in the target. max_target: the
    best of `samples` policy actions in the target; mode_target: the policy's mode there instead of one sample. importance: values less log densities in
    the logsumexp; false: the values and the recorded action's, less log of their number. Discrete actions use network, value, critic_optimiser, tau and weight only.
    """

    network: Network = MLP(hidden=(256, 256, 256), activation="relu")
    value: ValueHead = MSE()
    critics: Count = 2
    head: PolicyHead = Squashed(low=-20.0, high=2.0, smooth=False)
    actor_optimiser: Optimiser = Adam(lr=3e-5, clip=None)
    critic_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    alpha_optimiser: Optimiser = Adam(lr=3e-5, clip=None)
    alpha: Positive | None = None
    alpha_start: Positive = 1.0
    alpha_loss: Literal["exp", "log"] = "log"
    alpha_fresh: bool = False
    target_entropy: float | None = None
    tau: Annotated[float, Field(gt=0, le=1)] = 0.005
    delay: Count = 1
    critic_weight: Positive = 1.0
    weight: NonNegative = 10.0
    samples: Count = 10
    temperature: Positive = 1.0
    threshold: float | None = None
    weight_optimiser: Optimiser = Adam(lr=3e-4, clip=None)
    backup_entropy: bool = False
    max_target: bool = False
    mode_target: bool = False
    importance: bool = True
    epsilon_end: float = 0.0
    dueling: bool = False

    def check(self, recipe):
        super().check(recipe)
        if not self.value.scalar:
            raise UserError(f"value={self.value.part_name} learns a return distribution; the conservative term is of numbers; accepted: mse, huber, hl-gauss, two-hot")
        if self.mode_target and (self.max_target or self.backup_entropy):
            raise UserError("mode_target=true: the mode is one action without a log-probability; accepted: max_target=false and backup_entropy=false")

    def actor(self, spec, seeds):
        return QNetwork(self, spec, seeds) if spec.actions.kind == "discrete" else Actor(self, spec, seeds)

    def agent(self, run, spec, data):
        return DiscreteAgent(run, self, spec) if spec.actions.kind == "discrete" else CQLAgent(run, self, spec)


class CQLAgent(SACAgent):
    """SAC's update with the conservative term in the critics' loss."""

    def __init__(self, run, part: CQL, spec):
        super().__init__(run, part, spec)
        self.uniform = -sum(math.log(h - low) for low, h in zip(spec.actions.low, spec.actions.high))  # log density of a uniform action
        self.multiplier = make(run, "multiplier", Temperature(part.seeds, 1.0), part.weight_optimiser if part.threshold is not None else None, part.seeds)

    def critic_noise(self, batch):
        """Noise for the target's action (with max_target `samples` of them) and for the conservative term's: uniform, at s', at s."""
        rows, n = batch["rewards"].shape[1], self.part.samples
        draw = lambda count: self.sampling.noise(self.head, rows * count).to(self.low.device)
        return {"target": draw(n if self.part.max_target else 1), "chance": torch.from_numpy(self.sampling.uniform(rows * n, self.head.size)).to(self.low.device),
                "next_obs": draw(n), "obs": draw(n)}

    @torch.no_grad()
    def _draw(self, observations, noise: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """count policy actions per row, [S, B * count, d], with their log-probabilities [S, B * count]; no gradient."""
        return self.head.draw(self.module(observations).repeat_interleave(count, 1), noise)

    def critic_loss(self, batch, noise, alpha):
        part, critics = self.part, self.critics
        with torch.no_grad():
            if part.max_target:
                actions, logp = self._draw(batch["next_obs"], noise["target"], part.samples)
                value = critics.target_values(repeated(batch["next_obs"], part.samples), actions).amin(1).unflatten(-1, (-1, part.samples)).amax(-1)
                logp = torch.zeros_like(value) if not part.backup_entropy else logp.unflatten(-1, (-1, part.samples)).mean(-1)
            else:
                chosen = self.module(batch["next_obs"])
                actions, logp = (self.head.mode(chosen), None) if part.mode_target else self.head.draw(chosen, noise["target"])
                value = critics.target_values(batch["next_obs"], actions).amin(1)
            target = batch["rewards"] + batch["discounts"] * (value - (alpha * logp if part.backup_entropy else 0.0))
        outputs = critics.net.module(batch["obs"], batch["actions"])
        losses = critics.losses(outputs, target)
        gap = self.conservative(batch, critics.read(outputs), noise)                              # [S, members, B]
        made = {"outputs": outputs, "target": target, "gap": gap}
        if part.threshold is None:
            return losses + part.weight * gap, made
        scale = self.multiplier.module.log.detach().exp().clamp(max=1e6).unsqueeze(-1)
        return losses + scale * part.weight * (gap - part.threshold), made

    def conservative(self, batch, recorded: Tensor, noise: dict[str, Tensor]) -> Tensor:
        """temperature logsumexp((Q(s, a) - log density(a)) / temperature) over the three kinds of actions, minus Q(s, recorded a). [S, members, B]."""
        part, n, rows = self.part, self.part.samples, batch["rewards"].shape[1]
        actions = [uniform_actions(self.low, self.high, noise["chance"])]
        logps = [torch.full(actions[0].shape[:2], self.uniform, device=self.low.device)]
        for observations in ("next_obs", "obs"):
            drawn, logp = self._draw(batch[observations], noise[observations], n)
            actions.append(drawn)
            logps.append(logp)
        every = torch.cat([a.unflatten(1, (rows, n)) for a in actions], 2).flatten(1, 2)            # [S, B * 3n, d], row by row
        density = torch.cat([p.unflatten(1, (rows, n)) for p in logps], 2)                          # [S, B, 3n]
        values = self.lifted(self.critics.values(repeated(batch["obs"], 3 * n), every).unflatten(-1, (rows, 3 * n)), batch)
        if part.importance:
            return part.temperature * conservative_gap((values - density.unsqueeze(1)) / part.temperature, recorded / part.temperature)
        values = torch.cat([values, recorded.unsqueeze(-1)], -1)
        return part.temperature * (conservative_gap(values / part.temperature, recorded / part.temperature) - math.log(3 * n + 1))

    def lifted(self, values: Tensor, batch) -> Tensor:
        """The values [S, members, B, 3n] (uniform actions first) as they are; a calibrated critic lifts them here."""
        return values

    def update_critics(self, batch):
        made = super().update_critics(batch)
        if self.part.threshold is not None:
            weight = self.multiplier.module.log.squeeze(-1).exp().clamp(max=1e6)
            self.multiplier.backward(-weight * self.part.weight * (made["gap"] - self.part.threshold).mean((-1, -2)))
            self.multiplier.step()
        return made

    def report(self, made):
        return super().report(made) | {"gap": made["gap"]}


class DiscreteAgent:
    """Double DQN with the conservative term, for discrete actions."""

    def __init__(self, run, part: CQL, spec):
        self.part, self.module = part, part.actor(spec, part.seeds)
        self.net = make(run, "q", self.module, part.critic_optimiser, part.seeds)
        self.target = run.lagged(self.net, tau=part.tau, name="target")
        self.size = sum(p.numel() for p in self.module.parameters())
        self.descend = descent(run, self.net, self.loss)

    def loss(self, batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over rows of TD loss + weight (logsumexp_a Q(s, a) - Q(s, recorded a)), per seed, and the gap [S, B]."""
        net, part = self.module, self.part
        with torch.no_grad():
            best = net.pick(self.target.module(batch["next_obs"]), net.values(batch["next_obs"]).argmax(-1))
            target = part.value.backup(best, batch["rewards"], batch["discounts"])
        outputs = net(batch["obs"])
        chosen = net.pick(outputs, batch["actions"])
        gap = conservative_gap(net.read(outputs), part.value.value(chosen))
        return (part.value.loss(chosen, target) + part.weight * gap).mean(-1), {"gap": gap}

    def update(self, batch):
        loss, made = self.descend(batch)
        norm = self.net.step()
        self.target.update()
        return made | {"loss": loss, "gradient_norm": norm}

    def report(self, made):
        return dict(made)


cql = method("cql", CQL(), title="conservative Q-learning", source="arXiv 2006.04779")
