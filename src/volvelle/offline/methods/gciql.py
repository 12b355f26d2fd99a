"""Goal-conditioned implicit Q-learning: iql for every goal that the data contain.

Problem: reach commanded goals from data without rewards, also where the world moves by itself.
Idea: V(s, g) is an upper expectile of the smaller of two lagged critics Q(s, a, g) over recorded actions; Q regresses r + gamma m V(s', g), r = -1 and m = 1
until the goal. Only recorded actions are valued. The policy climbs Q and stays near the data (ddpg-bc), or imitates by advantage (awr).
Pick it where single steps matter (manipulation, noisy worlds). extraction.weight decides much: 0.3 for ant mazes, 0.1 humanoid, 1 manipulation, 0.003 point
mazes, 0.01 for exploratory data. gcivl is cheaper; hiql and ota reach further.
Source: arXiv 2410.20092 (iql: 2110.06169). Discrete actions: extraction=awr.
"""

from __future__ import annotations

import torch

from volvelle.control.networks import Output
from volvelle.core.parts import method, part

from ..goals import together
from ..implicit import action_numbers, action_width
from ..maxima import expectile_loss
from ..reaching import AscentAndCloning, Extraction, Level, Reaching, ReachingAgent


@part("goal-implicit-q")
class GCIQL(Reaching):
    """level: of the expectile; extraction: ddpg-bc (continuous actions) or awr."""

    level: Level = 0.9
    extraction: Extraction = AscentAndCloning(weight=0.3)

    def agent(self, run, spec, data):
        return GCIQLAgent(run, self, spec)


class GCIQLAgent(ReachingAgent):
    """The algorithm."""

    def networks(self):
        net, layout, s = self.part.value_network, self.spec.observations, self.seeds
        return {"value": (Output(net.build(layout, s), s, 1, net.init), 1),
                "critic": (Output(net.build(layout, 2 * s, action_width(self.spec)), 2 * s, 1, net.init, members=2), 2)}

    def lags(self):
        return ("critic",)

    def judges(self):
        return (self.net["critic"],)

    def v(self, states, goals):
        """V(s, g), [S, B]."""
        return self.net["value"](together(states, goals)).squeeze(-1)

    def value_loss(self, batch):
        """Mean expectile loss of min Qbar(s, a, g) - V(s, g), per seed."""
        with torch.no_grad():
            q = self.heads(self.targets["critic"].module, together(batch["obs"], batch["value_goals"]), action_numbers(batch["actions"], self.spec)).amin(1)
        return expectile_loss(q - self.v(batch["obs"], batch["value_goals"]), self.part.level).mean(-1)

    def critic_loss(self, batch):
        """Sum over critics of mean (r + gamma m V(s', g) - Q)^2, per seed."""
        with torch.no_grad():
            target = batch["rewards"] + self.part.gamma * batch["masks"] * self.v(batch["next_obs"], batch["value_goals"])
        q = self.heads(self.net["critic"], together(batch["obs"], batch["value_goals"]), action_numbers(batch["actions"], self.spec))
        return (q - target.unsqueeze(1)).square().mean(-1).sum(-1)

    def worth(self, batch, actions):
        return self.heads(self.net["critic"], together(batch["obs"], batch["actor_goals"]), action_numbers(actions, self.spec)).amin(1)

    def advantages(self, batch):
        return self.worth(batch, batch["actions"]) - self.v(batch["obs"], batch["actor_goals"])

    def losses(self, batch):
        return {"value": self.value_loss(batch), "critic": self.critic_loss(batch), "actor": self.part.extraction.loss(self, batch)}


gciql = method("gciql", GCIQL(), title="goal-conditioned implicit Q-learning", source="arXiv 2410.20092")
