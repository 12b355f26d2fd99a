"""CISPO: clipped importance-sampling policy optimisation (MiniMax-M1, arXiv 2506.13585).

Problem. Clipping the surrogate drops the gradient of rare but decisive tokens whose ratio left the window.
Idea. Clip the weight, not the update: L = -sg(clip(w)) A log p. No token is ever dropped.
Pick it with several updates per batch when exploration tokens should keep their gradient.
"""

from volvelle.core.parts import method

from ..objectives import CISPO
from ..recipe import LanguageRecipe

cispo = method("cispo", LanguageRecipe(objective=CISPO()), title="Clipped importance weights instead of clipped updates", source="arXiv 2506.13585")
