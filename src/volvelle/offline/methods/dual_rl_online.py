"""Dual-V online: implicit maximisation over a replay buffer.

Problem: soft actor-critic bootstraps from actions of its own policy, whose values are extrapolated.
Idea: take the replay buffer as the data of dual_rl: V follows Q over the actions that were taken, Q regresses r + gamma V(s'), the policy imitates by
advantage, and acts to fill the buffer.
Pick it to go on online after dual-rl, or where sac overestimates; a buffer of poor actions holds it back longer than sac.
Source: arXiv 2302.08560, appendix. `learner` is any recipe with implicit maxima: dual-rl, iql, xql.
"""

from __future__ import annotations

import numpy as np

from volvelle.control.offpolicy import OffPolicy
from volvelle.control.spaces import Spec
from volvelle.control.stacked import Streams
from volvelle.core.errors import UserError
from volvelle.core.parts import Recipe, method, part

from ..behaviours import random_action
from ..implicit import ImplicitQ
from .dual_rl import FDVL, TotalVariationMaximum


@part("online-implicit")
class Online(OffPolicy):
    """learner: the offline recipe whose agent learns from the buffer; its gamma, seeds, batch and sampler are this recipe's. Uniform actions while warming up."""

    learner: Recipe = FDVL(maximum=TotalVariationMaximum(), decay=False)

    def check(self, recipe):
        super().check(recipe)
        if not isinstance(self.learner, ImplicitQ) or self.learner.goals or type(self.learner).agent not in (ImplicitQ.agent, FDVL.agent):
            raise UserError(f"learner={self.learner.part_name}: no learner of recorded rewards by implicit maxima; accepted: implicit-q, f-dvl")
        if self.replay.part_name == "prioritised":
            raise UserError("replay=prioritised: implicit maxima take no weights; accepted: uniform")
        if self.learner.decay:
            raise UserError("learner.decay=true: an offline run's length means nothing here; accepted: false")

    def actor(self, spec, seeds):
        return self.learner.actor(spec, seeds)

    def agent(self, run, spec):
        return OnlineAgent(run, self, spec)


class OnlineAgent:
    """Acts, and hands the buffer's batches to the offline agent."""

    def __init__(self, run, part: Online, spec: Spec):
        self.part, self.spec, self.exploring = part, spec, Streams(run, "exploring", part.seeds)
        self.inner = part.learner.replace(seeds=part.seeds, gamma=part.gamma).agent(run, spec, None)
        self.module, self.size = self.inner.module, self.inner.size

    def noise(self, steps, envs):
        return [envs] * steps

    def explore(self, observations, noise, env_steps):
        if env_steps < self.part.warmup:
            return np.stack([np.stack([random_action(self.spec, g) for _ in range(noise)]) for g in self.exploring.generators])
        return self.module.explore(observations, self.exploring).cpu().numpy()

    def update(self, batch):
        return self.inner.update(batch)

    def report(self, made):
        return {k: v for k, v in made.items()}

    def errors(self, made):
        return (made["q"] - made["v"]).abs()


dual_rl_online = method("dual-rl-online", Online(), title="f-DVL on a replay buffer", source="arXiv 2302.08560")
