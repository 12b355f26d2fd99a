"""REINFORCE for token policies (Williams 1992), the plainest member of the family.

Idea. L = -A log p with A the reward to go minus a baseline (the batch's mean reward by default). No ratio, no clipping, no groups.
Pick it as the yardstick. One update per batch only: with more, the batch no longer comes from the policy and nothing corrects for it.
"""

from volvelle.core.parts import method

from ..advantages import Return
from ..objectives import PolicyGradient
from ..recipe import LanguageRecipe
from ..samplers import Plain

reinforce = method("reinforce", LanguageRecipe(sampler=Plain(group=1), advantage=Return(baseline="batch"), objective=PolicyGradient(), prompts=64),
                   title="The policy gradient with a batch-mean baseline", source="Williams 1992, doi 10.1007/BF00992696")
