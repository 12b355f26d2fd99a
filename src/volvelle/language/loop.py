"""The one loop of the language wing. It knows the wheels and nothing about any paper.

A paper with another order of events subclasses LanguageLearner in its own file and overrides `step` with these verbs:
draw, sample, score, total, batch, passes, credit, improve, update.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from volvelle.core.errors import RunStopped, UserError
from volvelle.core.statistics import mean_interval, pass_at_k

from .batching import deal, make_batch, minibatches, total_of
from .fittings import Coefficient
from .objectives import aggregate
from .recipe import LanguageRecipe
from .records import POLICY, Batch, Prompt, Rollout, Scores
from .sampling import Sampling, generate
from .slots import finite


def _acts_on(loss) -> tuple[int, ...]:
    return getattr(loss, "acts_on", (POLICY,))


def _plain(values) -> list:
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)


class LanguageLearner:
    """Draw -> sample -> score -> total -> filter (refill) -> passes -> advantage -> improve -> update.

    In several processes prompts are dealt out for sampling and scoring, micro-batches for every pass; all else every process does alike.
    """

    in_processes = True

    def __init__(self, recipe: LanguageRecipe, run):
        self.recipe, self.run = recipe, run
        config = run.config
        if config.task is None:
            raise UserError("a language recipe needs a task; for example --task gcd-easy")
        if config.model is None:
            raise UserError("a language recipe needs a model; for example --model smollm2")
        self.task = config.task
        run.policy = self.policy = config.model.load(run).own(run, recipe.updates.optimiser)
        if "reference" in recipe.needs:
            run.reference()
        self.reward = run.start("reward", recipe.reward)
        self.curriculum = run.start("curriculum", recipe.curriculum)
        self.sampler = run.start("sampler", recipe.sampler)
        self.filter = run.start("filter", recipe.filter)
        self.critic = run.start("critic", recipe.critic)
        self.kl = run.start("kl", recipe.kl)
        self.advantage = run.start("advantage", recipe.advantage)
        self.losses = {name: run.start("objective" if name == "objective" else f"terms.{name}", o) for name, o in recipe.losses().items()}
        self.temperature = recipe.sampler.temperature or 1.0
        self.cap = getattr(getattr(self.sampler, "sampling", None), "max_tokens", None)
        self.size = self.policy.parameters
        updates, kl = recipe.updates, recipe.kl
        kl_sees_old = kl is not None and (kl.place == "reward" or isinstance(kl.coefficient, Coefficient))
        # With one update per batch the policy that is updated *is* the old policy: its log-probs come with the loss's own pass.
        self.one_update = updates.epochs == 1 and updates.minibatch is None and not kl_sees_old and "old" not in recipe.sampling_needs

    # ---------------------------------------------------------------------------------------------------------------- the step

    def step(self) -> dict[str, float]:
        rollouts, metrics = self.collect()
        if not rollouts:
            return metrics
        batch = self.batch(rollouts)
        self.passes(batch)
        self.credit(batch)
        metrics |= self.improve(batch)
        self.update(batch)
        return metrics | self.reports()

    def collect(self) -> tuple[list[Rollout], dict[str, float]]:
        """Rollouts of one step: sampled, scored, filtered, and sampled again until the batch is full if the filter refills."""
        target, sieve, kept, everything, rounds = self.recipe.prompts, self.recipe.filter, [], [], 0
        while True:
            rollouts = self.sample(self.draw(target))
            for r in rollouts:
                r.group += rounds * target
            self.score(rollouts)
            everything += rollouts
            rounds += 1
            kept += self.sift(rollouts)
            if sieve is None or not sieve.refill or len({r.group for r in kept}) >= target:
                break
            if sieve.max_rounds and rounds >= sieve.max_rounds:
                raise RunStopped(f"after {rounds} rounds the filter has kept {len({r.group for r in kept})} of {target} groups; "
                                 "raise filter.max_rounds, choose an easier or harder task, or set filter.refill=false")
        first = sorted({r.group for r in kept})[:target]
        metrics = self.describe(everything) | {"rounds": rounds, "groups": len(first)}
        kept = [r for r in kept if r.group in set(first)]
        self.run.sample([self.record(r, "train") for r in everything[: self.recipe.evaluation.log]])
        return kept, metrics

    def draw(self, count: int) -> list[Prompt]:
        return self.curriculum.draw(count)

    def sample(self, prompts: list[Prompt]) -> list[Rollout]:
        """Rollouts of all prompts; each of several processes samples its share of them."""
        share = self.run.processes.share(len(prompts))
        if share.start == share.stop:
            return self.run.processes.gather([])
        with self.run.own_numbers():
            made = self.sampler.sample(prompts[share])
        for r in made:
            r.group += share.start
        return self.run.processes.gather(made)

    def score(self, rollouts: list[Rollout]) -> None:
        """Fill in every rollout's scores and reward. RunStopped where a reward is missing, not one number, or not finite."""
        if self.reward is None:
            return
        groups = sorted({r.group for r in rollouts})
        mine = set(groups[self.run.processes.share(len(groups))])
        own = [r for r in rollouts if r.group in mine]
        for name, values in self.reward.score(own).items() if own else ():
            if len(values) != len(own):
                raise RunStopped(f"reward {name!r} returned {len(values)} values for {len(own)} responses")
            for r, v in zip(own, _plain(values)):
                r.scores[name] = finite(v, f"reward {name!r} on prompt {r.prompt.id!r}")
        for i, scores in self.run.processes.gather([(i, r.scores) for i, r in enumerate(rollouts) if r.group in mine]):
            rollouts[i].scores = scores
        self.total(rollouts)

    def total(self, rollouts: list[Rollout]) -> None:
        """From scores to one reward each; calling it again re-scores stored rollouts."""
        names = sorted({k for r in rollouts for k in r.scores})
        scores = {k: torch.tensor([r.scores[k] for r in rollouts]) for k in names}
        total = self.reward.total(scores, {"rollouts": rollouts}, self.run.step)
        if getattr(total, "shape", None) != (len(rollouts),):
            raise RunStopped(f"the total reward has shape {tuple(getattr(total, 'shape', ()))}; expected ({len(rollouts)},)")
        for r, v in zip(rollouts, _plain(total)):
            r.reward = finite(v, f"the total reward of prompt {r.prompt.id!r}")

    def sift(self, rollouts: list[Rollout]) -> list[Rollout]:
        if self.filter is None:
            return rollouts
        keep, train = self.filter(self.batch(rollouts))
        for r, t in zip(rollouts, train.tolist()):
            r.train = t
        return [r for r, k in zip(rollouts, keep.tolist()) if k]

    def batch(self, rollouts: list[Rollout]) -> Batch:
        return make_batch(self.policy, rollouts, self.run.step, self.run.device)

    # ------------------------------------------------------------------------------------------------------------------ passes

    @torch.no_grad()
    def passes(self, batch: Batch) -> None:
        """Old, reference and value passes, only those that somebody needs, and old only for rows the sampler did not draw exactly."""
        needs, roles = self.recipe.needs, self.roles()
        keep = batch.acted(roles)
        if "old" in needs and not self.one_update:
            stats = self.old_needs()
            inexact = ~(batch.exact & self.policy.steps_exactly) | (keep & ~batch.acted((POLICY,))).any(1)
            if stats or inexact.all():
                batch.old = self.score_in_parts(self.policy, batch, keep, stats)
            else:
                batch.old = Scores(torch.where(batch.acted((POLICY,)), batch.behaviour.logps, 0.0))
                if inexact.any():
                    rows = inexact.nonzero().squeeze(1)
                    part = batch.select(rows)
                    found = self.score_in_parts(self.policy, part, part.acted(roles))
                    batch.old.logps[rows, : found.logps.shape[1]] = found.logps
        if "reference" in needs:
            batch.reference = self.score_in_parts(self.run.reference(), batch, keep)
        if self.critic is not None:
            batch.values = self.critic.values(batch)

    def old_needs(self) -> frozenset[str]:
        """Statistics (entropy, mean_logp) that some loss wants of the old policy."""
        return frozenset().union(*(getattr(o, "old_needs", ()) for o in self.recipe.losses().values()))

    def roles(self) -> tuple[int, ...]:
        """Roles of tokens that some loss acts on, policy tokens always among them."""
        return tuple(sorted({POLICY}.union(*(_acts_on(o) for o in self.recipe.losses().values()))))

    def score_in_parts(self, policy, batch: Batch, keep: torch.Tensor, needs: frozenset[str] = frozenset()) -> Scores:
        """Scores of a whole batch without gradient, in micro-batches."""
        out: dict[str, torch.Tensor] = {}
        for rows in deal(batch, self.recipe.updates.micro_tokens, False, self.run.processes):
            micro = batch.select(rows)
            found = policy.score(micro, keep[rows][:, : micro.ids.shape[1]], needs, self.temperature)
            for name, value in vars(found).items():
                if value is not None:
                    out.setdefault(name, torch.zeros(keep.shape, device=value.device))[rows, : value.shape[1]] = value
        return Scores(**total_of(out, keep, self.run.processes))

    def credit(self, batch: Batch) -> None:
        """KL in the reward, then advantages on the whole batch."""
        if self.kl is not None and self.kl.part.place == "reward":
            penalty = self.kl.penalty(batch)
            batch.token_rewards = penalty if batch.token_rewards is None else batch.token_rewards + penalty
        if self.advantage is not None:
            with torch.no_grad():
                found = self.advantage(batch)
            if not isinstance(found, torch.Tensor) or found.shape not in (batch.rewards.shape, batch.ids.shape):
                shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
                raise RunStopped(f"the advantage has shape {shape}; expected {tuple(batch.rewards.shape)} or {tuple(batch.ids.shape)}")
            batch.advantages = found.float()

    # ----------------------------------------------------------------------------------------------------------------- improve

    def improve(self, batch: Batch) -> dict[str, float]:
        """Epochs of mini-batches of micro-batches; the gradient of a mini-batch does not depend on how it is cut."""
        updates, totals, count = self.recipe.updates, defaultdict(float), 0
        for _ in range(updates.epochs):
            for rows in minibatches(batch, updates.minibatch, self.run.rng("updates")):
                mini = batch if len(rows) == len(batch) and updates.minibatch is None else batch.select(rows)
                for key, value in self.improve_once(mini).items():
                    totals[key] = max(totals[key], value) if key.endswith("_max") else totals[key] + value
                count += 1
        return {k: v if k.endswith("_max") else v / count for k, v in totals.items()}

    def improve_once(self, mini: Batch) -> dict[str, float]:
        """One optimiser step on a mini-batch."""
        if self.recipe.updates.normalise == "minibatch" and mini.advantages is not None:
            a = mini.advantages
            counted = a[mini.acted(self.roles()) & mini.train[:, None]] if a.ndim == 2 else a
            mini = dataclasses.replace(mini, advantages=(a - counted.mean()) / (counted.std() + 1e-8))
        weights = self.weights(mini)
        keep = torch.stack([w > 0 for w in weights.values()]).any(0)
        needs = self.recipe.loss_needs | (self.old_needs() if self.one_update else frozenset())
        metrics: dict[str, float] = defaultdict(float)
        for rows in deal(mini, self.recipe.updates.micro_tokens, "groups" in self.recipe.loss_needs, self.run.processes):
            micro = mini.select(rows)
            width = micro.ids.shape[1]
            scores = self.policy.score(micro, keep[rows][:, :width], needs, self.temperature)
            if self.one_update:
                micro.old = scores.detach()
            total = 0.0
            for name, weight in weights.items():
                matrix = self.kl.loss(scores, micro) if name == "kl" else self.losses[name](scores, micro)
                if getattr(matrix, "shape", None) not in (micro.ids.shape, micro.rewards.shape):
                    shape = f"shape {tuple(matrix.shape)}" if isinstance(matrix, torch.Tensor) else f"type {type(matrix).__name__}"
                    raise RunStopped(f"the loss {name!r} has {shape}; expected {tuple(micro.ids.shape)} or {tuple(micro.rewards.shape)}")
                w = micro.train / len(mini) if matrix.ndim == 1 else weight[rows][:, :width]
                value = torch.where(w != 0, matrix * w, 0.0).sum()
                total = total + value
                metrics["loss" if name == "objective" else f"loss/{name}"] += float(value.detach())
            self.policy.backward(total)
            self.ratios(scores, micro, metrics)
        found = self.run.processes.merge(dict(metrics))
        if self.critic is not None:
            found |= self.critic.fit(mini)
        self.run.processes.sum_gradients(self.policy.trainable.parameters)
        return found | {"grad_norm": self.policy.step()}

    def weights(self, mini: Batch) -> dict[str, torch.Tensor]:
        """Aggregation as weights [N, T]; muted rows weigh nothing. A loss of one number per response is averaged over responses instead.

        The aggregations that divide by a length take the sampler's cap where the loss sets none.
        """
        out = {}
        losses = self.recipe.losses() | ({"kl": self.kl.part} if self.kl is not None and self.kl.part.place == "loss" else {})
        for name, loss in losses.items():
            mask = mini.acted(_acts_on(loss)) & mini.train[:, None]
            out[name] = aggregate(mask, getattr(loss, "aggregation", "token_mean"), getattr(loss, "length", None) or self.cap)
        return out

    def ratios(self, scores: Scores, micro: Batch, metrics: dict[str, float]) -> None:
        if micro.old is not None:
            mask = micro.acted((POLICY,)) & micro.train[:, None]
            if mask.any():
                gap = (scores.logps.detach() - micro.old.logps)[mask].abs()
                metrics["log_ratio_max"] = max(metrics["log_ratio_max"], float(gap.max()))

    def update(self, batch: Batch) -> None:
        """Let every live part see the scored, credited batch."""
        for path, live in self.run.live.items():
            if hasattr(live, "update") and path != "policy":
                live.update(batch)

    # --------------------------------------------------------------------------------------------------------------- reporting

    def reports(self) -> dict[str, float]:
        """What live parts have to tell about the step (`report() -> {name: number}`), named by their path."""
        told = {path: live.report() for path, live in self.run.live.items() if hasattr(live, "report")}
        return {f"{path}/{name}": value for path, found in told.items() for name, value in found.items()}

    def describe(self, rollouts: list[Rollout]) -> dict[str, float]:
        n = len(rollouts)
        groups = defaultdict(set)
        for r in rollouts:
            groups[r.group].add(round(r.reward, 6))
        acted = [-float(lp) for r in rollouts for lp, role in zip(r.logps.tolist(), r.role) if role == POLICY]
        out = {"reward": sum(r.reward for r in rollouts) / n, "length": sum(len(r.ids) for r in rollouts) / n,
               "clip_ratio": sum(r.finish == "length" for r in rollouts) / n, "mixed_groups": sum(len(g) > 1 for g in groups.values()) / len(groups),
               "tokens": float(sum(len(r.ids) for r in rollouts))}
        if acted:
            out["surprise"] = sum(acted) / len(acted)
        for name in sorted({k for r in rollouts for k in r.scores}):
            out[f"reward/{name}"] = sum(r.scores.get(name, 0.0) for r in rollouts) / n
        return out

    def record(self, r: Rollout, split_name: str) -> dict:
        return {"split": split_name, "prompt_id": r.prompt.id, "prompt": r.prompt.text or r.prompt.messages, "response": r.text, "reward": r.reward,
                "solved": self.task.solved(r.reward) if split_name != "train" else None, "tokens": len(r.ids), "finish": r.finish}

    def evaluate(self, task=None) -> dict[str, float]:
        """pass@k with the 95 % interval of pass@1 over prompts, mean score and length on held-out prompts; with sampler.overlong=skip
        also `skipped`, the number of those that do not fit. Changes no state."""
        e, task = self.recipe.evaluation, task or self.task
        if hasattr(task, "exact_pass_at_k") and hasattr(self.policy, "leaf_probabilities"):
            return task.exact_pass_at_k(self.policy.leaf_probabilities(), e.ks)
        asked = task.split(e.split)[: e.prompts]
        prompts = self.fitting(task, asked)
        rollouts = self.eval_rollouts(task, prompts)
        scores = [task.score(r.prompt, r.text) for r in rollouts]
        solved = np.array([task.solved(v) for v in scores]).reshape(len(prompts), e.samples).sum(1)
        out = {f"pass@{k}": float(pass_at_k(e.samples, solved, k).mean()) for k in e.ks}
        if len(prompts) > 1:
            interval = mean_interval(solved / e.samples)
            out |= {"pass@1_low": interval.low, "pass@1_high": interval.high}
        domains = np.array([p.domain for p in prompts])
        if len(set(domains)) > 1:
            out |= {f"pass@1/{d or 'none'}": float(solved[domains == d].mean() / e.samples) for d in sorted(set(domains))}
        out |= {"score": sum(scores) / len(scores), "length": sum(len(r.ids) for r in rollouts) / len(rollouts)}
        if self.skips:
            out["skipped"] = float(len(asked) - len(prompts))
        for r, s in zip(rollouts, scores):
            r.reward = s
        self.run.sample([self.record(r, e.split) for r in rollouts[:: e.samples][: e.log * 2]])
        return out

    @property
    def skips(self) -> bool:
        return getattr(getattr(self.sampler, "part", None), "overlong", "stop") == "skip"

    def longest(self, task) -> int:
        """Longest response in evaluation: the sampler's on its own task, or else the task's."""
        plain = getattr(self.sampler, "sampling", None)
        return plain.max_tokens if plain and task == self.task else task.max_tokens

    def fitting(self, task, prompts: list[Prompt]) -> list[Prompt]:
        """The prompts that leave room for a response, where sampler.overlong=skip leaves out the others."""
        found = [p for p in prompts if not self.skips or len(self.policy.encode(p)) + self.longest(task) <= self.policy.context]
        if not found:
            raise RunStopped("every prompt of the evaluation is longer than the policy's context allows")
        return found

    def eval_rollouts(self, task, prompts: list[Prompt]) -> list[Rollout]:
        """`evaluation.samples` responses to each prompt, the same random numbers at every evaluation of a run."""
        e, plain = self.recipe.evaluation, getattr(self.sampler, "sampling", None)
        sampling = Sampling(e.temperature, 0, e.top_p, 0.0, self.longest(task), plain.stop if plain and task == self.task else task.stop)
        share = self.run.processes.share(len(prompts))
        name = f"{self.run.seed}/evaluation" + (f"/{self.run.processes.rank}" if self.run.processes.rank else "")
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        rng, size, out = torch.Generator().manual_seed(seed), max(1, 256 // e.samples), []
        for i in range(share.start, share.stop, size):
            out += generate(self.policy, prompts[i:min(i + size, share.stop)], e.samples, sampling, rng)
        return self.run.processes.gather(out)

    def evaluate_as(self, config, weights: Path | None = None) -> None:
        """Evaluate from now on as another configuration says (task, evaluation part), with the exported weights if given."""
        self.task, self.recipe = config.task, config.recipe
        if weights is not None:
            self.policy.read(weights / "policy")

    def product(self):
        return {"policy": self.policy}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
