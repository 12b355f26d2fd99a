"""Meta-training of an update rule over many agents' lifetimes: the recipe, its learner, the two ways to improve the rule, and plain level draws.

Which levels new lifetimes get is a `Curation`; how the rule moves is an `Outer`. Fresh random levels and the meta-gradient are the
learned policy gradient (LPG, arXiv 2007.08794).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from volvelle.core.errors import UserError
from volvelle.core.parts import Part, Recipe, part
from volvelle.core.trainable import Adam, Optimiser

from .gridtasks import Grids
from .gridworlds import ACTIONS, Levels, Worlds
from .lpg import LPG, UpdateRule, ask, load_rule, tabular_update
from .rule_tests import RuleTests
from .tabular import EPS, Experience, Tabular, Values, entropy, normalised, play, returns, softmax

Count = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Curation(Part):
    """Slot: levels for new lifetimes. The live object has `first(count)` and `renew(ended [indices], learner)`, both giving Levels, and a `report()`."""

    slot: ClassVar[str] = "curation"
    values: ClassVar[bool] = False  # needs the lifetimes' scalar critics


@part("uniform")
class Uniform(Curation):
    """A new random level for every lifetime (domain randomisation)."""

    def start(self, run):
        return _Uniform(run)


class _Uniform:
    def __init__(self, run):
        self.source, self.generator = run.config.task.levels, run.torch_rng("levels")

    def first(self, count: int) -> Levels:
        return self.source.draw(count, self.generator)

    def renew(self, ended: Tensor, learner) -> Levels:
        return self.first(len(ended))

    def report(self) -> dict[str, float]:
        return {}


class Outer(Part):
    """Slot: `improve(learner)` makes one step of the rule and returns metrics."""

    slot: ClassVar[str] = "outer"

    def improve(self, learner: MetaLearner) -> dict[str, float]:
        raise NotImplementedError


@part("meta-gradient")
class MetaGradient(Outer):
    """The policy gradient of the updated agents, differentiated through their `updates` last updates.

    policy_entropy, prediction_entropy: weights of the entropies of the agents' policies and predictions (raised); policy_norm, prediction_norm: weights of
    the squares of the rule's outputs (lowered); critic: the scalar critics learn, or stay as they began (as in the released code, where their gradient
    is lost); through_inputs: the gradient also passes through what the rule reads of updated agents (in the released code it does not, so that
    nothing but the last four terms teaches the rule its predictions); recompute: of so many lifetimes at a time, the rule's inner values are computed again
    on the way back instead of being kept (0: all are kept): the same gradient, a fraction of the memory, somewhat more time.
    """

    updates: Count = 5
    policy_entropy: NonNegative = 0.05
    prediction_entropy: NonNegative = 0.001
    policy_norm: NonNegative = 0.005
    prediction_norm: NonNegative = 0.001
    critic: bool = True
    through_inputs: bool = False
    recompute: Annotated[int, Field(ge=0)] = 0

    def improve(self, learner):
        loss, metrics = self.loss(learner)
        learner.rule.backward(loss)
        learner.detach()
        norm = learner.rule.step()
        return metrics | {"meta_gradient_norm": norm}

    def loss(self, learner: MetaLearner) -> tuple[Tensor, dict[str, float]]:
        """L_out, averaged over lifetimes; the agents are left updated, with their history attached."""
        terms: dict[str, Any] = {name: 0.0 for name in ("policy_entropy", "prediction_entropy", "policy_norm", "prediction_norm")}
        rule = _recomputed(learner.rule, self.recompute) if self.recompute else learner.rule
        for _ in range(self.updates):
            seen, pi_hat, y_hat = learner.update(rule)
            terms["policy_entropy"] += entropy(softmax(seen.rows(learner.actor))).mean() / self.updates
            terms["prediction_entropy"] += entropy(softmax(seen.rows(learner.bootstrap))).mean() / self.updates
            terms["policy_norm"] += (pi_hat**2).mean() / self.updates
            terms["prediction_norm"] += (y_hat**2).sum(-1).mean() / self.updates
        seen = play(learner.actor.detach(), learner.worlds, learner.part.agent.length, learner.playing)
        advantages, _ = learner.values.advantages(seen)
        p = softmax(seen.rows(learner.actor)).gather(-1, seen.actions.unsqueeze(-1))[..., 0]
        gain = (torch.log(p + EPS) * normalised(advantages)).mean()
        loss = (-gain - self.policy_entropy * terms["policy_entropy"] + self.policy_norm * terms["policy_norm"]
                - self.prediction_entropy * terms["prediction_entropy"] + self.prediction_norm * terms["prediction_norm"])
        if self.critic:
            learner.values.learn(seen, advantages)
        return loss, {"reward": float(seen.rewards.mean()), "meta_loss": float(loss.detach())} | {k: float(v.detach()) for k, v in terms.items()}


def _recomputed(rule: Any, lifetimes: int) -> Any:
    def pieces(*inputs):
        made = [checkpoint(rule, *piece, use_reentrant=False, preserve_rng_state=False) for piece in zip(*(x.split(lifetimes) for x in inputs))]
        return tuple(torch.cat(outputs) for outputs in zip(*made))

    return pieces


@part("openes")
class OpenES(Outer):
    """Evolution: half the lifetimes run with the rule plus noise, half with the rule minus it, two by two on the same level and to their ends; the better
    of a pair counts 1, the other 0. sigma: the noise's deviation, decay: its factor per generation (the step size has its own, in the optimiser)."""

    sigma: Annotated[float, Field(gt=0)] = 0.1
    decay: Annotated[float, Field(gt=0, le=1)] = 0.999
    episodes: Count = 64

    def check(self, recipe):
        if recipe.lifetimes % 2:
            raise UserError(f"lifetimes={recipe.lifetimes}: openes compares pairs; expected an even number")
        if recipe.curation.values:
            raise UserError(f"curation.score={recipe.curation.score}: needs scalar critics, which openes trains none of; accepted: algorithmic-regret, optimal-regret")

    def improve(self, learner):
        rule, half, sigma = learner.rule, learner.part.lifetimes // 2, self.sigma * self.decay**learner.rule.steps
        noise, reached = self.compare(learner, sigma)
        better = torch.sign(reached[:half] - reached[half:]) / 2       # 1 and 0, or both a half: the difference over two
        for name, p in rule.module.named_parameters():
            p.grad = -torch.einsum("l,l...->...", better, noise[name]) / (half * sigma)
        return {"return": float(reached.mean()), "meta_gradient_norm": rule.step(), "sigma": sigma}

    def compare(self, learner: MetaLearner, sigma: float) -> tuple[dict[str, Tensor], Tensor]:
        """(noise by parameter, one per pair; returns [L] of the agents, those with plus the noise first)."""
        rule, half, device = learner.rule, learner.part.lifetimes // 2, learner.run.device
        noise = {k: torch.randn(half, *p.shape, generator=learner.noise).to(device) for k, p in rule.module.named_parameters()}
        candidates = {k: torch.cat([p.detach() + sigma * noise[k], p.detach() - sigma * noise[k]]) for k, p in rule.module.named_parameters()}

        def each(*inputs):
            return torch.func.vmap(lambda parameters, *x: torch.func.functional_call(rule.module, parameters, x))(candidates, *inputs)

        with torch.no_grad():
            while bool((learner.age < learner.worlds.levels.lifetime).any()):
                learner.update(each)
            return noise, returns(learner.worlds.levels, learner.actor, self.episodes, learner.playing)


@part("meta-training")
class MetaTraining(Recipe):
    """Agents live in parallel, each on one level, and learn only by the rule; one step improves the rule once.

    rule: the network; agent: how tabular agents learn; curation: which levels; outer: how the rule moves, with `optimiser`; lifetimes: agents at a time;
    value_lr, value_optimiser: of the scalar critics (sgd is clipped as the agents are; at the agents' step sizes it can oscillate); evaluation: agents trained by the frozen rule on held-out levels or other environments.
    """

    wing: ClassVar[str] = "curriculum"
    rule: LPG = LPG()
    agent: Tabular = Tabular()
    curation: Curation = Uniform()
    outer: Outer = MetaGradient()
    optimiser: Optimiser = Adam(lr=1e-4, clip=None)
    lifetimes: Count = 512
    value_lr: Annotated[float, Field(gt=0)] = 0.03
    value_optimiser: Literal["adam", "sgd"] = "adam"
    evaluation: RuleTests = RuleTests()

    def validate(self, task=None):
        super().validate(task)
        if not isinstance(task, Grids):
            raise UserError(f"{self.part_name}: task {task.label() if task else None} gives no levels; accepted: grids:tiny, grids:small, grids:all and the like "
                            "(a rule that has been trained can be tested elsewhere: volvelle eval RUN --task CartPole-v1)")

    def start(self, run):
        return MetaLearner(self, run)


class MetaLearner:
    """actor, bootstrap: tables of all lifetimes; moments of both; values: scalar critics; age [L]: updates so far."""

    def __init__(self, part: MetaTraining, run):
        self.part, self.run, self.task, self.tests = part, run, run.config.task, part.evaluation
        self.playing, self.beginning, self.noise = (run.torch_rng(n) for n in ("playing", "agents", "noise"))
        module = part.rule.build(part.agent.width, run.torch_rng("rule"))
        self.rule, self.size = run.model("rule", module, part.optimiser), sum(p.numel() for p in module.parameters())
        self.tested: UpdateRule = self.rule.module
        self.curation = run.start("curation", part.curation)
        self.paired = isinstance(part.outer, OpenES)  # two lifetimes per level
        levels = self._doubled(self.curation.first(self.places)).to(run.device)
        L, S = part.lifetimes, levels.states
        self.worlds = Worlds(levels, part.agent.workers)
        self.values = Values(L, S, part.value_lr, part.value_optimiser, part.agent.clip if part.value_optimiser == "sgd" else None, device=run.device)
        self.actor, self.bootstrap = (part.agent.fresh(L, S, k, self.beginning, run.device) for k in (ACTIONS, part.agent.width))
        self.moments = (part.agent.moments(self.actor), part.agent.moments(self.bootstrap))
        self.age = torch.zeros(L, dtype=torch.long, device=run.device)

    @property
    def places(self) -> int:
        """Levels in play at a time."""
        return self.part.lifetimes // (2 if self.paired else 1)

    def _doubled(self, levels: Levels) -> Levels:
        return levels[torch.arange(len(levels)).repeat(2)] if self.paired else levels

    def update(self, rule) -> tuple[Experience, Tensor, Tensor]:
        """One update of every agent that is not yet at its end. Returns what it met and the rule's outputs."""
        agent, going = self.part.agent, self.age < self.worlds.levels.lifetime
        seen = play(self.actor.detach(), self.worlds, agent.length, self.playing)
        p, y = softmax(seen.rows(self.actor)), softmax(seen.rows(self.bootstrap, last=True))
        if not getattr(self.part.outer, "through_inputs", False):
            p, y = p.detach(), y.detach()
        pi_hat, y_hat = ask(rule, seen, p, y, self.age, self.worlds.levels.lifetime)
        self.actor, self.bootstrap, self.moments = tabular_update(agent, self.actor, self.bootstrap, self.moments, seen, pi_hat, y_hat, going)
        if getattr(self.part.outer, "critic", False):
            self.values.learn(seen, self.values.advantages(seen)[0], going)
        self.age = self.age + going
        return seen, pi_hat, y_hat

    def detach(self) -> None:
        self.actor, self.bootstrap = self.actor.detach(), self.bootstrap.detach()
        self.moments = tuple(tuple(m.detach() for m in one) for one in self.moments)

    def step(self):
        metrics = self.part.outer.improve(self)
        ended = torch.nonzero(self.age >= self.worlds.levels.lifetime)[:, 0]
        if len(ended):
            self.renew(ended)
        return metrics | self.curation.report()

    def renew(self, ended: Tensor) -> None:
        """New levels and new agents where lifetimes have ended."""
        places = ended[ended < self.places] if self.paired else ended
        fresh = self.curation.renew(places, self).to(self.run.device)
        if self.paired:
            fresh = self._doubled(fresh)
        self.worlds.levels.put(ended, fresh)
        self.worlds.refresh()
        self.worlds.restart(ended)
        agent, S = self.part.agent, self.worlds.levels.states
        for table in (self.actor, self.bootstrap):
            table[ended] = agent.fresh(len(ended), S, table.shape[-1], self.beginning, self.run.device)
        for memory in (x for one in self.moments for x in one):
            memory[ended] = 0.0
        self.values.reset(ended)
        self.age[ended] = 0

    def evaluate(self, task=None):
        return self.tests.measure(self.tested, self.part.agent, task or self.task, self.run.seed, self.run.device, self.run.reporter)

    def evaluate_as(self, config, best) -> None:
        """Test the rule from now on as `config` says (its task and evaluation), or the one kept in `best`."""
        if config.recipe.replace(evaluation=self.part.evaluation) != self.part:
            raise UserError("eval: only evaluation.… and the task can be changed for a rule that has been trained")
        config.recipe.evaluation.check_task(config.task)
        self.task, self.tests = config.task, config.recipe.evaluation
        if best is not None:
            self.tested = load_rule(best / "rule")

    def product(self):
        return {"rule": self.rule.module} | ({"levels": self.curation} if hasattr(self.curation, "save") else {})

    def state_dict(self):
        return {"worlds": self.worlds.state_dict(), "levels": self.worlds.levels.tensors(), "values": self.values.state_dict(), "actor": self.actor,
                "bootstrap": self.bootstrap, "moments": [list(m) for m in self.moments], "age": self.age}

    def load_state_dict(self, state):
        device = self.run.device
        self.worlds.levels.put(slice(None), Levels(**{k: v.to(device) for k, v in state["levels"].items()}))
        self.worlds.load_state_dict(state["worlds"])
        self.values.load_state_dict(state["values"])
        self.actor, self.bootstrap, self.age = (state[k].to(device) for k in ("actor", "bootstrap", "age"))
        self.moments = tuple(tuple(m.to(device) for m in one) for one in state["moments"])
