"""Implicit Q-learning: the value of the best recorded action, by expectile regression.

Problem: offline Q-learning asks for the value of actions that were never tried, and believes the answer.
Idea: V(s) is an upper expectile of Q(s, a) over the recorded actions; Q regresses r + gamma V(s'); the policy imitates recorded actions with
weights min(exp(temperature (Q - V)), 100). No other action is ever evaluated.
Pick it as the first offline method to try; raise maximum.level (0.9) and temperature (10) where pieces of trajectories must be joined, lower the
temperature (0.5) for narrow data. xql and dual-rl change how V follows Q.
Source: arXiv 2110.06169. fresh=true is the order of the authors' code, fresh=false that of the common PyTorch port.
"""

from volvelle.core.parts import method, part

from ..implicit import ImplicitQ
from ..maxima import Expectile


@part("implicit-q")
class IQL(ImplicitQ):
    """The implicit-maximum recipe with any `maximum`; see volvelle.offline.implicit."""


iql = method("iql", IQL(maximum=Expectile(level=0.7)), title="implicit Q-learning", source="arXiv 2110.06169")
