"""AWR with boosted trees: advantage-weighted regression on recent rollouts (arXiv 2407.08250; AWR: arXiv 1910.00177).

Problem and idea as in gbrl; here data are kept for several rollouts. Values and lambda-returns are computed anew over all of them, then policy steps
maximise min(exp(A / beta), 20) log pi on batches drawn from them. Pick it over gbrl where environment steps are dear; it grows hundreds of trees per
rollout, so distil. Advantages are normalised per batch before the exponential, as in the reference code.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.parts import method, part

from ..credit import GAE, Objective, Rollout
from ..learner import Count
from ..losses import weighted_mean
from ..policy import as_tensors
from .gbrl import BoostedLearner, BoostedPolicy


@part("advantage-weighted")
class AdvantageWeighted(Objective):
    """-min(exp(A / beta), largest) log pi (arXiv 1910.00177)."""

    beta: Annotated[float, Field(gt=0)] = 0.05
    largest: Annotated[float, Field(gt=0)] = 20.0

    def __call__(self, logp, batch):
        return -(batch["advantages"] / self.beta).exp().clamp(max=self.largest) * logp


@part("boosted-awr")
class BoostedAWR(BoostedPolicy):
    """AWR on the last `rollouts` rollouts; values and lambda-returns are computed anew over all of them.

    Separate ensembles: value_steps steps of the critic, then values again, then policy_steps of the actor; shared: gradient_steps joint ones. batch: rows per step.
    """

    rollouts: Count = 10
    batch: Count = 256
    value_steps: Count = 200
    policy_steps: Count = 1000
    gradient_steps: Count = 200
    objective: Objective = AdvantageWeighted()
    normalise_advantages: bool = True

    def check(self, recipe):
        super().check(recipe)
        for name, why in (("epochs", self.epochs != 1), ("minibatches", self.minibatches != 1), ("whole_episodes", self.whole_episodes),
                          ("target_kl", self.target_kl is not None), ("value_clip", self.value_clip is not None), ("critic", self.critic != "trees")):
            if why:
                raise UserError(f"{name}: advantage-weighted regression draws its own batches from past rollouts and grows trees; leave {name} as it is")

    def start(self, run):
        return AWRLearner(run, self)


class AWRLearner(BoostedLearner):
    """step = collect, remember, value steps, policy steps."""

    def __init__(self, run, part):
        super().__init__(run, part)
        self.past: list[dict[str, torch.Tensor]] = []

    def planned(self):
        p = self.part
        return self.run.config.steps * (p.gradient_steps if p.shared else max(p.value_steps, p.policy_steps))

    def _final_values(self, cuts) -> None:
        """Remember the observations at which episodes were cut; their values are computed when needed."""
        blocks = self.blocks
        blocks.arrays["cut"][:] = False
        self.finals = torch.zeros_like(blocks.tensors["obs"])
        for t, s, n, final in cuts:
            blocks.arrays["cut"][s, t, n] = True
            seen = np.asarray(final, np.float32)[None, None].repeat(self.part.seeds, 0)
            self.finals[s, t, n] = torch.from_numpy((self.normaliser(seen) if self.normaliser is not None else seen)[s, 0])

    @torch.no_grad()
    def credited(self) -> dict[str, torch.Tensor]:
        """All remembered steps with fresh values, advantages and lambda-returns, [S, rollouts * T * N, ...]."""
        seeds, rows = self.part.seeds, []
        for past in self.past:
            shape, value = past["rewards"].shape, lambda x: self.value.value(self.net.module.values(x.flatten(1, -2)))
            values, finals = value(past["obs"]).view(shape), value(past["finals"]).view(shape)
            rollout = Rollout(past["rewards"], values, past["ended"], past["cut"], finals, value(past["last"]).view(seeds, -1), torch.ones(shape, dtype=torch.bool))
            advantages, returns = self.credit(rollout, self.part.gamma)
            rows.append({k: v.flatten(1, 2) for k, v in {"obs": past["obs"], "actions": past["actions"], "advantages": advantages, "returns": returns,
                                                         "values": values}.items()})
        return {k: torch.cat([r[k] for r in rows], 1) for k in rows[0]}

    def batch(self):
        kept = {k: self.blocks.tensors[k].clone() for k in ("obs", "actions", "rewards", "ended", "cut")}
        self.past = [*self.past, kept | {"finals": self.finals, "last": as_tensors(self.obs).clone()}][-self.part.rollouts :]
        return self.credited()

    def drawn(self, data):
        """A batch of rows, drawn with replacement for every seed."""
        rows = torch.from_numpy(self.shuffling.integers(data["returns"].shape[1], self.part.batch))
        return {k: torch.stack([v[s, rows[s]] for s in range(self.part.seeds)]) for k, v in data.items()} | {"old": torch.zeros(rows.shape)}

    def improve(self, batch):
        part, norm = self.part, 0.0
        self.entropy_weight = part.entropy if isinstance(part.entropy, float) else torch.tensor(part.entropy.at(self.run.step))
        scale = 1 - self.run.step / self.run.config.steps if part.anneal else 1.0

        def steps(count, only, data):
            nonlocal norm
            policy = value = torch.zeros(())
            for _ in range(count):
                mini = self.drawn(data)
                if only == "value":
                    value = weighted_mean(self.value.loss(self.net.module.values(mini["obs"]), mini["returns"]), None)
                    self.net.backward(part.value_weight * value)
                else:
                    loss, policy, value, _ = self.loss(mini)
                    self.net.backward(loss)
                norm = self.net.step(scale, only)
            return float(policy.detach().mean()), float(value.detach().mean())

        if part.shared:
            policy, value = steps(part.gradient_steps, None, batch)
        else:
            _, value = steps(part.value_steps, "value", batch)
            batch = self.credited()
            policy, _ = steps(part.policy_steps, "policy", batch)
        for boosted in self.net.boosted.values():
            boosted.distil(batch["obs"])
        return {"loss/policy": policy, "loss/value": value, "gradient_norm": norm, "trees": float(sum(f.trees for f in self.net.module.forests.values()))}

    def state_dict(self):
        return super().state_dict() | {"past": [dict(p) for p in self.past]}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.past = [dict(p) for p in state["past"]]


gbrl_awr = method("gbrl-awr", BoostedAWR(
    envs=8, length=256, gamma=0.99, advantage=GAE(lam=0.95), value_weight=0.5, policy_lr=0.03, value_lr=0.1),
    title="advantage-weighted regression with boosted trees", source="arXiv 2407.08250")
