"""Goal-conditioned implicit V-learning: the distance to every goal from recordings alone, without a critic over actions.

Problem: reach commanded goals by joining pieces of different trajectories, from data without rewards.
Idea: V(s, g) follows an upper expectile of r + gamma V(s', g) over the recorded next states, where r = -1 until the goal and the goal is any state of
the data; two heads with lagged copies, the weight from the smaller one. The policy imitates steps that came nearer: weight min(exp(10 (V(s') - V(s))), 100).
Pick it as the simplest value method for goals, also with discrete actions. Where the world moves by itself it is optimistic: luck in s' counts as skill
(gciql does not do that). For long ways take hiql or ota.
Source: arXiv 2410.20092 (the flat form of 2307.11949).
"""

from __future__ import annotations

import torch

from volvelle.control.networks import Output
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part

from ..goals import together
from ..reaching import AscentAndCloning, Extraction, Level, Reaching, ReachingAgent, WeightedCloning, implicit_value_loss


@part("goal-values")
class GCIVL(Reaching):
    """level: of the expectile. The extraction must be one that asks for advantages alone (awr)."""

    level: Level = 0.9
    extraction: Extraction = WeightedCloning(temperature=10.0)

    def check(self, recipe):
        super().check(recipe)
        if isinstance(self.extraction, AscentAndCloning):
            raise UserError("extraction=ddpg-bc climbs a critic, and gcivl learns none; accepted: awr (gciql has a critic)")

    def agent(self, run, spec, data):
        return GCIVLAgent(run, self, spec)


class GCIVLAgent(ReachingAgent):
    """The algorithm."""

    def networks(self):
        part, layout = self.part, self.spec.observations
        return {"value": (Output(part.value_network.build(layout, 2 * self.seeds), 2 * self.seeds, 1, part.value_network.init, members=2), 2)}

    def lags(self):
        return ("value",)

    def value_loss(self, batch):
        goals = batch["value_goals"]
        here, following = together(batch["obs"], goals), together(batch["next_obs"], goals)
        with torch.no_grad():
            lagged = [self.heads(self.targets["value"].module, x) for x in (here, following)]
        return implicit_value_loss(self.heads(self.net["value"], here), *lagged, batch["rewards"], batch["masks"], self.part.gamma, self.part.level)

    def advantages(self, batch):
        here, following = (self.heads(self.net["value"], together(batch[k], batch["actor_goals"])).mean(1) for k in ("obs", "next_obs"))
        return following - here

    def losses(self, batch):
        return {"value": self.value_loss(batch), "actor": self.part.extraction.loss(self, batch)}


gcivl = method("gcivl", GCIVL(), title="goal-conditioned implicit V-learning", source="arXiv 2410.20092")
