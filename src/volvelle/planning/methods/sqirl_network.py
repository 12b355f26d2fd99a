"""SQIRL with a network: shallow Q-iteration in any environment with discrete actions (arXiv 2312.08369, its practical form).

The network has k heads; head 1 is regressed on the returns of random play, head j on r + discount max_a Q_{j-1}(s', a), all over all time steps. Iteration i

    1. plays m episodes: steps t < i by the frozen network of step t (greedy, head k), steps t >= i uniformly at random
    2. stores the transitions with t >= i, with their returns, and trains on everything stored
    3. freezes a copy of the network as the policy of step i; the network itself trains on

so exploration is random play and learning is regression: no target network, no bootstrapping in head 1. See methods.effective_horizon for the idea, the
tabular form, when to pick it and when not. With horizon T the memory of frozen copies is T times the parameters, kept on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.buffers import Replay, ReplayPart
from volvelle.control.envs import each, numbers_for
from volvelle.control.learner import ControlLearner, ControlRecipe
from volvelle.control.networks import MLP, Network
from volvelle.control.policy import as_tensors
from volvelle.control.slots import Shaper
from volvelle.control.stacked import Streams, make
from volvelle.control.valueheads import MSE, ValueHead
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam, Optimiser

from .sqirl_parts import Aged, AgedReplay, Timed

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
IDLE = 10  # iterations without a random action after which it stops


# ---- the regression

def head_targets(value: ValueHead, following: Tensor, returns: Tensor, rewards: Tensor, discounts: Tensor) -> list[Tensor]:
    """Targets of heads 1 ... k, without gradient. following [B, k, A, width]: outputs at the next observations; returns of random play, rewards, discounts
    (0 after an end): [B]."""
    following, k = following.detach(), following.shape[1]
    found = [returns]
    for j in range(k - 1):
        greedy = value.value(following[:, j]).argmax(-1)
        best = following[:, j].gather(1, greedy[:, None, None].expand(-1, 1, following.shape[-1])).squeeze(1)
        found.append(value.backup(best, rewards, discounts))
    return found


def head_losses(value: ValueHead, picked: Tensor, targets: list[Tensor]) -> Tensor:
    """[k]: mean loss of every head; picked [B, k, width]: outputs of the actions taken."""
    return torch.stack([value.loss(picked[:, j], target).mean() for j, target in enumerate(targets)])


def scaled_loss(losses: Tensor, running: Tensor | None, smoothing: float = 0.99) -> tuple[Tensor, Tensor]:
    """(mean over heads of loss / its running mean, running means [k]): updated first, begun at the first losses, constants for the gradient."""
    running = losses.detach() if running is None else smoothing * running + (1 - smoothing) * losses.detach()
    return (losses / running.clamp(min=1e-12)).mean(), running


# ---- recipe

@part("sqirl-network")
class SqirlNetwork(ControlRecipe):
    """One step learns the policy of one more time step. depth: k; episodes: m per time step; epochs: gradient steps are new environment steps times epochs over
    the batch; separate: a network per head; dueling: value and advantage streams per head; value: mse, huber or c51 heads; scale_losses: every head's loss is
    divided by its running mean (smoothing). reward_scale: multiplies rewards. time: the share of the time limit gone by joins the observation. average: Polyak
    weight of a copy that is frozen instead of the network (0: none). explore_share: share of the steps that train without freezing. budget: of environment steps.
    """

    relabels: ClassVar[dict] = {}
    envs: Count = 1
    depth: Count = 1
    episodes: Count = 100
    epochs: Count = 4
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    network: Network = MLP(hidden=(64, 64), activation="relu")
    separate: bool = False
    dueling: bool = False
    value: ValueHead = MSE()
    optimiser: Optimiser = Adam(lr=1e-3, clip=10.0)
    replay: ReplayPart = Aged(capacity=50_000, batch=64)
    scale_losses: bool = True
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.99
    reward_scale: Annotated[float, Field(gt=0)] = 1.0
    time: bool = False
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    explore_share: Share = 0.0
    budget: Count | None = None
    shapers: dict[str, Shaper] = field(default_factory=dict)

    def check(self, recipe):
        super().check(recipe)
        if self.seeds != 1:
            raise UserError(f"seeds={self.seeds}: its episodes end at different times; expected seeds=1 (compare several runs instead)")
        if self.episodes % self.envs:
            raise UserError(f"episodes={self.episodes}: must be a multiple of envs={self.envs}, so that short episodes do not count more often")
        if self.replay.n_step != 1:
            raise UserError(f"replay.n_step={self.replay.n_step}: head 1 has whole returns already; expected 1")

    def actor(self, spec, seeds):
        return Timed(self, spec)

    def start(self, run):
        return SqirlLearner(run, self)


# ---- learner

class SqirlLearner(ControlLearner):
    def __init__(self, run, part: SqirlNetwork):
        super().__init__(run, part, part.envs)
        self.module = part.actor(self.spec, 1)
        if part.time:
            if self.envs.limit is None:
                raise UserError(f"time=true: task {run.config.task.label()} declares no time limit; set task.time_limit")
            self.module.limit = float(self.envs.limit)
        self.net = make(run, "q", self.module, part.optimiser, 1, part.depth if part.separate else 1)
        self.size = sum(p.numel() for p in self.module.parameters())
        self.averaged = run.lagged(self.net, tau=1 - part.average, name="average") if part.average else None
        extra = {"to_go": ((), np.float32), "t": ((), np.float32)}
        self.replay: Replay = part.replay.build(1, 1, part.gamma, self.spec, extra, Streams(run, "replay", 1))
        self.exploring = Streams(run, "exploring", 1)
        self.running: Tensor | None = None
        self.gradient_steps, self.idle, self.finished = 0, 0, False

    def module_policy(self):
        return self.module

    def step(self):
        part, i = self.part, len(self.module.frozen)
        steps, stored, reached = self.collect(i)
        losses = None
        if stored:
            for _ in range(math.ceil(steps * part.epochs / part.replay.batch)):
                losses = self.learn()
        self.idle = 0 if stored else self.idle + 1
        if self.run.step >= part.explore_share * self.run.config.steps:
            self.module.freeze(self.module.net if self.averaged is None else self.averaged.module.net)
        if isinstance(self.replay, AgedReplay):
            self.replay.age()
        self.finished = self.idle > IDLE or (part.budget is not None and self.env_steps >= part.budget)
        named = {} if losses is None else {f"loss/{j + 1}": float(v) for j, v in enumerate(losses)}
        return self.episode_metrics() | named | {"frozen": float(len(self.module.frozen)), "reached": reached, "stored": float(stored)}

    # ---- 1: episodes

    def collect(self, i: int) -> tuple[int, int, float]:
        """Play m episodes, random from step i on; (environment steps, transitions stored, share of episodes that reached step i)."""
        part, envs, count = self.part, self.envs, self.part.envs
        obs = each(np.copy, envs.reset(numbers_for(self.run.seed, self.run.step, count)))
        envs.rest()
        left, open_, before, stored, reached = np.full(count, part.episodes // count), [[] for _ in range(count)], self.env_steps, 0, 0
        while left.any():
            t = envs.lengths.copy()
            random = self.exploring.integers(self.module.actions, count)[0]
            actions = self.module.greedy_at(as_tensors(self.rows(obs), self.device), t, random)
            raw, rewards, terminated, truncated = envs.step(actions)
            following, ended = each(np.copy, raw), terminated | truncated
            true = each(np.copy, following)
            for row, final in envs.finals:
                for k, array in true.items() if isinstance(true, dict) else [(None, true)]:
                    array[row] = final if k is None else final[k]
            for row in np.flatnonzero(left > 0):
                self.env_steps += 1
                open_[row].append((each(lambda x: x[row], obs), actions[row], float(rewards[row]) * part.reward_scale, each(lambda x: x[row], true), bool(ended[row]), int(t[row])))
                if ended[row]:
                    stored += self.store(open_[row], i)
                    reached += t[row] >= i
                    left[row], open_[row] = left[row] - 1, []
            envs.rest(left == 0)
            obs = following
        return self.env_steps - before, stored, reached / part.episodes

    def store(self, episode: list, i: int) -> int:
        """Returns over the whole episode; only what random play made (t >= i) is kept."""
        to_go, rows = 0.0, []
        for obs, action, reward, following, ended, t in reversed(episode):
            to_go = reward + self.part.gamma * to_go
            if t >= i:
                rows.append((obs, action, reward, following, ended, t, to_go))
        one = lambda x: np.asarray(x)[None, None]  # noqa: E731
        for obs, action, reward, following, ended, t, value in reversed(rows):
            self.replay.add(each(one, obs), one(action), one(np.float32(reward)), one(np.float32(ended)), one(np.float32(ended)), each(one, following),
                            to_go=one(np.float32(value)), t=one(np.float32(t)))
        return len(rows)

    # ---- 2: regression

    def learn(self) -> Tensor:
        part, module = self.part, self.module
        batch = {k: each(lambda x: x.to(self.device), v) for k, v in self.replay.sample(self.gradient_steps).items()}
        t = batch["t"][0]
        with torch.no_grad():
            following = module.outputs(batch["next_obs"], t + 1)
        outputs = module.outputs(batch["obs"], t)
        actions = batch["actions"][0][:, None, None, None].expand(-1, module.k, 1, module.width)
        targets = head_targets(part.value, following, batch["to_go"][0], batch["rewards"][0], batch["discounts"][0])
        losses = head_losses(part.value, outputs.gather(2, actions).squeeze(2), targets)
        loss = losses.mean()
        if part.scale_losses:
            loss, self.running = scaled_loss(losses, self.running, part.smoothing)
        self.net.backward(loss[None])
        self.net.step()
        if self.averaged is not None:
            self.averaged.update()
        self.gradient_steps += 1
        return losses.detach()

    # ---- what the trainer asks for

    def evaluate(self, task=None):
        return super().evaluate(task) | {"env_steps": float(self.env_steps)}

    def before_checkpoint(self):
        super().before_checkpoint()
        self.replay.save(self.run.folder / "replay")

    def state_dict(self):
        return super().state_dict() | {"frozen": self.module.frozen.clone(), "running": self.running, "idle": self.idle, "finished": self.finished,
                                       "gradient_steps": self.gradient_steps, "replay": self.replay.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.module.frozen, self.running = state["frozen"].clone(), state["running"]
        self.idle, self.finished, self.gradient_steps = state["idle"], state["finished"], state["gradient_steps"]
        self.replay.load(state["replay"], self.run.folder / "replay")


sqirl_network = method("sqirl-network", SqirlNetwork(), title="Shallow Q-iteration from random play, with a network", source="arXiv 2312.08369")
