"""GFUCB for finite-horizon decision processes that share a feature map of (state, action) (arXiv 2205.15701).

Per level, backwards: least squares on reward + optimistic value of the next state over the whole class, one joint ball of all tasks around the
fit, and a bonus that the tasks share. The paper maximises over all levels at once, which is intractable; here every tuple of states (one per
task, visited in the same step) takes the largest joint value at its own level, as in LSVI-UCB, and a task's part of the bonus is in
proportion to its own width. Use it through the explorer `gfucb` on a task of decision processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from volvelle.core.claims import Claim
from volvelle.core.parts import method

from ..bandit_tasks import Explore
from ..bandits import LinearMdps
from .gfucb import Ball, Beta, Finite, ball, fit, gram, optimistic, widths


class GfucbMdp:
    """Plays episodes in all tasks in step. groups: which tasks share a ball (default: all); beta is scaled by (steps to go)^2."""

    def __init__(self, problem: LinearMdps, features: Float[np.ndarray, "P X k"], beta: Beta, ridge: float = 1e-3,
                 groups: Sequence[Sequence[int]] | None = None):
        self.problem, self.features, self.beta, self.ridge = problem, features, beta, ridge
        self.groups = [list(g) for g in groups] if groups else [list(range(problem.tasks))]
        h, m = problem.horizon, problem.tasks
        self.inputs, self.rewards, self.after = np.zeros((0, h, m), int), np.zeros((0, h, m)), np.zeros((0, h, m), int)

    def values(self, region: Ball, states: Int[np.ndarray, "N M"], most: float) -> tuple[np.ndarray, np.ndarray]:
        """Each task's share of the joint optimistic value of its state tuple, clipped to [0, most], and the actions."""
        actions = self.problem.actions
        inputs = states[..., None] * actions + np.arange(actions)                                  # [N, M, A]
        phi = np.moveaxis(self.features[:, inputs], 0, 1)                                    # [N, P, M, A, k]
        means = np.einsum("npmak,pmk->npma", phi, region.centres)
        width = widths(phi, region.inverses)
        _, maps, chosen = optimistic(means, width, region.slack)
        rows = np.arange(len(states))
        mean = np.take_along_axis(means[rows, maps], chosen[..., None], -1)[..., 0]
        part = np.take_along_axis(width[rows, maps], chosen[..., None], -1)[..., 0]
        bonus = np.sqrt(region.slack[maps])[:, None] * part / np.sqrt(np.maximum(part.sum(1, keepdims=True), 1e-300))
        return np.clip(mean + bonus, 0.0, most), chosen

    def plan(self) -> list[list[Ball]]:
        """Backwards over levels: [level][group] the joint confidence set."""
        p = self.problem
        plan: list[list[Ball]] = [[] for _ in range(p.horizon)]
        for g, group in enumerate(self.groups):
            for h in reversed(range(p.horizon)):
                later = 0.0
                if h + 1 < p.horizon and len(self.after):
                    later = self.values(plan[h + 1][g], self.after[:, h][:, group], p.horizon - h - 1)[0]
                target = self.rewards[:, h][:, group] + later
                counts, sums = np.zeros((2, len(group), self.features.shape[1]))
                columns = np.broadcast_to(np.arange(len(group)), target.shape)
                np.add.at(counts, (columns, self.inputs[:, h][:, group]), 1)
                np.add.at(sums, (columns, self.inputs[:, h][:, group]), target)
                inverses = gram(self.features, counts, self.ridge)
                radius = self.beta(len(self.rewards), len(group)) * (p.horizon - h) ** 2
                plan[h].append(ball(self.features, counts, fit(self.features, counts, sums, inverses), inverses, radius))
        return plan

    def episode(self, generator: np.random.Generator) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
        """Play one episode in all tasks. Returns each task's regret, as the summed optimality gaps of its actions (unbiased), and reward."""
        p, plan, best = self.problem, self.plan(), self.problem.values()
        states, tasks, lost = np.zeros(p.tasks, int), np.arange(p.tasks), np.zeros(p.tasks)
        rows = np.zeros((3, 1, p.horizon, p.tasks))
        for h in range(p.horizon):
            actions = np.zeros(p.tasks, int)
            for region, group in zip(plan[h], self.groups, strict=True):
                actions[group] = self.values(region, states[None, group], p.horizon - h)[1][0]
            lost += best[h, tasks, states].max(1) - best[h, tasks, states, actions]
            inputs = states * p.actions + actions
            reward, states = p.move(inputs, generator)
            rows[:, 0, h] = inputs, reward, states
        self.inputs = np.concatenate([self.inputs, rows[0].astype(int)])
        self.rewards = np.concatenate([self.rewards, rows[1]])
        self.after = np.concatenate([self.after, rows[2].astype(int)])
        return lost, rows[1, 0].sum(0)

    def state_dict(self):
        return {"inputs": self.inputs, "rewards": self.rewards, "after": self.after}

    def load_state_dict(self, state):
        self.inputs, self.rewards, self.after = state["inputs"], state["rewards"], state["after"]


claim = Claim(
    says="decision processes that share an unknown feature map lose less when they explore together than each alone",
    arms={"joint": Explore(explorer=Finite(factor=0.1)), "independent": Explore(explorer=Finite(factor=0.1), sharing="separate")},
    task="linear-mdps", steps=40, seeds=30, equal="episodes", minutes=3, run={"checkpoint_every": 0}, quick={"steps": 3, "seeds": 2},
    expects=("joint < independent on regret",))

method("gfucb-mdp", Explore(explorer=Finite(factor=0.1)), title="GFUCB in episodic decision processes with a shared feature map",
       source="arXiv 2205.15701", claim=claim)
