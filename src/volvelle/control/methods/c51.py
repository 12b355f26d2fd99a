"""C51: deep Q-learning that learns the distribution of the return on fixed atoms.

Problem: the mean of the return is a poor, noisy regression target for a network.
Idea: predict a categorical distribution over 51 (or more) fixed values for every action; shift and scale the next state's distribution by
reward and discount, project it back onto the atoms, and minimise the cross-entropy. Act greedily in the mean.
Pick it over dqn when the range of returns is known; otherwise qr-dqn, which needs no range. Returns outside the atoms are cut to the edge.
Source: arXiv 1707.06887. The cross-entropy uses log-softmax; implementations that clamp probabilities at 1e-5 differ where p is smaller.
"""

from volvelle.core.parts import method
from volvelle.core.trainable import Adam

from ..valueheads import C51
from .dqn import dqn, dqn_atari

c51 = method("c51", dqn(value=C51(low=-100.0, high=100.0, bins=101), optimiser=Adam(lr=2.5e-4, eps=0.01 / 128, clip=None)),
             title="categorical distributional Q-learning", source="arXiv 1707.06887")

c51_atari = method("c51-atari", dqn_atari(value=C51(low=-10.0, high=10.0, bins=51), copy_every=10_000, optimiser=Adam(lr=2.5e-4, eps=0.01 / 32, clip=None)),
                   title="C51 with the usual settings for Atari games", source="arXiv 1707.06887")
