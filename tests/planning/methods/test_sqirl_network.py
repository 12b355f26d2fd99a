"""SQIRL with a network: the heads' losses by hand, what is stored, what is frozen, acting by the clock, resuming, and learning where one step misleads."""

import gymnasium as gym
import numpy as np
import pytest
from helpers import stop_at
import torch

import volvelle
from volvelle.control.policy import Policy
from volvelle.control.valueheads import C51, MSE, Huber
from volvelle.core.errors import UserError
from volvelle.core.state import fingerprint, load_state
from volvelle.core.trainer import checkpoints
from volvelle.planning.methods.played import Played
from volvelle.planning.methods.sqirl_network import head_losses, head_targets, scaled_loss, sqirl_network
from volvelle.planning.tasks import Lock, Trap

SMALL = ["episodes=8", "network.hidden=[16]", "replay.capacity=512", "replay.batch=16", "evaluation.episodes=2"]


# ---- by hand

PICKED = torch.tensor([[0.5, 0.1], [1.0, 0.9], [0.8, 0.5]])
RETURNS, REWARDS, DISCOUNTS = torch.tensor([0.9, 0.35, 1.0]), torch.tensor([0.5, -0.25, 1.0]), torch.tensor([0.9, 0.9, 0.0])
FOLLOWING = torch.tensor([[[0.6, 0.2], [9.0, 9.0]], [[1.0, 1.2], [9.0, 9.0]], [[7.0, 7.0], [9.0, 9.0]]])  # [B, k, A]: head 2 there is of no use


def test_two_heads_by_hand():
    targets = head_targets(MSE(), FOLLOWING.unsqueeze(-1), RETURNS, REWARDS, DISCOUNTS)
    assert targets[0].tolist() == pytest.approx([0.9, 0.35, 1.0]) and targets[1].tolist() == pytest.approx([1.04, 0.83, 1.0])
    losses = head_losses(MSE(), PICKED.unsqueeze(-1), targets)
    assert losses.tolist() == pytest.approx([0.2075, 0.3795]) and losses.mean() == pytest.approx(0.2935)
    loss, running = scaled_loss(losses, torch.tensor([0.4, 0.5]))
    assert running.tolist() == pytest.approx([0.398075, 0.498795]) and loss == pytest.approx(0.6410461)
    assert head_losses(Huber(), PICKED.unsqueeze(-1), targets).tolist() == pytest.approx([0.10375, 0.18975])
    assert scaled_loss(losses, None)[0] == 1


def test_no_gradient_flows_through_targets_and_head_one_never_bootstraps():
    following, picked = FOLLOWING.unsqueeze(-1).clone().requires_grad_(), PICKED.unsqueeze(-1).clone().requires_grad_()
    scaled_loss(head_losses(MSE(), picked, head_targets(MSE(), following, RETURNS, REWARDS, DISCOUNTS)), None)[0].backward()
    assert following.grad is None and (picked.grad != 0).all()
    other = head_targets(MSE(), FOLLOWING.unsqueeze(-1) + 5, RETURNS, REWARDS, DISCOUNTS)
    assert torch.equal(other[0], RETURNS) and other[1][0] == pytest.approx(1.04 + 4.5) and other[1][2] == 1


def test_categorical_heads_project_returns_and_backups():
    """Atoms 0, 1, 2: a return of .5 is half on 0 and half on 1; r = 1 behind a certain 1 is certainly 2; beyond the range it is cut."""
    value = C51(low=0.0, high=2.0, bins=3)
    certain = 50 * torch.tensor([[[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]] * 2])
    targets = head_targets(value, certain, torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([1.0]))
    assert value.label(targets[0]).tolist() == [[0.5, 0.5, 0.0]] and targets[1][0].tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    uniform = torch.zeros(1, 2, 3)
    assert head_losses(value, uniform, targets).tolist() == pytest.approx([np.log(3)] * 2)


# ---- the learner

class Clock(gym.Env):
    """Four steps; observes the time; the reward is 1 for action t mod 2 at step t."""

    observation_space, action_space = gym.spaces.Box(0, 4, (1,), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([0.0], np.float32), {}

    def step(self, action):
        reward, self.t = float(action == self.t % 2), self.t + 1
        return np.array([self.t], np.float32), reward, False, self.t == 4, {}


def train(folder, *words, task=lambda: Clock(), steps=2, **options):
    return volvelle.train(sqirl_network.override(*SMALL).override(*words), task=task, folder=folder, steps=steps, **options)


def test_only_steps_of_random_play_are_stored_and_a_cut_is_an_end(tmp_path):
    learner = train(tmp_path / "run", "gamma=0.5", steps=3, strict=True).learner
    rows = len(learner.replay)
    assert rows == 8 * (4 + 3 + 2)
    t, to_go, rewards = (learner.replay.blocks.arrays[k][0, :rows, 0] for k in ("t", "to_go", "rewards"))
    for i, (start, stop) in enumerate([(0, 32), (32, 56), (56, 72)]):
        assert t[start:stop].min() == i and sorted(set(t[start:stop])) == list(range(i, 4))
    assert (learner.replay.blocks.arrays["terminated"][0, :rows, 0] == (t == 3)).all()
    for j in range(rows - 1):
        assert to_go[j] == rewards[j] + (0.5 * to_go[j + 1] if t[j] < 3 else 0)


def test_frozen_steps_are_left_alone_by_later_training(tmp_path):
    first = train(tmp_path / "one", steps=1).learner.module
    later = train(tmp_path / "two", steps=3).learner.module
    assert len(later.frozen) == 3 and torch.equal(later.frozen[0], first.frozen[0]) and not torch.equal(later.frozen[0], later.frozen[2])


def test_it_acts_by_its_clock_and_a_saved_policy_does_too(tmp_path):
    """The optimum of Clock needs another action at every step; here the network of all steps is one that sees nothing: only the frozen copies can tell."""
    made = train(tmp_path / "run", "episodes=64", "epochs=16", task=lambda: gym.wrappers.TransformObservation(Clock(), lambda x: 0 * x, Clock.observation_space), steps=4)
    module = made.learner.module
    for t in range(4):  # bias of the output layer alone decides
        module.frozen[t] = torch.nn.utils.parameters_to_vector(module.net.parameters()).detach() * 0
        module.frozen[t, -2 + t % 2] = 1.0
    assert made.learner.evaluate()["return"] == 4.0
    (tmp_path / "saved").mkdir()
    made.learner.policy().save(tmp_path / "saved")
    policy, memory, played = Policy.load(tmp_path / "saved"), None, []
    for _ in range(4):
        act = policy.act(np.zeros((1, 3, 1), np.float32), memory)
        memory = act.memory
        played.append(act.actions[0].tolist())
    assert played == [[0] * 3, [1] * 3, [0] * 3, [1] * 3]
    assert policy.forget(memory, 1).tolist() == [4, 0, 4]


@pytest.mark.parametrize("words", [[], ["depth=2", "separate=true", "average=0.9", "time=true"], ["depth=3", "dueling=true", "value=c51", "value.low=0", "value.high=4", "replay.factor=0.5"],
                                   ["value=huber", "scale_losses=false", "explore_share=0.5", "envs=4"]])
def test_every_form_trains_and_resumes_exactly(tmp_path, words):
    options = {"steps": 4, "checkpoint_every": 2, "task": "CartPole-v1" if "time=true" in words else (lambda: Clock())}
    whole = train(tmp_path / "whole", *words, **options, strict=True)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", *words, **options, progress=stop_at(3))
    volvelle.train(sqirl_network.override(*SMALL).override(*words), resume=tmp_path / "broken", folder=tmp_path / "broken", **options)
    one, other = (fingerprint(load_state(checkpoints(tmp_path / f)[-1])) for f in ("whole", "broken"))
    assert one == other and len(whole.learner.module.frozen) == (2 if "explore_share=0.5" in words else 4)


def test_it_stops_when_no_episode_lives_that_long_or_the_budget_is_spent(tmp_path):
    made = train(tmp_path / "run", "episodes=2", steps=40)
    assert made.result["steps"] == 4 + 11 and made.learner.finished
    assert train(tmp_path / "budget", "budget=40", steps=40).result["steps"] == 2


def test_one_step_more_of_value_iteration_avoids_the_trap(tmp_path):
    """Random play prefers the sure .4; one step of Q-iteration sees the way to 1. Likewise depth 1 opens a lock, whose worth random play does see."""
    words = ["episodes=200", "epochs=8", "evaluation.episodes=20", "replay.capacity=5000"]
    found = {k: train(tmp_path / str(k), *words, f"depth={k}", task=Played(base=Trap()), steps=2).result["metrics"]["return"] for k in (1, 2)}
    assert found == {1: pytest.approx(0.4), 2: pytest.approx(1.0)}
    assert train(tmp_path / "lock", *words, task=Played(base=Lock(length=3)), steps=3).result["metrics"]["return"] == 1.0


@pytest.mark.parametrize("words, task, says", [(["seeds=2"], None, "seeds=1"), (["episodes=3", "envs=2"], None, "multiple of envs"), (["replay.n_step=2"], None, "n_step"),
                                               (["dueling=true", "separate=true", "depth=2"], None, "choose one"), ([], "Pendulum-v1", "discrete actions"),
                                               (["time=true"], None, "declares no time limit")])
def test_what_makes_no_sense_is_refused(tmp_path, words, task, says):
    with pytest.raises(UserError, match=says):
        volvelle.train(sqirl_network.override(*SMALL[1:], *words), task=task or (lambda: Clock()), folder=tmp_path / "run", steps=1)
