"""Extreme Q-learning: the soft maximum over recorded actions, by Gumbel regression.

Problem: maximum-entropy offline learning needs log-sum-exp over actions, which cannot be sampled from recordings.
Idea: errors of maxima follow a Gumbel distribution, so fitting V by Gumbel regression makes it beta log E exp(Q / beta). Everything else is iql.
Pick it when a soft maximum is wanted and Q's noise is small against beta; the exponential loss can blow up (small beta, noisy rewards): then take
dual-rl, whose losses are tame.
Source: arXiv 2301.02328. The loss is rescaled by the batch's largest exponent; Q's loss is Huber's with delta 20.
"""

from volvelle.control.networks import MLP
from volvelle.core.parts import method

from ..maxima import Gumbel
from ..valueheads import WideHuber
from .iql import IQL

xql = method("xql", IQL(maximum=Gumbel(beta=2.0), value=WideHuber(delta=20.0), value_network=MLP(hidden=(256, 256), activation="relu", layer_norm=True, init="orthogonal")),
             title="extreme Q-learning: Gumbel regression", source="arXiv 2301.02328")
