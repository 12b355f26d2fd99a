"""ReCOIL and the plain duals: their targets by hand, what they may not read, what they refuse, and that they learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from offline_data import counting

import volvelle
from volvelle.core.errors import UserError
from volvelle.core.trainer import start
from volvelle.core.verbs import configure
from volvelle.offline.data.files import write_dataset
from volvelle.offline.demonstrations import Demonstrations, apart_from
from volvelle.offline.methods.dual_rl_members import dual_q_imitation, dual_q_recorded, dual_v_imitation, dual_v_recorded, iq_learn, iv_learn
from volvelle.offline.methods.recoil import bounded_loss, claim, demonstration, grid, recoil
from volvelle.offline.tasks import Generated

PENDULUM = Generated(quality="medium", steps=600)
EXPERT = Generated(quality="expert", steps=400)
SMALL = ["network.hidden=[32]", "value_network.hidden=[32]", "batch=16", "period=2", "evaluation.episodes=2"]
MEMBERS = {"dual-v": dual_v_recorded, "dual-v-imitation": dual_v_imitation, "iv-learn": iv_learn, "dual-q": dual_q_recorded, "dual-q-imitation": dual_q_imitation,
           "iq-learn": iq_learn}


def agent_of(method, task, *overrides, small=SMALL):
    """(agent, a batch) of a freshly started run."""
    _, learner = start(configure(method, task, overrides=[*small, *overrides], device="cpu"), Path("nowhere"))
    return learner.agent, learner.sampler.draw()


def started(recipe, *words, task=PENDULUM):
    sampler = recipe.sampler.replace(expert=EXPERT) if isinstance(recipe.sampler, Demonstrations) else recipe.sampler
    return agent_of(recipe(sampler=sampler), task, *words, small=SMALL)


# ---- batches

def recorded(tmp_path, name, data):
    path = write_dataset(data, tmp_path / f"{name}.npz")
    return f"offline:{path}"


def test_halves_come_from_where_they_should(tmp_path):
    shift = counting(lengths=(4,), rewards=False)
    shift.fields["obs"] = shift.fields["obs"] + np.float32(100)
    task, expert = recorded(tmp_path, "data", counting(rewards=False)), recorded(tmp_path, "expert", shift)
    words = [*SMALL, f"sampler.expert={expert}", "gamma=0.9", "batch=400"]
    _, batch = agent_of("recoil", task, "sampler.merge=false", small=[w for w in words if w != "batch=16"])
    first, second = batch["obs"][:, :400], batch["obs"][:, 400:]
    assert first.max() < 50 and second.min() >= 100 and set(second[0, :, 1].tolist()) == {100, 101, 102, 103} and "rewards" not in batch
    assert torch.equal(batch["next_obs"][..., 1], batch["obs"][..., 1] + 1) and set(batch["initial_obs"][..., 1].flatten().tolist()) == {0, 100}
    ends = (batch["obs"][..., 0] == 0) & (batch["obs"][..., 1] == 2)
    assert torch.equal(batch["discounts"] == 0, ends | (batch["obs"] == torch.tensor([100.0, 103.0])).all(-1)) and batch["discounts"].max() == pytest.approx(0.9)
    _, merged = agent_of("recoil", task, small=[w for w in words if w != "batch=16"])
    share = (merged["obs"][0, :400, 0] >= 50).float().mean()
    assert abs(share - 4 / 14) < 0.11                                     # four of fourteen steps; off by more once in 10^6


def test_apart_leaves_out_what_the_demonstrations_visit():
    data, expert = counting(), counting(lengths=(2,))
    assert [tuple(data.fields["obs"][r]) for r in apart_from(data, expert)] == [(0, 2), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1)]


# ---- numbers

def test_targets_by_hand():
    one = lambda *x: torch.tensor([x])  # noqa: E731
    ended = bounded_loss(one([0.0]), one([200.0]), one(55.0), one(0.0), 0.99, 200.0)
    assert ended.item() == pytest.approx(0.5 * 200**2, rel=1e-5)            # y = -2 - .99 * 200 = -200, the expert's Q already at 200
    going = bounded_loss(one([1.0]), one([190.0]), one(3.0), one(0.99), 0.99, 200.0)
    assert going.item() == pytest.approx(0.5 * 100 + 0.5 * (1 - (-2 + 2.97)) ** 2, abs=1e-4)
    two = bounded_loss(one([1.0], [0.0]), one([190.0], [200.0]), one(3.0), one(0.99), 0.99, 200.0)
    assert two.item() == pytest.approx(50 + 0.5 * 0.03**2 + 0.5 * 0.97**2, abs=1e-4)


def test_the_agents_loss_uses_the_halves_and_the_bound():
    agent, batch = started(recoil, "gamma=0.9")
    following = agent.v(batch["next_obs"]).detach()
    q = agent.critics.values(batch["obs"], batch["actions"])
    target = -2 + batch["discounts"] * following - (0.9 - batch["discounts"]) * 20
    wanted = 0.5 * (q[..., 16:] - 20).square() + 0.5 * (q[..., :16] - target[:, :16].unsqueeze(1)).square()
    assert agent.critic_loss(batch, batch["actions"], following).item() == pytest.approx(wanted.mean(-1).sum().item(), rel=1e-5)
    changed = following.clone()
    changed[:, 16:] += 100                                                # nothing bootstraps on the expert's half
    assert agent.critic_loss(batch, batch["actions"], changed).item() == agent.critic_loss(batch, batch["actions"], following).item()


def test_v_and_policy_learn_from_the_datasets_half_but_are_rescaled_by_all():
    agent, batch = started(recoil, "maximum.beta=1.0")
    q = agent.target_q(batch["obs"], batch["actions"])
    z = (q - agent.v(batch["obs"])).clamp(max=7.0)
    for more in (0.0, 4.0):                                               # a larger exponent among the expert's rows shrinks every loss
        shifted = z + torch.cat([torch.zeros(1, 16), torch.full((1, 16), more)], -1)
        top = shifted.detach().amax().clamp(min=-1)
        wanted = ((shifted - top).exp() - shifted * (-top).exp() - (-top).exp())[:, :16].mean()
        moved = q + torch.cat([torch.zeros(1, 16), torch.full((1, 16), more)], -1)
        assert agent.value_loss(batch, batch["actions"], moved).item() == pytest.approx(wanted.item(), rel=1e-4)
    advantages = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    other = advantages.clone()
    other[:, 16:] = 9.0
    assert agent.actor_loss(batch, advantages).item() == agent.actor_loss(batch, other).item()
    contrast, batch = started(recoil, "maximum=expectile", "contrast=0.5")
    plain, _ = started(recoil, "maximum=expectile")
    v, q = plain.v(batch["obs"]), plain.target_q(batch["obs"], batch["actions"])
    gap = contrast.value_loss(batch, batch["actions"], q) - plain.value_loss(batch, batch["actions"], q)
    assert gap.item() == pytest.approx(0.5 * (v[:, :16].mean() - v[:, 16:].mean()).item(), abs=1e-5)


def test_the_dual_form_raises_the_experts_values_and_keeps_the_rest_consistent():
    agent, batch = started(recoil, "form=dual", "share=0.25", "critics=1")
    following = agent.v(batch["next_obs"]).detach()
    q = agent.critics.values(batch["obs"], batch["actions"])[:, 0]
    td = batch["discounts"] * following - q
    square = 0.25 * td[:, 16:].square().mean() + 0.75 * td[:, :16].square().mean()
    constant = 0.25 * (batch["discounts"] * following)[:, 16:].mean()      # without gradient to Q
    assert agent.critic_loss(batch, batch["actions"], following).item() == pytest.approx((constant - 0.25 * q[:, 16:].mean() + square / 4).item(), rel=1e-4)


def test_rewards_are_never_read(tmp_path):
    data = grid.replace(steps=400).dataset().take(np.arange(5))
    louder = data.take(np.arange(5))
    louder.fields["rewards"] = louder.fields["rewards"] * 2 + 7
    del data.fields["rewards"]
    runs = []
    for name, set_ in (("without", data), ("louder", louder)):
        task = recorded(tmp_path, name, set_)
        agent, batch = agent_of(recoil(sampler=Demonstrations(expert=demonstration)), task, small=SMALL)
        runs.append(agent.update(batch))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in ("loss/value", "loss/critic", "loss/actor", "q"))


# ---- the plain duals

@pytest.mark.parametrize("name", MEMBERS)
def test_members_learn_a_step_and_stay_finite(name):
    agent, batch = started(MEMBERS[name])
    before = agent.policy.flat.detach().clone()
    made = agent.update(batch)
    assert not torch.equal(agent.policy.flat, before) and all(torch.isfinite(torch.as_tensor(v)).all() for v in made.values())
    assert (made["reward"] == 0).all() == (name in ("iv-learn", "iq-learn"))


def test_dual_v_weighs_recorded_actions_by_the_ratio():
    agent, batch = started(dual_v_recorded, "alpha=2.0")
    td = (batch["rewards"] + batch["discounts"] * agent.v(batch["next_obs"]) - agent.v(batch["obs"])).detach()
    start = agent.v(batch["initial_obs"]).detach()
    x = td / 2
    wanted = 0.01 * start.mean() + 2 * torch.where(x >= -2, x + x.square() / 4, -1.0).mean()
    made = agent.update(batch)
    assert made["loss/value"].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert torch.allclose(made["weight"], (1 + x / 2).clamp(0, 100), atol=1e-5)


def test_dual_q_expects_over_discrete_actions_exactly():
    agent, batch = agent_of(dual_q_recorded(critics=1), grid.replace(steps=400))
    probabilities = agent.module(batch["next_obs"]).softmax(-1)
    codes = torch.eye(4).repeat(16, 1).expand(1, -1, -1)
    values = agent.critics.values(batch["next_obs"].repeat_interleave(4, 1), codes).view(1, 16, 4)
    assert torch.allclose(agent.expected(batch["next_obs"])[:, 0], (probabilities * values).sum(-1), atol=1e-5)


@pytest.mark.parametrize("still, sign", [("value", 1), ("policy", -1)])
def test_dual_q_moves_the_two_sides_apart(still, sign):
    """With one side held, an update makes the saddle's loss smaller by Q and larger by the policy."""
    moving = {"value": "policy", "policy": "value"}[still]
    agent, batch = agent_of(dual_q_recorded(critics=1), grid.replace(steps=400), f"{still}_optimiser.lr=1e-12", f"{moving}_optimiser.lr=1e-3")
    before = agent.update(batch)["loss"].item()
    assert sign * (agent.loss(batch).item() - before) > 1e-5


def test_the_discriminator_tells_expert_from_data():
    agent, batch = started(dual_v_imitation, "discriminator_optimiser.lr=3e-3", "sampler.apart=true")
    for _ in range(150):
        agent.rewarded(batch)
    logits = agent.discriminator.module(batch["obs"], batch["actions"]).squeeze(-1)
    assert torch.equal(agent.rewarded(batch)["rewards"], logits[:, :16].detach()) and (logits[:, :16] < logits[:, 16:].mean()).float().mean() > 0.9


@pytest.mark.parametrize("recipe, words, told", [
    (recoil, ["sampler=transitions"], "recoil learns from a dataset and demonstrations"), (recoil, [], "sampler.expert=none: no demonstrations"),
    (recoil, ["sampler.expert=pendulum-expert", "sampler.episodes=100000"], "sampler.episodes=100000"), (recoil, ["rewards=minus-one"], "recoil reads no rewards"),
    (recoil, ["sampler.expert=cartpole-expert"], "sampler.expert=.*cartpole-expert.* has observations"), (recoil, ["value=huber"], "recoil has its own loss"),
    (recoil, ["gamma=1.0"], "bound 2 / \\(1 - gamma\\) is infinite"), (recoil, ["sampler.expert=Pendulum-v1"], "no demonstrations"),
    (dual_v_recorded, ["reward=none"], "reward=none needs sampler=demonstrations with alone=true"), (iv_learn, ["sampler=transitions"], "reward=none needs sampler")])
def test_what_makes_no_sense_is_told_in_one_line(recipe, words, told, tmp_path):
    with pytest.raises(UserError, match=told) as error:
        volvelle.train(recipe, task=PENDULUM, folder=tmp_path / "run", overrides=[*SMALL, *words], steps=1)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_one_demonstration_is_enough_on_the_grid(tmp_path):
    arm = claim.arms["recoil"]
    made = volvelle.train(arm, task=grid, folder=tmp_path / "run", steps=1).result["metrics"]
    assert made["success"] > 0.85                                         # uniformly random actions reach the goal in one episode of twenty
