"""Proximal policy optimisation: the default for a new environment.

Problem: a policy-gradient step is only trustworthy near the policy that collected the data, yet data are expensive.
Idea: take several epochs of minibatch steps on each rollout, and clip the probability ratio in the objective so that no sample has a reason
to move the policy further than 1 +- clip. The larger of the clipped and the unclipped loss is used: a pessimistic bound.
Pick it for anything with a cheap simulator, discrete or continuous; it tolerates careless settings. Where environment steps are expensive,
an off-policy method (sac, td3, dqn) needs several times fewer of them.
Source: arXiv 1707.06347; details as in arXiv 2006.05990 and the reference implementations (advantages normalised per minibatch, orthogonal
initialisation, value clipping). The value loss has no factor 1/2: value_weight 0.25 here is 0.5 in implementations that have one.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam

from ..credit import GAE, Objective
from ..losses import clipped_surrogate
from ..networks import CNN, MLP
from ..onpolicy import OnPolicy


@part("clipped")
class Clipped(Objective):
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))."""

    clip: Annotated[float, Field(gt=0)] = 0.2

    def __call__(self, logp, batch):
        return clipped_surrogate(logp, batch["old"], batch["advantages"], self.clip)


ppo = method("ppo", OnPolicy(
    envs=4, length=128, minibatches=4, epochs=4, gamma=0.99, advantage=GAE(lam=0.95), objective=Clipped(clip=0.2), normalise_advantages=True,
    entropy=0.01, value_weight=0.25, value_clip=0.2, anneal=True, optimiser=Adam(lr=2.5e-4, eps=1e-5, clip=0.5),
    network=MLP(hidden=(64, 64), activation="tanh", init="orthogonal")),
    title="proximal policy optimisation", source="arXiv 1707.06347")

ppo_continuous = method("ppo-continuous", ppo(
    envs=1, length=2048, minibatches=32, epochs=10, entropy=0.0, optimiser=Adam(lr=3e-4, eps=1e-5, clip=0.5), normalise_observations=True,
    normalise_rewards=True),
    title="PPO with the usual settings for continuous actions", source="arXiv 1707.06347")

ppo_atari = method("ppo-atari", ppo(
    envs=8, length=128, objective=Clipped(clip=0.1), shared=True, network=CNN(init="orthogonal")),
    title="PPO with the usual settings for Atari games", source="arXiv 1707.06347")
