"""Reinforcement learning for token policies: five wheels and one loop.

Every method of the wing is an attribute: `volvelle.language.grpo`, `volvelle.language.dr_grpo`.
"""

from volvelle.core.registry import wing_methods

__getattr__ = wing_methods("language", {"reinforce_pp": "reinforce++"})
