"""RLOO: REINFORCE leave-one-out (arXiv 2402.14740).

Problem. For one reward per response, PPO's critic, clipping and per-token bootstrapping buy little.
Idea. Treat the whole response as one action, and use the mean reward of the other G - 1 responses as its baseline:
    A_i = r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean r)
with the KL to the reference subtracted from the reward token by token (k1), and the ratio of whole responses clipped (TRL's form).
Pick it for an unbiased, simple baseline; `grpo` adds the division by the deviation.
"""

from volvelle.core.parts import method

from ..advantages import LeaveOneOut
from ..fittings import KL
from ..objectives import SequenceClipped
from ..recipe import LanguageRecipe

rloo = method("rloo", LanguageRecipe(advantage=LeaveOneOut(), objective=SequenceClipped(), kl=KL(estimator="k1", place="reward", coefficient=0.05)),
              title="REINFORCE with a leave-one-out baseline", source="arXiv 2402.14740")
