"""LATR: lookahead tree-based rollouts (arXiv 2510.24302).

Problem. Group-based methods learn from differences inside a group, and independent sampling often gives one trajectory in different words.
Idea. Grow each group as a tree.
    1. Branch: where the second-best token is likely, p(c) > absolute, and nearly as likely as the best, p(top) - p(c) < relative, open a
       child with it; the branch itself goes on with the best token. At most k branches to a prompt.
    2. Look ahead: the child simply goes on growing.
    3. Prune: after r own tokens (r in `windows`) compare its last r tokens with its parent's; edit distance / r below the threshold
       means that both say the same, and the child goes, with all its descendants.
    4. Stop as soon as the trees are full and every child is judged; the branches are finished by ordinary sampling.
Only k = round(eta G) responses of a group come from the tree, the others are ordinary samples; eta falls over training.
Pick it when groups are homogeneous and responses long. Leave it for responses of a few tokens: apart from its forks the tree is greedy.
The update is that of any other method (`dapo sampler=latr`): responses count as sampled from the policy, nothing corrects for the tree.
Forking and pruning move rows of booleans over shared keys (stepping.py); no token is computed twice. Differences to the released code
are listed in docs/methods/latr.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import field
from typing import Annotated, Literal

import torch
from pydantic import Field

from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.schedule import Schedule, Table, at
from volvelle.core.trainable import Adam

from ..branching import Forest, Pruning, edit
from ..diversity import GroupRecipe
from ..fittings import KL, Updates
from ..recipe import Evaluation, LanguageRecipe
from ..samplers import LivePlain, Plain
from ..sampling import draw

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@part("latr")
class Latr(Plain):
    """Rollouts from a tree with lookahead pruning; `group`, `temperature` and the rest as for plain sampling.

    eta: share of a group that comes from the tree; absolute, relative: when a child opens (untempered probabilities, both strict);
    rank: candidates looked at per token; windows: own tokens after which a child is judged; prune: name -> rule, any of which suffices;
    spare: a child whose rival token consists of these characters is never pruned; surplus: which children a full tree gives up;
    full, slack: the trees stop when (full - slack step / max_tokens) of their places are taken; cap: steps of the tree phase at most;
    cumulative: every `interval` steps a branch of a tree that is not full goes if its log-prob is below the tree's best by more than
    -log(cumulative) per step; random_branching: probability of a second child instead of the two thresholds; adaptive: move all thresholds by 0.01
    after a step that suppressed more than a tenth of its tokens (stricter) or left more than a twentieth of its places empty (looser),
    at most ten times each way.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0
    eta: Share | Schedule = 1.0
    absolute: Share = 0.25
    relative: Share = 0.15
    rank: Annotated[int, Field(ge=2)] = 2
    windows: tuple[Count, ...] = (20, 30, 50)
    prune: dict[str, Pruning] = field(default_factory=lambda: {"edit": edit})
    spare: str = ""
    surplus: Literal["rank", "probability"] = "rank"
    full: Share = 0.98
    slack: Share = 0.0
    cap: Count | None = None
    cumulative: Annotated[float, Field(gt=0, lt=1)] | None = None
    interval: Count = 10
    random_branching: Share | None = None
    adaptive: bool = False
    needs = frozenset({"stepwise"})

    def __post_init__(self):
        super().__post_init__()
        if self.engine != "transformers":
            raise UserError(f"sampler=latr engine={self.engine}: a tree needs logits step by step; accepted: transformers")

    def start(self, run):
        return LiveLatr(self, run)


class LiveLatr(LivePlain):
    """sample(prompts) -> rollouts, `group` to each prompt: those of the tree first."""

    def __init__(self, description: Latr, run):
        super().__init__(description, run)
        self.level, self.seen, self.told = 0, defaultdict(float), {}  # steps towards stricter thresholds; counts since the last update

    def sample(self, prompts):
        width = round(at(self.part.eta, self.run.step) * self.part.group)
        prompts = self.fitting(prompts)
        if not width or not prompts:
            return super().sample(prompts)
        tree = Growth(self, prompts, width)
        forest = tree.grow()
        for name, count in tree.count.items():
            self.seen[name] += count
        plain = self.sampling.plain
        return [forest.rollout(s, self.entropy, plain and s % forest.room >= width, tree=float(s % forest.room < width)) for s in range(len(forest.used))]

    def update(self, batch):
        seen, places = self.seen, max(self.seen["places"], 1)
        if self.part.adaptive:
            strict, loose = seen["suppressed"] > 0.1 * places * self.sampling.max_tokens, seen["empty"] > 0.05 * places
            self.level = max(-10, min(10, self.level + strict - loose))
        self.told = {"forks": seen["forks"] / places, "suppressed": seen["suppressed"] / places, "empty": seen["empty"] / places,
                     "pruned": seen["pruned"] / max(seen["judged"], 1), "tree_steps": seen["steps"] / max(seen["trees"], 1),
                     "level": float(self.level)}
        self.seen = defaultdict(float)

    def report(self):
        return self.told

    def state_dict(self):
        return {"level": self.level, "seen": dict(self.seen)}

    def load_state_dict(self, state):
        self.level, self.seen = state["level"], defaultdict(float, state["seen"])


class Growth:
    """The trees of some prompts, `width` places each, and the ordinary samples of their groups, growing side by side."""

    def __init__(self, live: LiveLatr, prompts, width: int):
        self.part, self.width, self.live = live.part, width, live
        room = live.part.group
        self.forest = Forest(live.run.policy, prompts, room, [0, *range(width, room)], live.sampling)
        self.tree = torch.arange(len(prompts) * room) % room < width  # [slots] bool
        self.due = defaultdict(list)  # step -> children to be judged then, with their window
        self.shift = 0.01 * live.level
        self.count = defaultdict(float, places=float(width * len(prompts)), trees=1.0)

    def grow(self) -> Forest:
        forest, growing, more = self.forest, self.width > 1, True
        while more:
            forest.extend(*self.choose(growing))
            if growing:
                self.judge()
                self.count["steps"] += 1
                growing = not self.complete() and forest.step < self.live.sampling.max_tokens
                if not growing:
                    self.fill()
            more = forest.advance()
        return forest

    def choose(self, growing: bool):
        """What every branch is continued with (tokens, log-probs, entropies) and the children that open: in the tree the best token, with its
        untempered log-prob; elsewhere a draw."""
        forest, live = self.forest, self.live
        logits = forest.logits
        inside = self.tree[forest.active] if growing else torch.zeros(len(forest.active), dtype=torch.bool)
        token, logp, entropy = torch.zeros(len(inside), dtype=torch.long), torch.zeros(len(inside)), torch.zeros(len(inside))
        free, rows = (~inside).nonzero().flatten(), inside.nonzero().flatten()
        if len(free):
            drawn = draw(logits[free.to(logits.device)], live.sampling, live.rng, live.entropy)
            token[free], logp[free] = drawn[0].cpu(), drawn[1].cpu()
            if live.entropy:
                entropy[free] = drawn[2].cpu()
        if not len(rows):
            return token, logp, entropy, []
        here = logits[rows.to(logits.device)].float()
        top, candidate = (v.cpu() for v in here.softmax(-1).topk(min(self.part.rank, here.shape[-1])))
        token[rows], logp[rows] = candidate[:, 0], top[:, 0].log()
        if live.entropy:
            p = (here / live.sampling.temperature).log_softmax(-1)
            entropy[rows] = -(p.exp() * p).sum(-1).cpu()
        return token, logp, entropy, self.children(rows, top, candidate)

    def children(self, rows, top, candidate) -> list[tuple[int, int, int, float]]:
        """(row of the parent, place, token, log-prob) of every child that may open and finds a place."""
        forest, part = self.forest, self.part
        if part.random_branching is None:
            opens = (top[:, 1:] > part.absolute + self.shift) & (top[:, :1] - top[:, 1:] < part.relative - self.shift)
        else:
            opens = torch.rand(len(rows), top.shape[1] - 1, generator=self.live.rng) < part.random_branching
            opens[:, 1:] = False
        wanted = defaultdict(list)
        for i, rank in opens.nonzero().tolist():
            p = float(top[i, rank + 1])
            order = (rank, i) if part.surplus == "rank" else (-p, i)
            wanted[int(forest.active[rows[i]]) // forest.room].append((order, int(rows[i]), int(candidate[i, rank + 1]), p))
        made = []
        for prompt, asked in wanted.items():
            places = [s for s in range(prompt * forest.room, prompt * forest.room + self.width) if not forest.used[s]]
            self.count["suppressed"] += max(0, len(asked) - len(places))
            made += [(row, slot, token, math.log(p)) for slot, (_, row, token, p) in zip(places, sorted(asked))]
        for _, slot, _, _ in made if part.prune else ():
            for window in part.windows:
                self.due[forest.step + window].append((slot, window))
        self.count["forks"] += len(made)
        return made

    def judge(self) -> None:
        """Drop children that say what their parent says, and branches that have become too unlikely. A window that holds an end is left alone."""
        f, part, t = self.forest, self.part, self.forest.step
        for slot, window in self.due.pop(t, ()):
            parent = int(f.parent[slot])
            if not f.used[slot] or t - int(f.birth[slot]) != window or f.over[slot] or f.over[parent]:
                continue
            own, other = f.ids[slot, t - window:t].tolist(), f.ids[parent, t - window:t].tolist()
            rival = self.live.run.policy.decode(other[:1]).strip() if part.spare else ""
            if rival and set(rival) <= set(part.spare):
                continue
            self.count["judged"] += 1
            if any(rule(own, other, self.live.rng, self.shift) for rule in part.prune.values()):
                self.count["pruned"] += f.drop(slot)
        if part.cumulative is not None and t % part.interval == 0:
            for first in range(0, len(f.used), f.room):
                members = [s for s in range(first, first + self.width) if f.used[s]]
                total = {s: float(f.logps[s, :t].sum()) for s in members}
                for s in members if len(members) < self.width else ():
                    if f.used[s] and f.parent[s] >= 0 and not f.over[s] and total[s] - max(total.values()) < math.log(part.cumulative) * t:
                        self.count["pruned"] += f.drop(s)

    def complete(self) -> bool:
        """Whether the trees are as full as asked, or all ended, and no child is still to be judged; or the tree phase has had its steps."""
        f, part = self.forest, self.part
        used, over = (v.view(-1, f.room)[:, :self.width] for v in (f.used, f.over))
        taken = torch.where((over | ~used).all(1), self.width, used.sum(1)).sum()
        wanted = round(self.count["places"] * (part.full - part.slack * (f.step - 1) / self.live.sampling.max_tokens))
        young = self.tree & f.used & ~f.over & (f.parent >= 0) & (f.step - f.birth < max(part.windows))
        return f.step == part.cap or bool(taken >= wanted) and not (part.prune and young.any())

    def fill(self) -> None:
        """Empty places become copies of the tree's first branch."""
        for root in range(0, len(self.forest.used), self.forest.room):
            empty = [s for s in range(root, root + self.width) if not self.forest.used[s]]
            self.count["empty"] += len(empty)
            self.forest.repeat(root, empty)


countdown = Table((0, 10, 20, 80, 200), (1.0, 0.75, 0.5, 0.25, 0.0))  # eta over training in the released code
short = Latr(windows=(8,))
drawn = Evaluation(prompts=64, samples=1, ks=(1,))
trained = LanguageRecipe(prompts=64, updates=Updates(optimiser=Adam(lr=0.02)), evaluation=Evaluation(samples=8, ks=(1, 8)))

claim = Claim(
    says="groups hold more different outcomes than sampling gives, which takes the pruning, and training on them is faster",
    arms={"sampling": Arm(GroupRecipe(evaluation=drawn), steps=0), "unpruned": Arm(GroupRecipe(sampler=short.replace(prune={}), evaluation=drawn), steps=0),
          "latr": Arm(GroupRecipe(sampler=short, evaluation=drawn), steps=0), "grpo": trained, "grpo-latr": trained(sampler=short.replace(eta=0.5)),
          "grpo-latr-falling": trained(sampler=short.replace(eta=Table((0, 9, 18), (1.0, 0.5, 0.0))))},
    task="forks", steps=36, seeds=5, minutes=6,
    expects=("latr > sampling on distinct", "latr > unpruned on distinct", "grpo-latr > grpo on pass@1"))

latr = method("latr", LanguageRecipe(sampler=Latr(eta=countdown), kl=KL(coefficient=0.01)), title="Groups grown as trees with lookahead pruning",
              source="arXiv 2510.24302", claim=claim)
