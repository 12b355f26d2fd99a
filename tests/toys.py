"""Toy parts, one per seam: small enough to read at a glance, stateful enough that a forgotten number would show.

Everything here is registered under a name that begins with `toy-`. Trained on prompt trees with the tabular policy, or on `toy-letters` with
the tiny causal one.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from volvelle.core.parts import Recipe, part
from volvelle.core.run import RunConfig
from volvelle.core.trainable import SGD, Adam, Optimiser
from volvelle.language.loop import LanguageLearner
from volvelle.language.recipe import LanguageRecipe
from volvelle.language.records import FORCED, POLICY, TOOL, Prompt, Rollout
from volvelle.language.sampling import Sampling, generate
from volvelle.language.slots import Advantage, Critic, Curriculum, Filter, LanguageTask, Objective, Reward, Sampler

# ---------------------------------------------------------------------------------------------------------------- a text task


@part("toy-letters")
class Letters(LanguageTask):
    """Continue `xy=` with letters of the first half of the alphabet; the score is their share. wide: the first four prompts are long."""

    count: int = 24
    max_tokens: int = 4
    stop: tuple[str, ...] = ()
    wide: bool = False

    @cached_property
    def _prompts(self):
        rng = np.random.default_rng(7)
        words = ["".join(rng.choice(list("abcdefgh"), size=(8 if self.wide and i < 4 else 1) + i % 3)) for i in range(self.count)]
        return [Prompt(f"p{i}", text=f"{w}=", row={"index": i, "answer": w[0]}, domain="ab"[i % 2]) for i, w in enumerate(words)]

    def split(self, name):
        third = self.count // 3
        return {"train": self._prompts[:-2 * third], "validation": self._prompts[-2 * third:-third], "test": self._prompts[-third:]}[name]

    def score(self, prompt, text):
        return sum(c in "abcdefghijklm" for c in text) / self.max_tokens

    def demonstration(self, prompt, rng):
        return prompt.row["answer"] * 2


# ------------------------------------------------------------------------------------------------- 1 a reward with a memory


@part("toy-window")
class Window(Reward):
    """The verifier's score minus the mean of the last `size` scores: the total changes state, as a running percentile does."""

    size: int = 20

    def start(self, run):
        return LiveWindow(self, run.config.task)


class LiveWindow:
    def __init__(self, description, task):
        self.part, self.task = description, task
        self.seen, self.calls, self.by_prompt = [], 0, {}

    def score(self, rollouts):
        return {"right": torch.tensor([self.task.score(r.prompt, r.text) for r in rollouts])}

    def total(self, scores, meta, step):
        self.calls += 1
        mean = sum(self.seen) / len(self.seen) if self.seen else 0.0
        self.seen = (self.seen + scores["right"].tolist())[-self.part.size:]
        return scores["right"] - mean

    def update(self, batch):
        for rollout in batch.rollouts:
            self.by_prompt[rollout.prompt.row["index"]] = torch.tensor([rollout.reward])

    def state_dict(self):
        return {"seen": np.array(self.seen), "calls": self.calls, "by_prompt": self.by_prompt}

    def load_state_dict(self, state):
        self.seen, self.calls, self.by_prompt = state["seen"].tolist(), state["calls"], state["by_prompt"]


class LiveForgetful(LiveWindow):
    def state_dict(self):
        return {}


@part("toy-forgetful")
class Forgetful(Window):
    """Window without a state_dict: what a resumed run must not be equal under."""

    def start(self, run):
        return LiveForgetful(self, run.config.task)


# ------------------------------------------------------------------------------------------------------- 2 a lagged sampler


@part("toy-lagged")
class LaggedSampler(Sampler):
    """Half of each group from a copy of the policy that is two calls behind."""

    group: int = 4
    temperature: float = 1.0
    every: int = 2

    def start(self, run):
        return LiveLagged(self, run)


class LiveLagged:
    def __init__(self, description, run):
        self.part, self.run, self.rng = description, run, run.torch_rng("sampler")
        self.sampling = Sampling(description.temperature, max_tokens=run.config.task.max_tokens)
        self.behind = run.policy.lagged(run, every=description.every)

    def sample(self, prompts):
        half = self.part.group // 2
        near = generate(self.run.policy, prompts, half, self.sampling, self.rng)
        far = generate(self.behind, prompts, half, self.sampling, self.rng)
        for r in far:
            r.exact = False
        self.behind.follow.update()
        return [r for i in range(len(prompts)) for r in near[i * half:(i + 1) * half] + far[i * half:(i + 1) * half]]


# --------------------------------------------------------------------------------------------- 3 a learner with its own step


@part("toy-replay")
class Replay(LanguageRecipe):
    """Collects, fits a critic on everything collected so far, then makes several passes over replayed prompts with fresh samples."""

    passes: int = 2
    optimiser: Optimiser = Adam(lr=0.1)

    def start(self, run):
        return ReplayLearner(self, run)


class ReplayLearner(LanguageLearner):
    def __init__(self, recipe, run):
        super().__init__(recipe, run)
        self.memory: list[tuple[int, float]] = []
        self.critic_net = run.model("critic", torch.nn.Embedding.from_pretrained(torch.zeros(64, 1), freeze=False), recipe.optimiser)
        self.by_index = {p.row["index"]: p for p in self.task.split("train")}

    def step(self):
        rollouts, metrics = self.collect()
        self.memory += [(r.prompt.row["index"], r.reward) for r in rollouts]
        index, reward = torch.tensor([i for i, _ in self.memory]), torch.tensor([r for _, r in self.memory])
        self.critic_net.backward(((self.critic_net(index).squeeze(1) - reward) ** 2).mean())
        metrics["critic"] = self.critic_net.step()
        rng = self.run.rng("replay")
        for _ in range(self.recipe.passes):
            prompts = [self.by_index[self.memory[i][0]] for i in rng.integers(len(self.memory), size=3)]
            fresh = self.sample(prompts)
            self.score(fresh)
            batch = self.batch(fresh)
            self.passes(batch)
            with torch.no_grad():
                value = self.critic_net(torch.tensor([r.prompt.row["index"] for r in fresh])).squeeze(1)
            batch.advantages = batch.rewards - value
            metrics |= self.improve(batch)
        self.update(batch)
        return metrics

    def state_dict(self):
        return {"memory": self.memory}

    def load_state_dict(self, state):
        self.memory = state["memory"]


# ------------------------------------------------------------------------------------------------ 4 an objective over groups


@part("toy-ranking")
class Ranking(Objective):
    """Better responses of a group should be likelier than worse ones: every response's loss depends on all of its group."""

    needs = frozenset({"old", "groups"})

    def __call__(self, scores, batch):
        score = torch.where(batch.acted(), scores.logps - batch.old.logps, 0.0).sum(1)
        same = batch.groups[:, None] == batch.groups[None]
        better = same & (batch.rewards[:, None] > batch.rewards[None])
        pairs = torch.nn.functional.softplus(score[None] - score[:, None]) * better
        return pairs.sum(1) / same.sum(1)


# ------------------------------------------------------------------------------------------------------ 5 FORCED and TOOL rows


@part("toy-tools")
class Tools(Sampler):
    """Two turns with a tool's text between them, and one demonstration per group."""

    group: int = 3
    temperature: float = 1.0

    def start(self, run):
        return LiveTools(self, run)


class LiveTools:
    def __init__(self, description, run):
        self.part, self.run, self.rng, self.numbers = description, run, run.torch_rng("sampler"), run.rng("tool")

    def sample(self, prompts):
        policy, task, out = self.run.policy, self.run.config.task, []
        for g, prompt in enumerate(prompts):
            for first in generate(policy, [prompt], self.part.group - 1, Sampling(max_tokens=2), self.rng):
                tool = policy.encode_text("abcdefgh"[self.numbers.integers(8)] + ":")
                middle = Prompt(prompt.id, text=prompt.text + policy.decode(first.ids) + policy.decode(tool))
                second = generate(policy, [middle], 1, Sampling(max_tokens=2), self.rng)[0]
                out.append(Rollout(prompt, first.ids + tool + second.ids, first.text + second.text,
                                   torch.cat([first.logps, torch.full((len(tool),), torch.nan), second.logps]), second.finish,
                                   role=[POLICY] * len(first.ids) + [TOOL] * len(tool) + [POLICY] * len(second.ids),
                                   turn=[0] * len(first.ids) + [1] * len(tool) + [2] * len(second.ids), group=g))
            ids = policy.encode_text(task.demonstration(prompt, self.numbers))
            out.append(Rollout(prompt, ids, policy.decode(ids), torch.full((len(ids),), torch.nan), role=[FORCED] * len(ids), exact=False, group=g,
                               meta={"external": 1.0}))
        return out


@part("toy-mixed")
class Mixed(Objective):
    """The policy gradient on POLICY tokens and, half as strong, on FORCED ones."""

    acts_on = (POLICY, FORCED)
    needs = frozenset({"old", "advantages"})

    def __call__(self, scores, batch):
        ratio = (scores.logps - batch.old.logps).exp()
        return -batch.advantages[:, None] * ratio * torch.where(batch.role == FORCED, 0.5, 1.0)


# ------------------------------------------------------------------------------------------------------------- 6 inexact rows


@part("toy-tempered")
class Tempered(Sampler):
    """Every second response is drawn hotter than the policy trains: its behaviour log-probs are not the old ones."""

    group: int = 4
    temperature: float = 1.0
    hot: float = 2.0

    def start(self, run):
        return LiveTempered(self, run)


class LiveTempered:
    def __init__(self, description, run):
        self.part, self.run, self.rng = description, run, run.torch_rng("sampler")

    def sample(self, prompts):
        half, cap = self.part.group // 2, self.run.config.task.max_tokens
        plain = generate(self.run.policy, prompts, half, Sampling(max_tokens=cap), self.rng)
        hot = generate(self.run.policy, prompts, half, Sampling(self.part.hot, max_tokens=cap), self.rng)
        for r in hot:
            r.exact, r.meta = False, {"hot": 1.0}
        return [r for i in range(len(prompts)) for r in plain[i * half:(i + 1) * half] + hot[i * half:(i + 1) * half]]


# ------------------------------------------------------------------------------------------------------ 7 a refilling filter


@part("toy-epoch")
class EpochFilter(Filter):
    """Keeps groups with a success whose prompt has not been kept lately; remembers which."""

    refill: bool = True
    max_rounds: int = 0
    memory: int = 2

    def start(self, run):
        return LiveEpochFilter(self)


class LiveEpochFilter:
    def __init__(self, description):
        self.part, self.kept = description, []

    def __call__(self, batch):
        keep = torch.zeros(len(batch), dtype=torch.bool)
        for group in batch.groups.unique():
            rows = (batch.groups == group).nonzero().squeeze(1)
            index = batch.rollouts[rows[0]].prompt.row["index"]
            if batch.rewards[rows].max() > 0 and index not in self.kept:
                keep[rows] = True
                self.kept = (self.kept + [index])[-self.part.memory:]
        return keep, batch.train & (batch.rewards < 2)

    def state_dict(self):
        return {"kept": self.kept}

    def load_state_dict(self, state):
        self.kept = state["kept"]


# ------------------------------------------------------------------------------------------------- 8 a second trained model


@part("toy-critic")
class PromptCritic(Critic):
    """One learnt number per prompt, with momentum of its own."""

    optimiser: Optimiser = SGD(lr=0.5, momentum=0.9)

    def start(self, run):
        return LivePromptCritic(self, run)


class LivePromptCritic:
    def __init__(self, description, run):
        self.model = run.model("net", torch.nn.Embedding.from_pretrained(torch.zeros(64, 1), freeze=False), description.optimiser)

    def _index(self, batch):
        return torch.tensor([r.prompt.row["index"] for r in batch.rollouts])

    def values(self, batch):
        return self.model(self._index(batch)).expand(batch.ids.shape).clone()

    def fit(self, batch):
        self.model.backward(((self.model(self._index(batch)).squeeze(1) - batch.rewards) ** 2).mean())
        return {"critic/norm": self.model.step()}


@part("toy-baseline")
class Baseline(Advantage):
    """Reward minus the critic's value."""

    needs = frozenset({"values"})

    def __call__(self, batch):
        return batch.rewards - batch.values[:, 0]


# --------------------------------------------------------------------------------------------------------------- 9 child runs


@part("toy-outer")
class Outer(Recipe):
    """Every step trains a child with another learning rate and keeps the better one."""

    wing = "language"
    recipe: Recipe = LanguageRecipe(updates="updates", prompts=4)
    inner_steps: int = 2

    def start(self, run):
        return OuterLearner(self, run)


class OuterLearner:
    def __init__(self, recipe, run):
        self.part, self.run, self.rate, self.best = recipe, run, 0.01, 0.0
        self.config = RunConfig(recipe=recipe.recipe, task=run.config.task, model=run.config.model, steps=recipe.inner_steps, checkpoint_every=1)

    def step(self):
        rate = self.rate * float(self.run.rng("outer").uniform(1, 3))
        config = self.config.override(f"recipe.updates.optimiser.lr={rate!r}").replace(seed=self.run.step)
        found = self.run.child(f"{self.run.step}", config)["metrics"]["pass@1"]
        if found > self.best:
            self.rate, self.best = rate, found
        return {"rate": self.rate, "best": self.best}

    def evaluate(self, task=None):
        return {"pass@1": self.best}

    def product(self):
        return {}

    def state_dict(self):
        return {"rate": self.rate, "best": self.best}

    def load_state_dict(self, state):
        self.rate, self.best = state["rate"], state["best"]


# ------------------------------------------------------------------------------------------ 11 a trainable of another make


class Stumps:
    """Boosted stumps over one integer feature: `backward` takes the gradient at the outputs, `step` fits one stump; the state is bytes."""

    def __init__(self):
        self.trees = np.zeros((0, 3))
        self.asked, self.outputs = None, None

    def __call__(self, feature: torch.Tensor) -> torch.Tensor:
        x = feature.numpy()[:, None]
        split_at, left, right = self.trees.T
        out = torch.tensor(np.where(x < split_at, left, right).sum(1), dtype=torch.float32).requires_grad_()
        self.asked, self.outputs = feature.numpy(), out
        return out

    def backward(self, loss):
        loss.backward()

    def step(self) -> float:
        x, target = self.asked, -self.outputs.grad.numpy() * len(self.asked)
        best = None
        for at in np.unique(x):
            side = x < at
            means = [target[s].mean() if s.any() else 0.0 for s in (side, ~side)]
            error = ((target - np.where(side, *means)) ** 2).sum()
            if best is None or error < best[0]:
                best = (error, at, *means)
        self.trees = np.concatenate([self.trees, [[best[1], 0.5 * best[2], 0.5 * best[3]]]])
        return float(best[0])

    def state_dict(self):
        return {"file": self.trees.tobytes()}

    def load_state_dict(self, state):
        self.trees = np.frombuffer(state["file"]).reshape(-1, 3)


@part("toy-trees")
class TreeCritic(Critic):
    """PromptCritic with boosted stumps instead of a torch module."""

    def start(self, run):
        return LiveTreeCritic(run)


class LiveTreeCritic(LivePromptCritic):
    def __init__(self, run):
        self.model = run.register("trees", Stumps())

    def values(self, batch):
        return self.model(self._index(batch)).detach()[:, None].expand(batch.ids.shape).clone()

    def fit(self, batch):
        self.model.backward(((self.model(self._index(batch)) - batch.rewards) ** 2).mean())
        return {"critic/error": self.model.step()}


# ----------------------------------------------------------------------------------------------------------- 12 a function


def scaled(batch, *, scale: float = 1.0):
    """An advantage as a plain function."""
    return scale * (batch.rewards - batch.rewards.mean())


def vowels(prompt, response, **row):
    """A reward as a plain function."""
    return sum(c in "aeiou" for c in response) / 4


# ------------------------------------------------------------------------------------------- parts that go wrong on purpose


@part("toy-unsaveable")
class Unsaveable(Curriculum):
    """State that no checkpoint can hold."""

    def start(self, run):
        return LiveUnsaveable(run)


class LiveUnsaveable:
    def __init__(self, run):
        self.prompts = run.config.task.split("train")

    def draw(self, count):
        return self.prompts[:count]

    def state_dict(self):
        return {"seen": {object()}}

    def load_state_dict(self, state):
        pass


@dataclass
class Bare:
    """A learner that does as told: what the trainer must cope with."""

    script: dict = field(default_factory=dict)
    weight: float = 0.0
    finished: bool = False
    size: ClassVar[int] = 10

    def step(self):
        self.weight += 1
        return {"loss": self.script.get(int(self.weight), 1.0 / self.weight)}

    def evaluate(self, task=None):
        if "evaluation" in self.script:
            self.script["evaluation"](self)
        return {"score": float(self.script.get("scores", {}).get(int(self.weight), 0.0))}

    def product(self):
        return {"policy": self}

    def save(self, folder):
        (folder / "weight.txt").write_text(str(self.weight))

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = state["weight"]


@part("toy-bare-task")
class BareTask(LanguageTask):
    metric = "score"


@part("toy-bare")
class BareRecipe(Recipe):
    """Starts the learner that `SCRIPTS[name]` describes."""

    wing = "language"
    name: str = "plain"

    def start(self, run):
        learner = Bare(SCRIPTS[self.name])
        learner.run = run
        return learner


SCRIPTS: dict[str, dict] = {"plain": {}}

