"""Does the effective horizon foretell deep RL? Sample costs of SQIRL, Q-learning and PPO over many small problems (arXiv 2312.08369).

Problem. SQIRL explores at random and looks only k steps ahead (see effective_horizon). If that explains what learners do that explore at random too, problems that
are dear for SQIRL must be dear for them.

Idea. Take small problems whose tables are known, with sticky actions, and count the environment steps until a learner's greedy policy, evaluated exactly, has 95 %
of the optimal return (short of J* by at most .05 |J*|):

    SQIRL       tables (the practical form: one for all time steps, on all that random play has stored), k = 1, 2, 3 and m = 1, 2, 4, ... episodes per time step,
                each a run of its own; the steps of the cheapest (k, m) that gets there count
    Q-learning  one table over states, epsilon-greedy, rate 1 / visits^.6, backwards over the episodes played
    learner     any recipe of the control wing on the played table (PPO here, DQN as an option): one-hot state and the time gone by

Then correlate (Spearman) the logarithms of the steps over problems; who does not get there within the budget ranks last. And see who solves what by min_k at 1 %.

Pick it to judge a learner of your own, or your own problems (task.problems), against what random exploration can do. One step of the run is one problem.
"""
from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field
from scipy.stats import spearmanr

from volvelle.control.credit import GAE
from volvelle.control.learner import ControlRecipe
from volvelle.control.methods.ppo import ppo
from volvelle.core.claims import Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import Recipe, method, part
from volvelle.core.run import RunConfig
from volvelle.core.trainable import Adam
from volvelle.core.trainer import start

from ..horizons import analyse, approximate_k
from ..mdp import MDP
from ..sampling import TabularSampler, expected_returns
from ..small_problems import SmallProblems, problems
from ..tables import Tables
from ..tasks import Share, TabularTask
from .played import Played
from .sqirl_tables import near_optimal, sqirl_steps

Count = Annotated[int, Field(gt=0)]
NEVER = 2  # steps of a learner that did not get there, in budgets: behind all that did


@part("horizon-study")
class HorizonStudy(Recipe):
    """seeds: so many, from the run's on; budget: environment steps of every learner; share: how near the optimum counts as there (of |J*|); depths: k of SQIRL;
    batch, epsilon, gamma: episodes per sweep of Q-learning, its exploration and its discount; learner: of the control wing."""

    wing: ClassVar[str] = "planning"
    seeds: Count = 1
    budget: Count = 100_000
    share: Annotated[float, Field(gt=0, lt=1)] = 0.95
    depths: tuple[Count, ...] = (1, 2, 3)
    batch: Count = 8
    epsilon: Share = 0.2
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.99
    learner: Recipe = ppo(envs=8, length=64, minibatches=2, advantage=GAE(lam=0.95), optimiser=Adam(lr=1e-3, eps=1e-5, clip=0.5), normalise_rewards=True)

    def validate(self, task=None):
        super().validate(task)
        if not isinstance(task, SmallProblems):
            raise UserError(f"horizon-study: task {task.label() if task else None} is one problem or none; accepted: small-problems")
        if not isinstance(self.learner, ControlRecipe):
            raise UserError(f"learner={self.learner.part_name}: does not act in environments; accepted: a recipe of the control wing such as control/ppo")
        if self.learner.seeds != 1:
            raise UserError(f"learner.seeds={self.learner.seeds}: the study's own seeds are used; expected 1")

    def start(self, run):
        return _Live(self, run)


# ---- the learners: environment steps until there, inf if not within the budget ---------------------------------------------------------
def q_learning_steps(mdp: MDP, goal: float, budget: int, rng: np.random.Generator, batch: int = 8, epsilon: float = 0.2, gamma: float = 0.99) -> float:
    sampler, A = TabularSampler(mdp), mdp.actions
    q, visits, steps, due = np.zeros(mdp.states * A), np.zeros(mdp.states * A), 0, 1
    noise = rng.random((mdp.states, A)) * 1e-9  # breaks ties, so that untouched states are not all played alike

    def act(t, s):
        return np.where(rng.random(len(s)) < epsilon, rng.integers(A, size=len(s)), (q.reshape(-1, A)[s] + rng.random((len(s), A)) * 1e-9).argmax(-1))

    while steps < budget:
        data = sampler(batch, act, rng)
        steps += data.steps
        for t in reversed(range(mdp.horizon)):
            on = data.alive[:, t]
            after = data.observations[on, t + 1]
            targets = data.rewards[on, t] + gamma * np.where(mdp.absorbing[after], 0.0, q.reshape(-1, A)[after].max(-1))
            cells, which, count = np.unique(data.observations[on, t] * A + data.actions[on, t], return_inverse=True, return_counts=True)
            visits[cells] += count
            q[cells] += (np.bincount(which, targets) / count - q[cells]) / visits[cells] ** 0.6
        if steps >= due:
            due = steps * 1.1
            if expected_returns(mdp, lambda t, s: (q.reshape(-1, A)[s] + noise[s]).argmax(-1)[None])[0] >= goal:
                return float(steps)
    return np.inf


def learner_steps(task: TabularTask, recipe: ControlRecipe, seeds: int, seed: int, goal: float, budget: int, folder) -> np.ndarray:
    """[seeds]: a control recipe on the played table, all seeds as one model; asked after every learner step, later less often."""
    mdp, period = task.mdp(), getattr(recipe, "period", None) or recipe.envs * recipe.length
    config = RunConfig(recipe=recipe.replace(seeds=seeds), task=Played(base=task), method="learner", steps=-(-budget // period), seed=seed, checkpoint_every=0)
    run, live = start(config, folder)
    found, due, shown = np.full(seeds, np.inf), 0, np.eye(mdp.states, mdp.states + 1, dtype=np.float32)

    def act(t, s):
        seen = shown[s]
        seen[:, -1] = t / mdp.horizon
        return live.policy().act(np.broadcast_to(seen, (seeds, *seen.shape)).copy()).actions.cpu().numpy()

    while run.step < config.steps and np.isinf(found).any():
        live.step()
        run.step += 1
        if live.env_steps >= due or run.step == config.steps:
            due = live.env_steps * 1.1
            there = expected_returns(mdp, act, seeds) >= goal
            found = np.where(np.isinf(found) & there, live.env_steps, found)
    return found


# ---- the study --------------------------------------------------------------------------------------------------------------------------
def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rho of a and b [P]; not a number where one side does not vary."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else np.nan


def correlation(a: np.ndarray, b: np.ndarray, rng: np.random.Generator, resamples: int = 2000) -> tuple[float, float, float]:
    """(Spearman's rho of a and b [P], and the 95 % percentile bootstrap over the problems). Resamples in which one side does not vary are left out."""
    drawn = [spearman(a[i], b[i]) for i in rng.integers(len(a), size=(resamples, len(a)))]
    drawn = [d for d in drawn if np.isfinite(d)] or [np.nan]
    return (spearman(a, b), *map(float, np.percentile(drawn, [2.5, 97.5])))


class _Live:
    """taken [problems done, learners, seeds]: environment steps."""

    def __init__(self, part: HorizonStudy, run):
        self.part, self.run, self.tasks = part, run, run.config.task.sticky()
        self.names = [*(f"sqirl-{k}" for k in part.depths), "q", "learner"]
        self.taken, self.facts, self.finished = [], [], False

    def step(self):
        part, i = self.part, len(self.taken)
        name = list(self.tasks)[i]
        task = self.tasks[name]
        mdp, seeds = task.mdp(), range(self.run.seed, self.run.seed + part.seeds)
        found, goal = analyse(mdp), near_optimal(mdp, part.share)
        rng = lambda learner, s: self.run.rng(f"{name}/{learner}", s)  # noqa: E731
        rows = [[sqirl_steps(mdp, k, goal, part.budget, rng(f"sqirl-{k}", s)) for s in seeds] for k in part.depths]
        rows.append([q_learning_steps(mdp, goal, part.budget, rng("q", s), part.batch, part.epsilon, part.gamma) for s in seeds])
        rows.append(learner_steps(task, part.learner, part.seeds, self.run.seed, goal, part.budget, self.run.folder))
        self.taken.append(np.minimum(np.array(rows, float), NEVER * part.budget))
        near = approximate_k(mdp, 0.01)
        self.facts.append(np.array([found.min_k, near, found.effective_horizon, mdp.actions, mdp.horizon], float))
        self.finished = len(self.taken) == len(self.tasks)
        return {"problem": float(i), "min_k": float(found.min_k), "near_k": float(near), "horizon": found.effective_horizon} | {
            f"steps_{n}": float(np.median(r)) for n, r in zip(self.names, self.taken[-1])}

    def evaluate(self):
        """Over the problems done. spearman_X: log steps of SQIRL against X, _from and _to: bootstrap over problems, both_X: over those that both solve; foretold_X:
        H log A + 2 log T against X; solved_X: share; fall_X: share solved where min_k (at 1 %) is 1 less that where it is larger. near_k_P: that of problem P;
        steps_P_X: steps that X took, twice the budget if it did not get there."""
        found = {"problems": float(len(self.taken))}
        if len(self.taken) < 3:
            return found
        facts, near = np.array(self.facts), np.array(self.facts)[:, 1] == 1
        cost = facts[:, 2] * np.log(facts[:, 3]) + 2 * np.log(facts[:, 4])
        for s in range(self.part.seeds):
            end, taken = f"@{s}" if self.part.seeds > 1 else "", np.array(self.taken)[:, :, s]
            sqirl = taken[:, : len(self.part.depths)].min(1)
            for name, steps in (("sqirl", sqirl), ("q", taken[:, -2]), ("learner", taken[:, -1])):
                solved = steps <= self.part.budget
                made = {f"solved_{name}": solved.mean(), f"foretold_{name}": spearman(cost, steps)}
                if near.any() and not near.all():
                    made |= {f"solved_{name}_near": solved[near].mean(), f"solved_{name}_far": solved[~near].mean(), f"fall_{name}": solved[near].mean() - solved[~near].mean()}
                if name != "sqirl":
                    both = solved & (sqirl <= self.part.budget)
                    made |= dict(zip((f"spearman_{name}", f"spearman_{name}_from", f"spearman_{name}_to"), correlation(sqirl, steps, np.random.default_rng(s))))
                    made[f"both_{name}"] = spearman(sqirl[both], steps[both]) if both.sum() > 2 else np.nan
                made |= {f"steps_{p}_{name}": n for p, n in zip(self.tasks, steps)}
                found |= {k + end: float(v) for k, v in made.items() if np.isfinite(v)}
            found |= {f"near_k_{p}{end}": float(f[1]) for p, f in zip(self.tasks, facts) if np.isfinite(f[1])}
        return found

    def product(self):
        return {"study": Tables(steps=np.reshape(self.taken, (-1, len(self.names), self.part.seeds)), facts=np.reshape(self.facts, (-1, 5)), learners=self.names,
                                problems=list(self.tasks)[: len(self.taken)], columns=["min_k", "near_k", "effective_horizon", "actions", "time_limit"])}

    def state_dict(self):
        return {"taken": list(self.taken), "facts": list(self.facts)}

    def load_state_dict(self, state):
        self.taken, self.facts = list(state["taken"]), list(state["facts"])
        self.finished = len(self.taken) == len(self.tasks)


claim = Claim(
    says="what is dear for SQIRL is dear for learners that explore at random: its environment steps rank problems as theirs do, and all solve fewer where one greedy "
         "step on the random policy's Q function is not enough",
    arms={"study": HorizonStudy()}, task="small-problems", steps=len(problems()), seeds=5, first_seed=100, equal="environment steps", minutes=20,
    run={"checkpoint_every": 1},
    quick={"seeds": 2, "steps": 4, "arms": {"study": HorizonStudy(budget=2000)},
           "task": SmallProblems(problems={k: problems()[k] for k in ("lock-3", "trap", "random-0", "bait-4")})},
    expects=("study > 0.5 on spearman_q", "study > 0.5 on spearman_learner", "study > 0 on spearman_q_from", "study > 0 on spearman_learner_from",
             "study > 0 on fall_sqirl", "study > 0 on fall_q", "study > 0 on fall_learner"))

method("horizon-study", HorizonStudy(), title="Does the effective horizon foretell the cost of learning? A study over small problems", source="arXiv 2312.08369", claim=claim)
