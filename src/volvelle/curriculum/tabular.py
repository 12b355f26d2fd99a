"""Tabular agents in batches: L agents, each with its own level and its own tables, acting and learning as one tensor operation.

A table [L, S + 1, K] maps states to K numbers: row s, plus the last row times a thousandth of the episode's steps so far (the agents of
arXiv 2310.02782: linear, without bias, in a one-hot state and the time). Gradients are written out, so that a chain of updates can be differentiated
with respect to what they were made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.targets import gae
from volvelle.core.parts import Part, part

from .gridworlds import ACTIONS, Levels, Worlds

EPS = 1e-8  # inside logarithms of probabilities
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


@dataclass
class Experience:
    """T steps of L x W copies. states, times [L, W, T + 1] (the last: after the last step); actions, rewards, done [L, W, T]."""

    states: Tensor
    times: Tensor
    actions: Tensor
    rewards: Tensor
    done: Tensor

    def rows(self, table: Tensor, last: bool = False) -> Tensor:
        """The table at the states acted on, [L, W, T, K]; last: also after the last step, T + 1."""
        upto = None if last else -1
        return look(table, self.states[..., :upto], self.times[..., :upto])

    def grow(self, rows: Tensor, count: int) -> Tensor:
        """The gradient [L, count, K] of a table whose rows at the states acted on have gradients [L, W, T, K]."""
        return spread(rows, self.states[..., :-1], self.times[..., :-1], count)


def look(table: Tensor, states: Tensor, times: Tensor) -> Tensor:
    """table [L, S + 1, K] at states, times [L, ...]: [L, ..., K]."""
    L, count, K = table.shape
    offset = (torch.arange(L, device=states.device) * count).view(L, *(1,) * (states.ndim - 1))
    rows = table.reshape(-1, K).index_select(0, (states + offset).reshape(-1)).view(*states.shape, K)
    return rows + (times * 0.001).unsqueeze(-1) * table[:, -1].view(L, *(1,) * (states.ndim - 1), K)


def spread(rows: Tensor, states: Tensor, times: Tensor, count: int) -> Tensor:
    """The transpose of `look`: [L, count, K]."""
    L, K = len(rows), rows.shape[-1]
    offset = (torch.arange(L, device=states.device) * count).view(L, *(1,) * (states.ndim - 1))
    found = rows.new_zeros(L * count, K).index_add(0, (states + offset).reshape(-1), rows.reshape(-1, K)).view(L, count, K)
    last = ((times * 0.001).unsqueeze(-1) * rows).reshape(L, -1, K).sum(1, keepdim=True)
    return torch.cat([found[:, :-1], found[:, -1:] + last], 1)


def clip(gradient: Tensor, bound: float | None) -> Tensor:
    """Each agent's gradient [L, ...] shortened to the norm `bound`."""
    if bound is None:
        return gradient
    norm = (gradient.flatten(1).square().sum(1) + 1e-30).sqrt().view(-1, *(1,) * (gradient.ndim - 1))
    return gradient * (bound / norm).clamp(max=1.0)


def softmax(x: Tensor) -> Tensor:
    """Over the last axis. Torch is several times slower along a short last axis than along a first one."""
    return x.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Indices [...] drawn from probabilities [..., K] with numbers in [0, 1) [...]."""
    return (probabilities.cumsum(-1)[..., :-1] <= uniform.unsqueeze(-1)).sum(-1)


def logp_gradient(probabilities: Tensor, actions: Tensor) -> Tensor:
    """d log(pi(a) + 1e-8) / d logits, [..., K]."""
    chosen = probabilities.gather(-1, actions.unsqueeze(-1))
    one = torch.zeros_like(probabilities).scatter(-1, actions.unsqueeze(-1), 1.0)
    return chosen / (chosen + EPS) * (one - probabilities)


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log(p + 1e-8) over the last axis."""
    return -(probabilities * torch.log(probabilities + EPS)).sum(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p (log(p + 1e-8) - log(q + 1e-8)) over the last axis."""
    return (p * (torch.log(p + EPS) - torch.log(q + EPS))).sum(-1)


def kl_gradient(p: Tensor, q: Tensor) -> Tensor:
    """d kl(softmax(v), q) / d v, [..., K]."""
    c = torch.log(p + EPS) - torch.log(q + EPS) + p / (p + EPS)
    return p * (c - (p * c).sum(-1, keepdim=True))


@torch.no_grad()
def play(actor: Tensor, worlds: Worlds, length: int, generator: torch.Generator) -> Experience:
    """`length` steps of every copy with the softmax policies of the tables actor [L, S + 1, A]."""
    L, W, O, device = len(actor), worlds.workers, worlds.levels.objects, actor.device
    numbers = torch.rand(length, L, W, O + 2, generator=generator).to(device)
    states, times, actions, rewards, done = [worlds.states()], [worlds.time.clone()], [], [], []
    offset = (torch.arange(L, device=device) * actor.shape[1])[:, None]
    flat, last = actor.reshape(-1, actor.shape[-1]), actor[:, None, -1] * 0.001
    for t in range(length):                                         # `look`, with what stays the same kept outside the loop
        rows = flat.index_select(0, (states[-1] + offset).reshape(-1)).view(L, W, -1) + times[-1].unsqueeze(-1) * last
        action = draw(softmax(rows), numbers[t, ..., -1])
        reward, ended = worlds.step(action, numbers[t, ..., :-1])
        states.append(worlds.states())
        times.append(worlds.time.clone())
        actions.append(action)
        rewards.append(reward)
        done.append(ended)
    return Experience(*(torch.stack(x, -1) for x in (states, times, actions, rewards, done)))


@torch.no_grad()
def returns(levels: Levels, act, episodes: int, generator: torch.Generator) -> Tensor:
    """Mean undiscounted return [L] of `episodes` first episodes. act: tables [L, S + 1, A], or a function of (states, times, step) to actions [L, W]."""
    worlds = Worlds(levels, episodes)
    total = torch.zeros(len(levels), episodes, device=levels.size.device)
    playing = torch.ones_like(total, dtype=torch.bool)
    for step in range(int(levels.limit.max())):
        numbers = torch.rand(*total.shape, levels.objects + 2, generator=generator).to(total.device)
        if isinstance(act, Tensor):
            action = draw(softmax(look(act, worlds.states(), worlds.time)), numbers[..., -1])
        else:
            action = act(worlds.states(), worlds.time, step)
        reward, done = worlds.step(action, numbers[..., :-1])
        total += reward * playing
        playing &= ~done
        if not playing.any():
            break
    return total.mean(1)


@part("tabular")
class Tabular(Part):
    """How tabular agents act and learn.

    actor_lr, bootstrap_lr: step sizes; clip: bound on the norm of each table's gradient; optimiser: sgd, or adam (use far smaller steps then);
    width: entries of the bootstrap vector; alpha: weight of its loss; workers, length: copies of the level and steps of each per update.
    """

    slot: ClassVar[str] = "agent"
    actor_lr: Positive = 40.0
    bootstrap_lr: Positive = 4.0
    clip: Positive | None = 0.5
    optimiser: Literal["sgd", "adam"] = "sgd"
    width: Annotated[int, Field(gt=1)] = 8
    alpha: Annotated[float, Field(ge=0)] = 0.5
    workers: Count = 64
    length: Count = 20

    def fresh(self, L: int, states: int, K: int, generator: torch.Generator | None = None, device="cpu") -> Tensor:
        """L new tables [L, states + 1, K]; without a generator all zero."""
        if generator is None:
            return torch.zeros(L, states + 1, K, device=device)
        return (torch.randn(L, states + 1, K, generator=generator) / (states + 1) ** 0.5).to(device)

    def moments(self, table: Tensor) -> tuple[Tensor, ...]:
        """What the optimiser remembers of a table; its last entry counts updates, [L, 1, 1]."""
        return (torch.zeros_like(table), torch.zeros_like(table), table.new_zeros(len(table), 1, 1)) if self.optimiser == "adam" else ()

    def move(self, table: Tensor, gradient: Tensor, moments: tuple[Tensor, ...], lr: float, going: Tensor | None = None):
        """One step against the clipped gradient; agents not `going` ([L] bool) stay. Differentiable. Returns (table, moments)."""
        new, memory = descend(table, clip(gradient, self.clip), moments, lr)
        if going is None:
            return new, memory
        going = going.view(-1, 1, 1)
        return torch.where(going, new, table), tuple(torch.where(going, a, b) for a, b in zip(memory, moments))


def descend(table: Tensor, gradient: Tensor, moments: tuple[Tensor, ...], lr: float):
    """Plain gradient descent, or Adam (decays .9 and .999) if there are moments (first, second, count)."""
    if not moments:
        return table - lr * gradient, ()
    first, second, count = moments[0] * 0.9 + 0.1 * gradient, moments[1] * 0.999 + 0.001 * gradient**2, moments[2] + 1
    size = (second / (1 - 0.999**count) + 1e-16).sqrt()  # the small number keeps the root differentiable at rows never met
    return table - lr * (first / (1 - 0.9**count)) / (size + 1e-8), (first, second, count)


class Values:
    """A scalar critic per agent, [L, S + 1, 1], trained by Adam (decays .9 and .999) or by clipped gradient descent towards GAE targets."""

    def __init__(self, L: int, states: int, lr: float, optimiser: str = "adam", bound: float | None = None, gamma: float = 0.99, lam: float = 0.95, device="cpu"):
        self.lr, self.bound, self.gamma, self.lam = lr, bound, gamma, lam
        self.table = torch.zeros(L, states + 1, 1, device=device)
        self.moments = (torch.zeros_like(self.table), torch.zeros_like(self.table), torch.zeros(L, 1, 1, device=device)) if optimiser == "adam" else ()

    def advantages(self, seen: Experience) -> tuple[Tensor, Tensor]:
        """(GAE advantages, values), each [L, W, T]."""
        values = seen.rows(self.table, last=True)[..., 0].transpose(-1, -2)
        found = gae(seen.rewards.transpose(-1, -2), values[..., :-1, :], values[..., -1, :], seen.done.transpose(-1, -2), self.gamma, self.lam)
        return found.transpose(-1, -2), values[..., :-1, :].transpose(-1, -2)

    @torch.no_grad()
    def learn(self, seen: Experience, advantages: Tensor, going: Tensor | None = None) -> None:
        """One step on the squared distance to value + advantage."""
        gradient = seen.grow(-2 * advantages.unsqueeze(-1) / advantages[0].numel(), self.table.shape[1])
        table, moments = descend(self.table, clip(gradient, self.bound), self.moments, self.lr)
        if going is not None:
            going = going.view(-1, 1, 1)
            table, moments = torch.where(going, table, self.table), tuple(torch.where(going, a, b) for a, b in zip(moments, self.moments))
        self.table, self.moments = table, moments

    def reset(self, index: Tensor) -> None:
        for x in (self.table, *self.moments):
            x[index] = 0.0

    def state_dict(self):
        return {"table": self.table, "moments": list(self.moments)}

    def load_state_dict(self, state):
        self.table, self.moments = state["table"].to(self.table.device), tuple(m.to(self.table.device) for m in state["moments"])


def normalised(x: Tensor) -> Tensor:
    """Each agent's [L, ...] minus its mean, over its population deviation + 1e-8."""
    flat = x.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True, unbiased=False) + EPS)).view_as(x)


@torch.no_grad()
def actor_critic(levels: Levels, agent: Tabular, updates: int, generator: torch.Generator, *, value_lr: float = 0.03, entropy_weight: float = 0.01,
                 epochs: int = 1, ratio: float | None = None) -> Tensor:
    """Agents trained by hand-written actor-critic, one per level: their tables [L, S + 1, A].

    A2C: one step per rollout. PPO: `epochs` steps with the probability ratio clipped to 1 +- ratio. GAE(.99, .95), advantages normalised per rollout.
    """
    L, device = len(levels), levels.size.device
    worlds, values = Worlds(levels, agent.workers), Values(L, levels.states, value_lr, device=device)
    actor = agent.fresh(L, levels.states, ACTIONS, generator, device)
    moments = agent.moments(actor)
    for _ in range(updates):
        seen = play(actor, worlds, agent.length, generator)
        advantages, _ = values.advantages(seen)
        scaled, old = normalised(advantages), None
        for _ in range(epochs):
            p = softmax(seen.rows(actor))
            weight = scaled
            if ratio is not None:
                chosen = p.gather(-1, seen.actions.unsqueeze(-1))[..., 0]
                old = chosen if old is None else old
                r = chosen / old
                weight = torch.where(torch.where(scaled > 0, r > 1 + ratio, r < 1 - ratio), 0.0, scaled * r)
            spread_out = -p * (torch.log(p + EPS) + entropy(p).unsqueeze(-1))         # d entropy / d logits
            rows = -(weight.unsqueeze(-1) * logp_gradient(p, seen.actions) + entropy_weight * spread_out) / scaled[0].numel()
            actor, moments = agent.move(actor, seen.grow(rows, actor.shape[1]), moments, agent.actor_lr)
        values.learn(seen, advantages)
    return actor
