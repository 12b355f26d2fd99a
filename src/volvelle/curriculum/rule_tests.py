"""Testing an update rule: new agents learn by the frozen rule, on held-out grid worlds beside actor-critic, or with networks in any environment."""

from __future__ import annotations

import functools
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.envs import Envs, numbers_for
from volvelle.control.networks import MLP, Network, Output, reset
from volvelle.control.slots import ControlTask
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import Part, part

from .gridtasks import Grids
from .gridworlds import ACTIONS, Levels, Worlds, optimal_returns
from .lpg import UpdateRule, agent_loss, ask, tabular_update
from .tabular import Tabular, actor_critic, draw, play, returns, softmax

Count = Annotated[int, Field(gt=0)]


@part("rule-tests")
class RuleTests(Part):
    """How an update rule is tested.

    lifetime: updates per agent (none: the level's own on grids, 500 elsewhere); episodes: played by each trained agent. In other environments: network,
    lr (Adam), workers and length of the agents (none: as in meta-training).
    """

    slot: ClassVar[str] = "rule-tests"
    lifetime: Count | None = None
    episodes: Count = 64
    network: Network = MLP(hidden=(64, 64), activation="relu")
    lr: Annotated[float, Field(gt=0)] = 5e-4
    workers: Count | None = None
    length: Count | None = None

    def check_task(self, task) -> None:
        if not isinstance(task, (Grids, ControlTask)):
            raise UserError(f"task {task.label()}: an update rule is tested on grids or in an environment; accepted: grids:handmade, CartPole-v1 and the like")

    def measure(self, rule: UpdateRule, agent: Tabular, task, seed: int, device, report=lambda line: None) -> dict[str, float]:
        self.check_task(task)
        if isinstance(task, Grids):
            return self.grids(rule, agent, task, seed, device)
        return self.environment(rule, agent, task, seed, device, report)

    def grids(self, rule, agent, task, seed, device) -> dict[str, float]:
        """return: of agents trained by the rule; a2c, optimal, untrained: beside it; score: return / a2c, of the means; failures: share of the levels
        worth learning (a2c's gain on a random policy above .05) where less than three quarters of a2c's return is reached."""
        levels = self.levels(task)
        with torch.no_grad():
            reached = lifetime(rule, agent, levels.to(device), self.episodes, torch.Generator().manual_seed(seed)).cpu()
        a2c, untrained, optimal = rivals(self, agent, task)
        worth = a2c > untrained + 0.05
        return {"score": float(reached.mean() / a2c.mean()), "failures": float((reached < 0.75 * a2c)[worth].double().mean()), "return": float(reached.mean()),
                "a2c": float(a2c.mean()), "optimal": float(optimal.mean()), "untrained": float(untrained.mean()), "levels": float(len(levels))}

    def levels(self, task: Grids) -> Levels:
        levels = task.held_out()
        if self.lifetime is not None:
            levels.lifetime[:] = self.lifetime
        return levels

    def environment(self, rule, agent, task, seed, device, report) -> dict[str, float]:
        """score = return: mean return of the episodes that ended in the last tenth of the agent's life; before: in the first tenth."""
        workers, length = self.workers or agent.workers, self.length or agent.length
        envs = Envs(task, 1, workers, training=True, report=report)
        if len(envs.spec.actions.codes) != 1 or envs.spec.actions.low:
            raise UserError(f"task {task.label()}: actions of {envs.spec.actions.describe()}; an update rule needs one choice among discrete actions")
        streams = torch.Generator().manual_seed(seed)
        bodies = [Output(self.network.build(envs.spec.observations, 1), 1, k) for k in (envs.spec.actions.codes[0], rule.width)]
        actor, bootstrap = (reset(b, [streams]).to(device) for b in bodies)
        optimisers = [torch.optim.Adam(b.parameters(), lr=self.lr) for b in (actor, bootstrap)]
        updates, curve = self.lifetime or 500, []
        obs = envs.reset(numbers_for(seed, 0, workers))
        for age in range(updates):
            seen, actions, rewards, done = [], [], [], []
            with torch.no_grad():
                for _ in range(length):
                    seen.append(_tensors(obs, device))
                    action = draw(actor(seen[-1])[0].softmax(-1).cpu(), torch.rand(workers, generator=streams))
                    obs, reward, terminated, truncated = envs.step(action.numpy())
                    actions.append(action)
                    rewards.append(torch.tensor(reward, dtype=torch.float32))
                    done.append(torch.from_numpy(terminated | truncated))
            curve.append([r for _, r, _ in envs.finished])
            envs.finished.clear()
            together = _stack([*seen, _tensors(obs, device)])
            action, reward, end = (torch.stack(x, -1).to(device) for x in (actions, rewards, done))
            now = together[:, : length * workers] if isinstance(together, Tensor) else {k: v[:, : length * workers] for k, v in together.items()}
            logits, y = actor(now)[0].view(length, workers, -1).transpose(0, 1), bootstrap(together)[0].view(length + 1, workers, -1).transpose(0, 1)
            with torch.no_grad():
                chosen, p = logits.softmax(-1).gather(-1, action.unsqueeze(-1))[..., 0], y.softmax(-1)
                ages, lives = (torch.full((workers,), float(x), device=device) for x in (age, updates))
                pi_hat, y_hat = rule(reward, end, chosen, p[:, :-1], p[:, 1:], ages, lives)
            loss = agent_loss(logits, y[:, :-1], action, pi_hat, y_hat, agent.alpha)
            if not torch.isfinite(loss):
                raise RunStopped(f"{task.label()}: the agent's loss is {float(loss)} at update {age}")
            for o in optimisers:
                o.zero_grad(set_to_none=True)
            loss.backward()
            for body, o in zip((actor, bootstrap), optimisers):
                torch.nn.utils.clip_grad_norm_(body.parameters(), agent.clip or torch.inf)
                o.step()
        envs.close()
        tenth = max(1, updates // 10)
        last, first = ([r for part in some for r in part] for some in (curve[-tenth:], curve[:tenth]))
        if not last:
            raise UserError(f"task {task.label()}: no episode ended in the last {tenth * length * workers} steps; raise evaluation.lifetime or evaluation.length")
        found = {"score": float(np.mean(last)), "return": float(np.mean(last)), "episodes": float(sum(map(len, curve)))}
        return found | ({"before": float(np.mean(first))} if first else {})


def _tensors(obs, device):
    """[1, N, ...] for a network."""
    return {k: torch.from_numpy(v.copy())[None].to(device) for k, v in obs.items()} if isinstance(obs, dict) else torch.from_numpy(obs.copy())[None].to(device)


def _stack(observations):
    if isinstance(observations[0], dict):
        return {k: torch.cat([o[k] for o in observations], 1) for k in observations[0]}
    return torch.cat(observations, 1)


def lifetime(rule, agent: Tabular, levels: Levels, episodes: int, generator: torch.Generator) -> Tensor:
    """Train one fresh agent per level by the frozen rule for the level's lifetime; the mean returns [L] of its policy afterwards."""
    L, S, device = len(levels), levels.states, levels.size.device
    worlds = Worlds(levels, agent.workers)
    actor, bootstrap = (agent.fresh(L, S, k, generator, device) for k in (ACTIONS, agent.width))
    moments = (agent.moments(actor), agent.moments(bootstrap))
    for age in range(int(levels.lifetime.max())):
        seen = play(actor, worlds, agent.length, generator)
        p, y = softmax(seen.rows(actor)), softmax(seen.rows(bootstrap, last=True))
        pi_hat, y_hat = ask(rule, seen, p, y, torch.full((L,), age, device=device), levels.lifetime)
        actor, bootstrap, moments = tabular_update(agent, actor, bootstrap, moments, seen, pi_hat, y_hat, age < levels.lifetime)
    return returns(levels, actor, episodes, generator)


@functools.lru_cache(maxsize=8)
def rivals(tests: RuleTests, agent: Tabular, task: Grids) -> tuple[Tensor, Tensor, Tensor]:
    """Returns [L] on the held-out levels of actor-critic, of an untrained agent, and at best. The same for every run."""
    levels, generator = tests.levels(task), torch.Generator().manual_seed(2**41)
    a2c = actor_critic(levels, agent, int(levels.lifetime.max()), generator)
    nothing = agent.fresh(len(levels), levels.states, ACTIONS)
    return (*(returns(levels, actor, tests.episodes, generator) for actor in (a2c, nothing)), optimal_returns(levels).float())
