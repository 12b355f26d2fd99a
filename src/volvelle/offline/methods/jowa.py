"""JOWA: one transformer is world model and value function at once, trained on the recordings of many games, and looks ahead when it acts.

Problem: value learning from recordings of many games does not grow with the network; behaviour cloning grows, but imitates the mistakes as well.
Idea: frames become tokens; one causal transformer reads (frame, action) blocks and, on the same trunk, predicts the next frame, the reward's sign and the
end, and a return distribution per action. First the world alone is learnt, then both: beta L_world + L_TD + alpha (logsumexp_a Q - Q(s, a)). The supervised
loss steadies the values, and the world model serves a short beam search that mends what errors of Q are left.
Pick it for recordings of many image-like games with few actions and mixed quality. Not for continuous actions or a single small task (cql is hundreds of
times cheaper), and not where acting must be quick: a planned action costs (depth) x (tokens per frame + 1) passes.
Source: arXiv 2410.00564. The class has the paper's 40M setting, the method `jowa` a miniature for grids, trained in minutes on a CPU. Not as in the paper:
the tokeniser's perceptual distance (see `vq-vae`); clipped gradients per module; imagined segments continue full segments only, so no left padding.
Measured on 3x3 grids, 2400 steps: joint learning adds .52 (.26 to .78), the beam nothing (-.23, -.61 to .15). 1000 steps were too short to tell.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from volvelle.control.evaluation import Evaluation
from volvelle.control.learner import Count, NonNegative, Positive
from volvelle.control.policy import Deciding
from volvelle.control.stacked import Streams
from volvelle.control.valueheads import C51, MSE, ValueHead, project
from volvelle.core.claims import Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, AdamW, Optimiser

from ..learner import Offline
from ..losses import conservative_gap
from ..lookahead import Beam, Planner
from ..samplers import BatchSampler
from ..worlds import Body, Cells, FrameTokeniser, Grouped, Segments, VQVAE, frames_and_games, own_numbers, reset
from ..worldplay import Imagination, WorldLearner, WorldPlayer


# ---------------------------------------------------------------------------------------------- the losses

def atoms_target(value: C51, following: Tensor, legal: Tensor, rewards: Tensor, ended: Tensor, gamma: float) -> Tensor:
    """The projected return distribution r + gamma Z(s', a*), all mass at r where the episode ended; a* is the best legal action by `following` itself.

    following [n, A, atoms]: the target's probabilities at s'; legal [n, A]; rewards and ended [n]. -> [n, atoms].
    """
    best = (following * value.support(following)).sum(-1).masked_fill(~legal, -torch.inf).argmax(-1)
    chosen = following[torch.arange(len(best), device=best.device), best]
    places = rewards[:, None] + gamma * (~ended).float()[:, None] * value.support(following)
    return project(chosen, places, value.low, value.high, value.bins)


def rows_with_target(mask: Tensor, ended: Tensor) -> Tensor:
    """Steps that have a target: the terminal ones, and those that another step of their segment follows. [B, L], all boolean."""
    followed = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return mask & (ended | followed)


def conservative(q: Tensor, recorded: Tensor, mask: Tensor, alpha: float, real: int | None = None) -> Tensor:
    """alpha (mean logsumexp_a Q - mean Q(s, recorded a)) over valid steps; q [B, L, A] with illegal actions, recorded and mask [B, L].

    real: rows whose recorded action counts in the second term (None: all), the form "combo".
    """
    if real is None:
        return alpha * conservative_gap(q, recorded)[mask].mean()
    return alpha * (q.logsumexp(-1)[mask].mean() - recorded[:real][mask[:real]].mean())


# ---------------------------------------------------------------------------------------------- the recipe

@part("world-action")
class JOWA(Offline):
    """world_steps: gradient steps of the first stage (the world alone, and the tokeniser); beta: weight of the world's loss afterwards; alpha: of the conservative
    term. values: "q" for the paper's values, "cloning" for behaviour cloning on the same trunk (needs value=mse). detach: no gradient of values in the trunk.
    random_mixture: heads mixed at random, one draw per batch. combo: see `conservative`. tune_tokeniser: train it in the second stage too. target_every: steps
    between copies of the value head. q_lr_scale: the heads' learning rate over the trunk's. planner: how it acts (None: greedily), over `context` steps seen; at
    evaluation `randomness` of the actions are random.
    """

    needs, acting = ("rewards", "terminated", "mask"), ("planner", "context", "randomness")
    batch: Count = 512
    sampler: BatchSampler = Segments()
    tokeniser: FrameTokeniser = VQVAE()
    layers: Count = 4
    heads: Count = 8
    width: Count = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    value: ValueHead = C51(low=-10.0, high=30.0, bins=51)
    q_heads: Count = 1
    q_hidden: Count = 768
    values: Literal["q", "cloning"] = "q"
    world_steps: Annotated[int, Field(ge=0)] = 250_000
    beta: NonNegative = 0.1
    alpha: NonNegative = 0.1
    detach: bool = False
    random_mixture: bool = False
    combo: bool = False
    tune_tokeniser: bool = False
    target_every: Count = 1000
    autocast: bool = True
    tokeniser_optimiser: Optimiser = Adam(lr=1e-4, clip=1.0)
    world_optimiser: Optimiser = AdamW(lr=1e-4, weight_decay=0.01, clip=1.0)
    optimiser: Optimiser = AdamW(lr=5e-5, weight_decay=0.01, clip=1.0)
    q_lr_scale: Positive = 1.0
    planner: Planner | None = Beam()
    context: Count = 4
    randomness: Annotated[float, Field(ge=0, le=1)] = 0.001
    imagination: Imagination | None = None

    def check(self, recipe):
        super().check(recipe)
        depth = self.planner.depth if self.planner is not None else 0
        if self.seeds != 1:
            raise UserError(f"seeds={self.seeds}: jowa trains one seed at a time; accepted: 1")
        if not isinstance(self.sampler, Segments):
            raise UserError(f"sampler={self.sampler.part_name}: jowa learns from pieces of episodes; accepted: segments")
        if not isinstance(self.value, (C51, MSE)):
            raise UserError(f"value={self.value.part_name}: jowa's heads are mixed as probabilities on atoms or as numbers; accepted: c51, mse")
        if self.values == "cloning" and not self.value.scalar:
            raise UserError(f"values=cloning takes the outputs as scores of actions; value={self.value.part_name} has atoms; accepted: mse")
        if self.context + depth > self.sampler.length:
            raise UserError(f"context={self.context} and planner.depth={depth} are more steps than sampler.length={self.sampler.length} in all")
        if self.width % self.heads:
            raise UserError(f"width={self.width} must be a multiple of heads={self.heads}")

    def actor(self, spec, seeds):
        spec.actions.only("discrete", "jowa")
        layout = spec.observations
        if len(layout.images) != 1:
            raise UserError(f"jowa reads frames; the observations are {layout.describe()}; accepted: one image, and the number of the game if there are several")
        tokeniser = self.tokeniser.build(next(iter(layout.images.values())))
        body = Body(tokens=tokeniser.tokens, codes=tokeniser.codes, games=max(layout.vector, 1), actions=spec.actions.codes[0], steps=self.sampler.length, layers=self.layers,
                    heads=self.heads, width=self.width, dropout=self.dropout, value=self.value, q_heads=self.q_heads, q_hidden=self.q_hidden)
        return WorldPlayer(tokeniser, body, layout, self.planner, self.context, self.gamma, self.randomness)

    def agent(self, run, spec, data):
        return JOWAAgent(run, self, spec)

    def start(self, run):
        return WorldLearner(run, self)


class JOWAAgent:
    """The algorithm."""

    def __init__(self, run, part: JOWA, spec):
        self.part, self.device, self.layout = part, run.device, spec.observations
        self.module: Deciding = part.actor(spec, 1)
        numbers, world = run.torch_rng("initial", run.seed), run.config.task.world()
        reset(self.module, numbers)
        for game, legal in enumerate(getattr(world, "legal", ())):
            self.module.body.legal[game] = torch.isin(torch.arange(spec.actions.codes[0]), torch.tensor(legal))
        self.net = run.register("body", Grouped("body", self.module.body, part.world_optimiser, run.device, scale=part.q_lr_scale))
        self.tokeniser = run.model("tokeniser", (t := self.module.tokeniser), part.tokeniser_optimiser if any(p.requires_grad for p in t.parameters()) else None)
        self.target = run.lagged(_Head(self.module.body), every=part.target_every, name="target")
        self.imagined = run.start("imagination", part.imagination)
        self.dropout, self.streams = run.torch_rng("dropout", run.seed), Streams(run, "mixture", 1)
        self.size = sum(p.numel() for p in self.module.parameters())

    def update(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One gradient step; the world alone until `world_steps`."""
        part, body, net = self.part, self.module.body, self.net
        age, made = int(body.age), {}
        second = age >= part.world_steps
        net.part = part.optimiser if second else part.world_optimiser
        if age == part.world_steps:
            net.restart(part.optimiser)                                                     # each stage has its own optimiser
        frames, game = frames_and_games({k: v[0] for k, v in batch["obs"].items()} if isinstance(batch["obs"], dict) else batch["obs"][0], self.layout)
        if self.tokeniser.optimiser is not None and (not second or part.tune_tokeniser):
            made["loss/tokeniser"] = (loss := self.module.tokeniser.loss(frames[batch["mask"][0]])).detach()
            self.tokeniser.backward(loss)
            self.tokeniser.step()
        mask, actions, rewards, ended = batch["mask"][0], batch["actions"][0], batch["rewards"][0], batch["terminated"][0].bool()
        data = (self.module.tokeniser.encode(frames.flatten(0, 1)).unflatten(0, mask.shape), actions, rewards, ended & mask, mask, game[:, 0])
        real = len(mask)
        if second and self.imagined is not None:
            data = self.imagined.joined(self.module, data, age, part.gamma)
        with own_numbers(self.dropout, self.device):
            losses = self.losses(*data, real, second)
        if second:
            total = part.beta * sum(losses[k] for k in ("frames", "rewards", "ends")) + losses["values"] + losses["conservative"]
        else:
            total = sum(losses.values())
        net.backward(total)
        made |= {f"loss/{k}": v.detach() for k, v in losses.items()} | {"gradient_norm": net.step()}
        if second:
            self.target.update()
        body.age += 1
        return made

    def losses(self, tokens: Tensor, actions: Tensor, rewards: Tensor, ended: Tensor, mask: Tensor, game: Tensor, real: int, second: bool = True) -> dict[str, Tensor]:
        """The world's losses on the first `real` rows, and in the second stage "values" and "conservative" on all of them."""
        body, part = self.module.body, self.part
        with torch.autocast(self.device.type, torch.bfloat16, enabled=part.autocast):
            x = body(tokens, actions, game)
            losses = body.world_loss(x[:real], tokens[:real], rewards[:real], ended[:real], mask[:real])
            return losses | self.value_losses(x, actions, rewards, ended, mask, game, real) if second else losses

    def value_losses(self, x: Tensor, actions: Tensor, rewards: Tensor, ended: Tensor, mask: Tensor, game: Tensor, real: int) -> dict[str, Tensor]:
        """L_TD and L_CQL from the trunk's outputs [B, L, T + 1, D]. The target's head reads the same outputs, without gradient."""
        body, part, value = self.module.body, self.part, self.part.value
        weights = None
        if part.random_mixture:
            drawn = torch.from_numpy(self.streams.uniform(part.q_heads)[0]).to(x.device)
            weights = drawn / drawn.sum()
        mixed = body.mixture(body.q_outputs(x.detach() if part.detach else x), weights)      # [B, L, A, width]
        chosen = mixed.gather(2, actions[..., None, None].expand(-1, -1, 1, mixed.shape[-1])).squeeze(2)
        q = body.expected(mixed)
        if part.values == "cloning":
            return {"values": F.cross_entropy(q[mask], actions[mask]), "conservative": x.new_zeros(())}
        with torch.no_grad():
            following = body.mixture(body.q_outputs(x, self.target.module), weights)
            following = torch.cat([following[:, 1:], following[:, -1:]], 1)
        rows = rows_with_target(mask, ended)
        legal = body.legal[game][:, None].expand(*mask.shape, -1)[rows]
        if value.scalar:
            best = body.expected(following)[rows].masked_fill(~legal, -torch.inf).amax(-1)
            target = rewards[rows] + part.gamma * torch.where(ended[rows], 0.0, best)
            losses = 0.5 * (chosen.squeeze(-1)[rows] - target).square()
        else:
            target = atoms_target(value, following[rows], legal, rewards[rows], ended[rows], part.gamma)
            losses = -(target * (chosen[rows] + 1e-8).log()).sum(-1)
        recorded = q.gather(-1, actions[..., None]).squeeze(-1)
        return {"values": losses.sum() / max(len(losses), 1), "conservative": conservative(q, recorded, mask, part.alpha, real if part.combo else None)}

    def report(self, made):
        return dict(made)


class _Head:
    """The value head of a body, as something that a lagged copy can follow."""

    name = "value head"

    def __init__(self, body: Body):
        self.module = body.q


# ---------------------------------------------------------------------------------------------- the miniature

small = JOWA(batch=32, sampler=Segments(length=4, offset=2), tokeniser=Cells(codes=12), layers=2, heads=2, width=32, dropout=0.0, value=C51(low=-2.0, high=4.0, bins=25, prior=0.0),
             q_hidden=64, gamma=0.9, world_steps=400, beta=0.5, target_every=25, period=200, autocast=False, planner=Beam(width=3), context=2,
             world_optimiser=AdamW(lr=5e-3, weight_decay=0.01, warmup=50), optimiser=AdamW(lr=3e-3, weight_decay=0.01, warmup=50), evaluation=Evaluation(episodes=30))
claim = Claim(says="values learnt together with the world are better than values alone, and looking ahead in that world adds to them",
              arms={"joint": small, "values-only": small(world_steps=0, beta=0.0, planner=None)}, task="grid-games-small", steps=12, first_seed=10,
              expects=("joint > values-only on unplanned_return", "joint > 0 on planning_gain"), equal="gradient steps", minutes=14, quick={"steps": 1, "seeds": 2},
              paper={"arms": {"joint": (full := JOWA(tokeniser=Cells(codes=12))), "values-only": full(world_steps=0, beta=0.0, planner=None)},
                                                   "task": "grid-games-mixed", "steps": 1750})
jowa = method("jowa", small, title="world-action model: world and values on one transformer", source="arXiv 2410.00564", claim=claim)
