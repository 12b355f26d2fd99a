"""DAPO: decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476).

Problem. Long-chain GRPO loses entropy, wastes groups without signal, and punishes responses that were merely cut off.
Idea. Five changes: (1) clip-higher: the ratio may rise to 1.28 but fall only to 0.8; (2) token-mean loss; (3) dynamic sampling: groups whose
rewards are all equal are dropped and prompts drawn until the batch is full; (4) overlong responses: their loss is masked
(`filter.mute_overlong`), or a soft penalty rises over the last `buffer` tokens before the cap (the reward part `overlong`); (5) no KL.
Pick it for long responses and a mixed data set. Dynamic sampling costs extra rollouts exactly when most groups are homogeneous.
"""

from volvelle.core.parts import method, preset

from ..fittings import Drop
from ..objectives import Clipped
from ..recipe import LanguageRecipe

clip_higher = preset("dapo", Clipped(clip_low=0.2, clip_high=0.28))
dynamic_sampling = preset("dapo", Drop(which="homogeneous", mute_overlong=True))

dapo = method("dapo", LanguageRecipe(objective=clip_higher, filter=dynamic_sampling),
              title="Clip-higher, dynamic sampling, overlong handling", source="arXiv 2503.14476")
