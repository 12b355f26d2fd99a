"""HL-Gauss: values by classification in Q-learning, in the critics of sac and in ppo, and the parts that it is compared with."""

import math

import numpy as np
import pytest
from helpers import stop_at
import torch
from toy_envs import Counter, Reach, Target
from torch import tensor

import volvelle
from volvelle.control.losses import conservative_gap
from volvelle.control.methods.dqn import dqn
from volvelle.control.methods.hl_gauss import HistogramMSE, RewardNoise, claim
from volvelle.control.spaces import Layout
from volvelle.control.networks import ResidualMLP, reset
from volvelle.control.valueheads import C51, HLGauss, TwoHot
from volvelle.core.errors import UserError
from volvelle.core.files import read_lines
from volvelle.core.state import fingerprint, load_state
from volvelle.core.trainer import checkpoints

SMALL = ["network.hidden=[32]", "evaluation.episodes=20"]
Q = ["period=200", "warmup=100", "replay.capacity=2000", "replay.batch=32", "every=2", "copy_every=40", "optimiser.lr=3e-3", *SMALL]


def entropy(p):
    return float(-(p * p.clamp(min=1e-300).log()).sum())


def test_a_larger_sigma_has_more_entropy_and_an_absolute_one_does_not_know_of_bins():
    widths = [entropy(HLGauss(ratio=r).label(tensor(0.3, dtype=torch.float64))) for r in (0.1, 0.4, 0.75, 2.0)]
    assert widths == sorted(widths) and widths[0] < widths[-1] - 1
    for bins in (51, 101, 201):
        head = HLGauss(bins=bins, sigma=0.8)
        label = head.label(tensor(0.3, dtype=torch.float64))
        mean = float((label * head.support(label)).sum())
        spread = float((label * (head.support(label) - mean).square()).sum())
        assert spread == pytest.approx(0.8**2 + (20 / bins) ** 2 / 12, rel=1e-3)  # the bin's own width adds w^2 / 12


@pytest.mark.parametrize("head", [HLGauss(prior=4.0), TwoHot(prior=4.0), C51(prior=4.0), HistogramMSE(prior=4.0)], ids=lambda h: h.part_name)
def test_a_prior_is_what_outputs_of_zero_stand_for(head):
    zero = torch.zeros(3, head.width, dtype=torch.float64)
    assert torch.allclose(head.value(zero), torch.full((3,), 4.0, dtype=torch.float64), atol=0.05)       # a hundredth is spread evenly
    assert float(head.replace(prior=None).value(zero)[0]) == pytest.approx(0, abs=1e-9)
    outputs = torch.zeros(1, head.width, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        grad, = torch.autograd.grad(head.loss(outputs, tensor([-5.0], dtype=torch.float64)).sum(), outputs)
        outputs = (outputs - 0.5 * grad / max(1.0, float(grad.norm()))).detach().requires_grad_()
    assert float(head.value(outputs.detach())) == pytest.approx(-5, abs=0.25)                                    # and it can be learnt away
    with pytest.raises(UserError, match="prior=11.0 lies outside the range; accepted: -10.0 to 10.0"):
        head.replace(prior=11.0)


def test_the_control_has_the_parameters_of_a_histogram_and_the_loss_of_regression():
    head = HistogramMSE(low=0.0, high=4.0, bins=4)
    outputs = torch.zeros(2, 4, requires_grad=True)
    loss = head.loss(outputs, tensor([3.0, 9.0]))
    assert loss.tolist() == [1.0, 4.0]                                              # the mean is 2; 9 is moved to 4
    loss[0].backward()
    expected = -2 * 0.25 * (tensor([0.5, 1.5, 2.5, 3.5]) - 2)                        # 2 (Q - y) p_i (z_i - Q), here Q - y = -1
    assert torch.allclose(outputs.grad[0], expected)
    assert HLGauss(low=0.0, high=4.0, bins=4).loss(outputs.detach(), tensor([3.0, 9.0])).tolist() == pytest.approx([math.log(4)] * 2)


def test_gradients_are_bounded_whatever_the_error():
    for far in (1.0, 9.9):
        outputs = torch.zeros(1, 51, requires_grad=True)
        HLGauss().loss(outputs, tensor([far])).sum().backward()
        assert float(outputs.grad.abs().sum()) <= 2


def test_the_target_is_the_reward_plus_the_greatest_mean_of_the_next_state(tmp_path):
    made = volvelle.train("dqn", task=lambda: Counter(5), folder=tmp_path / "run", overrides=[*Q, "value=hl-gauss", "value.low=0", "value.high=20"], steps=1, seed=0)
    agent = made.learner.agent
    batch = made.learner.replay.sample(0)
    loss, made = agent.loss(batch)
    target = made["target"]
    with torch.no_grad():
        probabilities = agent.target.module(batch["next_obs"]).unflatten(-1, (2, 51)).softmax(-1)
    means = (probabilities * (torch.arange(51) + 0.5) * 20 / 51).sum(-1)
    assert torch.allclose(target, batch["rewards"] + batch["discounts"] * means.amax(-1), atol=1e-4)
    assert not target.requires_grad and loss.requires_grad


@pytest.mark.parametrize("method, task, overrides", [
    ("ppo", lambda: Target(), ["envs=8", "length=16", "epochs=4", "minibatches=2", "anneal=false", "optimiser.lr=3e-3", "value_clip=none", *SMALL]),
    ("td3", lambda: Reach(), ["period=200", "warmup=100", "replay.capacity=2000", "replay.batch=32", "every=2", "actor_optimiser.lr=3e-3",
                              "critic_optimiser.lr=3e-3", "exploration=0.3", *SMALL])], ids=["ppo", "td3"])
def test_it_stands_in_for_squared_error_in_other_methods(method, task, overrides, tmp_path):
    made = volvelle.train(method, task=task, folder=tmp_path / "run", overrides=[*overrides, "value=hl-gauss", "value.low=-4", "value.high=2"], steps=14, seed=0)
    assert made.result["metrics"]["return"] > (0.9 if method == "ppo" else -0.05), made.result


def test_two_critics_take_the_minimum_of_means_and_the_policy_gets_its_gradient_through_the_mean(tmp_path):
    made = volvelle.train("hl-gauss-sac", task=lambda: Reach(), folder=tmp_path / "run", steps=1, seed=0, overrides=[
        "period=100", "warmup=50", "every=10", "replay.capacity=500", "replay.batch=16", "value.low=-4", "value.high=1", *SMALL])
    agent, batch = made.learner.agent, made.learner.replay.sample(0)
    noise = agent.fresh(batch)
    losses, more = agent.critic_loss(batch, noise, agent.alpha)
    outputs, target = more["outputs"], more["target"]
    assert losses.shape == (1, 2, 16) and outputs.shape == (2, 16, 101)
    with torch.no_grad():
        actions, logp = agent.head.draw(agent.module(batch["next_obs"]), noise)
        means = (agent.critics.target.module(batch["next_obs"], actions).softmax(-1) * agent.part.value.support(outputs)).sum(-1)
    assert torch.allclose(target, batch["rewards"] + batch["discounts"] * (means.amin(0) - agent.alpha * logp), atol=1e-5)
    loss, _ = agent.actor_loss(batch["obs"], noise, torch.zeros(1, 1))
    grad, = torch.autograd.grad(loss.sum(), [agent.module.net.out.weight])
    assert float(grad.abs().max()) > 0


def test_the_conservative_gap():
    assert float(conservative_gap(tensor([1.0, 2.0, 0.0]), tensor(0))) == pytest.approx(1.40761, abs=1e-5)
    assert conservative_gap(torch.full((2, 3), 7.0), tensor([0, 2])).tolist() == pytest.approx([math.log(3)] * 2)


def test_a_conservative_weight_lowers_actions_that_the_data_lack(tmp_path):
    found = {}
    for weight in (0.0, 1.0):
        made = volvelle.train("hl-gauss", task=lambda: Target(), folder=tmp_path / str(weight), steps=1, seed=0,
                              overrides=[*Q, "value.low=-3", "value.high=3", f"conservative={weight}"])
        agent = made.learner.agent
        batch = {"obs": torch.eye(3)[None], "next_obs": torch.eye(3)[None], "actions": torch.zeros(1, 3, dtype=torch.long), "rewards": torch.ones(1, 3),
                 "discounts": torch.zeros(1, 3)}
        for _ in range(150):
            agent.update(batch)
        with torch.no_grad():
            q = agent.module.values(batch["obs"])[0]
        found[weight] = float((q[:, 0] - q[:, 1:].amax(1)).min())
    assert found[1.0] > max(found[0.0], 0) + 0.3, found


# ---- noise on rewards

def test_noise_reaches_the_learner_only_and_a_broken_run_goes_on_with_it(tmp_path):
    recipe = dqn(relabels={"noise": RewardNoise(spread=3.0)}).override(*[word.replace("period=200", "period=300") for word in Q], "seeds=2")
    whole = volvelle.train(recipe, task=lambda: Counter(3), folder=tmp_path / "whole", steps=4, seed=0, checkpoint_every=2)
    stored = whole.learner.replay.blocks.tensors["rewards"][:, :1200].flatten(1)
    noise = stored - tensor([1.0, 2.0, 3.0]).repeat(400)
    assert noise.abs().max() <= 3 and noise.std() == pytest.approx(3 / math.sqrt(3), rel=0.1) and not torch.equal(noise[0], noise[1])
    assert whole.result["metrics"]["return"] == whole.result["metrics"]["training_return"] == whole.result["metrics"]["training_return@1"] == 6

    with pytest.raises(KeyboardInterrupt):
        volvelle.train(recipe, task=lambda: Counter(3), folder=tmp_path / "broken", steps=4, seed=0, checkpoint_every=2, progress=stop_at(3))
    volvelle.train(recipe, task=lambda: Counter(3), resume=tmp_path / "broken", steps=4, seed=0, checkpoint_every=2)
    states = [fingerprint(load_state(checkpoints(tmp_path / name)[-1])) for name in ("whole", "broken")]
    assert states[0] == states[1]


def test_the_training_return_is_that_of_the_last_share_of_the_run(tmp_path):
    made = volvelle.train("ppo", task="CartPole-v1", folder=tmp_path / "run", steps=8, seed=0,
                          overrides=["envs=2", "length=64", "minibatches=2", "evaluation.episodes=1", "evaluation.training_share=0.25"])
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    late = [r for r in rows if r["step"] > 6 and "return" in r]
    expected = sum(r["return"] * r["episodes"] for r in late) / sum(r["episodes"] for r in late)
    assert made.result["metrics"]["training_return"] == pytest.approx(expected) and "training_return" not in made.result["start"]


# ---- what goes with it

def test_residual_layers_keep_copies_apart_and_pass_their_input_on():
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    body = reset(ResidualMLP(width=16, blocks=2).build(Layout(5), 2), generators)
    x = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(9)).expand(2, 7, 5)
    out = body(x)
    assert out.shape == (2, 7, 16) and not torch.allclose(out[0], out[1])
    with torch.no_grad():
        for _, _, last in body.dense.blocks:
            last.weight.zero_(), last.bias.zero_()
        assert torch.allclose(body(x), torch.relu(body.dense.first(x)))


def test_the_arms_of_the_claim_differ_in_their_value_head_alone():
    recipes = {name: arm for name, arm in claim.arms.items() if name.endswith("noise-3")}
    assert len(recipes) == 5 and len({r.replace(value=dqn.value).digest for r in recipes.values()}) == 1
    assert np.ptp([h.value.low for h in recipes.values() if h.value.width > 1]) == 0
