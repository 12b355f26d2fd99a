"""CDSA: a policy that is never retrained, corrected towards where the data are dense.

Problem: offline methods bake their caution into the policy; it must be retrained for every new degree of caution, and may still leave the data.
Idea: learn the gradient of the data's log density over state and action, s(x, sigma), by denoising score matching. At decision time the base
policy's action a_0 is moved by its action part, one denoising step sigma^2 g_a; the state part says which way the state should drift, and an inverse
dynamics model turns that displacement into an action: a = clip(a_0 + action_step a_1 + state_step I(s, s + clip(sigma^2 g_s, +-reach))).
Pick it as a layer of caution on any frozen policy with continuous actions and smooth dynamics. Not where the best behaviour is rare in the data: it
pulls towards what is common.
Source: arXiv 2406.07541. No public code was found, and the algebra of the correction is not in the readable part of the paper: `gradient`, `through`, `keep`,
`rounds` and `threshold` hold the readings that its ingredients admit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.evaluation import Evaluation
from volvelle.control.learner import Count, NonNegative, Positive
from volvelle.control.networks import MLP, Network, Output
from volvelle.control.spaces import Layout
from volvelle.control.stacked import Streams, make
from volvelle.core.claims import Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import Call, method, part
from volvelle.core.trainable import Adam, Optimiser

from ..bases import BasePolicy, Built, BuiltRecipe, RunBase
from ..hazards import straight
from ..learner import Offline
from ..samplers import BatchSampler

Score = Callable[[Tensor, Tensor], Tensor]  # x [S, B, D], sigma [S, B, 1] -> grad log density of the data with that much noise, [S, B, D]
FREQUENCIES = 4


def denoising_loss(score: Score, x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """|| sigma s(x + sigma z, sigma) + z ||^2, summed over dimensions, mean over the batch: [S]. Its minimum is not zero: 1 / (1 + sigma^2) per dimension of unit normal data."""
    return (sigma * score(x + sigma * noise, sigma) + noise).square().sum(-1).mean(-1)


def steps(gradient: Tensor, sigma: float, how: str) -> Tensor:
    """What a gradient in normalised units moves x by: "step" one denoising step sigma^2 g, "raw" g, "unit" g / |g|."""
    if how == "unit":
        return gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return sigma**2 * gradient if how == "step" else gradient


@part("state-pairs")
class StatePairs(BatchSampler):
    """Steps with their action and both observations; no rewards needed. The batch: obs, actions, next_obs."""

    def build(self, table, rng, batch, gamma):
        return _Pairs(table, rng, batch)


class _Pairs:
    def __init__(self, table, rng, batch):
        self.table, self.rng, self.batch, self.steps = table, rng, batch, table.data.rows

    def draw(self):
        rows = self.steps[self.rng.integers(len(self.steps), self.batch)]
        return {"obs": self.table.states(rows), "next_obs": self.table.states(rows + 1), "actions": self.table.field("actions", rows)}


@part("density-correction")
class CDSA(BuiltRecipe, Offline):
    """base: the policy to correct. action_step, state_step: k_1 and k_2; level: the noise sigma at which the score is asked, in deviations of the data.

    reach: largest displacement per state dimension, in its own units (None: the typical change in one step of the data); gradient: see `steps`, in
    deviations ("raw": in the data's units); through: the inverse model is asked "from-here" or for the change around the predicted next state ("residual");
    keep: weight of the base action; rounds: corrections in a row, the noise falling to sigma_low; threshold: no correction where |sigma^2 g| is smaller.
    """

    needs: ClassVar[tuple[str, ...]] = ("next_obs",)
    acting: ClassVar[tuple[str, ...]] = ("action_step", "state_step", "level", "gradient", "keep", "rounds", "threshold")
    base: BasePolicy = RunBase()
    sampler: BatchSampler = StatePairs()
    network: Network = MLP(hidden=(128, 128), activation="silu")
    dynamics_network: Network = MLP(hidden=(64, 64), activation="silu")
    sigma_low: Positive = 0.05
    sigma_high: Positive = 1.0
    level: Positive = 0.2
    action_step: NonNegative = 0.5
    state_step: NonNegative = 1.0
    reach: Positive | None = None
    gradient: Literal["step", "raw", "unit"] = "step"
    through: Literal["from-here", "residual"] = "from-here"
    keep: Annotated[float, Field(ge=0, le=1)] = 1.0
    rounds: Count = 1
    threshold: NonNegative = 0.0
    optimiser: Optimiser = Adam(lr=1e-3, clip=None)
    evaluation: Evaluation = Evaluation(episodes=20, tail=0.1)

    def check(self, recipe):
        super().check(recipe)
        if not self.sigma_low < self.sigma_high:
            raise UserError(f"sigma_low={self.sigma_low}: must be below sigma_high={self.sigma_high}")
        if not self.sigma_low <= self.level <= self.sigma_high:
            raise UserError(f"level={self.level}: the score is learnt from {self.sigma_low} to {self.sigma_high}")

    def actor(self, spec, seeds):
        return Corrected(self, spec, seeds)

    def agent(self, run, spec, data):
        return CDSAAgent(run, self, spec, data)


class Corrected(Built):
    """The base policy, the score of the data, the inverse dynamics, and for through=residual the forward dynamics."""

    def __init__(self, part: CDSA, spec, seeds: int):
        super().__init__(part.base, spec, seeds)
        n, d = spec.observations.vector, spec.actions.continuous
        if spec.observations.images or spec.actions.codes or not spec.actions.bounded:
            raise UserError(f"{part.part_name} needs a vector and continuous actions with finite bounds; this task has {spec.describe()}")
        self.part, self.width = part, n
        net = lambda network, reads, out: Output(network.build(Layout(reads), seeds), seeds, out, network.init)  # noqa: E731
        self.score_net = net(part.network, n + d + 1 + 2 * FREQUENCIES, n + d)
        self.inverse_net = net(part.dynamics_network, 2 * n, d)
        self.forward_net = net(part.dynamics_network, n + d, n) if part.through == "residual" else None
        for name, size in (("mean", n + d), ("std", n + d), ("change", n), ("reach", n)):
            self.register_buffer(name, torch.ones(size))
        self.register_buffer("low", torch.tensor(spec.actions.low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.actions.high), persistent=False)

    def measure(self, data) -> None:
        """Take the scales from a dataset: mean and deviation of states and actions, deviation of one step's change."""
        states, actions = (np.asarray(data.fields[k][data.rows], np.float64) for k in ("obs", "actions"))
        change = np.asarray(data.fields["obs"][data.rows + 1], np.float64) - states
        x, typical = np.concatenate([states, actions], 1), np.sqrt(np.square(change).mean(0)) + 1e-6
        reach = np.full(self.width, self.part.reach) if self.part.reach else typical
        for name, value in (("mean", x.mean(0)), ("std", x.std(0) + 1e-6), ("change", typical), ("reach", reach)):
            getattr(self, name).copy_(torch.from_numpy(value))

    def normal(self, states: Tensor, actions: Tensor) -> Tensor:
        """[state | action] in deviations of the data."""
        return (torch.cat([states, actions], -1) - self.mean) / self.std

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """s(x, sigma) = network([x, embedding of log sigma]) / sigma."""
        level = sigma.log()
        angles = level * torch.pi * 2.0 ** torch.arange(-2, FREQUENCIES - 2, device=x.device)
        return self.score_net(torch.cat([x, level, angles.sin(), angles.cos()], -1)) / sigma

    def inverse(self, states: Tensor, change: Tensor) -> Tensor:
        """I(s, s + change): the action that leads there, in its own units."""
        n = self.width
        made = self.inverse_net(torch.cat([(states - self.mean[:n]) / self.std[:n], change / self.change], -1))
        return torch.addcmul(self.mean[n:], made, self.std[n:])

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """The predicted change of the state."""
        return self.forward_net(self.normal(states, actions)) * self.change

    def correction(self, states: Tensor, actions: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """(a_1, a_2): the action's own denoising step, and the action that takes the state along its part of the gradient. Both [S, B, d]."""
        part, n = self.part, self.width
        gradient = self.score(self.normal(states, actions), torch.full_like(states[..., :1], sigma))
        to_state, to_action = (steps(g, sigma, part.gradient) for g in (gradient[..., :n], gradient[..., n:]))
        if part.gradient == "raw":
            to_state, to_action = to_state / self.std[:n], to_action / self.std[n:]
        else:
            to_state, to_action = to_state * self.std[:n], to_action * self.std[n:]
        move = to_state.clamp(-self.reach, self.reach)
        if part.through == "from-here":
            back = self.inverse(states, move)
        else:
            expected = self.forward(states, actions)
            back = self.inverse(states, expected + move) - self.inverse(states, expected)
        if part.threshold:
            strong = (sigma**2 * gradient.norm(dim=-1, keepdim=True) >= part.threshold).to(back.dtype)
            return to_action * strong, back * strong
        return to_action, back

    @torch.no_grad()
    def corrected(self, states: Tensor, actions: Tensor) -> Tensor:
        """The base's actions after all rounds, inside the bounds; exactly as they were for keep=1 and both steps 0."""
        part = self.part
        if part.keep == 1 and not part.action_step and not part.state_step:
            return actions
        for i in range(part.rounds):
            sigma = part.level * (part.sigma_low / part.level) ** (i / max(1, part.rounds - 1))
            own, back = self.correction(states, actions, sigma)
            actions = (part.keep * actions + part.action_step * own + part.state_step * back).clamp(self.low, self.high)
        return actions

    def best(self, observations):
        return self.corrected(observations, self.base.best(observations, None))

    def greedy(self, observations, streams):
        return self.corrected(observations, self.base.best(observations, streams))

    def explore(self, observations, streams):
        return self.corrected(observations, self.base.propose(observations, 1, streams).squeeze(2))


class CDSAAgent:
    """Fits the score and the dynamics; the base policy stays as it is."""

    def __init__(self, run, part: CDSA, spec, data):
        seeds = part.seeds
        self.part, self.module = part, part.actor(spec, seeds)
        module = self.module.to(run.device)
        module.open(data.label())
        module.measure(data)
        self.fitted = {name: make(run, name, net, part.optimiser, seeds)
                       for name, net in (("score", module.score_net), ("inverse", module.inverse_net), ("forward", module.forward_net)) if net is not None}
        self.draws = Streams(run, "noise", seeds)
        self.size = sum(p.numel() for p in module.parameters())

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Per seed [S]: the denoising loss at log-uniform noise, and mean squared errors of the dynamics in deviations."""
        module, part, states, actions = self.module, self.part, batch["obs"], batch["actions"]
        x, change = module.normal(states, actions), batch["next_obs"] - states
        span = math.log(part.sigma_high / part.sigma_low)
        sigma = part.sigma_low * (torch.from_numpy(self.draws.uniform(x.shape[1], 1)).to(x.device) * span).exp()
        noise = torch.from_numpy(self.draws.normal(*x.shape[1:])).to(x.device)
        made = {"score": denoising_loss(module.score, x, sigma, noise),
                "inverse": ((module.inverse(states, change) - actions) / module.std[module.width :]).square().mean((-1, -2))}
        if module.forward_net is not None:
            made["forward"] = ((module.forward(states, actions) - change) / module.change).square().mean((-1, -2))
        return made

    def update(self, batch):
        made = self.losses(batch)
        for name, loss in made.items():
            self.fitted[name].backward(loss)
            self.fitted[name].step()
        return {f"loss/{k}": v.detach() for k, v in made.items()}

    def report(self, made):
        return dict(made)


TOP = CDSA(base=Call(straight))
claim = Claim(
    says="correcting a frozen, reckless policy towards the data keeps it out of a hazard that the data avoid; the state part does it, not the action part",
    arms={"base": TOP(action_step=0.0, state_step=0.0), "cdsa": TOP, "action-only": TOP(action_step=1.0, state_step=0.0), "state-only": TOP(action_step=0.0)},
    expects=("cdsa > base + 10 on return", "cdsa > base + 10 on return_cvar", "cdsa > base + 10 on return_var", "cdsa >= base - 0.05 on success", "state-only > action-only + 10 on return"),
    task="detour-top", steps=3, seeds=5, equal="steps", minutes=4)
cdsa = method("cdsa", CDSA(), title="conservative denoising score-based correction of a frozen policy", source="arXiv 2406.07541", claim=claim)
