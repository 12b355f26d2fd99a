"""SMORe: losses by hand, the two halves of its batches, fixed points on a chain, what it may not read, and that it reaches goals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from offline_data import counting

import volvelle
from volvelle.control.evaluation import Evaluation
from volvelle.core.errors import UserError
from volvelle.core.trainer import start
from volvelle.core.verbs import configure
from volvelle.offline.behaviours import Walker
from volvelle.offline.commands import Maze
from volvelle.offline.data.files import write_dataset
from volvelle.offline.maxima import Expectile
from volvelle.offline.methods.smore import GoalTransitions, claim, later_rows, plain_loss, smore, stable_loss, walks
from volvelle.offline.samplers import Table
from volvelle.offline.tasks import Generated

SMALL = ["network.hidden=[32]", "value_network.hidden=[32]", "batch=16", "period=2", "evaluation.episodes=1"]
MAZE = Generated(env=Maze(maze="small"), behaviour=Walker(), quality="navigate", steps=2000)
FORMS = ["stable", "plain", "dual", "discriminator"]
one = lambda *x: torch.tensor([[list(x)]])  # noqa: E731  [seed, member, row]


def agent_of(task=MAZE, *overrides, small=SMALL):
    _, learner = start(configure(smore, task, overrides=[*small, *overrides], device="cpu"), Path("nowhere"))
    return learner.agent, learner.sampler.draw()


# ---- losses

def test_losses_by_hand():
    following = torch.tensor([[3.0]])
    assert stable_loss(one(190.0), one(1.0), following, 0.99, 200.0, 1e-4).item() == pytest.approx(100.000451, abs=1e-5)
    assert stable_loss(one(200.0), one(1.0), following, 0.99, 200.0, 1e-4).item() == pytest.approx(0.00045 + 1e-6, abs=1e-6)
    assert plain_loss(one(190.0), one(1.0), following, 0.99, 1e-4).item() == pytest.approx(-190 + 1e-4 + 1.94045, abs=1e-4)
    assert plain_loss(one(0.0), one(1.0), following, 0.99, 1e-4).item() == pytest.approx(1.94055, abs=1e-5)
    heads = torch.tensor([[[190.0], [200.0]]])
    assert stable_loss(heads, torch.ones(1, 2, 1), following, 0.99, 200.0, 0.0).item() == pytest.approx(100.0009, abs=1e-4)      # added, not averaged


def test_targets_carry_no_gradient():
    following = torch.tensor([[3.0]], requires_grad=True)
    for loss in (stable_loss(one(1.0), one(1.0).requires_grad_(), following, 0.9, 20.0, 0.0), plain_loss(one(1.0), one(1.0).requires_grad_(), following, 0.9, 0.0)):
        loss.sum().backward()
    assert following.grad is None


def descend(loss, n, steps=4000, lr=0.5):
    s = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (grad,) = torch.autograd.grad(loss(s), s)
        s.data -= lr * n * grad
    return s.detach()


def test_scores_fall_with_the_distance_to_the_goal_on_a_chain():
    gamma, c, n = 0.9, 12.0, 6                                            # pair i is i steps before the entering one, whose score stays c

    def loss(s):
        scores = torch.cat([torch.tensor([c], dtype=torch.float64), s])
        return stable_loss(torch.full((1, 1, n), 20.0, dtype=torch.float64), s.view(1, 1, n), scores[:-1].view(1, n), gamma, 20.0, 0.0)

    found = descend(loss, n)
    wanted = torch.tensor([gamma**d * c - 2 * (1 - gamma**d) / (1 - gamma) for d in range(1, n + 1)], dtype=torch.float64)
    assert torch.allclose(found, wanted, atol=1e-6) and (found.diff() < 0).all() and found[0] < c


def test_data_that_never_enter_a_goal_go_to_the_worst_value():
    none = torch.empty(1, 1, 1, dtype=torch.float64).fill_(20.0)
    stable = descend(lambda s: stable_loss(none, s.view(1, 1, 2), s.view(1, 2), 0.9, 20.0, 0.0), 2)
    plain = descend(lambda s: plain_loss(0 * none, s.view(1, 1, 2), s.view(1, 2), 0.9, 0.0), 2)
    assert torch.allclose(stable, torch.full_like(stable, -20.0), atol=1e-4) and torch.allclose(plain, torch.zeros_like(plain), atol=1e-4)


@pytest.mark.parametrize("level, wanted", [(0.5, 2.0), (0.999, 4.0)])
def test_the_expectile_goes_from_the_mean_to_the_largest(level, wanted):
    v = torch.linspace(0, 4, 4001, dtype=torch.float64)
    losses = Expectile(level=level).loss(torch.stack([0 - v, 4 - v], -1)).mean(-1)
    assert float(v[losses.argmin()]) == pytest.approx(wanted, abs=0.01)


# ---- batches

def test_later_rows_are_uniform_and_reach_the_final_observation():
    rows, lasts = np.array([3, 3, 3, 5]), np.array([6, 6, 6, 6])
    assert later_rows(rows, lasts, np.array([0.0, 0.4, 0.999, 0.0], np.float32)).tolist() == [4, 5, 6, 6]


class Numbers:
    def __init__(self, seed=0):
        self.g = np.random.default_rng(seed)

    def integers(self, high, *shape):
        return self.g.integers(high, size=shape)[None]

    def uniform(self, *shape):
        return self.g.random(shape, np.float32)[None]


def test_goals_lie_later_and_entering_transitions_enter_them():
    batch = GoalTransitions().build(Table(counting(rewards=False)), Numbers(), 3000, 0.9).draw()
    assert torch.equal(batch["goals"][..., 0], batch["obs"][..., 0]) and (batch["goals"][..., 1] > batch["obs"][..., 1]).all()
    assert torch.equal(batch["entering_goals"], batch["entering_next_obs"]) and torch.equal(batch["entering_next_obs"][..., 1], batch["entering_obs"][..., 1] + 1)
    assert torch.allclose(batch["actions"][..., 0], batch["obs"][..., 1] / 10) and torch.allclose(batch["entering_actions"][..., 0], batch["entering_obs"][..., 1] / 10)
    assert batch["goals"][..., 1].max() == 5 and not {"rewards", "discounts", "terminated", "masks"} & set(batch)
    for goal in range(1, 6):                                              # both halves share the distribution of goals: within 0.05 at 3000 draws, p < 1e-4
        shares = [(batch[k][0] == torch.tensor([1.0, goal])).all(-1).float().mean() for k in ("goals", "entering_goals")]
        assert abs(shares[0] - shares[1]) < 0.05


def commanded():
    data = counting(rewards=False)
    goals = np.full_like(data.fields["obs"], 99)
    goals[:4], goals[4:10] = (0, 2), (1, 4)                               # the third episode never comes near its goal
    data.fields["desired_goal"] = goals
    return data


def test_commanded_goals_join_with_the_rest_of_the_share():
    batch = GoalTransitions().build(Table(commanded()), Numbers(), 4000, 0.9).draw()
    told = (batch["goals"][0] == torch.tensor([99.0, 99.0])).all(-1).float().mean()
    assert told == pytest.approx(0.2 * 2 / 10, abs=0.02)                  # two of ten steps carry it
    batch = GoalTransitions(hindsight=0.0).build(Table(commanded()), Numbers(), 500, 0.9).draw()
    entered = {tuple(x) for x in torch.cat([batch["entering_obs"][0], batch["entering_goals"][0]], -1).tolist()}
    assert entered == {(0, 1, 0, 2), (1, 3, 1, 4)}
    with pytest.raises(UserError, match="needs the field 'desired_goal'"):
        GoalTransitions(hindsight=0.8).build(Table(counting()), Numbers(), 5, 0.9)
    narrow = commanded()
    narrow.fields["desired_goal"] = narrow.fields["desired_goal"][:, :1]
    with pytest.raises(UserError, match="goals are states"):
        GoalTransitions().build(Table(narrow), Numbers(), 5, 0.9)
    lost = commanded()
    lost.fields["desired_goal"][:] = 99
    with pytest.raises(UserError, match="comes so near"):
        GoalTransitions().build(Table(lost), Numbers(), 5, 0.9)


# ---- the agent

@pytest.mark.parametrize("form", FORMS)
def test_scores_ask_for_recorded_actions_only_and_values_come_from_the_m_just_moved(form):
    agent, batch = agent_of(MAZE, f"form={form}")
    asked, seen = [], []
    for module in (agent.critics.net.module, agent.critics.target.module):
        module.register_forward_pre_hook(lambda m, args: asked.append(args[1]))
    inner = agent.descend_critics
    agent.descend_critics = lambda b, actions, following: seen.append((agent.v(b["next_obs"]).detach(), following)) or inner(b, actions, following)
    made = agent.update(batch)
    assert torch.equal(asked[0], batch["actions"]) and torch.equal(asked[1], torch.cat([batch["actions"], batch["entering_actions"]], 1)) and len(asked) == 2
    assert torch.equal(*seen[0]) and torch.isfinite(made["loss/critic"]).all()


def test_the_agents_losses_are_these():
    for form in ("stable", "plain"):
        agent, batch = agent_of(MAZE, f"form={form}", "gamma=0.9")
        parts = agent.parts(batch)
        following = agent.v(parts["next_obs"]).detach()
        offline, entering = agent.critics.values(parts["obs"], batch["actions"]), agent.critics.values(parts["entering_obs"], batch["entering_actions"])
        wanted = stable_loss(entering, offline, following, 0.9, 20.0, 1e-4) if form == "stable" else plain_loss(entering, offline, following, 0.9, 1e-4)
        assert agent.critic_loss(parts, batch["actions"], following).item() == pytest.approx(wanted.item(), rel=1e-5)
        assert parts["obs"].shape == (1, 16, 4) and torch.equal(parts["entering_obs"][..., 2:], batch["entering_goals"])


def test_the_dual_form_is_the_mixture():
    agent, batch = agent_of(MAZE, "form=dual", "share=0.25", "gamma=0.9")
    parts = agent.parts(batch)
    here, there = (0.9 * agent.v(parts[f"{w}next_obs"]).detach().unsqueeze(1) - agent.critics.values(parts[f"{w}obs"], batch[f"{w}actions"]) for w in ("", "entering_"))
    square = 0.25 * there.square().mean(-1) + 0.75 * here.square().mean(-1)
    wanted = (0.25 * there.mean(-1) + square / 4).sum()
    assert agent.critic_loss(parts, batch["actions"], agent.v(parts["next_obs"]).detach()).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_m_and_the_policy_ignore_entering_transitions():
    made = []
    for change in (0.0, 5.0):
        agent, batch = agent_of()
        for name in ("entering_obs", "entering_next_obs", "entering_goals"):
            batch[name] = batch[name] + change
        found = agent.update(batch)
        made.append((found["loss/value"], found["loss/actor"], found["loss/critic"], agent.values.flat.detach().clone(), agent.policy.flat.detach().clone()))
    assert all(torch.equal(made[0][i], made[1][i]) for i in (0, 1, 3, 4)) and not torch.equal(made[0][2], made[1][2])


def test_weights_depend_on_the_difference_of_s_and_m_only():
    agent, batch = agent_of()
    parts = agent.parts(batch)
    s = agent.target_q(parts["obs"], batch["actions"])
    m = agent.v(parts["obs"]).detach()
    assert agent.actor_loss(parts, (s + 8) - (m + 8)).item() == pytest.approx(agent.actor_loss(parts, s - m).item(), rel=1e-4)


def test_the_discriminator_learns_which_pairs_enter_and_its_log_odds_are_the_reward():
    agent, batch = agent_of(MAZE, "form=discriminator", "discriminator_optimiser.lr=1e-2", "batch=256", small=[w for w in SMALL if w != "batch=16"])
    parts = agent.parts(batch)
    every = torch.cat([batch["actions"], batch["entering_actions"]], 1)
    for _ in range(100):
        rewards = agent.rewards(parts["obs"], parts["entering_obs"], every)
    logits = agent.discriminator.module(torch.cat([parts["obs"], parts["entering_obs"]], 1), every).squeeze(-1)
    assert rewards.shape == (1, 256) and logits[:, 256:].mean() > logits[:, :256].mean() + 1


def test_neither_rewards_nor_ends_are_read(tmp_path):
    plain, other = MAZE.dataset().take(np.arange(4)), MAZE.dataset().take(np.arange(4))
    steps = np.zeros(len(other.fields["obs"]), np.float32)
    steps[other.lasts - 1] = 1
    other.fields |= {"rewards": steps * 7, "terminated": steps, "truncated": 0 * steps}
    made = []
    for name, data in (("plain", plain), ("other", other)):
        agent, batch = agent_of(f"offline:{write_dataset(data, tmp_path / f'{name}.npz')}")
        made.append(agent.update(batch))
    assert all(torch.equal(made[0][k], made[1][k]) for k in ("loss/value", "loss/actor", "loss/critic"))


def test_steep_scores_pay():
    free, batch = agent_of()
    taxed, _ = agent_of(MAZE, "gradient_penalty=1e4")
    assert taxed.update(batch)["loss/critic"].item() >= free.update(batch)["loss/critic"].item()


@pytest.mark.parametrize("words, told", [
    (["sampler=goals"], "smore needs transitions that enter goals"), (["value=huber"], "smore has its own loss"), (["gamma=1.0"], "the bound 2 / \\(1 - gamma\\)"),
    (["sampler.hindsight=0.8"], "needs the field 'desired_goal'"), (["rewards=minus-one"], "make their rewards from goals")])
def test_what_makes_no_sense_is_told_in_one_line(words, told, tmp_path):
    with pytest.raises(UserError, match=told) as error:
        volvelle.train(smore, task=MAZE, folder=tmp_path / "run", overrides=[*SMALL, *words], steps=1)
    assert "\n" not in str(error.value)


def test_goals_are_reached(tmp_path):
    arm = claim.arms["smore"](period=700, evaluation=Evaluation(episodes=4))
    found = volvelle.train(arm, task=walks, folder=tmp_path / "run", steps=1).result
    assert found["start"]["success"] < 0.25 and found["metrics"]["success"] > 0.38          # cloning the walks ends near 0.2
