"""The on-policy recipe and its loop: collect with the current policy, credit, improve for some epochs, throw the data away."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from volvelle.core.errors import UserError
from volvelle.core.parts import part
from volvelle.core.schedule import Schedule, at
from volvelle.core.trainable import Adam, Optimiser

from .buffers import Blocks, observation_fields
from .speed import compiled
from .credit import GAE, Advantage, Objective, PolicyGradient, Rollout, explained_variance
from .envs import each
from .heads import Auto, Distribution, Outputs, PolicyHead
from .learner import ControlLearner, ControlRecipe, Count, NonNegative, Positive
from .losses import approximate_kl, clipped_value_error, standardise, weighted_mean
from .networks import MLP, Linear, Network, Output
from .normalise import ObservationNormaliser, RewardNormaliser
from .policy import Deciding, as_tensors
from .slots import Relabel, Shaper
from .spaces import Spec
from .stacked import Streams, make
from .valueheads import MSE, ValueHead


@part("on-policy")
class OnPolicy(ControlRecipe):
    """Actor-critic (or actor alone) on fresh rollouts.

    A learner step collects `length` steps in each of `envs` environments (with whole_episodes: one episode in each, of at most `length`
    steps) and makes `epochs` passes over them in `minibatches` parts. shared: actor and critic share the network's body. anneal: the learning
    rate falls linearly to 0 over the run. value_weight times the value loss is added, and minus `entropy` times the entropy.
    kl_stop: passes end when the estimated KL to the old policy exceeds target_kl, seen before a "minibatch" step (with a margin of half) or at
    the end of an "epoch". relabels change the rewards of every rollout before credit is given (they see observations as the policy does).
    """

    envs: Count = 4
    length: Count = 128
    whole_episodes: bool = False
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99
    network: Network = MLP(init="orthogonal")
    shared: bool = False
    head: PolicyHead = Auto()
    value: ValueHead = MSE()
    advantage: Advantage = GAE()
    objective: Objective = PolicyGradient()
    optimiser: Optimiser = Adam(lr=2.5e-4, eps=1e-5, clip=0.5)
    anneal: bool = False
    epochs: Count = 1
    minibatches: Count = 1
    normalise_advantages: bool = False
    entropy: NonNegative | Schedule = 0.0
    value_weight: NonNegative = 0.5
    value_clip: Positive | None = None
    target_kl: Positive | None = None
    kl_stop: Literal["minibatch", "epoch"] = "minibatch"
    normalise_observations: bool = False
    normalise_rewards: bool = False
    relabels: dict[str, Relabel] = field(default_factory=dict)
    shapers: dict[str, Shaper] = field(default_factory=dict)

    def check(self, recipe):
        super().check(recipe)
        size = self.envs * self.length
        if not self.whole_episodes and (size % self.minibatches or size // self.minibatches < 2):
            raise UserError(f"minibatches={self.minibatches}: envs * length = {size} steps must divide into minibatches of at least 2")
        if self.whole_episodes and self.minibatches != 1:
            raise UserError("minibatches: whole episodes have no fixed number of steps; accepted with whole_episodes: 1")
        if self.target_kl is not None and self.seeds > 1:
            raise UserError(f"target_kl={self.target_kl}: would stop the passes of all seeds when one goes too far; accepted with seeds={self.seeds}: none")
        if not self.value.scalar:
            raise UserError(f"value={self.value.part_name} learns a return distribution, but on-policy targets are numbers; accepted: mse, huber, hl-gauss, two-hot")
        if self.value_clip is not None and self.value.part_name != "mse":
            raise UserError(f"value_clip={self.value_clip}: clips squared errors; with value={self.value.part_name} leave it out (value_clip=none)")
        if self.advantage.part_name == "monte-carlo" and not self.whole_episodes:
            raise UserError("advantage=monte-carlo needs whole_episodes=true: returns of unfinished episodes are not known")

    def actor(self, spec: Spec, seeds: int) -> ActorCritic:
        return ActorCritic(self, spec, seeds)

    def start(self, run):
        return OnPolicyLearner(run, self)


class ActorCritic(Deciding):
    """Outputs of the policy, as its head reads them, and of the value [S, N, value.width]; the head's free parameters (log std) are here."""

    def __init__(self, recipe: OnPolicy, spec: Spec, seeds: int):
        super().__init__()
        self.head: Distribution = recipe.head.bind(spec.actions)
        how = recipe.network.init
        body = recipe.network.build(spec.observations, seeds)
        self.policy_net = Output(body, seeds, self.head.width, how, 0.01 if how == "orthogonal" else 1.0)
        if recipe.shared:
            self.value_net, self.value_out = None, Linear(seeds, body.width, recipe.value.width, how)
        else:
            self.value_net, self.value_out = Output(recipe.network.build(spec.observations, seeds), seeds, recipe.value.width, how), None
        self.free = nn.Parameter(torch.full((seeds, 1, self.head.free), self.head.start)) if self.head.free else None

    def policy(self, x) -> Outputs:
        outputs = self.policy_net(x)
        return outputs if self.free is None else (outputs, self.free)

    def forward(self, x) -> tuple[Outputs, Tensor]:
        if self.value_out is None:
            return self.policy(x), self.value_net(x)
        features = self.policy_net.body(x)
        outputs = self.policy_net.out(features)
        return outputs if self.free is None else (outputs, self.free), self.value_out(features)

    def values(self, x) -> Tensor:
        return self.value_net(x) if self.value_out is None else self.value_out(self.policy_net.body(x))

    def best(self, observations):
        return self.head.mode(self.policy(observations))

    def explore(self, observations, streams: Streams):
        outputs = self.policy(observations)
        count, device = next(iter(observations.values())).shape[1] if isinstance(observations, dict) else observations.shape[1], self.device
        return self.head.sample(outputs, streams.noise(self.head, count).to(device))


class OnPolicyLearner(ControlLearner):
    """step = collect, reward, credit, improve."""

    compilable = True

    def __init__(self, run, part: OnPolicy):
        super().__init__(run, part, part.envs)
        seeds = part.seeds
        module = part.actor(self.spec, seeds)
        self.net = self.trainable(module)
        self.head, self.value = module.head, part.value
        self.size = sum(p.numel() for p in module.parameters())
        self.sampling, self.shuffling = Streams(run, "sampling", seeds), Streams(run, "shuffling", seeds)
        self.objective, self.credit = run.start("objective", part.objective), run.start("advantage", part.advantage)
        if part.normalise_observations and self.spec.observations.vector:
            self.normaliser = ObservationNormaliser(seeds, self.spec.observations.vector)
        self.reward_scale = RewardNormaliser(seeds, part.envs, part.gamma) if part.normalise_rewards else None
        actions = self.spec.actions
        self.blocks = Blocks(seeds, part.length, part.envs, {
            **observation_fields(self.spec, "obs"), "actions": (actions.shape, actions.dtype), "rewards": ((), np.float32), "ended": ((), bool),
            "cut": ((), bool), "final_values": ((), np.float32), "valid": ((), bool), **{k: ((), np.float32) for k in self.envs.keys}})
        self.blocks.arrays["valid"][:] = True
        self.loss = compiled(run, self._loss) if self.compilable else self._loss

    def trainable(self, module: ActorCritic):
        """The Trainable that moves the module: anything with `module`, backward(loss) and step(scale)."""
        return make(self.run, "actor-critic", module, self.part.optimiser, self.part.seeds)

    # ---- collect

    def module_policy(self):
        return self.net.module

    def restarted(self) -> None:
        if self.reward_scale is not None:
            self.reward_scale.restart()

    @torch.no_grad()
    def collect(self) -> None:
        """Fill the blocks with one rollout of the current policy."""
        part, seeds, n, blocks = self.part, self.part.seeds, self.part.envs, self.blocks
        if part.whole_episodes:
            self.obs = None
        obs = self.current()
        noise = self.sampling.noise(self.head, part.length, n).unbind(1)
        shape, alive, self.filled = (seeds, n), np.ones((seeds, n), bool), part.length
        self.envs.rest()
        actions_block, policy, sample = blocks.arrays["actions"], self.net.module.policy, self.head.sample
        views = blocks.read("obs", lambda t: t)
        cuts: list[tuple[int, int, int, object]] = []
        for t in range(part.length):
            blocks.write(t, "obs", obs)
            now = {k: v[:, t].to(self.device) for k, v in views.items()} if isinstance(views, dict) else views[:, t].to(self.device)
            actions = sample(policy(now), noise[t].to(self.device)).cpu().numpy()
            actions_block[:, t] = actions
            raw, rewards, terminated, truncated = self.envs.step(actions.reshape(seeds * n, *actions.shape[2:]))
            ended = (terminated | truncated).reshape(shape)
            blocks.write(t, "rewards", rewards.reshape(shape))
            blocks.write(t, "ended", ended)
            for k, values in self.envs.infos.items():
                blocks.write(t, k, values.reshape(shape))
            if part.whole_episodes:
                blocks.write(t, "valid", alive)
            for row, final in self.envs.finals:
                if truncated[row] and not terminated[row]:
                    cuts.append((t, row // n, row % n, final))
            obs = self.observe(raw, update=True)
            if part.whole_episodes:
                alive = alive & ~ended
                self.envs.rest(~alive.reshape(-1))
                if not alive.any():
                    self.filled = t + 1
                    break
        self.obs = obs
        self.env_steps += self.filled * n
        self._final_values(cuts)

    def reward(self) -> None:
        """Relabel the rollout's rewards, then scale them."""
        blocks, T = self.blocks, self.filled
        if self.relabels:
            rows = {k: blocks.read(k, lambda x: x[:, :T].flatten(1, 2)) for k in ("obs", "actions", "rewards", "ended", *self.envs.keys)}
            for relabel in self.relabels.values():
                rows = relabel(rows)
            blocks.tensors["rewards"][:, :T] = rows["rewards"].view(self.part.seeds, T, -1)
            self.update_relabels(rows)
        if self.reward_scale is not None:
            rewards, ended = blocks.arrays["rewards"], blocks.arrays["ended"]
            for t in range(T):
                rewards[:, t] = self.reward_scale(rewards[:, t], ended[:, t])

    def _final_values(self, cuts) -> None:
        """Values of the observations at which episodes were cut, in one batch."""
        blocks = self.blocks
        blocks.arrays["cut"][:] = False
        if not cuts or not getattr(self.part.advantage, "critic", True):
            return
        most = max(sum(s == seed for _, s, _, _ in cuts) for seed in range(self.part.seeds))
        rows: dict[int, list] = {s: [] for s in range(self.part.seeds)}
        for cut in cuts:
            rows[cut[1]].append(cut)
        example = cuts[0][3]
        padded = [[c[3] for c in rows[s]] + [example] * (most - len(rows[s])) for s in range(self.part.seeds)]
        batch = ({k: np.stack([np.stack([np.asarray(o[k]) for o in row]) for row in padded]) for k in example} if isinstance(example, dict)
                 else np.stack([np.stack(row) for row in padded]))
        batch = self.observe_batch(batch)
        values = self.value.value(self.net.module.values(batch)).cpu().numpy()
        for s, list_ in rows.items():
            for i, (t, _, n, _) in enumerate(list_):
                blocks.arrays["cut"][s, t, n], blocks.arrays["final_values"][s, t, n] = True, values[s, i]

    # ---- credit

    @torch.no_grad()
    def batch(self) -> dict:
        """Everything the update needs, flat over time and environments: [S, T * N, ...]."""
        part, blocks, seeds, n, T = self.part, self.blocks, self.part.seeds, self.part.envs, self.filled
        flat = lambda t: t[:, :T].flatten(1, 2).to(self.device)
        obs, actions = blocks.read("obs", flat), flat(blocks.tensors["actions"])
        logps, values, entropies = [], [], []
        for piece in range(0, T * n, 8192):
            cut = lambda x, p=piece: x[:, p : p + 8192]
            outputs, value_outputs = self.net.module(each(cut, obs))
            logp, entropy = self.head.score(outputs, cut(actions))
            logps.append(logp)
            entropies.append(entropy.expand_as(logp))
            values.append(self.value.value(value_outputs))
        logp, value = torch.cat(logps, 1), torch.cat(values, 1)
        last = self.value.value(self.net.module.values(as_tensors(self.obs, self.device)))
        time = {k: blocks.tensors[k][:, :T].to(self.device) for k in ("rewards", "ended", "cut", "final_values", "valid")}
        rollout = Rollout(time["rewards"], value.view(seeds, T, n), time["ended"], time["cut"], time["final_values"], last, time["valid"])
        advantages, returns = self.credit(rollout, part.gamma)
        made = {"obs": obs, "actions": actions, "old": logp, "values": value, "advantages": advantages.flatten(1, 2).contiguous(),
                "returns": returns.flatten(1, 2).contiguous()}
        if part.whole_episodes:
            made["weights"] = time["valid"].flatten(1, 2).float()
        self.mean_entropy = float(weighted_mean(torch.cat(entropies, 1), made.get("weights")).mean())
        return made

    # ---- improve

    def _loss(self, batch: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss per seed [S], its policy and value parts [S], and the log-probabilities [S, B]."""
        part, weights = self.part, batch.get("weights")
        outputs, value_outputs = self.net.module(batch["obs"])
        logp = self.head.log_prob(outputs, batch["actions"])
        if part.normalise_advantages:
            batch = {**batch, "advantages": standardise(batch["advantages"], weights)}
        policy = weighted_mean(self.objective(logp, batch), weights)
        if part.value_clip is not None:
            errors = clipped_value_error(self.value.value(value_outputs), batch["values"], batch["returns"], part.value_clip)
        else:
            errors = self.value.loss(value_outputs, batch["returns"])
        value = weighted_mean(errors, weights)
        loss = torch.add(policy, value, alpha=part.value_weight)
        if part.entropy != 0.0:
            loss = loss - self.entropy_weight * weighted_mean(self.head.entropy(outputs).expand_as(logp), weights)
        return loss, policy, value, logp

    def minibatches(self, batch: dict):
        """One shuffled pass over the batch. Rows are gathered once per pass; minibatches are slices of that."""
        part, size = self.part, batch["old"].shape[1]
        if part.minibatches == 1:
            yield batch
            return
        order = torch.from_numpy(self.shuffling.permutations(size)).to(self.device)
        rows = (order + torch.arange(part.seeds, device=self.device)[:, None] * size).flatten()

        def shuffle(x: Tensor) -> Tensor:
            return torch.index_select(x.reshape(-1, *x.shape[2:]), 0, rows).view(x.shape)

        mixed = {k: each(shuffle, v) for k, v in batch.items()}
        width = size // part.minibatches
        for start in range(0, size, width):
            yield {k: each(lambda x: x[:, start : start + width], v) for k, v in mixed.items()}

    def improve(self, batch: dict) -> dict[str, float]:
        part = self.part
        scale = 1 - self.run.step / self.run.config.steps if part.anneal else 1.0
        self.entropy_weight = torch.tensor(at(part.entropy, self.run.step)) if isinstance(part.entropy, Schedule) else part.entropy
        last, norm, steps, stop, kl = None, 0.0, 0, False, None
        for _ in range(part.epochs):
            for mini in self.minibatches(batch):
                loss, *last, logp = self.loss(mini)
                if part.target_kl is not None:
                    with torch.no_grad():
                        kl = float(approximate_kl(logp, mini["old"]).max())
                    stop = kl > (1.5 if part.kl_stop == "minibatch" else 1.0) * part.target_kl
                    if stop and part.kl_stop == "minibatch":
                        break
                self.net.backward(loss)
                norm = self.net.step(scale)
                steps += 1
            if stop:
                break
        with torch.no_grad():
            kl = float(approximate_kl(logp, mini["old"]).mean())
        metrics = {k: float(v.detach().mean()) for k, v in zip(("loss/policy", "loss/value"), last)}
        metrics |= {"entropy": self.mean_entropy, "kl": kl, "gradient_norm": norm, "updates": steps}
        counted = batch["weights"] > 0 if "weights" in batch else ...
        explained = float(explained_variance(batch["values"][counted], batch["returns"][counted])) if part.value_weight else float("nan")
        return metrics | ({"explained_variance": explained} if np.isfinite(explained) else {})

    def step(self) -> dict[str, float]:
        self.collect()
        self.reward()
        metrics = self.improve(self.batch())
        return self.episode_metrics() | metrics

    def state_dict(self):
        return super().state_dict() | {"reward_scale": self.reward_scale.state_dict() if self.reward_scale is not None else None}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.reward_scale is not None:
            self.reward_scale.load_state_dict(state["reward_scale"])
