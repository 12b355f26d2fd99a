"""Acting with a world-action model, looking ahead in it, and continuing recorded segments with dreams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from volvelle.control.learner import Count
from volvelle.control.policy import Deciding
from volvelle.control.spaces import Layout, Spec
from volvelle.control.stacked import Streams
from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part

from .learner import OfflineLearner
from .lookahead import Beam, Planner, greedy
from .worlds import Body, frames_and_games


@dataclass
class Seen:
    """What a player remembers of the last C steps: tokens [N, C, T], actions [N, C] (newest last), and how many steps count [N]."""

    tokens: Tensor
    actions: Tensor
    count: Tensor


class WorldPlayer(Deciding):
    """Acts by a planner (None: greedily) in a world-action model, from the last `context` steps; `randomness` of the actions are random legal ones."""

    def __init__(self, tokeniser: nn.Module, body: Body, layout: Layout, planner: Planner | None, context: int, gamma: float, randomness: float):
        super().__init__()
        self.tokeniser, self.body, self.layout = tokeniser, body, layout
        self.planner, self.context, self.gamma, self.randomness = planner, context, gamma, randomness

    @torch.no_grad()
    def remember(self, observations: Any, memory: Seen | None, explore: bool, streams: Streams | None) -> tuple[Tensor, Seen]:
        training = self.training
        self.eval()
        frames, game = frames_and_games(observations, self.layout)
        tokens, game = self.tokeniser.encode(frames[0]), game[0]
        if memory is None:
            memory = Seen(tokens.new_zeros(len(tokens), self.context, tokens.shape[1]), tokens.new_zeros(len(tokens), self.context), tokens.new_zeros(len(tokens)))
        seen = Seen(torch.cat([memory.tokens[:, 1:], tokens[:, None]], 1), torch.cat([memory.actions[:, 1:], torch.zeros_like(memory.actions[:, :1])], 1),
                    (memory.count + 1).clamp(max=self.context))
        used = int(seen.count.max())
        root = self.body.begin(seen.tokens[:, -used:], seen.actions[:, -used:], seen.count, game)
        plan = self.planner.plan(self.body, root, self.gamma, streams) if self.planner is not None else greedy(root)
        action = plan.action
        if self.randomness and streams is not None:
            other = torch.from_numpy(streams.gumbel(*root.q.shape)[0]).to(action.device).masked_fill(root.q == -torch.inf, -torch.inf).argmax(-1)
            action = torch.where(torch.from_numpy(streams.uniform(len(action))[0]).to(action.device) < self.randomness, other, action)
        seen.actions[:, -1] = action
        self.train(training)
        return action[None], seen

    def forget(self, memory: Seen, row: int) -> Seen:
        count = memory.count.clone()
        count[row] = 0
        return Seen(memory.tokens, memory.actions, count)

    def best(self, observations):
        """Without memory and chance: each observation as if its episode had just begun. Observations [1, N, ...]."""
        return self.remember(observations, None, False, None)[0]


class WorldLearner(OfflineLearner):
    """Also reports the returns without planning; a planner given for an evaluation is used there."""

    def spec_of(self, task) -> Spec:
        spec, games = super().spec_of(task), None
        if "obs/vector" in self.data.fields:
            games = self.data.fields["obs/vector"]
        if games is not None and not (np.isin(games, (0, 1)).all() and (np.sum(games, 1) == 1).all()):
            raise UserError(f"dataset {self.data.label()}: beside the image there are {games.shape[1]} numbers; accepted: the number of the game, one-hot")
        return spec

    def evaluate(self, task=None):
        player = self.policy().module if self.loaded is None else self.loaded.module
        planner, wanted = player.planner, (self.evaluated if self.evaluated is not None else self.run.config).recipe.planner
        wanted = wanted if int(player.body.age) else None  # nothing is known of the world before the first step
        try:
            player.planner = wanted
            found = super().evaluate(task)
            player.planner = None
            plain = super().evaluate(task) if wanted is not None else found
        finally:
            player.planner = planner
        return found | ({"unplanned_return": plain["return"], "planning_gain": found["return"] - plain["return"]} if "return" in found else {})


@part("imagination")
class Imagination(Part):
    """Segments whose last steps are dreamt by a planner, mixed into the batches of values (never of the world).

    after: gradient steps before it begins; rows: dreamt segments per batch; refresh: how many are made per gradient step (from the full segments of the
    batch); capacity: of the buffer, oldest out first; planner: what dreams (a beam of at least one step).
    """

    slot: ClassVar[str] = "imagination"
    after: Annotated[int, Field(ge=0)] = 20_000
    rows: Count = 16
    refresh: Count = 16
    capacity: Count = 4096
    planner: Planner = Beam()

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.planner, Beam) or not self.planner.depth:
            raise UserError(f"imagination.planner={self.planner.part_name}: dreams need a path of at least one step; accepted: beam with depth >= 1")

    def start(self, run):
        return Dreams(self, Streams(run, "dreams", 1))


Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # tokens, actions, rewards, ended, mask, game


class Dreams:
    """The buffer of dreamt segments, on the CPU."""

    def __init__(self, part: Imagination, streams: Streams):
        self.part, self.streams, self.kept = part, streams, []  # the fields of `Rows`, each [n, ...]

    def joined(self, player: WorldPlayer, data: Rows, age: int, gamma: float) -> Rows:
        """The real rows with some dreamt ones behind them, once there are any."""
        if age < self.part.after:
            return data
        self.add(self.dream(player, data, gamma))
        if not self.kept:
            return data
        picked = torch.from_numpy(self.streams.integers(len(self.kept[0]), self.part.rows)[0])
        return tuple(torch.cat([real, made[picked].to(real.device)]) for real, made in zip(data, self.kept))

    def dream(self, player: WorldPlayer, data: Rows, gamma: float) -> Rows:
        """The full segments among the first rows, their last `depth` steps replaced by dreamt ones; the last action and reward are copies without a target."""
        full = torch.nonzero(data[4].all(1)).flatten()[: self.part.refresh]
        tokens, actions, rewards, ended, mask, game = (x[full] for x in data)
        if not len(full):
            return tokens, actions, rewards, ended, mask, game
        first = tokens.shape[1] - self.part.planner.depth
        if first < 1:
            raise UserError(f"imagination.planner.depth={self.part.planner.depth}: segments have {tokens.shape[1]} steps; accepted: fewer")
        training = player.training
        player.eval()
        root = player.body.begin(tokens[:, :first], actions[:, :first], torch.full_like(game, first), game)
        plan = self.part.planner.plan(player.body, root, gamma, self.streams)
        player.train(training)
        dreamt = torch.stack([node.tokens[rows] for node, rows in plan.path], 1)
        actions = torch.cat([actions[:, : first - 1], plan.actions, plan.actions[:, -1:]], 1)
        rewards = torch.cat([rewards[:, : first - 1], plan.rewards, plan.rewards[:, -1:]], 1)
        return torch.cat([tokens[:, :first], dreamt], 1), actions, rewards, torch.zeros_like(ended), mask, game

    def add(self, made: Rows) -> None:
        made = tuple(x.cpu() for x in made)
        if len(made[0]):
            self.kept = [torch.cat([old, new])[-self.part.capacity :] for old, new in zip(self.kept, made)] if self.kept else [x[-self.part.capacity :] for x in made]

    def state_dict(self) -> dict[str, Any]:
        return {"kept": list(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = list(state["kept"])
