"""ReCOIL: imitation of a few demonstrations with the help of data of any quality, without rewards and without a discriminator.

Problem: imitation that matches occupancies needs data that cover the expert, and a discriminator whose errors become rewards.
Idea: match mixtures, D_f(b d_pi + (1 - b) data || b expert + (1 - b) data), whose right side always covers the left. The dual over Q, for chi-square:
raise Q on the expert's pairs, keep it Bellman-consistent with zero reward elsewhere:
  min_Q  b (E Q(s, pi) - E_expert Q(s, a)) + E_mix[(gamma Q(s', pi) - Q(s, a))^2] / 4.
Offline, Q(s', pi) becomes V(s'), an implicit maximum of Q over recorded actions (any `maximum`), and the policy imitates by advantage.
form=bounded, as in the authors' code, is its least-squares version: 0.5 (Q - top)^2 on the expert's pairs, 0.5 (Q - (-cost + gamma V(s')))^2 elsewhere,
top = 2 / (1 - gamma), cost = (1 - gamma) top, and -top after a termination: values lie in [-top, top]. form=dual is the unbounded one, any divergence.
Pick it with demonstrations and unlabelled data but no rewards; with plenty of demonstrations alone bc will do.
Source: arXiv 2302.08560. sampler.expert=offline:PATH gives the demonstrations; the task is the other dataset.

The claim: an 8 x 8 grid, one demonstration from corner to corner, 6,000 uniformly random steps; success from anywhere. In the arms "apart" the
random steps that begin in states of the demonstration are left out, so that the data do not cover the expert. recoil's mixture holds the demonstration
by definition; discriminator arms match on the data as they are, and "merged" on the data with the demonstration put in, which covers it again.
Two runs came before: one whose only discriminator arms were merged ones (all at 1.00, so no difference), one with half the updates, in which
recoil-apart had not got there yet (.08): its values first rise around the demonstration and have to fall everywhere else.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.evaluation import Evaluation
from volvelle.control.learner import NonNegative, Positive
from volvelle.control.networks import MLP, Network
from volvelle.core.claims import Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam

from ..behaviours import Random
from ..demonstrations import Demonstrations
from ..divergences import ChiSquare, Divergence, mixture_dual_q
from ..grids import GridDriver, GridTask, Table
from ..implicit import ImplicitAgent, ImplicitQ
from ..maxima import Expectile, Gumbel, Maximum
from ..samplers import BatchSampler
from ..tasks import Generated
from .bc import bc
from .dual_rl_members import dual_v_imitation


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """What belongs to the dataset's rows and to the demonstrations', along the last axis."""
    return x.chunk(2, -1)


def bounded_loss(offline: Tensor, expert: Tensor, following: Tensor, discounts: Tensor, gamma: float, top: float) -> Tensor:
    """0.5 (Q_expert - top)^2 + 0.5 (Q_offline - y)^2, y = -(1 - gamma) top + discount V(s') - (gamma - discount) top; meant over rows, summed over members.

    offline, expert: Q [S, members, B]; following: V(s'), discounts: gamma, or 0 after a termination, both [S, B] of the offline rows -> [S].
    """
    target = -(1 - gamma) * top + discounts * following - (gamma - discounts) * top
    return (0.5 * (expert - top).square() + 0.5 * (offline - target.unsqueeze(1)).square()).mean(-1).sum(-1)


@part("mixture-imitation")
class ReCOIL(ImplicitQ):
    """form: "bounded" or "dual" (see above); top: none means 2 / (1 - gamma); share: b, the expert's part of the mixture, and divergence, for form=dual;
    contrast: weight of mean V(dataset) - mean V(expert) in V's loss (the authors have it with the expectile)."""

    needs: ClassVar[tuple[str, ...]] = ("discounts", "next_obs")
    sampler: BatchSampler = Demonstrations()
    value_network: Network = MLP(hidden=(256, 256), activation="relu", layer_norm=True, init="orthogonal")
    maximum: Maximum = Gumbel(beta=2.0, clip=7.0)
    form: Literal["bounded", "dual"] = "bounded"
    top: Positive | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    divergence: Divergence = ChiSquare()
    contrast: NonNegative = 0.0

    def check(self, recipe):
        super().check(recipe)
        if not isinstance(self.sampler, Demonstrations) or self.sampler.alone:
            raise UserError("sampler: recoil learns from a dataset and demonstrations; accepted: sampler=demonstrations, with alone=false")
        if self.rewards != "as-is":
            raise UserError(f"rewards={self.rewards}: recoil reads no rewards; accepted: as-is")
        if self.form == "bounded" and self.top is None and self.gamma == 1:
            raise UserError("gamma=1: the bound 2 / (1 - gamma) is infinite; give top, or a gamma below 1")
        if self.value.part_name != "mse":
            raise UserError(f"value={self.value.part_name}: recoil has its own loss for Q; accepted: mse")

    def agent(self, run, spec, data):
        return ReCOILAgent(run, self, spec)


class ReCOILAgent(ImplicitAgent):
    """The implicit-maximum agent on batches of two halves."""

    def value_loss(self, batch, actions, q):
        """The implicit maximum's loss of every row (Gumbel regression rescales by all of them), averaged over the dataset's half."""
        v = self.v(batch["obs"])
        loss = halves(self.part.maximum.loss(q - v))[0].mean(-1)
        if self.part.contrast:
            offline, expert = halves(v)
            loss = loss + self.part.contrast * (offline.mean(-1) - expert.mean(-1))
        return loss

    def critic_loss(self, batch, actions, following):
        part = self.part
        offline, expert = halves(self.critics.values(batch["obs"], actions))
        if part.form == "bounded":
            top = part.top if part.top is not None else 2 / (1 - part.gamma)
            return bounded_loss(offline, expert, halves(following)[0], halves(batch["discounts"])[0], part.gamma, top)
        here, there = ((d * v).unsqueeze(1) - q for d, v, q in zip(halves(batch["discounts"]), halves(following), (offline, expert)))
        return mixture_dual_q(torch.zeros_like(here), there, here, part.divergence, part.share, part.gamma).sum(-1)  # Q(s0, pi) has become V(s0)

    def actor_loss(self, batch, advantages):
        count = advantages.shape[-1] // 2
        obs = batch["obs"]
        first = {k: v[:, :count] for k, v in obs.items()} if isinstance(obs, dict) else obs[:, :count]
        return super().actor_loss({"obs": first, "actions": batch["actions"][:, :count]}, advantages[:, :count])


# --------------------------------------------------------------------------------------------------------------- recipes and claim

grid = Generated(env=GridTask(ends=False), behaviour=Random(), quality="random", steps=6000)
demonstration = Generated(env=GridTask(ends=False, start="corner", time_limit=14), behaviour=GridDriver(), quality="expert", steps=14)
fast = Adam(lr=0.05, clip=None)
shared = {"network": Table(), "batch": 128, "period": 500, "gamma": 0.97, "evaluation": Evaluation(episodes=60)}
tables = {**shared, "value_network": Table(), "tau": 0.02, "actor_optimiser": fast, "critic_optimiser": Adam(lr=0.5, clip=None),
          "value_optimiser": Adam(lr=0.5, clip=None), "decay": False}
def shown(**fields) -> Demonstrations:
    return Demonstrations(expert=demonstration, **fields)


small = ReCOIL(**tables, maximum=Expectile(level=0.8))
matched = dual_v_imitation(**shared, value_network=Table(), policy_optimiser=fast, value_optimiser=fast, discriminator_optimiser=fast)

claim = Claim(
    says="one demonstration suffices to reach the goal from anywhere, also with data that do not cover it, where matching by a discriminator fails",
    arms={"recoil": small(sampler=shown()), "recoil-apart": small(sampler=shown(apart=True)), "bc": bc(**shared, optimiser=fast, sampler=shown(alone=True)),
          "discriminator": matched(sampler=shown(merge=False)), "discriminator-apart": matched(sampler=shown(merge=False, apart=True)),
          "discriminator-apart-merged": matched(sampler=shown(apart=True))},
    task=grid, steps=6, seeds=5, equal="gradient steps", minutes=6,
    expects=("recoil > bc on success", "recoil-apart > discriminator-apart on success", "recoil-apart >= recoil - 0.1 on success"), quick={"steps": 1, "seeds": 2})

recoil = method("recoil", ReCOIL(), title="imitation by matching mixtures, without rewards or a discriminator", source="arXiv 2302.08560", claim=claim)
