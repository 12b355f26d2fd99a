"""QR-DQN: deep Q-learning that learns quantiles of the return.

Problem: a categorical return distribution needs a range fixed in advance, and its projection has no clean metric behind it.
Idea: predict N quantiles at the midpoints (i + 0.5) / N for every action, and move them by quantile regression (with a Huber kink at 1) to
the quantiles of r + gamma Z(s', a'), a' greedy in the mean. This minimises the 1-Wasserstein distance.
Pick it for discrete actions when the return's range is unknown, or when its spread matters (risk). Slower per step than dqn: N^2 pairs.
Source: arXiv 1710.10044. Loss: sum over predicted quantiles, mean over target quantiles and batch.
"""

from volvelle.core.parts import method
from volvelle.core.trainable import Adam

from ..valueheads import Quantile
from .dqn import dqn, dqn_atari

qr_dqn = method("qr-dqn", dqn(value=Quantile(quantiles=50), optimiser=Adam(lr=5e-4, eps=0.01 / 128, clip=None)),
                title="quantile-regression Q-learning", source="arXiv 1710.10044")

qr_dqn_atari = method("qr-dqn-atari", dqn_atari(
    value=Quantile(quantiles=200), warmup=50_000, copy_every=10_000, epsilon_share=0.005, optimiser=Adam(lr=5e-5, eps=0.01 / 32, clip=None)),
    title="QR-DQN with the usual settings for Atari games", source="arXiv 1710.10044")
