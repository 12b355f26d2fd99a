"""GROOVE: discovering update rules with adversarial environment design (arXiv 2310.02782, NeurIPS 2023).

Problem: a learned update rule (LPG, arXiv 2007.08794) works where it was meta-trained and poorly elsewhere; which levels it meets decides.
Idea: keep levels in a buffer and let half of all new agents live on those where the rule does worst against what can be done. That is measured as
algorithmic regret: the return of an agent that a hand-written algorithm (A2C) trained on the level, minus the return of the agent the rule trained,

    AR(rule, level) = V_level(A2C) - V_level(rule)        after equally long lives (A2C's is the longest there is)

Unlike the value losses of prioritised level replay it does not ask how hard a level is for an agent, and unlike the regret to the optimum it is
not fooled by levels that no algorithm learns in a lifetime.
Pick it to discover or transfer an update rule, or to study curricula for meta-learning. Not to solve one task, not without many parallel lives.
The claim is inconclusive at the size that two cores allow: 300 meta-updates are 240 lifetimes. Sizes were set beforehand, after one seed of each arm on
smaller levels (grids:tiny); nothing was changed after the result.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.claims import Claim
from volvelle.core.errors import UserError
from volvelle.core.files import write_text
from volvelle.core.parts import method, part
from volvelle.core.plots import heat_map
from volvelle.core.state import save_state
from volvelle.core.trainable import Adam

from ..gridtasks import Grids, RandomGrids
from ..gridworlds import ACTIONS, Levels, Worlds, optimal_returns
from ..levelbuffer import LevelBuffer
from ..lpg import LPG, load_rule
from ..metalearning import Curation, MetaGradient, MetaTraining
from ..rule_tests import lifetime
from ..tabular import Tabular, Values, actor_critic, play, returns

Score = Literal["algorithmic-regret", "l1-value-loss", "positive-value-loss", "optimal-regret"]
Antagonist = Literal["a2c", "ppo", "random", "expert"]
EPISODES = 64  # per agent, where returns are compared


def antagonist_returns(kind: Antagonist, levels: Levels, agent: Tabular, updates: int, generator: torch.Generator) -> Tensor:
    """V of the antagonist [L]: agents trained by A2C or PPO for `updates`, a random policy, or (expert) the exact optimum."""
    if kind == "expert":
        return optimal_returns(levels).float()
    if kind == "random":
        return returns(levels, agent.fresh(len(levels), levels.states, ACTIONS, device=levels.size.device), EPISODES, generator)
    further = {"epochs": 4, "ratio": 0.2} if kind == "ppo" else {}
    return returns(levels, actor_critic(levels, agent, updates, generator, **further), EPISODES, generator)


def algorithmic_regret(antagonist: Tensor, learned: Tensor) -> Tensor:
    """AR = V(antagonist) - V(rule), [L]."""
    return antagonist - learned


@torch.no_grad()
def value_loss(levels: Levels, actor: Tensor, values: Values, workers: int, positive: bool, generator: torch.Generator) -> Tensor:
    """Mean of |GAE|, or of max(GAE, 0), over the first episode of every copy: [L]."""
    seen = play(actor, Worlds(levels, workers), int(levels.limit.max()), generator)
    advantages, _ = values.advantages(seen)
    first = torch.cumsum(seen.done, -1) - seen.done.long() == 0
    size = advantages.clamp(min=0) if positive else advantages.abs()
    return (size * first).sum((1, 2)) / first.sum((1, 2))


@part("adversarial")
class Adversarial(Curation):
    """A buffer of levels; a share of new lifetimes lives on those with high scores.

    score: algorithmic-regret, optimal-regret (against the exact optimum), l1-value-loss or positive-value-loss (of the lifetimes' scalar critics);
    antagonist: whom algorithmic regret compares with; size: of the buffer; replay: share of curated levels; transform: rank (the highest, in order) or
    proportional (drawn with p ~ exp(score / temperature)); frozen: levels keep their first score and none is replaced.
    """

    score: Score = "algorithmic-regret"
    antagonist: Antagonist = "a2c"
    size: Annotated[int, Field(gt=0)] = 4000
    replay: Annotated[float, Field(ge=0, le=1)] = 0.5
    transform: Literal["rank", "proportional"] = "rank"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    frozen: bool = False

    @property
    def values(self):
        return self.score.endswith("value-loss")

    def check(self, recipe):
        if self.size < 3 * recipe.lifetimes:
            raise UserError(f"curation.size={self.size}: active, fresh and scored levels for lifetimes={recipe.lifetimes} need room; expected at least {3 * recipe.lifetimes}")

    def start(self, run):
        return _Adversarial(self, run)


class _Adversarial:
    def __init__(self, part: Adversarial, run):
        self.part, self.source, self.generator = part, run.config.task.levels, run.torch_rng("levels")
        self.buffer = LevelBuffer(self.source.draw(part.size, self.generator))
        self.slots = torch.zeros(0, dtype=torch.long)
        self.last: dict[str, float] = {}

    def _draw(self, count: int) -> Levels:
        return self.source.draw(count, self.generator)

    def _sample(self, count: int, batch: int) -> Tensor:
        part = self.part
        return self.buffer.sample(count, batch, part.replay, part.transform, part.temperature, None if part.frozen else self._draw, self.generator)

    def first(self, count):
        self.slots = self._sample(count, count)
        return self.buffer.levels[self.slots]

    def scores(self, ended: Tensor, learner) -> Tensor:
        part, levels, agent = self.part, learner.worlds.levels[ended], learner.part.agent
        actor = learner.actor[ended]
        if part.values:
            critic = Values(len(ended), levels.states, 1.0, device=actor.device)
            critic.table = learner.values.table[ended]
            return value_loss(levels, actor, critic, agent.workers, part.score == "positive-value-loss", learner.playing)
        learned = returns(levels, actor, EPISODES, learner.playing)
        if learner.paired:
            learned = (learned + returns(levels, learner.actor[ended + learner.places], EPISODES, learner.playing)) / 2
        kind = "expert" if part.score == "optimal-regret" else part.antagonist
        return algorithmic_regret(antagonist_returns(kind, levels, agent, self.source.longest, learner.playing), learned)

    def renew(self, ended, learner):
        scores, slots = self.scores(ended, learner).cpu(), self.slots[ended.cpu()]
        old = ~self.buffer.new[slots]
        if self.part.frozen:
            scores = torch.where(old, self.buffer.score[slots], scores)
        self.last = {"score_random": float(scores[~old].mean())} if (~old).any() else {}
        self.last |= {"score_curated": float(scores[old].mean())} if old.any() else {}
        self.buffer.finish(slots, scores)
        self.slots[ended.cpu()] = chosen = self._sample(len(ended), len(self.slots))
        return self.buffer.levels[chosen]

    def report(self) -> dict[str, float]:
        return {"curated": float((~self.buffer.new[self.slots]).double().mean())} | self.last

    def save(self, folder) -> None:
        """The buffer, and a picture of its twelve highest scored levels."""
        save_state(folder, self.buffer.state_dict())
        if len(self.buffer.curated):
            write_text(folder / "levels.svg", picture(self.buffer))

    def state_dict(self):
        return self.buffer.state_dict() | {"slots": self.slots, "last": dict(self.last)}

    def load_state_dict(self, state):
        self.buffer.load_state_dict(state)
        self.slots, self.last = state["slots"], dict(state["last"])


def picture(buffer: LevelBuffer, count: int = 12) -> str:
    """What the highest scored levels are like, in deviations from the mean of all scored ones."""
    index = torch.nonzero(~buffer.new)[:, 0]
    index = index[buffer.score[index].argsort(descending=True)]
    levels, score = buffer.levels[index], buffer.score[index]
    owned = levels.owned.double()
    table = torch.stack([score.double(), levels.size.double(), levels.walls.sum(1).double(), owned.sum(1), (levels.reward * owned).amax(1).double(),
                         (levels.reward * owned).amin(1).double(), levels.limit.double()], 1)
    scaled = (table[:count] - table.mean(0)) / (table.std(0, unbiased=False) + 1e-9)
    return heat_map(scaled.numpy(), [str(i + 1) for i in range(len(scaled))], ["score", "side", "walls", "objects", "best reward", "worst reward", "episode"], value="deviations from the mean", centre=0.0,
                    y="level, by score", title="The levels with the highest scores beside all scored levels")


@part("static")
class Static(Curation):
    """A fixed set of levels, drawn from uniformly. count: how many; candidates: random levels they are the best of by algorithmic regret of the update
    rule saved in the folder `rule` (0: they are random)."""

    count: Annotated[int, Field(gt=0)] = 16
    candidates: Annotated[int, Field(ge=0)] = 0
    rule: str = ""

    def check(self, recipe):
        if self.candidates and not self.rule:
            raise UserError(f"curation.candidates={self.candidates}: are scored with an update rule; give curation.rule=RUN/rule")
        if 0 < self.candidates < self.count:
            raise UserError(f"curation.candidates={self.candidates}: expected at least curation.count={self.count}, or 0")

    def start(self, run):
        source, generator = run.config.task.levels, run.torch_rng("levels")
        levels = source.draw(self.candidates or self.count, generator)
        if self.candidates:
            rule, agent = load_rule(self.rule), run.config.recipe.agent
            learned = lifetime(rule, agent, levels, EPISODES, generator)
            regret = algorithmic_regret(antagonist_returns("a2c", levels, agent, source.longest, generator), learned)
            levels = levels[regret.argsort(descending=True)[: self.count]]
        return _Static(levels, generator)


class _Static:
    def __init__(self, levels: Levels, generator):
        self.levels, self.generator = levels, generator

    def first(self, count):
        return self.levels[torch.randint(len(self.levels), (count,), generator=self.generator)]

    def renew(self, ended, learner):
        return self.first(len(ended))

    def report(self):
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"levels": self.levels.tensors()}

    def load_state_dict(self, state):
        self.levels = Levels(**state["levels"])


small = MetaTraining(rule=LPG(hidden=32, embed=8), agent=Tabular(width=4, workers=16, length=10), outer=MetaGradient(updates=3), optimiser=Adam(lr=1e-3, clip=None),
                     lifetimes=16)
large = MetaTraining(outer=MetaGradient(recompute=64))  # the paper's sizes, in the memory of one machine
curated = Adversarial(size=200, transform="proportional", temperature=0.1)
claim = Claim(
    says="an update rule meta-trained on levels of high algorithmic regret fails on fewer held-out levels than one meta-trained on random levels",
    arms={"lpg": small, "groove": small(curation=curated)},
    task="grids:mixed", steps=300, seeds=8, equal="meta-updates", minutes=15, run={"checkpoint_every": 0}, quick={"steps": 2, "seeds": 2, "task": Grids(levels=RandomGrids(lifetime=(4, 4)), tests=4)},
    paper={"steps": 5000, "task": "grids:all", "arms": {"lpg": large, "groove": large(curation=Adversarial()),
                                                      "optimal-regret": large(curation=Adversarial(score="optimal-regret"))}},
    expects=("groove < lpg on failures",))

groove = method("groove", MetaTraining(curation=Adversarial()), title="Meta-trained update rules on levels of high algorithmic regret", source="arXiv 2310.02782",
                claim=claim)
