"""Dr. GRPO: GRPO done right (arXiv 2503.20783).

Problem. Two normalisations of GRPO bias it: dividing by the group's deviation overweighs prompts that are almost always or almost never solved,
and averaging each response over its own length prefers short correct and long wrong responses.
Idea. Drop both: A_i = r_i - mean(r), and the loss is a sum over tokens divided by a constant (number of responses times a fixed length).
Pick it when responses get longer without getting better. With rewards of one scale and short responses it behaves like `grpo` at another
learning rate.
"""

from volvelle.core.parts import method

from ..advantages import GroupNormalised
from ..objectives import Clipped
from ..recipe import LanguageRecipe

dr_grpo = method("dr-grpo", LanguageRecipe(advantage=GroupNormalised(scale="none"), objective=Clipped(aggregation="constant")),
                 title="GRPO without its two normalisation biases", source="arXiv 2503.20783")
