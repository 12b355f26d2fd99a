"""LPG: the learned policy gradient, an update rule found by meta-training (arXiv 2007.08794, NeurIPS 2020).

Problem: what to predict and how to learn from it are choices of a hand-written algorithm. Idea: a network, run backwards over what an agent met, says for
every step how its action's probability shall move and what its prediction vector (of no given meaning) shall be; the network is trained by the gradient of
the agents' returns through several of their own updates, over many lifetimes and levels.
Pick it as the plain base of methods that choose levels (groove). Levels here are random; hand-made ones are `--task grids:handmade`.
The lifetimes' hyper-parameters are those of arXiv 2310.02782; the bandit that picks them per lifetime in the first paper is left out.
"""

from volvelle.core.parts import method

from ..metalearning import MetaTraining

lpg = method("lpg", MetaTraining(), title="A policy-gradient rule learned over many lifetimes", source="arXiv 2007.08794")
