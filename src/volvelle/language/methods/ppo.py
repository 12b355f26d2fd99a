"""PPO for language models (arXiv 1707.06347, in the form of arXiv 1909.08593 and 2203.02155).

Problem. Credit for a reward at the end of a text has to reach its tokens, with several optimiser steps per batch of samples.
Idea. Per-token reward r_t = -beta k1_t + [last token] score; a critic V; generalised advantage estimation
    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   returns = A + V (before whitening)
whitened over the batch; the clipped surrogate; a value loss clipped around the old values; four epochs.
Pick it with dense or per-turn rewards, or one response per prompt. For outcome rewards the group methods are cheaper: no critic.

Defaults: TRL's (lambda 0.95, clip 0.2, value clip 0.2, 4 epochs, KL 0.05). The critic has an optimiser of its own instead of a
coefficient in a joint loss.
"""

from volvelle.core.parts import method

from ..advantages import GeneralisedAdvantage
from ..fittings import KL, Updates, ValueCritic
from ..recipe import LanguageRecipe
from ..samplers import Plain

ppo = method("ppo", LanguageRecipe(sampler=Plain(group=1), advantage=GeneralisedAdvantage(), critic=ValueCritic(), prompts=64,
                                   kl=KL(estimator="k1", place="reward", coefficient=0.05), updates=Updates(epochs=4, minibatch=16)),
             title="Proximal policy optimisation with a token-level critic", source="arXiv 1707.06347")
