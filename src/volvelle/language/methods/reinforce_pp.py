"""REINFORCE++ (arXiv 2501.03262).

Problem. Group baselines need many responses per prompt, and normalising within small groups is noisy and biased.
Idea. Reward to go per token (outcome on the last token, minus beta k1 per token), whitened over *all tokens of the batch*; PPO's clipped
loss; no critic, and one response per prompt is enough. `advantage.baseline=group` first takes off the group mean (the paper's second form).
Pick it when prompts are plentiful and responses costly. Long responses weigh more in the whitening statistics.
"""

from volvelle.core.parts import method

from ..advantages import ReinforcePlusPlus
from ..fittings import KL
from ..recipe import LanguageRecipe
from ..samplers import Plain

reinforce_pp = method("reinforce++", LanguageRecipe(sampler=Plain(group=1), advantage=ReinforcePlusPlus(), prompts=64,
                                                    kl=KL(estimator="k1", place="reward", coefficient=0.01)),
                      title="Batch-whitened REINFORCE with PPO's clip", source="arXiv 2501.03262")
