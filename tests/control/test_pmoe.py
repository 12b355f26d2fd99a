"""PMOE: mixture densities, the frequency loss, who gets which gradient, and learning inside soft actor-critic and PPO."""

import math

import numpy as np
import pytest
import torch
from toy_envs import Reach
from torch import tensor

import volvelle
from volvelle.control.landscapes import TwoGoals, TwoGoalsEnv, deceptive_reward
from volvelle.control.methods.pmoe import PMOE, frequency_loss
from volvelle.control.mixtures import GaussianMixture, SquashedMixture
from volvelle.control.spaces import Actions
from volvelle.core.errors import UserError

BOX = Actions((), (-1.0,), (1.0,), plain=False)
SMALL = ["network.hidden=[32]", "evaluation.episodes=10"]
QUICK = ["period=200", "warmup=100", "replay.capacity=2000", "replay.batch=32", "every=2", "actor_optimiser.lr=3e-3", "critic_optimiser.lr=3e-3", *SMALL]


def agent(tmp_path, *overrides, steps=1):
    made = volvelle.train("pmoe", task=lambda: Reach(), folder=tmp_path / "run", overrides=[*QUICK, *overrides], steps=steps, seed=0)
    return made.learner.agent, made.learner.replay.sample(0)


# ---- worked numbers

def test_the_frequency_loss():
    assert float(frequency_loss(tensor([0.5, 0.3, 0.2]), tensor(1))) == pytest.approx(0.26)
    assert float(frequency_loss(tensor([1.0]), tensor(0))) == 0


def test_the_frequency_loss_leads_to_the_share_of_times_an_expert_is_best():
    best = torch.multinomial(tensor([0.6, 0.3, 0.1]), 4000, True, generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):
        optimiser.zero_grad()
        frequency_loss(logits.softmax(-1).expand(4000, 3), best).mean().backward()
        optimiser.step()
    assert torch.allclose(logits.softmax(-1), torch.bincount(best) / 4000, atol=1e-3)


def test_the_density_of_a_mixture_and_the_order_of_its_experts():
    head = GaussianMixture(experts=2).bind(BOX)
    density = head.log_prob((tensor([0.0, 0.0, 0.0, 2.0]), tensor([0.0, 0.0])), tensor([1.0]))
    assert float(density) == pytest.approx(-1.41894, abs=1e-5)
    a, b = (tensor([0.7, -0.2, 0.4, -1.0]), tensor([0.1, -0.5])), (tensor([-0.2, 0.7, -1.0, 0.4]), tensor([-0.5, 0.1]))
    assert float(head.log_prob(a, tensor([0.3]))) == pytest.approx(float(head.log_prob(b, tensor([0.3]))), abs=1e-6)
    assert float(head.log_prob((tensor([0.0, 0.0, 0.0, 2.0]), tensor([0.0, 0.0])), tensor([60.0]))) < -1000       # no underflow to -inf
    grid = torch.linspace(-8, 8, 40_001).unsqueeze(-1)
    assert float(head.log_prob(a, grid).exp().sum() * 16 / 40_000) == pytest.approx(1, abs=1e-3)


def test_squashed_mixtures_have_weights_and_densities_that_sum_to_one():
    head = SquashedMixture(experts=3).bind(BOX)
    head.scale, head.bias = head.scale.double(), head.bias.double()
    outputs = torch.randn(9, generator=torch.Generator().manual_seed(2)).double()
    assert float(head.weights(outputs).sum()) == pytest.approx(1)
    grid = torch.linspace(-1, 1, 400_001)[1:-1].double().unsqueeze(-1)
    assert float(head.log_prob(outputs, grid).exp().sum() * 2 / 400_000) == pytest.approx(1, abs=5e-3)


def test_a_drawn_action_has_the_density_of_its_own_expert_and_experts_are_drawn_by_weight():
    head, generator = SquashedMixture(experts=2).bind(BOX), torch.Generator().manual_seed(0)
    outputs = tensor([math.log(0.8), math.log(0.2), 0.5, -0.5, 0.0, 0.0])
    noise = torch.cat([torch.zeros(20_000, 2), -torch.empty(20_000, 2).exponential_(generator=generator).log()], -1)
    actions, logps = head.draw(outputs.expand(20_000, 6), noise)
    assert float((actions > 0).float().mean()) == pytest.approx(0.8, abs=0.015)
    each = head.every(outputs, torch.zeros(4))[1]
    assert set(logps.tolist()) == set(each.tolist())                                 # no log w in it: mixing adds no entropy


# ---- gradients

def gradients(made, batch, **changes):
    made.part = made.part.replace(**changes)
    outputs = made.module(batch["obs"]).detach().requires_grad_()
    made.module.forward = lambda x: outputs
    noise = made.fresh(batch)
    loss, more = made.actor_loss(batch["obs"], [noise], torch.full((1, 1), 0.1))
    grad, = torch.autograd.grad(loss.sum(), outputs)
    k = made.head.experts
    with torch.no_grad():
        actions, logps = made.head.every(outputs, noise)
        best = made.values_of(batch["obs"], actions).argmax(-1)
    return grad[..., :k], grad[..., k:].unflatten(-1, (2, k)), best, more["logp"], logps


def test_only_the_best_expert_is_improved_and_weights_learn_from_frequencies_alone(tmp_path):
    made, batch = agent(tmp_path)
    gate, experts, best, logp, logps = gradients(made, batch)
    is_best = torch.nn.functional.one_hot(best, 4).bool()
    moved = experts.abs().sum(2) > 0
    assert torch.equal(moved, is_best) and gate.abs().max() > 0
    assert torch.allclose(logp, logps.gather(-1, best.unsqueeze(-1)).squeeze(-1))     # what alpha is tuned by
    gate, experts, *_ = gradients(made, batch, frequency_weight=0.0)
    assert gate.abs().max() == 0 and experts.abs().max() > 0
    for improve in ("all", "weighted"):
        gate, experts, *_ = gradients(made, batch, frequency_weight=0.0, improve=improve)
        assert gate.abs().max() == 0 and (experts.abs().sum(2) > 0).all()


def test_the_frequency_loss_reaches_neither_experts_nor_critics(tmp_path):
    made, batch = agent(tmp_path)
    made.critics.net.flat.grad.zero_()
    outputs = made.module(batch["obs"])
    loss = frequency_loss(made.head.weights(outputs), torch.zeros(outputs.shape[:2], dtype=torch.long)).mean()
    loss.backward()
    assert made.module.gate.net.weight.grad.abs().max() > 0
    assert all(p.grad.abs().max() == 0 for p in made.module.net.parameters()) and made.critics.net.flat.grad.abs().max() == 0


def test_compared_estimators_move_the_weights(tmp_path):
    made, batch = agent(tmp_path)
    for index in ("gumbel", "score"):
        gate, experts, *_ = gradients(made, batch, index=index)
        assert gate.abs().max() > 0 and experts.abs().max() > 0


def test_the_target_takes_the_log_probability_of_the_drawn_expert(tmp_path):
    made, batch = agent(tmp_path)
    noise = made.fresh(batch)
    target = made.critic_loss(batch, noise, torch.full((1, 1), 0.5))[1]["target"]
    with torch.no_grad():
        outputs = made.module(batch["next_obs"])
        actions, logps = made.head.every(outputs, noise)
        index = (outputs[..., :4] + noise[..., -4:]).argmax(-1)
        q = made.critics.target_values(batch["next_obs"], actions.gather(-2, index[..., None, None]).squeeze(-2)).amin(1)
        expected = batch["rewards"] + batch["discounts"] * (q - 0.5 * logps.gather(-1, index.unsqueeze(-1)).squeeze(-1))
    assert torch.allclose(target, expected, atol=1e-5)


def test_one_expert_is_soft_actor_critic_to_the_bit(tmp_path):
    same = ["delay=1", "alpha_fresh=false", "alpha_loss=log", "critic_weight=0.5", "alpha_optimiser.lr=3e-4", *QUICK]
    sac = volvelle.train("sac", task=lambda: Reach(), folder=tmp_path / "sac", overrides=same, steps=2, seed=0)
    one = volvelle.train("pmoe", task=lambda: Reach(), folder=tmp_path / "one", overrides=[*same, "head.experts=1"], steps=2, seed=0)
    a, b = sac.learner.agent.module.state_dict(), one.learner.agent.module.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and set(b) - set(a) == {"gate.net.weight", "gate.net.bias"}
    assert sac.result["metrics"] == one.result["metrics"]


# ---- learning and refusing

@pytest.mark.parametrize("method, overrides, steps", [
    ("pmoe", [*QUICK, "alpha=0.01"], 6), ("pmoe", [*QUICK, "alpha=0.01", "greedy=drawn", "samples=2", "gate=mlp", "gate.hidden=[8]"], 8),
    ("pmoe", [*QUICK, "alpha=0.01", "head.compose=gating"], 6), ("pmoe", [*QUICK, "alpha=0.01", "head.compose=product"], 6),
    ("pmoe-ppo", ["envs=8", "length=16", "epochs=4", "minibatches=2", "anneal=false", "optimiser.lr=3e-3", "normalise_rewards=false", "head.start=-1", *SMALL], 30)],
    ids=["pmoe", "options", "gating", "product", "pmoe-ppo"])
def test_it_reaches_the_goal(method, overrides, steps, tmp_path):
    made = volvelle.train(method, task=lambda: Reach(), folder=tmp_path / "run", overrides=overrides, steps=steps, seed=0)
    assert made.result["metrics"]["return"] > -0.06 and made.result["start"]["return"] < -0.1, made.result


@pytest.mark.parametrize("method, overrides, says", [
    ("sac", ["head=squashed-mixture"], "head=squashed-mixture: its mixing weights are learnt by pmoe alone"),
    ("pmoe", ["alpha_fresh=true"], "alpha_fresh=true: pmoe tunes alpha"), ("pmoe", ["index=score", "improve=all"], "improve=all: with index=score"),
    ("pmoe", ["index=score", "head.compose=gating"], "index=score: with head.compose=gating"), ("pmoe-ppo", ["shared=true"], "shared=true: the experts")])
def test_what_makes_no_sense_is_refused(method, overrides, says, tmp_path):
    with pytest.raises(UserError, match=says):
        volvelle.train(method, task=lambda: Reach(), folder=tmp_path / "run", overrides=overrides, steps=1)


def test_two_goals_measures_who_goes_where(tmp_path):
    assert deceptive_reward(-0.35) == pytest.approx(0.6, abs=1e-3) and deceptive_reward(0.8) == pytest.approx(1, abs=1e-2)
    env = TwoGoalsEnv()
    env.reset(seed=0)
    walk = [env.step(np.array([0.5 if i < 2 else 1.0, 1.0])) for i in range(4)]
    assert walk[-1][2] and walk[-1][4]["goal"] == 1 and walk[-1][1] > 0.9
    assert TwoGoals().measure({"goal": np.array([1, 1, -1, 0.0])}) == {"goals": 2, "reached": 0.75, "balance": pytest.approx(2 / 3)}
    made = volvelle.train(PMOE().override(*QUICK, "seeds=2"), task=TwoGoals(), folder=tmp_path / "run", steps=1, seed=0)
    assert {"goals", "balance@1", "reached@0"} <= set(made.result["metrics"])
