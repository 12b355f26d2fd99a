"""bc, td3-bc, iql, xql, cql, awac: their numbers by hand, and that they beat imitation where imitation must fail."""

import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from helpers import stop_at
import torch
from gymnasium import spaces
from offline_data import counting

import volvelle
from volvelle.control.tasks import from_environment
from volvelle.core.errors import UserError
from volvelle.core.trainer import start
from volvelle.core.verbs import configure
from volvelle.offline.behaviours import Random
from volvelle.offline.data.collect import collect
from volvelle.offline.data.files import write_dataset
from volvelle.offline.losses import advantage_weights, conservative_gap, huber, scaled_policy_gradient
from volvelle.offline.maxima import expectile_loss, gumbel_loss
from volvelle.offline.methods.bc import best_episodes
from volvelle.offline.tasks import Generated, Recorded

near = lambda *x: pytest.approx(x if len(x) > 1 else x[0], abs=2e-5)  # noqa: E731
SMALL = ["network.hidden=[32]", "batch=16", "period=2", "evaluation.episodes=2"]
PENDULUM = Generated(quality="medium", steps=1000)


def agent_of(method, task=PENDULUM, *overrides):
    """(agent, a batch) of a freshly started run."""
    config = configure(method, task, overrides=[*SMALL, *overrides], device="cpu")
    _, learner = start(config, Path("nowhere"))
    return learner.agent, learner.sampler.draw()


# ---- numbers

def test_expectile_by_hand():
    assert expectile_loss(torch.tensor([-1.0, 2.0]), 0.7).tolist() == near(0.3, 2.8)


def test_gumbel_by_hand():
    assert gumbel_loss(torch.tensor([-1.0, 0.0, 2.0]), 1.0, 7.0).tolist() == near(0.049787, 0, 0.593994)
    assert gumbel_loss(torch.tensor([-3.0, -2.0]), 1.0, 7.0).tolist() == pytest.approx((5.5719, 3.0862), abs=1e-4)
    x = torch.tensor([1.0, 9.0], requires_grad=True)
    gumbel_loss(x, 1.0, 5.0).sum().backward()
    assert x.grad[1] == 0 and x.grad[0] != 0            # the exponent is cut at 5, and no gradient passes there


def test_weights_huber_gap_and_scaling_by_hand():
    assert advantage_weights(torch.tensor([0.5, 2.0]), 3.0, 100.0).tolist() == pytest.approx((4.4817, 100.0), abs=1e-3)
    assert huber(torch.tensor([2.0, 30.0, -30.0]), 20.0).tolist() == [2.0, 400.0, 400.0]
    assert float(conservative_gap(torch.tensor([1.0, 2.0, 0.0]), torch.tensor(1.0))) == near(1.40761)
    assert float(conservative_gap(torch.full((5,), 3.3), torch.tensor(3.3))) == near(math.log(5))
    q = torch.tensor([[1.0, 2.0, -3.0]])
    assert scaled_policy_gradient(7 * q).tolist() == pytest.approx(scaled_policy_gradient(q).tolist())


def test_the_best_episodes_are_those_with_the_highest_discounted_return():
    data = counting(lengths=(3, 5, 2))
    assert best_episodes(data, 0.34, 1.0).tolist() == [1] and best_episodes(data, 0.67, 1.0).tolist() == [0, 1]
    data.fields["rewards"][:] = 0
    data.fields["rewards"][[4 + 4, 10]] = 10, 1          # late in episode 1, early in episode 2
    assert best_episodes(data, 0.3, 0.1).tolist() == [2] and best_episodes(data, 0.3, 1.0).tolist() == [1]


# ---- the losses that the agents assemble

def test_td3_bc_does_not_depend_on_the_scale_of_q_and_pulls_in_units_of_the_range():
    agent, batch = agent_of("td3-bc")
    loss = agent.actor_loss(batch)
    action = agent.module(batch["obs"])
    pull = ((action - batch["actions"]) / 2).square().mean()              # Pendulum's actions reach from -2 to 2
    q = agent.critics.values(batch["obs"], action)[:, 0]
    assert loss.item() == pytest.approx((pull - 2.5 * q.mean() / q.abs().mean()).item(), rel=1e-5)
    with torch.no_grad():
        agent.critics.net.module.out.weight.mul_(5)
        agent.critics.net.module.out.bias.mul_(5)
    assert agent.actor_loss(batch).item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_leading_critic_is_the_first_one_and_takes_no_gradient(seeds):
    agent, batch = agent_of("td3-bc", PENDULUM, f"seeds={seeds}")
    for _ in range(3):
        agent.update(batch)
        assert torch.allclose(agent.critics.leading(batch["obs"], batch["actions"]), agent.critics.values(batch["obs"], batch["actions"])[:, 0], atol=1e-6)
    agent.actor_loss(batch).sum().backward()
    assert agent.critics.net.flat.grad.abs().sum() == 0 and agent.policy.flat.grad.abs().sum() > 0


def test_iql_regresses_rewards_and_values_and_stops_at_terminations():
    agent, batch = agent_of("iql")
    batch["discounts"] = batch["discounts"].clone()
    batch["discounts"][:, ::2] = 0
    following = agent.v(batch["next_obs"]).detach()
    target = batch["rewards"] + batch["discounts"] * following
    q = agent.critics.values(batch["obs"], batch["actions"])
    assert agent.critic_loss(batch, batch["actions"], following).item() == pytest.approx((q - target.unsqueeze(1)).square().mean(-1).sum().item(), rel=1e-5)
    assert torch.equal(target[:, ::2], batch["rewards"][:, ::2])
    lagged = agent.target_q(batch["obs"], batch["actions"])
    u = lagged - agent.v(batch["obs"])
    wanted = (torch.where(u < 0, 0.3, 0.7) * u.square()).mean()
    loss = agent.value_loss(batch, batch["actions"], lagged)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    assert agent.values.flat.grad.abs().sum() > 0 and agent.critics.net.flat.grad.abs().sum() == 0 and agent.policy.flat.grad.abs().sum() == 0


@pytest.mark.parametrize("method", ["iql", "xql"])
@pytest.mark.parametrize("fresh", [True, False])
def test_no_action_outside_the_batch_is_ever_valued(method, fresh):
    agent, batch = agent_of(method, PENDULUM, f"fresh={str(fresh).lower()}")
    asked = []
    for module in (agent.critics.net.module, agent.critics.target.module):
        module.register_forward_pre_hook(lambda m, args: asked.append(args[1]))
    before = agent.v(batch["obs"]).detach()
    made = agent.update(batch)
    assert asked and all(torch.equal(a, batch["actions"]) for a in asked)
    assert torch.equal(made["v"], before) is not fresh                    # the order of the two public codes


def test_cql_penalises_by_hand():
    agent, batch = agent_of("cql", PENDULUM, "samples=3")
    calls = []
    agent.critics.values = lambda obs, actions: calls.append((obs, actions)) or actions.sum(-1).unsqueeze(1).expand(-1, 2, -1)
    drawn = iter([(torch.full((1, 48, 1), 0.5), torch.full((1, 48), -0.3)), (torch.full((1, 48, 1), -1.0), torch.full((1, 48), 0.7))])
    agent._draw = lambda obs, noise, n: next(drawn)
    recorded = torch.zeros(1, 2, 16)
    gap = agent.conservative(batch, recorded, agent.critic_noise(batch))
    obs, actions = calls[0]
    uniform = actions.view(1, 16, 9)[..., :3]
    assert uniform.abs().max() <= 2 and torch.equal(obs.view(1, 16, 9, 3)[:, :, 4], batch["obs"])
    values = torch.cat([uniform + math.log(4), torch.full((1, 16, 3), 0.5 + 0.3), torch.full((1, 16, 3), -1.0 - 0.7)], -1)
    assert torch.allclose(gap, values.logsumexp(-1).unsqueeze(1).expand(-1, 2, -1), atol=1e-5)


def test_cql_leaves_entropy_out_of_the_backup_and_tunes_the_multiplier():
    agent, batch = agent_of("cql", PENDULUM, "samples=2", "weight=0.0")
    noise = agent.critic_noise(batch)
    losses, made = agent.critic_loss(batch, noise, agent.alpha)
    target, (actions, _) = made["target"], agent.head.draw(agent.module(batch["next_obs"]), noise["target"])
    assert torch.allclose(target, batch["rewards"] + batch["discounts"] * agent.critics.target_values(batch["next_obs"], actions).amin(1))
    assert torch.allclose(losses, (agent.critics.values(batch["obs"], batch["actions"]) - target.unsqueeze(1)).square(), rtol=1e-4)
    tuned, batch = agent_of("cql", PENDULUM, "samples=2", "threshold=-100.0")
    before = tuned.multiplier.module.log.item()
    tuned.update(batch)
    assert tuned.multiplier.module.log.item() > before                    # the gap is above the threshold: the multiplier must rise


def test_cqls_target_may_take_the_mode():
    agent, batch = agent_of("cql", PENDULUM, "samples=2", "mode_target=true")
    made = agent.critic_loss(batch, agent.critic_noise(batch), agent.alpha)[1]
    value = agent.critics.target_values(batch["next_obs"], agent.module.best(batch["next_obs"])).amin(1)
    assert torch.allclose(made["target"], batch["rewards"] + batch["discounts"] * value)
    with pytest.raises(UserError, match="mode_target=true: the mode is one action"):
        agent_of("cql", PENDULUM, "mode_target=true", "max_target=true")


def test_awac_compares_with_the_policys_own_actions():
    agent, batch = agent_of("awac", PENDULUM, "samples=4")
    agent.act = lambda obs: torch.zeros(1, obs.shape[1], 1)
    wanted = agent.critics.values(batch["obs"], batch["actions"]).amin(1) - agent.critics.values(batch["obs"], torch.zeros(1, 16, 1)).amin(1)
    assert torch.allclose(agent.advantage(batch, batch["actions"]), wanted, atol=1e-5) and not agent.advantage(batch, batch["actions"]).requires_grad


# ---- learning: from uniformly random actions, imitation gets the middle, and these must find the best

class Reach(gym.Env):
    """One step; the reward is -(action - observation)^2."""

    observation_space, action_space = spaces.Box(-1, 1, (1,), np.float32), spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = self.np_random.uniform(-0.8, 0.8)
        return np.array([self.goal], np.float32), {}

    def step(self, action):
        return np.array([self.goal], np.float32), -float((action[0] - self.goal) ** 2), True, False, {}


class Pick(gym.Env):
    """One step; the reward is 1 for the action that the observation shows."""

    observation_space, action_space = spaces.Discrete(3), spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.right = int(self.np_random.integers(3))
        return self.right, {}

    def step(self, action):
        return self.right, float(action == self.right), True, False, {}


def recorded(env, folder):
    world = from_environment(env)
    path = write_dataset(collect(world, Random(), "random", 2000), folder / env.__name__)
    return Recorded(path=str(path), env=world)


FAST = ["network.hidden=[64]", "batch=64", "period=1500", "evaluation.episodes=40"]
RATES = ["actor_optimiser.lr=3e-3", "critic_optimiser.lr=3e-3"]


@pytest.mark.parametrize("method, overrides, bound", [
    ("bc", ["head=none", "optimiser.lr=3e-3"], None), ("td3-bc", [*RATES, "weight=20"], -0.06), ("iql", [*RATES, "value_optimiser.lr=3e-3", "temperature=10"], -0.1),
    ("xql", [*RATES, "value_optimiser.lr=3e-3", "maximum.beta=0.5", "temperature=10"], -0.1), ("cql", [*RATES, "weight=0.1", "samples=4", "period=600"], -0.06),
    ("awac", [*RATES, "lam=0.1"], -0.1)], ids=lambda v: v if isinstance(v, str) else None)
def test_continuous(method, overrides, bound, tmp_path):
    words = [w for w in FAST if w.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    found = volvelle.train(method, task=recorded(Reach, tmp_path), folder=tmp_path / "run", overrides=[*words, *overrides], steps=1).result["metrics"]
    assert found["return"] > bound if bound is not None else found["return"] < -0.1, found     # imitation stands in the middle: -E goal^2 = -0.21


@pytest.mark.parametrize("method, overrides", [("iql", [*RATES, "value_optimiser.lr=3e-3"]), ("cql", ["critic_optimiser.lr=3e-3", "weight=0.5"]), ("awac", [*RATES, "lam=0.1"])],
                         ids=lambda v: v if isinstance(v, str) else None)
def test_discrete(method, overrides, tmp_path):
    found = volvelle.train(method, task=recorded(Pick, tmp_path), folder=tmp_path / "run", overrides=[*[w for w in FAST if "period" not in w], "period=500", *overrides], steps=1)
    assert found.result["metrics"]["return"] > 0.95


def test_rewards_must_be_there(tmp_path):
    path = write_dataset(counting(rewards=False), tmp_path / "set.npz")
    with pytest.raises(UserError, match="needs the field 'rewards'"):
        volvelle.train("iql", task=f"offline:{path}", folder=tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="learns a return distribution"):
        volvelle.train("iql", task=PENDULUM, folder=tmp_path / "run", overrides=["value=c51"], steps=1)


@pytest.mark.parametrize("method", ["td3-bc", "iql", "xql", "cql", "awac"])
def test_resumes_exactly(method, tmp_path):
    from volvelle.core.state import fingerprint, load_state
    from volvelle.core.trainer import checkpoints

    options = dict(task=PENDULUM, overrides=[*SMALL, "seeds=2"], steps=4, checkpoint_every=2)
    volvelle.train(method, folder=tmp_path / "whole", strict=True, **options)
    with pytest.raises(KeyboardInterrupt):
        volvelle.train(method, folder=tmp_path / "broken", progress=stop_at(3), strict=True, **options)
    volvelle.train(resume=tmp_path / "broken")
    assert fingerprint(load_state(checkpoints(tmp_path / "whole")[-1])) == fingerprint(load_state(checkpoints(tmp_path / "broken")[-1]))
