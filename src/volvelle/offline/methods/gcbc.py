"""Goal-conditioned behaviour cloning: imitate the recorded action as the way to wherever the trajectory went afterwards.

Problem: learn to reach commanded goals from recordings that carry neither rewards nor goals.
Idea: every later state of a trajectory was reached by its actions; so score the action a_t as the right one for that state as goal:
-log pi(a_t | s_t, g), g uniform in the rest of the trajectory.
Pick it as the baseline of goal-reaching. It takes detours for ways and cannot join pieces of different trajectories; value-based methods
(gcivl, gciql, hiql, qrl, crl) can.
Source: arXiv 1906.05838; form and defaults of OGBench (arXiv 2410.20092).
"""

from __future__ import annotations

from typing import ClassVar

from volvelle.control.heads import PolicyHead
from volvelle.control.networks import MLP, Network
from volvelle.control.speed import descent
from volvelle.control.stacked import make
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, Optimiser

from ..goals import Goals, together
from ..heads import AroundMean
from ..learner import GoalOffline
from ..policies import HeadPolicy
from ..samplers import BatchSampler


@part("goal-cloning")
class GCBC(GoalOffline):
    """Goals of the actor come from `sampler.actor_*`: by default uniform in the rest of the trajectory."""

    needs: ClassVar[tuple[str, ...]] = ("actor_goals",)
    batch: int = 1024
    sampler: BatchSampler = Goals()
    network: Network = MLP(hidden=(512, 512, 512), activation="gelu", init="fan-avg")
    head: PolicyHead = AroundMean(tanh=False, std="one")
    optimiser: Optimiser = Adam(lr=3e-4, clip=None)

    def actor(self, spec, seeds):
        return HeadPolicy(self.network, self.head, spec, seeds, gain=0.1)

    def agent(self, run, spec, data):
        return GCBCAgent(run, self, spec)


class GCBCAgent:
    """The algorithm."""

    def __init__(self, run, part: GCBC, spec):
        self.module = part.actor(spec, part.seeds)
        self.policy = make(run, "actor", self.module, part.optimiser, part.seeds)
        self.size = sum(p.numel() for p in self.module.parameters())
        self.descend = descent(run, self.policy, self.loss)

    def loss(self, batch):
        """-mean log pi(a | s, g), per seed."""
        return -self.module.log_prob(together(batch["obs"], batch["actor_goals"]), batch["actions"]).mean(-1)

    def update(self, batch):
        return {"loss": self.descend(batch), "norm": self.policy.step()}

    def report(self, made):
        return {"loss/actor": made["loss"], "gradient_norm": made["norm"]}


gcbc = method("gcbc", GCBC(), title="goal-conditioned behaviour cloning", source="arXiv 1906.05838")
