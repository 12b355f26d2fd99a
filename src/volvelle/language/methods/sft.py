"""SFT: supervised fine-tuning on the task's demonstrations.

Idea. The same loop with other rows: a sampler that hands out logged text as FORCED tokens, and the negative log-likelihood as objective.
No rewards, no advantages. Pick it to warm-start a policy that never succeeds by itself.
"""

from volvelle.core.parts import method
from volvelle.core.trainable import AdamW

from ..fittings import Updates
from ..objectives import NLL
from ..recipe import LanguageRecipe
from ..samplers import Logged

sft = method("sft", LanguageRecipe(sampler=Logged(), reward=None, advantage=None, objective=NLL(), prompts=32, updates=Updates(optimiser=AdamW(lr=1e-5))),
             title="Supervised fine-tuning", source="maximum likelihood")
