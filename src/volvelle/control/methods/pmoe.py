"""PMOE: a mixture of experts as the policy of soft actor-critic, whose mixing weights learn how often each expert is best.

Problem: a Gaussian policy has one mode, and drawing which component of a mixture acts cannot be differentiated.
Idea: pi(a|s) = sum_i w_i(s) N(mu_i(s), sigma_i(s)), squashed. For every state draw one action of each expert and ask the critics which is best, j;
(1) regress the weights to its indicator, mean over i of (w_i - [i = j])^2, whose minimum is the probability of being best (the frequency
approximate gradient); (2) improve only that expert, alpha log pi_j(a_j) - q_j, so that experts do not all climb the same hill. Targets use a
drawn expert and its own log-probability.
Pick it for continuous control with several good ways to act, for skills and wider exploration. Not where one mode is enough: every update asks the
critics about K actions per state. Experts that are never best stop learning; watch `least_weight`.
Compared: index=gumbel (straight-through Gumbel-softmax), index=score (likelihood ratio), head.compose=gating or product (one Gaussian made of all),
head.experts=1 (soft actor-critic itself, to the bit). Option-critic's terminating options are not among them.
Source: arXiv 2104.09122. The authors' single file scales batch-normalised rewards by 10 and plays a drawn expert's mean in evaluation; here rewards
are as they are, and greedy=likeliest plays the expert of the greatest weight (greedy=drawn is theirs).

The claim: both goals are kept, as said, but the return falls short of soft actor-critic's by more than the .1 allowed. The expert is drawn anew at every
step and the experts point to different goals, so walks waver (7.4 steps for 4.6); the likeliest expert alone is as good as soft actor-critic.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.claims import Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam

from ..buffers import Uniform
from ..envs import each
from ..evaluation import Evaluation
from ..heads import PolicyHead
from ..landscapes import TwoGoals
from ..learner import Count, NonNegative
from ..mixtures import Composed, SquashedMixture, chosen
from ..networks import MLP, Linear, Network, Output, flat
from ..stacked import Streams
from .sac import SAC, Actor, SACAgent


def frequency_loss(weights: Tensor, best: Tensor) -> Tensor:
    """Mean over the K experts of (w_i - [i = best])^2, [...]; weights [..., K], best [...] expert numbers."""
    wanted = torch.nn.functional.one_hot(best, weights.shape[-1]).to(weights.dtype)
    return (weights - wanted).square().mean(-1)


class Gate(torch.nn.Module):
    """Logits [S, B, K] of the mixing weights: linear in the observation, or behind a network of its own."""

    def __init__(self, network: Network | None, layout, seeds: int, experts: int):
        super().__init__()
        self.net = Linear(seeds, layout.size, experts) if network is None else Output(network.build(layout, seeds), seeds, experts, network.init)
        self.linear = network is None

    def forward(self, x) -> Tensor:
        return self.net(flat(x) if self.linear else x)


@part("pmoe")
class PMOE(SAC):
    """index: gradient of the choice of expert; improve: the best expert, all, or all weighted by w; samples: actions per expert that are asked about
    before the best is named; frequency_weight: of the frequency loss; gate: network of the mixing weights (none: linear in the observation);
    gumbel_temperature: of index=gumbel; greedy: the likeliest expert's mean, or that of a drawn one.
    """

    head: PolicyHead = SquashedMixture(experts=4)
    alpha_fresh: bool = False
    index: Literal["frequency", "gumbel", "score"] = "frequency"
    improve: Literal["best", "all", "weighted"] = "best"
    samples: Count = 1
    frequency_weight: NonNegative = 1.0
    gate: Network | None = None
    gumbel_temperature: Annotated[float, Field(gt=0)] = 1.0
    greedy: Literal["likeliest", "drawn"] = "likeliest"
    mixes = True

    def check(self, recipe):
        super().check(recipe)
        if not isinstance(self.head, SquashedMixture):
            raise UserError(f"head={self.head.part_name}: pmoe weighs experts; accepted: squashed-mixture (head.experts=1 is a single Gaussian)")
        if self.alpha_fresh:
            raise UserError("alpha_fresh=true: pmoe tunes alpha by the log-probability of the improved expert; accepted: false")
        if self.head.compose != "draw" and self.index != "frequency":
            raise UserError(f"index={self.index}: with head.compose={self.head.compose} no expert is drawn; leave index out")
        if self.index != "frequency" and self.improve != "best":
            raise UserError(f"improve={self.improve}: with index={self.index} the drawn expert is improved; leave improve out")

    def actor(self, spec, seeds):
        return MixtureActor(self, spec, seeds)

    def agent(self, run, spec):
        return (ComposedAgent if self.head.compose != "draw" else PMOEAgent)(run, self, spec)


class MixtureActor(Actor):
    """One network with K * 2 * A outputs, and the gate."""

    def __init__(self, recipe: PMOE, spec, seeds: int):
        super(Actor, self).__init__()
        self.head, self.recipe = recipe.head.bind(spec.actions), recipe
        experts = recipe.head.experts
        self.net = Output(recipe.network.build(spec.observations, seeds), seeds, self.head.width - experts, recipe.network.init)
        self.gate = Gate(recipe.gate, spec.observations, seeds, experts)

    def forward(self, x) -> Tensor:
        return torch.cat([self.gate(x), self.net(x)], -1)

    def best(self, observations):
        return self.head.mode(self(observations))

    def greedy(self, observations, streams: Streams):
        if self.recipe.greedy == "likeliest" or isinstance(self.head, Composed):
            return self.best(observations)
        outputs = self(observations)
        return self.head.mode(outputs, torch.from_numpy(streams.gumbel(outputs.shape[1], self.head.experts)).to(outputs.device))

    def explore(self, observations, streams):
        outputs = self(observations)
        return self.head.sample(outputs, streams.noise(self.head, outputs.shape[1]).to(outputs.device))


class ComposedAgent(SACAgent):
    """The baselines that act with one Gaussian made of all experts: plain soft actor-critic on it."""


class PMOEAgent(SACAgent):
    """The algorithm: only the actor's loss differs from soft actor-critic."""

    def values_of(self, observations, actions: Tensor) -> Tensor:
        """min_k Q_k(s, a_i) [S, B, K] of one action per expert [S, B, K, A]."""
        experts = actions.shape[2]
        rows = each(lambda x: x.repeat_interleave(experts, 1), observations)
        return self.critics.values(rows, actions.flatten(1, 2)).amin(1).unflatten(1, (-1, experts))

    def actor_noise(self, batch):
        """Noise for the learning actions, and for the further ones per expert that are asked about."""
        return [self.fresh(batch) for _ in range(self.part.samples if self.part.index == "frequency" else 1)]

    def actor_loss(self, observations, noise: list[Tensor], alpha: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Expert loss plus frequency loss, per seed; and log pi [S, B] of the improved expert."""
        part, head, (noise, *further) = self.part, self.head, noise
        outputs = self.module(observations)
        actions, logps = head.every(outputs, noise)
        if part.index != "frequency":
            return self.drawn_loss(observations, outputs, actions, logps, noise, alpha)
        with torch.no_grad():
            q = self.values_of(observations, actions)
            for more in further:
                q = q + self.values_of(observations, head.every(outputs, more)[0])
            best = q.argmax(-1)
        frequency = frequency_loss(head.weights(outputs), best).mean(-1)
        logp = chosen(logps, best)
        if part.improve == "best":
            cost = alpha * logp - self.critics.values(observations, chosen(actions, best)).amin(1)
        else:
            cost = alpha.unsqueeze(-1) * logps - self.values_of(observations, actions)
            cost = (cost if part.improve == "all" else cost * head.weights(outputs).detach()).sum(-1)
        return cost.mean(-1) + part.frequency_weight * frequency, {"logp": logp}

    def drawn_loss(self, observations, outputs, actions, logps, noise, alpha) -> tuple[Tensor, dict[str, Tensor]]:
        """The compared estimators: the loss of a drawn expert, differentiated through a relaxed draw, or by the likelihood ratio."""
        logits, gumbel = outputs[..., : self.head.experts], self.head.noise_parts(noise)[1]
        index = self.head.index(logits, gumbel)
        if self.part.index == "gumbel" and gumbel is not None:
            soft = ((logits + gumbel) / self.part.gumbel_temperature).softmax(-1)
            mix = torch.nn.functional.one_hot(index, self.head.experts) - soft.detach() + soft
            action, logp = (mix.unsqueeze(-1) * actions).sum(-2), (mix * logps).sum(-1)
        else:
            action, logp = chosen(actions, index), chosen(logps, index)
        cost = alpha * logp - self.critics.values(observations, action).amin(1)
        loss = cost.mean(-1)
        if self.part.index == "score":
            known = cost.detach()
            loss = loss + (chosen(logits.log_softmax(-1), index) * (known - known.mean(-1, keepdim=True))).mean(-1)
        return loss, {"logp": logp}

    def update_actor(self, batch):
        made = super().update_actor(batch)
        return made | {"obs": batch["obs"]}

    @torch.no_grad()
    def report(self, made):
        shown = super().report(made)
        if "obs" in made:
            outputs = self.module(made["obs"])
            means = self.head.blocks(outputs)[1].tanh()
            shown |= {"least_weight": self.head.weights(outputs).mean(1).amin(-1), "spread": means.std(-2, correction=0).mean()}
        return shown


# --------------------------------------------------------------------------------------------------------------- recipe and claim

pmoe_parts = {"warmup": 5000, "replay": Uniform(capacity=1_000_000, batch=256), "critic_optimiser": Adam(lr=3e-4, clip=None),
              "alpha_optimiser": Adam(lr=3e-4, clip=None), "delay": 1, "alpha_loss": "log", "critic_weight": 0.5}
small = {**pmoe_parts, "warmup": 500, "period": 500, "every": 2, "replay": Uniform(capacity=20_000, batch=64), "alpha": 0.02, "gamma": 0.95, "network": MLP(hidden=(64, 64), activation="relu"),
         "actor_optimiser": Adam(lr=1e-3, clip=None), "critic_optimiser": Adam(lr=1e-3, clip=None), "evaluation": Evaluation(episodes=100, explore=True)}


def _arm(experts: int, **options):
    return PMOE(**small | options, head=SquashedMixture(experts=experts))


claim = Claim(
    says="keeps several equally good ways to act, where one Gaussian commits to one of them",
    arms={"sac": _arm(1), "pmoe": _arm(4), "improve-all": _arm(4, improve="all"), "gumbel": _arm(4, index="gumbel"), "score": _arm(4, index="score")},
    task=TwoGoals(), steps=12, seeds=8, equal="environment steps", minutes=5,
    expects=("pmoe > sac on balance", "pmoe >= sac - 0.1 on return", "pmoe > improve-all on balance"))

pmoe = method("pmoe", PMOE(**pmoe_parts), title="mixture of experts as the policy of soft actor-critic", source="arXiv 2104.09122", claim=claim)
