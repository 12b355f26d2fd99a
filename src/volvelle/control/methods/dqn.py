"""Deep Q-learning, with double, dueling, n-step and prioritised forms as options.

Problem: learn to act from pixels or features with discrete actions and little data.
Idea: regress Q(s, a) to r + gamma max_a' Q_target(s', a') on transitions drawn from a replay buffer, act epsilon-greedily, and copy the network
to the target network now and then, so that the regression target stands still in between.
Pick it for discrete actions when environment steps are expensive. With many cheap environments ppo is faster in wall time; for continuous
actions use sac or td3.
Sources: arXiv 1312.5602 and Nature 518 (2015); double: arXiv 1509.06461; dueling: arXiv 1511.06581; prioritised replay: arXiv 1511.05952; conservative: arXiv 2006.04779.
Other value heads (c51, quantile, hl-gauss, two-hot) turn it into the methods of their papers.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from volvelle.core.parts import method, part
from volvelle.core.schedule import Schedule, at
from volvelle.core.trainable import Adam, Optimiser

from ..buffers import Uniform
from ..learner import Count, NonNegative, Positive
from ..losses import conservative_gap, mean_over_rows
from ..networks import CNN, MLP, Dueling, Network, Output
from ..offpolicy import OffPolicy
from ..policy import Deciding
from ..spaces import Spec
from ..speed import descent
from ..stacked import Streams, make
from ..valueheads import MSE, ValueHead

Share = Annotated[float, Field(ge=0, le=1)]


@part("q-learning")
class QLearning(OffPolicy):
    """epsilon falls from epsilon_start to epsilon_end over the first epsilon_share of the run, or is a schedule over environment steps.

    copy_every: environment steps between copies to the target network; tau instead: Polyak averaging at every gradient step.
    double: the online network chooses the next action, the target network values it. dueling: value and advantage streams.
    conservative: weight of log sum exp Q - Q(data), on values, which keeps actions that the data lack from looking good.
    """

    network: Network = MLP(hidden=(120, 84), activation="relu")
    value: ValueHead = MSE()
    optimiser: Optimiser = Adam(lr=2.5e-4, clip=None)
    double: bool = False
    dueling: bool = False
    epsilon_start: Share = 1.0
    epsilon_end: Share = 0.05
    epsilon_share: Share = 0.5
    epsilon: Schedule | None = None
    copy_every: Count = 500
    tau: Positive | None = None
    conservative: NonNegative = 0.0

    def actor(self, spec, seeds):
        return QNetwork(self, spec, seeds)

    def agent(self, run, spec):
        return QAgent(run, self, spec)


class QNetwork(Deciding):
    """Outputs [S, B, actions * value.width]: the value head's numbers of every action, side by side."""

    def __init__(self, recipe: QLearning, spec: Spec, seeds: int):
        super().__init__()
        spec.actions.only("discrete", "q-learning")
        self.actions, self.head, self.epsilon = spec.actions.codes[0], recipe.value, recipe.epsilon_end
        body = recipe.network.build(spec.observations, seeds)
        if recipe.dueling:
            self.net = Dueling(body, seeds, self.actions, recipe.value.width, recipe.network.init)
        else:
            self.net = Output(body, seeds, self.actions * recipe.value.width, recipe.network.init)

    def forward(self, x) -> Tensor:
        return self.net(x)

    def read(self, outputs: Tensor) -> Tensor:
        """Q [S, B, actions] of outputs."""
        return self.head.value(outputs.unflatten(-1, (self.actions, -1)))

    def values(self, x) -> Tensor:
        return self.read(self(x))

    def pick(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """The outputs [S, B, width] of the given actions [S, B]."""
        if outputs.shape[-1] == self.actions:
            return outputs.gather(-1, actions.unsqueeze(-1))
        apart = outputs.unflatten(-1, (self.actions, -1))
        return apart.gather(-2, actions[..., None, None].expand(-1, -1, 1, apart.shape[-1])).squeeze(-2)

    def best(self, observations):
        return self.values(observations).argmax(-1)

    def explore(self, observations, streams):
        best = self.best(observations)
        random = torch.from_numpy(streams.integers(self.actions, best.shape[1])).to(best.device)
        return torch.where(torch.from_numpy(streams.uniform(best.shape[1])).to(best.device) < self.epsilon, random, best)


class QAgent:
    """The algorithm: epsilon-greedy acting, and one temporal-difference step per update."""

    def __init__(self, run, part: QLearning, spec: Spec):
        self.part, self.total = part, part.total(run)
        self.module = part.actor(spec, part.seeds)
        self.net = make(run, "q", self.module, part.optimiser, part.seeds)
        rounds = max(1, part.copy_every // part.every) * part.updates
        self.target = run.lagged(self.net, every=None if part.tau else rounds, tau=part.tau, name="target")
        self.exploring = Streams(run, "exploring", part.seeds)
        self.size = sum(p.numel() for p in self.module.parameters())
        self.descend = descent(run, self.net, self.loss)

    def epsilon(self, env_steps: int) -> float:
        part = self.part
        if part.epsilon is not None:
            return at(part.epsilon, env_steps)
        share = min(1.0, env_steps / max(1.0, part.epsilon_share * self.total))
        return part.epsilon_start + (part.epsilon_end - part.epsilon_start) * share

    def noise(self, steps, envs):
        return list(zip(self.exploring.uniform(steps, envs).swapaxes(0, 1), self.exploring.integers(self.module.actions, steps, envs).swapaxes(0, 1)))

    def explore(self, observations, noise, env_steps):
        chance, random = noise
        explores = chance < self.epsilon(env_steps)
        if explores.all():
            return random
        return np.where(explores, random, self.module.best(observations).cpu().numpy())

    def loss(self, batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss per seed [S]; the losses of rows [S, B], the outputs of the taken actions [S, B, width] and the target:

        r + discount * what the target network's outputs for the next action stand for.
        """
        part = self.part
        with torch.no_grad():
            following = self.target.module(batch["next_obs"])
            choosing = self.module(batch["next_obs"]) if part.double else following
            best = self.module.pick(following, self.module.read(choosing).argmax(-1))
            target = part.value.backup(best, batch["rewards"], batch["discounts"])
        every = self.module(batch["obs"])
        outputs = self.module.pick(every, batch["actions"])
        losses = part.value.loss(outputs, target)
        if part.conservative:
            losses = losses + part.conservative * conservative_gap(self.module.read(every), batch["actions"])
        return mean_over_rows(losses, batch.get("weights")), {"losses": losses, "outputs": outputs, "target": target}

    def update(self, batch):
        made = self.descend(batch)[1]
        norm = self.net.step()
        self.target.update()
        return made | {"norm": norm}

    def report(self, made):
        return {"loss": made["losses"], "q": self.part.value.value(made["outputs"]), "gradient_norm": made["norm"]}

    def errors(self, made):
        return (self.part.value.value(made["outputs"]) - made["target"]).abs() if self.part.value.scalar else made["losses"]


dqn = method("dqn", QLearning(
    period=1000, warmup=10_000, every=10, replay=Uniform(capacity=10_000, batch=128), copy_every=500, epsilon_end=0.05, epsilon_share=0.5,
    network=MLP(hidden=(120, 84), activation="relu"), optimiser=Adam(lr=2.5e-4, clip=None)),
    title="deep Q-learning", source="arXiv 1312.5602")

dqn_atari = method("dqn-atari", dqn(
    warmup=80_000, every=4, replay=Uniform(capacity=1_000_000, batch=32), copy_every=1000, epsilon_end=0.01, epsilon_share=0.1, network=CNN(),
    optimiser=Adam(lr=1e-4, clip=None)),
    title="deep Q-learning with the usual settings for Atari games", source="Nature 518 (2015)")
