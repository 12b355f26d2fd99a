"""v-gps: labels, calibration and choice by hand; any policy is steered, none is changed."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import volvelle
from volvelle.control.policy import Policy
from volvelle.control.stacked import Streams
from volvelle.core.errors import UserError
from volvelle.core.trainer import start
from volvelle.core.verbs import configure
from volvelle.offline.instructions import TARGETS, HashedWords, Instructed, Obedient
from volvelle.offline.methods.bc import BC
from volvelle.offline.methods.cql import CQL
from volvelle.offline.methods.iql import IQL
from volvelle.offline.methods.v_gps import SMALL, VGPS, CalQL, Demonstrations, calibrated, discounted, labels
from volvelle.offline.steering import Steering, Units, choose
from volvelle.offline.tasks import Generated

near = lambda *x: pytest.approx(x if len(x) > 1 else x[0], abs=1e-4)  # noqa: E731
DATA = Generated(env=Instructed(), behaviour=Obedient(noise=(0.3,)), quality="expert", steps=600)
QUICK = ["batch=32", "period=2", "evaluation.episodes=4"]


def fumble(observations):
    """A deterministic policy of the user's."""
    return np.tanh(observations[:, 2:4])


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v-gps") / "base"
    volvelle.train(BC(network=SMALL.critic.network), task=DATA, steps=1, overrides=QUICK, folder=folder, device="cpu")
    return folder


def learner(recipe, base_run, *overrides, task=DATA):
    return start(configure(recipe, task, overrides=[f"base.path={base_run}", *QUICK, *overrides], device="cpu"), Path("nowhere"))[1]


def states(count=40):
    return np.random.default_rng(1).standard_normal((1, count, 18), np.float32)


# ---- labels, calibration, choice

def test_labels_by_hand():
    rewards, masks, returns = labels(6, 3, 0.98)
    assert rewards.tolist() == [-1, -1, -1, 0, 0, 0] and masks.tolist() == [1, 1, 1, 0, 0, 0]
    assert returns.tolist() == near(-2.9404, -1.98, -1.0, 0, 0, 0)
    assert [x.tolist() for x in labels(2, 3, 0.98)] == [[0, 0], [0, 0], [0, 0]]
    assert discounted(np.array([1.0, 2.0]), np.array([1.0, 0.0]), 0.5).tolist() == [2.0, 2.0]


def test_calibration_lifts_policy_actions_alone():
    values = torch.tensor([-4.0, -1.0, -3.0, -2.5, -5.0, -1.5])
    assert calibrated(values, torch.tensor(-2.2), 2).tolist() == near(-4, -1, -2.2, -2.2, -2.2, -1.5)
    assert torch.equal(calibrated(values, torch.tensor(-9.0), 2), values)


def critic_agent(recipe):
    learned = start(configure(VGPS(base=lambda observations: observations, critic=recipe, batch=1), DATA, device="cpu"), Path("nowhere"))[1]
    return learned.agent.inner, learned.sampler.draw()


@pytest.mark.parametrize("fields, wanted", [({}, 2.9190), ({"calibrate": False}, 0.9037 + 2), ({"importance": False}, None)])
def test_the_conservative_term_by_hand(fields, wanted):
    agent, batch = critic_agent(CalQL(samples=2, network=SMALL.critic.network, **fields))
    draws = iter([(torch.zeros(1, 2, 2), torch.tensor([[0.2, -1.0]])), (torch.zeros(1, 2, 2), torch.tensor([[-0.5, 0.3]]))])
    agent._draw = lambda observations, noise, n: next(draws)                                 # the policy at s', then at s
    q = torch.tensor([-4.0, -1.0, -5.0, -1.5, -3.0, -2.5])
    agent.critics.values = lambda obs, actions: q.expand(1, 2, 6)
    batch["returns"] = torch.tensor([[-2.2]])
    gap = agent.conservative(batch, torch.full((1, 2, 1), -2.0), agent.critic_noise(batch)).flatten().tolist()
    lifted = torch.tensor([-4.0, -1.0, -2.2, -1.5, -2.2, -2.2])
    if wanted is None:                                                                # the recorded action joins in, and their number is taken off
        wanted = float(torch.cat([lifted, torch.tensor([-2.0])]).logsumexp(0)) - math.log(7) + 2
    elif not agent.part.calibrate:
        wanted = float((q - torch.tensor([math.log(0.25)] * 2 + [0.2, -1.0, -0.5, 0.3])).logsumexp(0)) + 2
    assert gap == near(wanted, wanted)


def test_the_backup_is_the_best_sample_of_the_smaller_critic():
    agent, batch = critic_agent(CalQL(samples=2, network=SMALL.critic.network))
    agent.critics.target_values = lambda obs, actions: torch.tensor([[[1.0, 5.0], [2.0, 3.0]]])
    batch["rewards"], batch["discounts"] = torch.tensor([[-1.0]]), torch.tensor([[0.98]])
    _, made = agent.critic_loss(batch, agent.critic_noise(batch), agent.alpha)
    assert made["target"].item() == near(-1 + 0.98 * 3)                                       # not 5, nor min(5, 3) of the means


def test_choice_by_hand():
    values = torch.tensor([-3.0, -1.0, -2.0, -1.5])
    assert choose(values, 0, None).item() == 1
    gumbel = torch.from_numpy(-np.log(np.random.default_rng(0).standard_exponential((200_000, 4))))
    for beta, wanted in ((1.0, (0.0641, 0.4740, 0.1744, 0.2875)), (0.1, (0.0, 0.99326, 4.5e-5, 0.00669)), (math.inf, (0.25,) * 4)):
        found = torch.bincount(choose(values.expand(200_000, 4), beta, gumbel), minlength=4) / 200_000
        assert found.tolist() == pytest.approx(wanted, abs=0.006), beta                # five standard errors of a share


def test_units_by_hand():
    units = Units.bounds((-2.0, 0.0), (2.0, 1.0))
    action = torch.tensor([0.5, -1.0])
    assert units.physical(action).tolist() == near(1.0, 0.0) and torch.equal(units.normalised(units.physical(action)), action)
    assert torch.equal(Units((0.0, 0.0), (1.0, 1.0)).physical(action), action)
    mean = Units((1.0, 1.0), (0.5, 0.5))
    assert Units.bounds((-2.0, 0.0), (2.0, 1.0)).normalised(mean.physical(action)).tolist() == near(0.625, 0.0)    # policy's, physical, critic's


# ---- steering

def test_the_action_is_the_best_of_the_base_policys_samples(base_run):
    made = learner(VGPS(critic=SMALL.critic), base_run, "candidates=7")
    module, seen = made.agent.module, torch.from_numpy(states())
    samples = module.base.propose(seen, 7, Streams.fixed("x", [0]))
    assert samples.shape == (1, 40, 7, 2) and samples.std(2).min() > 0
    picked = module.greedy(seen, Streams.fixed("x", [0]))
    q = torch.stack([made.agent.inner.critics.target_values(seen, samples[:, :, k]).amin(1) for k in range(7)], -1)
    assert torch.equal(picked, samples[0, torch.arange(40), q[0].argmax(-1)][None])
    mean = learner(VGPS(critic=SMALL.critic), base_run, "candidates=7", "score=mean").agent
    q = torch.stack([mean.inner.critics.target_values(seen, samples[:, :, k]).mean(1) for k in range(7)], -1)
    assert torch.allclose(mean.module.values(seen, samples), q, atol=1e-5)


def test_one_candidate_is_the_base_policy(base_run):
    made = learner(VGPS(critic=SMALL.critic), base_run, "candidates=1", "beta=1")
    own, base = made.policy(), Policy.load(base_run / "policy")
    for _ in range(3):                                                                # no random number but the base's is drawn
        assert torch.equal(own.act(states()).actions, base.act(states(), explore=True).actions)


def test_the_base_is_never_trained_and_the_critic_is(base_run):
    made = learner(VGPS(critic=SMALL.critic), base_run)
    module = made.agent.module
    before = {k: v.clone() for k, v in module.base.policy.module.state_dict().items()}
    critic = made.agent.inner.critics.net.flat.detach().clone()
    for _ in range(3):
        made.learn()
    assert all(torch.equal(before[k], v) and not v.requires_grad for k, v in module.base.policy.module.state_dict(keep_vars=True).items())
    assert all(p.grad is None for p in module.base.policy.module.parameters()) and not torch.equal(critic, made.agent.inner.critics.net.flat)
    assert module.critic is made.agent.inner.critics.target.module                    # the lagged critic scores


class Generalist:
    """A policy outside the library, with actions of its own units, in chunks."""

    def __init__(self, shape):
        self.shape, self.rng = shape, np.random.default_rng(0)

    def sample_actions(self, observation, instruction, n):
        self.made = self.rng.uniform(-1, 1, (n, *self.shape)).astype(np.float32)
        return self.made


def test_a_saved_run_steers_any_policy_with_the_same_critic(base_run, tmp_path):
    volvelle.train(VGPS(critic=SMALL.critic), task=DATA, steps=1, overrides=[f"base.path={base_run}", *QUICK], folder=tmp_path / "run", device="cpu")
    saved = Policy.load(tmp_path / "run" / "policy")
    before = {k: v.clone() for k, v in saved.module.state_dict().items()}
    embedder, units, seen = HashedWords(width=16), Units((0.0, 0.0), (0.5, 0.5)), np.zeros(2, np.float32)
    for shape in ((2,), (4, 2)):
        policy = Generalist(shape)
        made = Steering(saved, policy, embedder, units)(seen, next(iter(TARGETS)))
        first = torch.from_numpy(policy.made.reshape(10, -1, 2)[:, 0]) * 0.5
        whole = torch.from_numpy(np.concatenate([seen, embedder.encode([next(iter(TARGETS))])[0]]))[None, None]
        assert np.array_equal(made, policy.made[int(saved.module.values(whole, first[None, None]).argmax())])
    assert all(torch.equal(before[k], v) for k, v in saved.module.state_dict().items())
    again = volvelle.train(VGPS(critic=SMALL.critic, base=fumble), task=DATA, steps=1, overrides=QUICK, folder=tmp_path / "other", device="cpu")
    seen = states()
    assert np.allclose(again.learner.policy().act(seen).actions[0].numpy(), fumble(seen[0]), atol=1e-6)    # all samples alike: nothing to choose
    with pytest.raises(UserError, match="one seed"):
        Steering(Policy.load(base_run / "policy"), Generalist((2,)))


@pytest.mark.parametrize("critic", [CalQL(network=SMALL.critic.network), CQL(network=SMALL.critic.network), IQL(network=SMALL.critic.network)])
def test_every_critic_learns_and_scores(base_run, critic):
    made = learner(VGPS(critic=critic), base_run, "primitives=[[1, 0]]", "candidates=3", "seeds=1", "beta=0.5")
    assert all(math.isfinite(v) for v in made.step().values())
    module, seen = made.agent.module, torch.from_numpy(states())
    options = module.candidates(seen, Streams.fixed("x", [0]))
    assert options.shape == (1, 40, 4, 2) and torch.equal(options[0, :, 3], torch.tensor([[1.0, 0.0]]).expand(40, 2))
    picked = module.greedy(seen, Streams.fixed("x", [0]))
    assert ((options - picked.unsqueeze(2)).abs().amax(-1) == 0).any(2).all()


def test_recorded_rewards_can_stand_in_for_labels(base_run):
    made = learner(VGPS(critic=SMALL.critic), base_run, "sampler.recorded=true")
    data, batch = made.data, made.sampler.draw()
    rows = batch["rows"].numpy()
    assert np.array_equal(batch["rewards"].numpy(), data.fields["rewards"][rows]) and np.allclose(batch["discounts"], 0.98 * (1 - data.fields["terminated"][rows]))
    assert np.allclose(batch["returns"], (-(1 - 0.98 ** np.maximum(data.lasts[data.episode_of[rows]] - rows - 1, 0)) / 0.02), atol=1e-3)


@pytest.mark.parametrize("overrides, says", [
    (["critic=value-guided"], "accepted: calibrated-q, conservative-q, implicit-q"), (["critic.gamma=0.5"], "accepted: gamma=0.5 instead"),
    (["primitives=[[1]]"], "actions have 2 numbers"), (["critic.sampler=transitions"], "needs returns")])
def test_what_does_not_fit_is_one_line(base_run, overrides, says):
    with pytest.raises(UserError, match=says):
        learner(VGPS(), base_run, *overrides)


def test_discrete_actions_are_refused():
    with pytest.raises(UserError, match="continuous actions"):
        start(configure(VGPS(base=fumble, sampler=Demonstrations(recorded=True)), "cartpole-medium", device="cpu"), Path("nowhere"))


# ---- instructions

def test_embedded_texts_are_unit_vectors_that_tell_texts_apart():
    made = HashedWords(width=16).encode(list(TARGETS))
    assert np.linalg.norm(made, axis=1).tolist() == near(1, 1, 1, 1) and np.array_equal(made, HashedWords(width=16).encode(list(TARGETS)))
    assert (made @ made.T)[~np.eye(4, dtype=bool)].max() < 0.95


@pytest.mark.slow
def test_the_critic_listens_to_the_instruction(base_run):
    """With the instructions shuffled over rows, the recorded actions are worth less."""
    made = learner(SMALL, base_run, task="instructed-expert")
    for _ in range(800):
        made.learn()
    batch = made.sampler.draw()
    obs, shuffled = batch["obs"], batch["obs"].clone()
    shuffled[..., 2:] = obs[:, torch.randperm(obs.shape[1], generator=torch.Generator().manual_seed(0)), 2:]
    q = lambda x: made.agent.inner.critics.target_values(x, batch["actions"]).amin(1).mean().item()  # noqa: E731
    assert q(obs) > q(shuffled) + 0.5
