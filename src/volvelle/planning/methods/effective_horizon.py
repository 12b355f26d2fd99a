"""The effective horizon and SQIRL, shallow Q-iteration via reinforcement learning (arXiv 2312.08369).

Problem. Say in advance whether random exploration will do, and learn simply where it does.

Idea. Take the Q function of the uniformly random policy, Q^1, apply only k - 1 steps of Q-value iteration to it, and act greedily. If every
greedy policy of Q^k is optimal the problem is k-QVI-solvable. How small k may be, and how clearly Q^k separates optimal actions from others (the
k-gap Delta_k), gives the stochastic effective horizon H = min_k k + log_A(1 / Delta_k^2): sample cost grows like A^H, not like A^T. SQIRL learns
Q^k one time step after another from random roll-outs by plain regression; GORP is its open-loop predecessor for deterministic problems.

Pick it as a diagnostic for PPO- or DQN-like exploration, as a simple learner for short look-ahead, as a baseline. Do not pick it for long
episodes (one policy per time step, T rounds) or where random roll-outs never see a reward.

The analysis itself (min_k, planning window, gaps, H_k) is volvelle.planning.horizons. The learner here is the paper's theoretical version, one
regression per time step; the authors' code shares one network with k heads over all time steps instead.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import Part, Recipe, method, part

from ..lookahead import optimal_q, random_q
from ..mdp import policy_evaluation
from ..regression import table
from ..sampling import TabularSampler
from ..tables import Tables
from ..tasks import TabularTask, ToyText, Trap

Count = Annotated[int, Field(gt=0)]


@dataclass
class Sqirl:
    """One policy per time step, learnt in order. sampler: see sampling; depth: k; episodes: m per time step; regress: as `table` returns.

    regress(observations [n, ...], actions [n], targets [n], n_actions) -> function(observations [n, ...]) -> Q [n, A].
    """
    sampler: Callable
    regress: Callable
    depth: int = 1
    episodes: int = 100
    discount: float = 1.0
    frozen: list = field(default_factory=list)  # Q functions of the time steps done; never changed again
    steps: int = 0                              # environment steps used

    @property
    def finished(self) -> bool:
        return len(self.frozen) == self.sampler.horizon

    def act(self, t: int, observations, rng: np.random.Generator) -> np.ndarray:
        """Greedy for the time steps done, uniformly random after."""
        if t < len(self.frozen):
            return self.frozen[t](observations).argmax(-1)
        return rng.integers(self.sampler.actions, size=len(observations))

    def iterate(self, rng: np.random.Generator) -> dict[str, float]:
        """Learn the policy of the next time step i from m episodes that play at random from i on. Only steps t >= i enter a regression."""
        i, T, A = len(self.frozen), self.sampler.horizon, self.sampler.actions
        data = self.sampler(self.episodes, lambda t, x: self.act(t, x, rng), rng)
        self.steps += data.steps
        last, q = min(i + self.depth, T) - 1, None
        for t in range(last, i - 1, -1):
            on = data.alive[:, t]
            targets = data.returns_to_go(self.discount)[:, t] if t == last else data.rewards[:, t].copy()
            if t < last and q is not None:
                targets[data.alive[:, t + 1]] += self.discount * q(data.observations[data.alive[:, t + 1], t + 1]).max(-1)
            q = self.regress(data.observations[on, t], data.actions[on, t], targets[on], A) if on.any() else None
        self.frozen.append(q or (lambda observations: np.zeros((len(observations), A))))  # no episode lives to step i: nothing to decide
        return {"return": float(data.rewards.sum(1).mean()), "reached": float(data.alive[:, i].mean()), "steps": self.steps}


def gorp_step(sampler: Callable, plan: list[int], depth: int, episodes: int, rng: np.random.Generator, discount: float = 1.0):
    """(next action, environment steps, metrics) of an open-loop plan for a deterministic problem.

    Every sequence of `depth` actions is tried after `plan`, in `episodes` episodes that end at random; the first action of the sequence with the best
    mean reward to go is taken, the first in lexicographic order among ties.
    """
    best, value, steps, reached, i = 0, -math.inf, 0, False, len(plan)
    for sequence in itertools.product(range(sampler.actions), repeat=min(depth, sampler.horizon - i)):
        forced = [*plan, *sequence]
        data = sampler(episodes, lambda t, x: np.full(len(x), forced[t]) if t < len(forced) else rng.integers(sampler.actions, size=len(x)), rng)
        mean, steps, reached = data.returns_to_go(discount)[:, i].mean(), steps + data.steps, reached or data.alive[:, i].any()
        if mean > value:
            best, value = sequence[0], mean
    return best, steps, {"to_go": float(value), "reached": float(reached)}


def gorp(sampler: Callable, depth: int, episodes: int, rng: np.random.Generator, discount: float = 1.0) -> tuple[list[int], int]:
    """(actions, environment steps): greedy over random policy, until the horizon or until no episode lives any more."""
    plan, steps = [], 0
    while len(plan) < sampler.horizon:
        action, used, metrics = gorp_step(sampler, plan, depth, episodes, rng, discount)
        steps += used
        if not metrics["reached"]:
            break
        plan.append(action)
    return plan, steps


# ---- recipes: one step settles the action of one more time step --------------------------------------------------------------------------
class Regressor(Part):
    """REGRESS. A plain function (observations, actions, targets, n_actions) -> function(observations) -> Q can stand here."""

    slot: ClassVar[str] = "regressor"
    call: ClassVar[tuple[str, ...]] = ("observations", "actions", "targets", "n_actions")

    @classmethod
    def from_function(cls, function, call):
        live = cls()
        live.build = lambda states: function
        return live

    def build(self, states: int) -> Callable:
        raise NotImplementedError


@part("table")
class Table(Regressor):
    """The mean target of every (state, action); pairs without data predict `unseen`, or the mean of all targets."""

    unseen: float | None = None

    def build(self, states):
        return table(states, self.unseen)


@dataclass(frozen=True, eq=False)
class _ByTime(Recipe):
    """What SQIRL and GORP share. episodes: per time step (SQIRL) or per action sequence (GORP); depth: k."""

    wing: ClassVar[str] = "planning"
    depth: Count = 1
    episodes: Count = 100

    def validate(self, task=None):
        super().validate(task)
        if not isinstance(task, TabularTask):
            raise UserError(f"{self.part_name}: task {task.label() if task else None} has no transition table; accepted: a tabular task such as "
                            "table:FrozenLake-v1, lock or mdp:FILE")

    def start(self, run):
        return _Live(self, run)


@part("sqirl")
class SqirlRecipe(_ByTime):
    """Shallow Q-iteration via reinforcement learning."""

    regress: Regressor = Table()


@part("gorp")
class Gorp(_ByTime):
    """Greedy over random policy: an open-loop plan, for deterministic problems."""


class _Live:
    """Learns from sampled episodes, is evaluated exactly. tables [i, S, A]: Q (SQIRL) or the chosen action's indicator (GORP) for i time steps."""

    def __init__(self, recipe, run):
        self.recipe, self.rng = recipe, run.rng("episodes")
        self.mdp = run.config.task.mdp(run.seed)
        self.sampler, self.tables, self.steps, self.finished = TabularSampler(self.mdp), [], 0, False
        self.regress = run.start("regress", recipe.regress).build(self.mdp.states) if isinstance(recipe, SqirlRecipe) else None

    def step(self):
        if self.regress is None:
            plan = [int(q[0].argmax()) for q in self.tables]
            action, steps, metrics = gorp_step(self.sampler, plan, self.recipe.depth, self.recipe.episodes, self.rng, self.mdp.discount)
            self.tables.append(np.tile(np.eye(self.mdp.actions)[action], (self.mdp.states, 1)))
            self.steps += steps
        else:
            learner = Sqirl(self.sampler, self.regress, self.recipe.depth, self.recipe.episodes, self.mdp.discount,
                            [lambda s, q=q: q[s] for q in self.tables])
            metrics = learner.iterate(self.rng)
            self.tables.append(np.asarray(learner.frozen[-1](np.arange(self.mdp.states)), dtype=float))
            self.steps += learner.steps
        self.finished = len(self.tables) == self.mdp.horizon
        return {**metrics, "steps": self.steps}

    def policy(self):
        """[T, S, A]: greedy where settled, uniform after."""
        settled = [np.eye(self.mdp.actions)[q.argmax(-1)] for q in self.tables]
        rest = np.full((self.mdp.horizon - len(settled), self.mdp.states, self.mdp.actions), 1 / self.mdp.actions)
        return np.concatenate([np.reshape(settled, (len(settled), *rest.shape[1:])), rest])

    def evaluate(self):
        """return: expected, exactly; share: of the way from random play (0) to the optimum (1); steps: environment steps used."""
        value = float(self.mdp.initial @ policy_evaluation(self.mdp, self.policy())[0])
        chance, best = self.mdp.initial @ random_q(self.mdp)[0].mean(-1), self.mdp.initial @ optimal_q(self.mdp)[0].max(-1)
        return {"value": value, "share": float((value - chance) / (best - chance)) if best > chance else 1.0, "steps": float(self.steps)}

    def product(self):
        return {"policy": Tables(policy=self.policy(), tables=np.reshape(self.tables, (-1, self.mdp.states, self.mdp.actions)))}

    def state_dict(self):
        return {"tables": list(self.tables), "steps": self.steps}

    def load_state_dict(self, state):
        self.tables, self.steps = list(state["tables"]), state["steps"]
        self.finished = len(self.tables) == self.mdp.horizon


sqirl, sticky_lake = SqirlRecipe(episodes=4000), ToyText(horizon=20, repeat=0.25, options={"is_slippery": False})
claim = Claim(
    says="one greedy step on the random policy's Q function solves a problem with sticky actions, where open-loop planning from as many samples "
         "does not; where one step misleads, one more step of Q-value iteration is enough",
    arms={"sqirl": Arm(sqirl, task=sticky_lake), "gorp": Arm(Gorp(episodes=1500), task=sticky_lake),  # about 10 % more steps for GORP
          "trap-1": Arm(sqirl, task=Trap(chance=0.8)), "trap-2": Arm(sqirl(depth=2), task=Trap(chance=0.8))},
    steps=20, seeds=5, equal="environment steps", minutes=1, quick={"seeds": 2}, expects=("sqirl > gorp on share", "trap-2 > trap-1 on share"))

method("effective-horizon", SqirlRecipe(), title="Is random exploration enough? Shallow Q-iteration by regression", source="arXiv 2312.08369",
       claim=claim)
method("gorp", Gorp(), title="Open-loop planning by random completion", source="arXiv 2312.08369")
