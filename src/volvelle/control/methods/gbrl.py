"""GBRL: gradient-boosted trees as actor and critic (arXiv 2407.08250, ICML 2025).

Problem: for tabular, categorical and mixed observations trees serve better than networks, but boosting libraries expect fixed labels.
Idea: the ensemble's outputs theta(s) (logits or means, and the value) are the parameters of any actor-critic loss. Each optimisation step takes
the gradient of the loss at theta(s_i), times the batch size, and fits ONE new tree to it; leaves hold mean gradients, and policy and value
slices have learning rates of their own. Actor and critic may share the trees (`shared`) or grow one ensemble each.
Pick it for structured, categorical or noisy features, small inference, SHAP values. Not for images, nor for very long training: prediction slows
with every tree (`trees.distil_above` bounds that). Shared trees with the cosine score let large value gradients choose the splits: use
trees.score=l2, a smaller value_weight, or separate ensembles (the default here, as in the reference configuration).
Differences: the value loss here has no factor 1/2 (value_weight .436 is vf_coef .872). Control variates are computed here from the trees: the
package's own keep a memory that its files do not hold, so that no run with them could be resumed exactly.

Measured on ten seeds: learns faster than a network from categories, but depends more on a cue that never lied. Nothing was tuned after it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, Optimiser

from ..credit import GAE, PolicyGradient
from ..evaluation import Evaluation
from ..heads import Auto, PolicyHead
from ..networks import MLP, Network, Output
from ..onpolicy import ActorCritic, OnPolicy, OnPolicyLearner
from ..policy import Deciding
from ..learner import Positive
from ..stacked import make
from ..symbolic_grid import SymbolicGrid
from ..trees import Boosted, Forest, Trees
from .ppo import Clipped, ppo

NETWORK, OPTIMISER = MLP(init="orthogonal"), Adam(lr=2.5e-4, eps=1e-5, clip=0.5)


@part("boosted")
class BoostedPolicy(OnPolicy):
    """The on-policy loop with tree ensembles. shared: one ensemble for policy and value.

    policy_clip bounds the L2 norm of a sample's policy gradient, value_gradient_clip its value gradient; critic: trees, or a network (with
    `network` and `optimiser`) under a tree actor; std_optimiser moves the log standard deviation of Gaussian heads.
    """

    trees: Trees = Trees()
    policy_lr: Positive = 0.03
    value_lr: Positive = 0.015
    policy_clip: Positive | None = 100.0
    value_gradient_clip: Positive | None = 10.0
    critic: Literal["trees", "network"] = "trees"
    network: Network = NETWORK
    optimiser: Optimiser = OPTIMISER
    std_optimiser: Optimiser = Adam(lr=1e-3, clip=None)
    head: PolicyHead = Auto(start=-2.0)

    def check(self, recipe):
        super().check(recipe)
        if self.critic == "trees" and (self.network, self.optimiser) != (NETWORK, OPTIMISER):
            raise UserError("network and optimiser are those of critic=network; trees have trees.*, policy_lr and value_lr")
        if self.critic == "network" and self.shared:
            raise UserError("shared=true with critic=network: a network cannot share the actor's trees; accepted: shared=false")

    @property
    def rows(self) -> int:
        """The most samples that one tree is fitted to."""
        return self.envs * self.length // self.minibatches

    def actor(self, spec, seeds):
        return TreeActorCritic(self, spec, seeds)

    def start(self, run):
        return BoostedLearner(run, self)


class TreeActorCritic(Deciding):
    """The ensembles behind policy and value; free parameters (log std) are here. Same interface as ActorCritic."""

    def __init__(self, recipe: BoostedPolicy, spec, seeds: int):
        super().__init__()
        layout = spec.observations
        if layout.images:
            raise UserError(f"trees read vectors; the observations are {layout.describe()}; accepted: numbers, strings, categories:TASK for whole-number grids")
        if layout.categorical and recipe.normalise_observations:
            raise UserError("normalise_observations=true would turn categories into numbers; accepted with categorical observations: false")
        self.head = recipe.head.bind(spec.actions)
        self.width, extra = self.head.width, recipe.value.width
        policy, value = (0, self.width, recipe.policy_lr), (self.width, self.width + extra, recipe.value_lr)
        about = seeds, recipe.trees, layout.vector, layout.categorical
        self.forests: dict[str, Forest] = {}
        if recipe.shared:
            self.forests["shared"] = Forest(*about, self.width + extra, [policy, value], recipe.rows)
        else:
            self.forests["policy"] = Forest(*about, self.width, [policy], recipe.rows)
            if recipe.critic == "trees":
                self.forests["value"] = Forest(*about, extra, [(0, extra, recipe.value_lr)], recipe.rows)
        self.value_net = Output(recipe.network.build(layout, seeds), seeds, extra, recipe.network.init) if recipe.critic == "network" else None
        self.log_std = Free(seeds, self.head.free, self.head.start) if self.head.free else None

    def outputs(self, theta):
        return theta if self.log_std is None else (theta, self.log_std.free)

    def policy(self, x):
        return self.outputs(self.forests["shared"](x)[..., : self.width] if "shared" in self.forests else self.forests["policy"](x))

    def values(self, x):
        if self.value_net is not None:
            return self.value_net(x)
        return self.forests["shared"](x)[..., self.width :] if "shared" in self.forests else self.forests["value"](x)

    def forward(self, x):
        if "shared" in self.forests:
            theta = self.forests["shared"](x)
            return self.outputs(theta[..., : self.width]), theta[..., self.width :]
        return self.policy(x), self.values(x)

    best, explore = ActorCritic.best, ActorCritic.explore

    def weights(self):
        return super().weights() | {f"trees/{k}": f.blobs() for k, f in self.forests.items()}

    def load_weights(self, saved: dict[str, Any], where: str) -> None:
        if odd := {k for k in saved if k.startswith("trees/")} ^ {f"trees/{k}" for k in self.forests}:
            raise RunStopped(f"{where}: {sorted(odd)[0]!r} is on one side only")
        super().load_weights({k: v for k, v in saved.items() if not k.startswith("trees/")}, where)
        for k, f in self.forests.items():
            f.load_blobs(saved[f"trees/{k}"], where)


class Free(nn.Module):
    """Free parameters of a head, [S, 1, free]."""

    def __init__(self, seeds: int, width: int, start: float):
        super().__init__()
        self.free = nn.Parameter(torch.full((seeds, 1, width), start))


class Grown:
    """The Trainables of a TreeActorCritic as one: trees by the gradient at their outputs, log std and a network critic by their optimisers."""

    def __init__(self, run, module: TreeActorCritic, part: BoostedPolicy):
        w, extra, seeds = module.width, part.value.width, part.seeds
        policy, value = (0, w, "row", part.policy_clip), (w, w + extra, "element", part.value_gradient_clip)
        clips = {"shared": [policy, value], "policy": [policy], "value": [(0, extra, "element", part.value_gradient_clip)]}
        self.module, self.run = module, run
        self.boosted = {k: run.register(f"trees-{k}", Boosted(f"trees-{k}", f, clips[k])) for k, f in module.forests.items()}
        self.others = []
        if module.log_std is not None:
            self.others.append(make(run, "log-std", module.log_std, part.std_optimiser, seeds))
        if module.value_net is not None:
            self.others.append(make(run, "critic", module.value_net, part.optimiser, seeds))

    def backward(self, loss) -> None:
        loss.backward(torch.ones_like(loss) if loss.ndim else None)

    def step(self, scale: float = 1.0, only: str | None = None) -> float:
        """One tree in every ensemble (or in the one called `only`)."""
        norms = [b.step() for k, b in self.boosted.items() if only in (None, k)]
        return max(norms + [o.step(scale) for o in self.others if only is None or o.flat.grad.any()])


class BoostedLearner(OnPolicyLearner):
    """collect, credit, improve: every minibatch step grows a tree."""

    compilable = False  # nothing of a tree compiles

    def __init__(self, run, part):
        super().__init__(run, part)
        if part.anneal:
            for forest in self.net.module.forests.values():
                forest.anneal(self.planned())

    def planned(self) -> int:
        """Trees of a whole run."""
        return self.run.config.steps * self.part.epochs * self.part.minibatches

    def trainable(self, module):
        return Grown(self.run, module, self.part)

    def improve(self, batch):
        metrics = super().improve(batch)
        errors = [e for b in self.net.boosted.values() if (e := b.distil(batch["obs"])) is not None]
        trees = sum(f.trees for f in self.net.module.forests.values())
        return metrics | {"trees": float(trees)} | ({"distillation_error": max(errors)} if errors else {})


# ------------------------------------------------------------------------------------------------------------------- recipes and claim

# the settings of the reference code for CartPole; vf_coef .872
reference = BoostedPolicy(
    envs=8, length=128, minibatches=16, epochs=1, gamma=0.98, advantage=GAE(lam=0.8), objective=Clipped(clip=0.2), normalise_advantages=True,
    value_weight=0.436, policy_lr=0.029, value_lr=0.015)

how = Evaluation(episodes=100, explore=True)
symbolic = reference(minibatches=4, epochs=4, gamma=0.99, advantage=GAE(lam=0.95), policy_lr=0.17, value_lr=0.05, evaluation=how)


def _pair(name: str, **options):
    """Trees on categories, and PPO's network on one-hot columns with as many steps, of a larger learning rate than its default."""
    network = ppo(envs=8, minibatches=8, optimiser=Adam(lr=1e-3, eps=1e-5, clip=0.5), evaluation=how)
    return {f"gbrl{name}": Arm(symbolic, SymbolicGrid(test="both", coded=True, **options)), f"ppo{name}": Arm(network, SymbolicGrid(test="both", **options))}


claim = Claim(
    says="learns faster than a network from categories, with columns of noise too, and depends less on a cue that always stood beside the goal",
    arms=_pair("") | _pair("-noise", noise=20), steps=40, seeds=10, first_seed=10, equal="environment steps", minutes=14,
    expects=("gbrl > ppo on kept", "gbrl-noise > ppo-noise on kept", "gbrl < ppo on drop"))

gbrl = method("gbrl", reference, title="boosted trees as actor and critic, PPO", source="arXiv 2407.08250", claim=claim)

gbrl_a2c = method("gbrl-a2c", gbrl(
    envs=8, length=16, minibatches=1, objective=PolicyGradient(), gamma=0.99, advantage=GAE(lam=0.95), policy_lr=0.1, value_lr=0.1),
    title="boosted trees as actor and critic, A2C", source="arXiv 2407.08250")
