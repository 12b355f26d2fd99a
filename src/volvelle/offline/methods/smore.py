"""SMORe: goal reaching by matching the transitions that enter goals, with scores in place of rewards and discriminators.

Problem: supervised relabelling imitates the data's detours; matching goal occupancies needs a discriminator, whose errors become rewards.
Idea: let q(s, a, g) be the transitions that just enter g. Match mixtures, D_f(b d_pi + (1 - b) data || b q + (1 - b) data); the dual variable S(s, a, g)
is an unnormalised score of how useful a is at s for g. Chi-square:  min_S  b (E S(s, pi, g) - E_q S) + E_mix[(gamma S(s', pi, g) - S)^2] / 4: raise it on
goal-entering transitions, lower it under the policy, zero-reward Bellman consistency. Offline, M(s, g), an expectile of S over recorded actions, stands
for S(s, pi, g), and the policy imitates by S - M.
form=stable (the authors' default): (S - top)^2 on entering transitions, 0.5 (S - (-cost + gamma M(s')))^2 on the data's, top = 2 / (1 - gamma),
cost = (1 - gamma) top. plain: -S there and no cost here, unbounded: watch it. dual: the mixture itself. discriminator: the baseline, r = log-odds.
No reward and no termination is read: after a goal, one goes on.
Pick it for goal reaching from mixed logs (a little good, much random). Only for goals, and goals are states.
Source: arXiv 2311.02013.

The claim: two rooms with one gap, 200 random walks of 50 steps that keep their direction for a while, tables; goals all over, starts anywhere.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from volvelle.control.evaluation import Evaluation
from volvelle.control.learner import NonNegative, Positive
from volvelle.control.networks import MLP, Network, Output
from volvelle.control.stacked import Streams, make
from volvelle.core.claims import Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, Optimiser

from ..divergences import ChiSquare, Divergence, mixture_dual_q
from ..goals import Share, together
from ..grids import Drift, RoomsTask, Table
from ..implicit import ImplicitAgent, ImplicitQ, action_numbers, action_width
from ..learner import GoalOffline
from ..losses import gradient_excess
from ..maxima import Expectile, Maximum
from ..samplers import BatchSampler
from ..samplers import Table as Rows
from ..tasks import Generated
from .gcbc import gcbc


def later_rows(rows: np.ndarray, lasts: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Uniform rows in (row, last]. rows: of steps, lasts: of the final observations of their trajectories, chance: uniform in [0, 1)."""
    return rows + 1 + np.floor(chance.astype(np.float64) * (lasts - rows)).astype(np.int64)


@part("goal-transitions")
class GoalTransitions(BatchSampler):
    """Half a batch of steps with hindsight goals, half of transitions that enter their goal.

    hindsight: share of goals that are later states of the trajectory (the rest are commanded ones, the dataset's field `commanded`, as wide as a state);
    none: 0.8 if the dataset has that field, else 1. Entering transitions have the same share; the rest are steps after which the commanded goal is nearer
    than `threshold`. The batch: obs, next_obs, actions, goals, each also as entering_*; rows.
    """

    hindsight: Share | None = None
    commanded: str = "desired_goal"
    threshold: Positive = 0.05

    def build(self, table, rng, batch, gamma):
        return LiveGoalTransitions(self, table, rng, batch)


class LiveGoalTransitions:
    def __init__(self, part: GoalTransitions, table: Rows, rng: Streams, batch: int):
        data = table.data
        self.table, self.rng, self.batch, self.part = table, rng, batch, part
        self.hindsight = part.hindsight if part.hindsight is not None else 0.8 if part.commanded in data.fields else 1.0
        self.lasts, self.steps = data.lasts[data.episode_of], data.rows
        if self.hindsight < 1:
            data.require(f"sampler.hindsight={self.hindsight:g}", part.commanded)
            goals, states = data.fields[part.commanded], data.fields["obs"]
            if goals.shape != states.shape:
                raise UserError(f"dataset {data.label()}: its field {part.commanded!r} has rows of shape {goals.shape[1:]}; goals are states, of shape {states.shape[1:]}")
            near = np.linalg.norm(np.asarray(states[self.steps + 1]) - np.asarray(goals[self.steps]), axis=-1) < part.threshold
            self.reached = self.steps[near]
            if not len(self.reached):
                raise UserError(f"sampler.threshold={part.threshold:g}: no step of {data.label()} comes so near its commanded goal; accepted: a larger one, or hindsight=1")

    def any(self, rows: np.ndarray) -> np.ndarray:
        return rows[self.rng.integers(len(rows), self.batch)]

    def later(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and the row of a later state of each."""
        rows = self.any(self.steps)
        return rows, later_rows(rows, self.lasts[rows], self.rng.uniform(self.batch))

    def draw(self) -> dict[str, Any]:
        (rows, goals), (_, entered) = self.later(), self.later()
        entering = entered - 1
        commanded = self.hindsight < 1
        if commanded:
            told = [self.rng.uniform(self.batch) >= self.hindsight for _ in range(2)]
            entering = np.where(told[1], self.any(self.reached), entering)
        found = list(self.table.states(np.stack([rows, rows + 1, goals, entering, entering + 1, entered], 1)).unbind(1))
        if commanded:
            for place, who, which in ((2, rows, told[0]), (5, entering, told[1])):
                found[place] = torch.where(torch.from_numpy(which).to(found[place].device)[..., None], self.table.field(self.part.commanded, who), found[place])
        names = ("obs", "next_obs", "goals", "entering_obs", "entering_next_obs", "entering_goals")
        actions = self.table.take(np.concatenate([rows, entering], 1), ("actions",))["actions"]
        return dict(zip(names, found, strict=True)) | {"actions": actions[:, : self.batch], "entering_actions": actions[:, self.batch :], "rows": torch.from_numpy(rows)}


# --------------------------------------------------------------------------------------------------------------- losses: [S, members, B], following [S, B] -> [S]

def stable_loss(entering: Tensor, offline: Tensor, following: Tensor, gamma: float, top: float, regulariser: float) -> Tensor:
    """(S_entering - top)^2 + regulariser (1 - gamma) S^2 + 0.5 (S - (-(1 - gamma) top + gamma M(s')))^2, meant over rows, summed over members."""
    target = (gamma * following - (1 - gamma) * top).detach().unsqueeze(1)
    return ((entering - top).square() + regulariser * (1 - gamma) * offline.square() + 0.5 * (offline - target).square()).mean(-1).sum(-1)


def plain_loss(entering: Tensor, offline: Tensor, following: Tensor, gamma: float, regulariser: float) -> Tensor:
    """-S_entering + regulariser S + 0.5 (S - gamma M(s'))^2, meant over rows, summed over members."""
    return (regulariser * offline - entering + 0.5 * (offline - gamma * following.detach().unsqueeze(1)).square()).mean(-1).sum(-1)


@part("score-models")
class SMORe(GoalOffline, ImplicitQ):
    """form: see above; top: none means 2 / (1 - gamma); regulariser: weight that keeps scores small (stable, plain); share: b, and divergence (dual);
    gradient_penalty: weight of mean max(|dS/da| - 1, 0)^2."""

    needs: ClassVar[tuple[str, ...]] = ("goals", "next_obs", "entering_obs", "entering_next_obs", "entering_goals", "entering_actions")
    sampler: BatchSampler = GoalTransitions()
    network: Network = MLP(hidden=(256, 256, 256), activation="relu", init="orthogonal")
    value_network: Network = MLP(hidden=(256, 256, 256), activation="relu", layer_norm=True, init="orthogonal")
    maximum: Maximum = Expectile(level=0.8)
    form: Literal["stable", "plain", "dual", "discriminator"] = "stable"
    top: Positive | None = None
    regulariser: NonNegative = 1e-4
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    divergence: Divergence = ChiSquare()
    gradient_penalty: NonNegative = 0.0
    discriminator_optimiser: Optimiser = Adam(lr=3e-4, clip=None)

    def check(self, recipe):
        super().check(recipe)
        if not isinstance(self.sampler, GoalTransitions):
            raise UserError(f"sampler={self.sampler.part_name}: smore needs transitions that enter goals; accepted: goal-transitions")
        if self.value.part_name != "mse":
            raise UserError(f"value={self.value.part_name}: smore has its own loss for scores; accepted: mse")
        if self.form == "stable" and self.top is None and self.gamma == 1:
            raise UserError("gamma=1: the bound 2 / (1 - gamma) is infinite; give top, or a gamma below 1")

    def agent(self, run, spec, data):
        return SMOReAgent(run, self, spec)


class SMOReAgent(ImplicitAgent):
    """The implicit-maximum agent on states with goals: M and the policy meet the data's half only, the scores both."""

    def __init__(self, run, part: SMORe, spec):
        super().__init__(run, part, spec)
        if part.form == "discriminator":
            body = part.network.build(spec.observations, part.seeds, action_width(spec))
            self.discriminator = make(run, "discriminator", Output(body, part.seeds, 1, part.network.init), part.discriminator_optimiser, part.seeds)
            self.size += sum(p.numel() for p in self.discriminator.module.parameters())

    def rewards(self, offline: Tensor, entering: Tensor, actions: Tensor) -> Tensor:
        """Log-odds [S, B] that a pair of the data enters its goal, from a classifier that learns on the way."""
        logits = self.discriminator.module(torch.cat([offline, entering], 1), actions).squeeze(-1)
        first, second = logits.chunk(2, -1)
        self.discriminator.backward((F.softplus(first) + F.softplus(-second)).mean(-1))
        self.discriminator.step()
        return first.detach()

    def critic_loss(self, batch, actions, following):
        part, count, gamma = self.part, actions.shape[1], self.part.gamma
        every = torch.cat([actions, action_numbers(batch["entering_actions"], self.spec)], 1)
        states = torch.cat([batch["obs"], batch["entering_obs"]], 1)
        scores = self.critics.values(states, every)
        offline, entering = scores[..., :count], scores[..., count:]
        if part.form == "stable":
            top = part.top if part.top is not None else 2 / (1 - gamma)
            loss = stable_loss(entering, offline, following, gamma, top, part.regulariser)
        elif part.form == "plain":
            loss = plain_loss(entering, offline, following, gamma, part.regulariser)
        elif part.form == "discriminator":
            target = batch["rewards"] + gamma * following
            loss = 0.5 * (offline - target.unsqueeze(1)).square().mean(-1).sum(-1)
        else:
            with torch.no_grad():
                there = self.v(batch["entering_next_obs"])
            here, there = gamma * following.unsqueeze(1) - offline, gamma * there.unsqueeze(1) - entering
            loss = mixture_dual_q(torch.zeros_like(here), there, here, part.divergence, part.share, gamma).sum(-1)  # S(s0, pi, g) has become M(s0, g)
        if part.gradient_penalty:
            loss = loss + part.gradient_penalty * gradient_excess(lambda a: self.critics.values(states, a), every)
        return loss

    def parts(self, batch) -> dict[str, Any]:
        """The batch as the networks meet it: states with their goals."""
        goals, entered = batch["goals"], batch["entering_goals"]
        return {
            "obs": together(batch["obs"], goals), "next_obs": together(batch["next_obs"], goals), "actions": batch["actions"],
            "entering_obs": together(batch["entering_obs"], entered), "entering_next_obs": together(batch["entering_next_obs"], entered),
            "entering_actions": batch["entering_actions"]}

    def update(self, batch):
        made = self.parts(batch)
        if self.part.form == "discriminator":
            every = torch.cat([action_numbers(made[k], self.spec) for k in ("actions", "entering_actions")], 1)
            made["rewards"] = self.rewards(made["obs"], made["entering_obs"], every)
        return super().update(made)


# --------------------------------------------------------------------------------------------------------------- recipe and claim

walks = Generated(env=RoomsTask(), behaviour=Drift(), quality="explore", steps=10_000, length=50)
fast, table = Adam(lr=0.02, clip=None), Table(features=8)
common = {"network": table, "batch": 256, "gamma": 0.95, "period": 1000, "evaluation": Evaluation(episodes=10)}
small = SMORe(**common, value_network=table, tau=0.02, actor_optimiser=fast, critic_optimiser=fast, value_optimiser=fast, discriminator_optimiser=fast, decay=False)

claim = Claim(
    says="reaches goals from random walks where goal-conditioned cloning does not, by a larger than mean value, and better than with a discriminator's rewards",
    arms={"gcbc": gcbc(**common, optimiser=fast), "smore": small(), "smore-mean": small(maximum=Expectile(level=0.5)),
          "discriminator": small(form="discriminator")},
    task=walks, steps=2, seeds=5, equal="gradient steps", minutes=6,
    expects=("smore > gcbc on success", "smore > smore-mean on success", "smore > discriminator on success"), quick={"steps": 1, "seeds": 2})

smore = method("smore", SMORe(), title="score models for goal reaching from mixed data", source="arXiv 2311.02013", claim=claim)
