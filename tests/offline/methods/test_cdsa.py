"""cdsa and the policies it is built on: numbers by hand, frozen bases, and one line for what does not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch

import volvelle
from volvelle.control.networks import reset
from volvelle.control.policy import Policy
from volvelle.control.spaces import Actions, Layout, Spec
from volvelle.core.errors import UserError
from volvelle.core.statistics import tail
from volvelle.core.trainer import start
from volvelle.core.verbs import configure
from volvelle.offline.hazards import Detour, PointDetour, straight
from volvelle.offline.methods.cdsa import CDSA, TOP, Corrected, StatePairs, denoising_loss, steps
from volvelle.offline.methods.td3_bc import td3_bc
from volvelle.offline.tasks import Generated

near = lambda *x: pytest.approx(x if len(x) > 1 else x[0], abs=2e-5)  # noqa: E731
SMALL = ["network.hidden=[32]", "batch=16", "period=2", "evaluation.episodes=2"]
PENDULUM = Generated(quality="medium", steps=1000)
FOUR = torch.ones(1, 4, 1)


def learner(recipe=TOP, task="detour-top", *overrides):
    return start(configure(recipe, task, overrides=overrides, device="cpu"), Path("nowhere"))[1]


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cdsa") / "base"
    volvelle.train(td3_bc, task=PENDULUM, steps=1, overrides=SMALL, folder=folder, device="cpu")
    return folder


# ---- denoising score matching

def test_denoising_loss_by_hand():
    loss = denoising_loss(lambda x, sigma: -x / 2, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    assert float(loss) == near(0.25)
    two = denoising_loss(lambda x, sigma: -x / 2, torch.zeros(1, 3, 2), torch.ones(1, 3, 1), torch.ones(1, 3, 2))
    assert float(two) == near(0.5)                                        # summed over dimensions, mean over the batch


def test_the_least_loss_is_not_zero():
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(1, 200_000, 1, generator=g), torch.randn(1, 200_000, 1, generator=g)
    best = denoising_loss(lambda x, sigma: -x / (1 + sigma**2), x, torch.ones(1, 1, 1), z)
    assert float(best) == pytest.approx(0.5, abs=0.01)                    # 1 / (1 + sigma^2); five standard errors are below 0.008
    assert float(denoising_loss(lambda x, sigma: -0.8 * x / (1 + sigma**2), x, torch.ones(1, 1, 1), z)) > float(best)


def test_a_score_trained_on_normal_data_is_that_of_normal_data():
    spec = Spec(Layout(1), Actions((), (-5.0,), (5.0,), False))
    module = Corrected(CDSA(base=TOP.base), spec, 1)
    module.mean.zero_()
    generator = torch.Generator().manual_seed(0)
    reset(module, [generator])
    adam = torch.optim.Adam(module.score_net.parameters(), lr=2e-3)
    for _ in range(600):
        x, z = torch.randn(1, 512, 2, generator=generator), torch.randn(1, 512, 2, generator=generator)
        sigma = 0.05 * (torch.rand(1, 512, 1, generator=generator) * np.log(20)).exp()
        loss = denoising_loss(module.score, x, sigma, z).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    at = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]])
    made = module.score(at, torch.ones(1, 3, 1))
    assert made[0, 0, 0].item() == pytest.approx(-1, abs=0.2) and made[0, 1, 1].item() == pytest.approx(-1, abs=0.2) and made[0, 2, 0].item() == pytest.approx(0.5, abs=0.2)


def test_one_step_lands_on_a_single_point_of_data():
    m, x, sigma = torch.tensor([[[0.3, -1.2]]]), torch.tensor([[[5.0, 2.0]]]), 0.4
    score = (m - x) / sigma**2
    assert (x + steps(score, sigma, "step")).flatten().tolist() == near(0.3, -1.2)
    assert torch.equal(steps(score, sigma, "raw"), score) and steps(score, sigma, "unit").norm().item() == near(1.0)


# ---- the correction, with an exact score and an exact inverse model of s' = s + B a

B = torch.tensor([[0.05, 0.01], [0.0, 0.04]])


def exact(centre=(0.0, 0.0, 0.0, 0.0), **fields):
    """A corrector whose data have one point, with the inverse model of a linear system in place of its network."""
    module = Corrected(TOP(**fields), Spec(Layout(2), Actions((), (-1.0, -1.0), (1.0, 1.0), False)), 1)
    module.mean.zero_()
    module.reach.fill_(fields.get("reach") or 1.0)
    module.score = lambda x, sigma: (torch.tensor(centre) - x) / sigma**2
    module.inverse = lambda states, change: change @ torch.linalg.inv(B).T
    return module


def test_the_state_part_asks_for_the_action_that_makes_the_displacement():
    module = exact((0.03, -0.02, 0.5, 0.0), action_step=0.0, state_step=1.0)
    own, back = module.correction(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 0.2)
    wanted = torch.linalg.inv(B) @ torch.tensor([0.03, -0.02])
    assert back.flatten().tolist() == near(*wanted.tolist()) and own.flatten().tolist() == near(0.5, 0.0)
    moved = module.corrected(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)).flatten()
    assert moved.tolist() == near(*wanted.clamp(-1, 1).tolist())
    assert module.corrected(torch.zeros(1, 1, 2), torch.full((1, 1, 2), 0.1)).flatten().tolist() == near(*(wanted + 0.1).clamp(-1, 1).tolist())


def test_displacements_stay_within_reach_and_actions_within_the_box():
    module = exact((9.0, -9.0, 9.0, -9.0), reach=0.01, action_step=0.5)
    _, back = module.correction(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 0.2)
    assert (back.flatten() @ B.T).tolist() == near(0.01, -0.01)
    assert module.corrected(torch.zeros(1, 5, 2), torch.zeros(1, 5, 2)).flatten(1).abs().max() == 1


@pytest.mark.parametrize("gradient", ["step", "raw", "unit"])
def test_nothing_is_corrected_where_the_data_are_densest(gradient):
    module = exact((0.2, 0.3, 0.4, -0.5), gradient=gradient)
    at, action = torch.tensor([[[0.2, 0.3]]]), torch.tensor([[[0.4, -0.5]]])
    assert module.corrected(at, action).flatten().tolist() == near(0.4, -0.5)


def test_scales_are_undone():
    module = exact((1.0, 0.0, 1.0, 0.0), action_step=1.0, state_step=0.0)
    module.std.copy_(torch.tensor([1.0, 1.0, 0.5, 1.0]))
    assert module.correction(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 0.2)[0].flatten().tolist() == near(0.5, 0.0)
    raw = exact((0.02, 0.0, 0.02, 0.0), gradient="raw")
    raw.std.copy_(torch.tensor([1.0, 1.0, 0.5, 1.0]))
    assert raw.correction(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 0.2)[0].flatten().tolist() == near(1.0, 0.0)   # 0.02 / 0.04 / 0.5


def test_readings_of_the_correction():
    module = exact((0.0, 0.0, 1.0, 0.0), action_step=0.5, keep=0.5, state_step=0.0)
    at, a = torch.zeros(1, 1, 2), torch.tensor([[[0.4, 0.0]]])
    assert module.corrected(at, a).flatten().tolist() == near(0.5, 0.0)              # 0.5 * 0.4 + 0.5 * (1 - 0.4)
    assert exact((0.0, 0.0, 1.0, 0.0), action_step=0.5, state_step=0.0, rounds=2).corrected(at, a).flatten().tolist() == near(0.85, 0.0)
    shy = exact((0.0, 0.0, 1.0, 0.0), action_step=0.5, state_step=0.0, threshold=0.61)
    assert shy.corrected(at, a).flatten().tolist() == near(0.4, 0.0) and shy.corrected(at, a - 0.1).flatten().tolist() == near(0.65, -0.05)
    around = exact((0.03, 0.0, 0.0, 0.0), through="residual")
    around.forward = lambda states, actions: actions @ B.T
    around.inverse = lambda states, change: change @ torch.linalg.inv(B).T + 7.0     # what is constant cancels
    assert around.correction(at, a, 0.2)[1].flatten().tolist() == near(*(torch.linalg.inv(B) @ torch.tensor([0.03, 0.0])).tolist())


def test_several_rounds_ask_at_falling_noise():
    module, asked = exact(rounds=3, level=0.4, sigma_low=0.1), []
    score = module.score
    module.score = lambda x, sigma: asked.append(float(sigma[0, 0, 0])) or score(x, sigma)
    module.corrected(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    assert asked == near(0.4, 0.2, 0.1)


# ---- the base policy stays as it is

def test_without_steps_the_base_policy_comes_back_bit_for_bit(base_run):
    made = learner(CDSA(), PENDULUM, f"base.path={base_run}", "action_step=0", "state_step=0", "batch=16")
    made.learn()
    obs = np.random.default_rng(0).standard_normal((1, 50, 3), np.float32)
    assert torch.equal(made.policy().act(obs).actions, Policy.load(base_run / "policy").act(obs).actions)


def test_the_base_takes_no_gradient_and_the_rest_learns(base_run):
    made = learner(CDSA(), PENDULUM, f"base.path={base_run}", "batch=16", "through=residual")
    module = made.agent.module
    before = {k: v.clone() for k, v in module.base.policy.module.state_dict().items()}
    nets = {k: t.flat.detach().clone() for k, t in made.agent.fitted.items()}
    for _ in range(3):
        made.learn()
    own = module.base.policy.module
    assert all(p.grad is None and not p.requires_grad for p in own.parameters()) and all(torch.equal(before[k], v) for k, v in own.state_dict().items())
    assert set(nets) == {"score", "inverse", "forward"} and all(not torch.equal(nets[k], t.flat) for k, t in made.agent.fitted.items())
    assert not {id(p) for p in own.parameters()} & {id(p) for p in module.parameters()}


def test_a_corrected_policy_is_saved_with_its_base(base_run, tmp_path):
    made = volvelle.train(CDSA(), task=PENDULUM, steps=1, overrides=[f"base.path={base_run}", "batch=16", "period=2", "evaluation.episodes=2"], folder=tmp_path / "run", device="cpu")
    policy = made.learner.policy()
    obs = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(0))
    moved = base_run.rename(base_run.parent / "elsewhere")
    try:
        again = Policy.load(tmp_path / "run" / "policy")
        assert torch.equal(again.act(obs).actions, policy.act(obs).actions)
        twice = learner(CDSA(), PENDULUM, f"base.path={tmp_path / 'run'}", "action_step=0", "state_step=0")   # a corrected policy can be corrected again
        assert torch.equal(twice.policy().act(obs).actions, policy.act(obs).actions)
    finally:
        moved.rename(base_run)
    found = made.result["metrics"]
    assert found["return_cvar"] <= found["return_var"] <= found["return_median"]


@pytest.mark.parametrize("overrides, says", [
    ([], "base.path: which policy"), (["base.path=nowhere"], "no policy there"), (["level=2"], "learnt from 0.05 to 1.0"), (["normalise_observations=true"], "accepted: false")])
def test_what_does_not_fit_is_one_line(overrides, says):
    with pytest.raises(UserError, match=says):
        learner(CDSA(), PENDULUM, *overrides)


def test_a_base_of_another_shape_is_refused(base_run):
    with pytest.raises(UserError, match="was made for observations of 3 numbers"):
        learner(CDSA(), "detour-top", f"base.path={base_run}")
    with pytest.raises(UserError, match="holds 1 seeds"):
        learner(CDSA(), PENDULUM, f"base.path={base_run}", "seeds=2")
    with pytest.raises(UserError, match="continuous actions"):
        learner(TOP, "cartpole-medium")


# ---- the world of the claim, and tails

def test_the_hazard_lies_on_the_straight_way():
    env = PointDetour(noise=0.0)
    obs, _ = env.reset(seed=0)
    total, over = 0.0, False
    while not over:
        obs, reward, over, _, info = env.step(straight(obs[None])[0])
        total += reward
    assert total == -info["hazard"] and info["hazard"] == 20 and info["success"] == 1
    assert Detour().measure({"success": np.array([1.0, 0.0])}) == {"success": 0.5}


def test_the_tail_by_hand():
    assert tail(np.arange(11.0), 0.1) == (1.0, 0.5) and tail(np.array([3.0, 3.0, 3.0]), 0.1) == (3.0, 3.0)


def test_state_pairs_are_neighbours():
    made = learner(TOP, "detour-top", "batch=64")
    batch = made.sampler.draw()
    assert isinstance(made.part.sampler, StatePairs) and set(batch) == {"obs", "next_obs", "actions"}
    gap = (batch["next_obs"] - batch["obs"]) / 0.05 - batch["actions"]                # actuator noise of deviation 0.2 alone
    assert gap.abs().max() < 1.2 and gap.std().item() == pytest.approx(0.2, abs=0.06)


def test_the_degree_of_caution_changes_without_retraining(tmp_path):
    """One run, evaluated with other steps: no correction is the base policy, and what was learnt is not for change."""
    made = volvelle.train("cdsa", task="detour-top", steps=1, seed=0, folder=tmp_path / "run", overrides=["base=volvelle.offline.hazards:straight", "period=400", "evaluation.episodes=5"])
    same = volvelle.evaluate(tmp_path / "run")
    assert same["return"] == pytest.approx(made.result["metrics"]["return"])
    plain = volvelle.evaluate(tmp_path / "run", overrides=["action_step=0", "state_step=0"])
    bare = volvelle.train("cdsa", task="detour-top", steps=1, seed=0, folder=tmp_path / "bare",
                          overrides=["base=volvelle.offline.hazards:straight", "period=1", "evaluation.episodes=5", "action_step=0", "state_step=0"])
    assert plain["return"] == bare.result["metrics"]["return"] < same["return"]
    with pytest.raises(UserError, match="sigma_high: a trained density-correction is evaluated as it was trained; an evaluation may change evaluation, action_step, state_step"):
        volvelle.evaluate(tmp_path / "run", overrides=["sigma_high=2"])
