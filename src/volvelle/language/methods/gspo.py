"""GSPO: group sequence policy optimisation (arXiv 2507.18071).

Problem. GRPO weighs each token by its own ratio, a one-sample importance weight whose noise grows with length (and breaks mixtures of experts).
Idea. One ratio per response, normalised by length: s_i = exp(mean over tokens of (log p - log p_old)), clipped in a very narrow window
(3e-4 below, 4e-4 above); every token of the response carries the gradient A_i s_i.
Pick it with several updates per batch and long responses. With one update per batch it equals `grpo` with a sequence mean.
"""

from volvelle.core.parts import method

from ..objectives import GSPO
from ..recipe import LanguageRecipe

gspo = method("gspo", LanguageRecipe(objective=GSPO()), title="One clipped ratio per response", source="arXiv 2507.18071")
