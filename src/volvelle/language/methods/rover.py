"""ROVER: random policy valuation for diverse reasoning (arXiv 2509.24981).

Problem. Policy iteration (PPO, GRPO) with a 0/1 verifier needs clipping, KL or entropy bonuses to stay stable, and ends in one way of solving.
Idea. Text is a tree with rewards at its leaves. There the Q-values of the *uniformly random* policy already say where success is possible, so
one fixed policy is evaluated, with the mean instead of the max, and actions are drawn from softmax(Q / rho). In a language model
    1. Q(s, a) = rho (log p(a|s) - log p_old(a|s)): the policy is its own Q-function, relative to the policy that made the batch, so Q starts at 0;
    2. r~ = r - mean(r) over the group, not divided by the deviation, copied to every token;
    3. target = r~ + beta * mean over the whole vocabulary of Q(s', .), without gradient; the second term is 0 after the last token;
    4. L = token mean of (Q - target)^2. No clipping, no KL, no reference, no critic. Drawing from softmax(Q / rho) is drawing from the policy.
With one update per batch Q is 0 and this is REINFORCE with a mean baseline, times 2 rho. From the second update on each log-ratio is drawn to
its target and stops there, and tokens that lead to a peaked next distribution get a lower target: use four updates or more.
Pick it when different solutions (pass@k) matter and rewards are binary and terminal. Its theory does not cover dense rewards, random
environments, or states reached by several paths.

The exact form on small trees is here as functions (`uniform_values`, `softmax_policy`, `success_bound`) and as the sampler `rover`. Deviations
of the released code are options: division by the group's deviation (its mathematics script) is `advantage.scale=group`; `beta=0`, `clip` and
`level=response` are its switches. There `clip` compares Q with log(1 ± clip), which is the log-ratio only for rho = 1; so it does here.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from volvelle.core.claims import Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam

from ..advantages import GroupNormalised
from ..fittings import Updates
from ..objectives import Aggregation, per_token
from ..recipe import Evaluation, LanguageRecipe
from ..records import POLICY, Batch, Prompt, Rollout, Scores
from ..samplers import Plain
from ..sampling import Sampling, draw
from ..slots import Objective, Sampler
from ..tasks.tree import Tree
from .grpo import grpo

Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]

# ------------------------------------------------------------------------------------------------------------- the language form


def relative_q(now: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, rho: float) -> torch.Tensor:
    """[N, T] rho (now - old) where mask, else 0. Of log-probs: Q of the tokens; of mean log-probs over the vocabulary: mean Q of the states."""
    return rho * torch.where(mask, now - old, 0.0)


def following(values: torch.Tensor) -> torch.Tensor:
    """[N, T] each position's successor; 0 after the last."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)


def settled(q: torch.Tensor, target: torch.Tensor, clip: float) -> torch.Tensor:
    """[N, T] q, without gradient where it has already gone beyond log(1 ± clip) and its target lies further out still."""
    high, low = math.log1p(clip), math.log1p(-clip)
    q = torch.where((target > q) & (q > high), high, q)
    return torch.where((target < q) & (q < low), low, q)


@part("rover")
class RelativeQ(Objective):
    """ROVER's squared error between the policy's relative Q and centred reward plus mean next Q.

    rho: temperature of softmax(Q / rho); beta: weight of the next state (0: reward only); clip: no gradient beyond log(1 ± clip) (none: off);
    level: "token", or "response" for (mean over tokens of Q - reward)^2. Advantages are the centred rewards.
    """

    rho: Positive = 1.0
    beta: AtLeast0 = 1.0
    clip: Annotated[float, Field(gt=0, lt=1)] | None = None
    level: Literal["token", "response"] = "token"
    aggregation: Aggregation = "token_mean"
    length: Count | None = None

    @property
    def old_needs(self) -> frozenset[str]:
        bare = self.beta == 0 or (self.level == "response" and self.clip is None)
        return frozenset() if bare else frozenset({"mean_logp"})

    @property
    def needs(self) -> frozenset[str]:
        return self.old_needs | {"old", "advantages"}

    def __call__(self, scores: Scores, batch: Batch) -> torch.Tensor:
        mask = batch.acted((POLICY,))
        q = relative_q(scores.logps, batch.old.logps, mask, self.rho)
        reward = per_token(batch.advantages, q)
        target = reward
        if self.old_needs:
            target = reward + self.beta * following(relative_q(scores.mean_logp, batch.old.mean_logp, mask, self.rho)).detach()
        if self.clip is not None:
            q = settled(q, target, self.clip)
        if self.level == "token":
            return (q - target) ** 2
        count = mask.sum(1)
        gap = torch.where(mask, q - reward, 0.0).sum(1) / count.clamp(min=1)
        return gap**2


# ----------------------------------------------------------------------------------------------------------------- the exact form


def uniform_values(leaves: torch.Tensor, vocabulary: int) -> list[torch.Tensor]:
    """Q of the uniformly random policy on complete trees: leaves [..., V^D] rewards -> per level l, [..., V^l, V] float64.

    One backward sweep with the mean: Q(s, a) = mean over a' of Q(s a, a'); at the leaves Q = reward. Q(s, a) is the expected reward of random
    continuations, and 0 exactly where no success lies below (rewards >= 0). The greedy policy on it is optimal.
    """
    levels = [leaves.double().unflatten(-1, (-1, vocabulary))]
    while levels[0].shape[-2] > 1:
        levels.insert(0, levels[0].mean(-1).unflatten(-1, (-1, vocabulary)))
    return levels


def softmax_policy(levels: list[torch.Tensor], rho: float) -> list[torch.Tensor]:
    """Per level, probabilities softmax(Q / rho); rho = 0 is greedy (the first of equals)."""
    if rho == 0:
        return [torch.nn.functional.one_hot(q.argmax(-1), q.shape[-1]).double() for q in levels]
    return [(q / rho).softmax(-1) for q in levels]


def leaf_probabilities(policy: list[torch.Tensor]) -> torch.Tensor:
    """[..., V^D] the probability of every leaf under per-level probabilities [..., V^l, V]."""
    reach = torch.ones_like(policy[0][..., 0])
    for here in policy:
        reach = (reach[..., None] * here).flatten(-2)
    return reach


def success_bound(levels: list[torch.Tensor], rho: float, reward: float = 1.0) -> torch.Tensor:
    """[...] what softmax(Q / rho) earns at least (Theorem 2), on trees that hold a leaf worth `reward`, all others worth 0.

    reward * (1 - sum over reachable states with both kinds of action of Pr(state) n / (n + exp(max Q / rho))), n = actions with Q = 0.
    """
    reach, lost = torch.ones_like(levels[0][..., 0]), 0.0
    for q, here in zip(levels, softmax_policy(levels, rho)):
        dead, best = (q == 0).sum(-1).double(), q.amax(-1)
        share = torch.sigmoid(dead.log() - best / rho)  # 0 where no action is dead
        lost = lost + (reach * torch.where(best > 0, share, 0.0)).sum(-1)
        reach = (reach[..., None] * here).flatten(-2)
    return reward * (1 - lost)


def q_learning(leaves: np.ndarray, vocabulary: int, episodes: int, rng: np.random.Generator, epsilon: float = 0.1,
               rate: float = 0.5) -> list[torch.Tensor]:
    """The yardstick: epsilon-greedy tabular Q-learning (max operator) on one tree, leaves [V^D]; ties are broken at random while learning."""
    depth = round(math.log(len(leaves), vocabulary))
    levels = [np.zeros((vocabulary**level, vocabulary)) for level in range(depth)]
    for _ in range(episodes):
        state = 0
        for level, q in enumerate(levels):
            best = np.flatnonzero(q[state] == q[state].max())
            action = rng.integers(vocabulary) if rng.random() < epsilon else rng.choice(best)
            after = state * vocabulary + action
            goal = leaves[after] if level + 1 == depth else levels[level + 1][after].max()
            q[state, action] += rate * (goal - q[state, action])
            state = after
    return [torch.from_numpy(q) for q in levels]


@part("rover")
class UniformValue(Sampler):
    """Draws from softmax(Q / rho), Q the exact values of the uniformly random policy, from the task's verifier over every response.

    rho = 0 is greedy. Needs a tabular policy (which only lends its tokens) of at most `leaves` responses. Rows are not drawn from the policy:
    with `objective=nll objective.on=policy` the policy learns to draw as the sampler does. temperature: at which the policy is scored.
    """

    group: Count = 8
    rho: AtLeast0 = 0.05
    leaves: Count = 1 << 16
    temperature: Positive = 1.0
    gives = frozenset()

    def start(self, run):
        return LiveUniformValue(self, run)


class LiveUniformValue:
    def __init__(self, description: UniformValue, run):
        self.part, self.policy, self.task = description, run.policy, run.config.task
        self.rng = run.torch_rng("sampler")
        self.kept: dict[str, list[torch.Tensor]] = {}
        if not hasattr(self.policy, "depth"):
            raise UserError("sampler=rover looks at every response, which only a tabular policy allows; use --task tree --model tabular")
        if self.policy.vocabulary**self.policy.depth > description.leaves:
            raise UserError(f"sampler=rover: {self.policy.vocabulary**self.policy.depth} responses to each prompt; accepted: at most "
                            f"sampler.leaves={description.leaves}")

    def values(self, prompt: Prompt) -> list[torch.Tensor]:
        """The prompt's Q per level, [V^l, V]; computed once."""
        if prompt.id not in self.kept:
            v, depth = self.policy.vocabulary, self.policy.depth
            every = torch.cartesian_prod(*[torch.arange(v)] * depth).reshape(-1, depth)
            rewards = torch.tensor([float(self.task.score(prompt, self.policy.decode(ids))) for ids in every.tolist()])
            self.kept[prompt.id] = uniform_values(rewards, v)
        return self.kept[prompt.id]

    def sample(self, prompts: list[Prompt]) -> list[Rollout]:
        group, n = self.part.group, len(prompts) * self.part.group
        of, state = torch.arange(n) // group, torch.zeros(n, dtype=torch.long)
        ids, logps = [], []
        for level in zip(*[self.values(p) for p in prompts]):
            probabilities, = softmax_policy([torch.stack(level)], self.part.rho)
            token, logp, _ = draw(probabilities[of, state].log(), Sampling(), self.rng)
            state = state * self.policy.vocabulary + token
            ids.append(token)
            logps.append(logp)
        ids, logps = torch.stack(ids, 1).tolist(), torch.stack(logps, 1)
        return [Rollout(prompts[i // group], ids[i], self.policy.decode(ids[i]), logps[i], "length", exact=False, group=i // group) for i in range(n)]


# --------------------------------------------------------------------------------------------------------------- recipe and claim

rover_parts = {"advantage": GroupNormalised(scale="none"), "objective": RelativeQ()}
tree = {"sampler": Plain(group=16), "prompts": 64, "updates": Updates(optimiser=Adam(lr=0.1), epochs=8),
        "evaluation": Evaluation(samples=64, ks=(1, 4, 16, 64))}


def _rover(**options):
    return grpo(**tree, **rover_parts | {"objective": RelativeQ(**options)})


claim = Claim(
    says="keeps more different solutions than GRPO at the same pass@1",
    arms={"grpo": grpo(**tree), "rover": _rover(), "reward-only": _rover(beta=0.0), "rho-0.1": _rover(rho=0.1), "rho-3": _rover(rho=3.0),
          "beta-5": _rover(beta=5.0)},
    task=Tree(prompts=64, winners=12), model="tabular", steps=60, seeds=5, minutes=4,
    expects=("rover > grpo on distinct_winners", "rover >= grpo - 0.02 on pass@1"))

rover = method("rover", LanguageRecipe(**rover_parts, updates=Updates(minibatch=2)), title="Values of the random policy, for diverse solutions",
               source="arXiv 2509.24981", claim=claim)
