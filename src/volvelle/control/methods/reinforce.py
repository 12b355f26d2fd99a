"""REINFORCE: the Monte-Carlo policy gradient.

Problem: improve a stochastic policy from nothing but whole episodes and their returns.
Idea: raise the log-probability of every action by its discounted reward-to-go, minus a baseline that does not depend on the action (none, the
batch mean, or a learnt value); the baseline lowers the variance and leaves the expectation alone.
Pick it for short episodes, for teaching, and as the unbiased form under methods that change the credit of each step. Anything longer
learns much faster with ppo or a2c.
Source: Williams, Machine Learning 8 (1992). Reward-to-go is discounted from each step on; the gamma^t in front of the gradient is left out, as
everywhere in practice.
"""

from volvelle.core.parts import method
from volvelle.core.trainable import Adam

from ..credit import MonteCarlo, PolicyGradient
from ..onpolicy import OnPolicy

reinforce = method("reinforce", OnPolicy(
    envs=8, length=1000, whole_episodes=True, advantage=MonteCarlo(baseline="mean"), objective=PolicyGradient(), normalise_advantages=True,
    value_weight=0.0, optimiser=Adam(lr=3e-3, clip=None)),
    title="Monte-Carlo policy gradient", source="Williams 1992")
