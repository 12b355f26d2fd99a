"""Looking ahead in a learnt world: beam search and Monte-Carlo tree search over what a model dreams.

A world is anything with advance(node, rows, actions, streams) -> (node, rewards); a node holds M situations and their action values `q` [M, A], -inf for
illegal actions. Reading an observation into a node, and what a situation is, are the world's own affair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.learner import Count, Positive
from volvelle.control.stacked import Streams
from volvelle.core.parts import Part, part

Depth = Annotated[int, Field(ge=0)]


class World(Protocol):
    def advance(self, node: Any, rows: Tensor, actions: Tensor, streams: Streams | None = None) -> tuple[Any, Tensor]: ...


@dataclass
class Plan:
    """The first action [N] and its score [N]; of the best path also actions and rewards [N, H], and the situations on it as (node, rows [N]), H of them.
    Tree search plans no path."""

    action: Tensor
    score: Tensor
    actions: Tensor | None = None
    rewards: Tensor | None = None
    path: tuple[tuple[Any, Tensor], ...] = ()


class Planner(Part):
    """Slot: `plan(world, root, gamma, streams)` chooses an action in each of the root's situations. depth: steps ahead; 0 is the greedy action."""

    slot: ClassVar[str] = "planner"
    depth: Depth = 2

    def plan(self, world: World, root: Any, gamma: float, streams: Streams | None = None) -> Plan:
        raise NotImplementedError


def greedy(root: Any) -> Plan:
    best = root.q.max(-1)
    return Plan(best.indices, best.values)


@part("beam")
class Beam(Planner):
    """The `width` best actions of every kept situation are tried, and the `width` situations of highest score kept; the score is
    sum_{i<h} gamma^i r_i + gamma^h max_a Q(s_h, a). sample: draw the dreamt frames instead of taking the likeliest."""

    depth: Depth = 2
    width: Count = 2
    sample: bool = False

    def plan(self, world, root, gamma, streams=None):
        return beam(world, root, self.width, self.depth, gamma, streams if self.sample else None)


def beam(world: World, root: Any, width: int, depth: int, gamma: float, streams: Streams | None = None) -> Plan:
    """See Beam. width + (depth - 1) width^2 situations are dreamt for each of the root's; fewer where fewer actions are legal."""
    if depth == 0:
        return greedy(root)
    count, device = root.q.shape[0], root.q.device
    node, kept = root, torch.arange(count, device=device)                      # rows of `node` in the beam, the same number for every situation
    earned, trail, gains, path = root.q.new_zeros(count), None, None, []
    for h in range(1, depth + 1):
        top = node.q[kept].topk(min(width, node.q.shape[1]), -1)
        parent = torch.arange(len(kept), device=device).repeat_interleave(top.indices.shape[1])
        actions = top.indices.flatten()
        node, rewards = world.advance(node, kept[parent], actions, streams)
        earned = (earned[parent] + gamma ** (h - 1) * rewards).masked_fill(top.values.flatten() == -math.inf, -math.inf)  # illegal: out for good
        score = (earned + gamma**h * node.q.amax(-1)).view(count, -1)
        best = score.topk(min(width, score.shape[1]), -1)
        kept = (best.indices + torch.arange(count, device=device)[:, None] * score.shape[1]).flatten()
        trail = actions[kept, None] if trail is None else torch.cat([trail[parent[kept]], actions[kept, None]], 1)
        gains = rewards[kept, None] if gains is None else torch.cat([gains[parent[kept]], rewards[kept, None]], 1)
        path = [(n, rows[parent[kept]]) for n, rows in path] + [(node, kept)]
        earned = earned[kept]
    first = torch.arange(count, device=device) * best.indices.shape[1]         # topk sorts: the best of every situation comes first
    return Plan(trail[first, 0], best.values[:, 0], trail[first], gains[first], tuple((n, rows[first]) for n, rows in path))


@part("mcts")
class MCTS(Planner):
    """Tree search by PUCT (arXiv 1911.08265) with prior softmax(Q / temperature).

    simulations: None for width + (depth - 1) width^2, the beam's cost; leaf: the largest action value or their mean; choose: the action by its mean value or
    by its number of visits. Situations below `depth` steps are not entered.
    """

    depth: Depth = 2
    width: Count = 2
    simulations: Count | None = None
    temperature: Positive = 1.0
    base: Positive = 19652.0
    initial: Positive = 1.25
    leaf: Literal["max", "mean"] = "max"
    choose: Literal["value", "visits"] = "value"
    sample: bool = False

    def plan(self, world, root, gamma, streams=None):
        if self.depth == 0:
            return greedy(root)
        trees = [_Tree(self, root, row, gamma) for row in range(root.q.shape[0])]
        for _ in range(self.simulations or self.width + (self.depth - 1) * self.width**2):
            leaves = [tree.descend() for tree in trees]
            for parent in {id(leaf.node): leaf.node for leaf in leaves if leaf is not None}.values():
                members = [(tree, leaf) for tree, leaf in zip(trees, leaves) if leaf is not None and leaf.node is parent]
                rows, actions = (torch.tensor(x, device=root.q.device) for x in zip(*((leaf.row, leaf.action) for _, leaf in members)))
                node, rewards = world.advance(parent, rows, actions, streams if self.sample else None)
                for i, (tree, _) in enumerate(members):
                    tree.grow(node, i, float(rewards[i]))
        chosen = [tree.chosen() for tree in trees]
        return Plan(torch.tensor([a for a, _ in chosen], device=root.q.device), torch.tensor([v for _, v in chosen], device=root.q.device))


class _Spot:
    """A situation in the tree, or (node None) a place where one may grow."""

    def __init__(self, action: int, prior: float):
        self.action, self.prior, self.visits, self.total, self.reward, self.children = action, prior, 0, 0.0, 0.0, []
        self.node, self.row = None, 0


@dataclass
class _Leaf:
    node: Any
    row: int
    action: int


class _Tree:
    def __init__(self, part: MCTS, root: Any, row: int, gamma: float):
        self.part, self.gamma, self.low, self.high = part, gamma, math.inf, -math.inf
        self.root = _Spot(-1, 1.0)
        self.open(self.root, root, row)
        self.way: list[_Spot] = []

    def open(self, spot: _Spot, node: Any, row: int) -> float:
        """Put a situation there, and return what it is worth."""
        q = node.q[row]
        prior = (q / self.part.temperature).softmax(-1).tolist()
        spot.node, spot.row, spot.children = node, row, [_Spot(a, prior[a]) for a in torch.nonzero(q > -math.inf).flatten().tolist()]
        legal = q[q > -math.inf]
        return float(legal.max() if self.part.leaf == "max" else legal.mean())

    def worth(self, spot: _Spot) -> float:
        return spot.reward + self.gamma * spot.total / spot.visits

    def appeal(self, parent: _Spot, child: _Spot) -> float:
        part = self.part
        pull = math.sqrt(max(parent.visits, 1)) / (1 + child.visits) * (part.initial + math.log((parent.visits + part.base + 1) / part.base))
        value = 0.0 if not child.visits else (self.worth(child) - self.low) / (self.high - self.low) if self.high > self.low else self.worth(child)
        return value + child.prior * pull

    def descend(self) -> _Leaf | None:
        """Down to a place where nothing has grown; None if the way ended at the depth limit and its end has been counted again."""
        spot, self.way = self.root, [self.root]
        while True:
            child = max(spot.children, key=lambda c: self.appeal(spot, c))
            self.way.append(child)
            if child.node is None:
                return _Leaf(spot.node, spot.row, child.action)
            if len(self.way) - 1 >= self.part.depth:
                q = child.node.q[child.row]
                legal = q[q > -math.inf]
                self.count(float(legal.max() if self.part.leaf == "max" else legal.mean()))
                return None
            spot = child

    def grow(self, node: Any, row: int, reward: float) -> None:
        self.way[-1].reward = reward
        self.count(self.open(self.way[-1], node, row))

    def count(self, value: float) -> None:
        for spot in reversed(self.way):
            spot.visits, spot.total = spot.visits + 1, spot.total + value
            if spot is not self.root:
                value = spot.reward + self.gamma * value
                self.low, self.high = min(self.low, self.worth(spot)), max(self.high, self.worth(spot))

    def chosen(self) -> tuple[int, float]:
        tried = [c for c in self.root.children if c.visits]
        best = max(tried, key=lambda c: self.worth(c) if self.part.choose == "value" else c.visits)
        return best.action, self.worth(best)
