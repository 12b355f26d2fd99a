"""HL-Gauss: values learnt by classification instead of regression.

Problem: networks that regress bootstrapped targets with squared error scale badly and follow every noise and move of their targets.
Idea: keep the target a number, y = r + gamma V(s'), but spread it by a Gaussian over bins of the value range, p_i(y) = mass of N(y, sigma^2) in
bin i; train logits with the cross-entropy to p(y), so that the gradient is softmax(logits) - p(y), bounded whatever the error; read the value
as the mean of the predicted histogram. sigma is 0.75 bin widths. Nothing else changes: double, n-step, minima over critics act on numbers.
Pick it for large networks, noisy rewards, moving targets and ranges that are known (returns outside are cut to the edge, so leave three sigma of
room). Not for unbounded or unknown ranges, nor for a small network on clean targets, where squared error fits as well or faster.
Compared: two-hot (mass on the two nearest locations, no smoothing), c51 (the distribution of the return), and `histogram-mse`, the same histogram
fitted by squared error of its mean, which tells the loss from the parameters. Works for dqn, the critics of sac and td3, and the values of ppo.
Source: arXiv 2403.03950. Every value head takes `prior` where the middle of the range is a poor first guess.

The claim: CartPole with noise U(-eta, eta) on every reward, two layers of 128, the mean true return of the training episodes of the second half.
It stays open at this size (eight seeds): the means are alike, only the spread between seeds at noise 3 is a third of squared error's.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from volvelle.core.claims import Claim
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam

from ..buffers import Uniform
from ..evaluation import Evaluation
from ..networks import MLP
from ..slots import Relabel
from ..stacked import Streams
from ..valueheads import C51, MSE, HLGauss, TwoHot
from .dqn import dqn, dqn_atari
from .ppo import ppo
from .sac import sac


@part("histogram-mse")
class HistogramMSE(HLGauss):
    """The control: a histogram's mean fitted by squared error, (sum_i p_i z_i - y)^2; targets are moved into the range."""

    def loss(self, outputs, target):
        return (self.value(outputs) - target.detach().clamp(self.low, self.high)).square()


@part("reward-noise")
class RewardNoise(Relabel):
    """Adds `spread` * U(-1, 1) to every reward that is learnt from; episode returns are still counted without it."""

    when: str = "store"
    spread: Annotated[float, Field(ge=0)] = 1.0

    def start(self, run):
        return LiveRewardNoise(self, run)


class LiveRewardNoise:
    info = ()

    def __init__(self, description: RewardNoise, run):
        self.when, self.spread = description.when, description.spread
        self.streams = Streams(run, "reward-noise", run.config.recipe.seeds)

    def __call__(self, batch):
        chance = torch.from_numpy(self.streams.uniform(*batch["rewards"].shape[1:])).to(batch["rewards"].device)
        return {**batch, "rewards": batch["rewards"] + self.spread * (2 * chance - 1)}


# --------------------------------------------------------------------------------------------------------------- recipes and claim

small = {"warmup": 1000, "every": 2, "replay": Uniform(capacity=30_000, batch=64), "copy_every": 500, "epsilon_share": 0.3, "epsilon_end": 0.05,
         "network": MLP(hidden=(128, 128), activation="relu"), "optimiser": Adam(lr=1e-3, clip=None), "evaluation": Evaluation(training_share=0.5)}
heads = {"mse": MSE(), "hl-gauss": HLGauss(low=-10.0, high=110.0), "two-hot": TwoHot(low=-10.0, high=110.0), "c51": C51(low=-10.0, high=110.0),
         "histogram-mse": HistogramMSE(low=-10.0, high=110.0)}


def _arm(name: str, noise: float):
    return dqn(**small, value=heads[name], relabels={"noise": RewardNoise(spread=noise)})


claim = Claim(
    says="learns better than squared error the noisier the rewards are",
    arms={f"{name}-noise-{eta}": _arm(name, float(eta)) for eta, names in {0: ("mse", "hl-gauss"), 1: ("mse", "hl-gauss"), 3: tuple(heads)}.items() for name in names},
    task="CartPole-v1", steps=30, seeds=8, equal="environment steps", minutes=15,
    expects=("hl-gauss-noise-3 > mse-noise-3 on training_return", "hl-gauss-noise-1 > mse-noise-1 on training_return",
             "hl-gauss-noise-3 > histogram-mse-noise-3 on training_return"))

hl_gauss = method("hl-gauss", dqn(value=HLGauss(low=-100.0, high=100.0, bins=101)), title="values by classification, in deep Q-learning",
                  source="arXiv 2403.03950", claim=claim)
hl_gauss_atari = method("hl-gauss-atari", dqn_atari(value=HLGauss(), copy_every=8000, optimiser=Adam(lr=6.25e-5, eps=1.5e-4, clip=None)),
                        title="values by classification, with the usual settings for Atari games", source="arXiv 2403.03950")
hl_gauss_sac = method("hl-gauss-sac", sac(value=HLGauss(low=-500.0, high=500.0, bins=101)), title="soft actor-critic with critics by classification",
                      source="arXiv 2403.03950")
hl_gauss_ppo = method("hl-gauss-ppo", ppo(value=HLGauss(low=-100.0, high=100.0, bins=101), value_clip=None),
                      title="PPO with values by classification", source="arXiv 2403.03950")
