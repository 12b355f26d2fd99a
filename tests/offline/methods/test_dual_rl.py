"""Divergences and duals against the problems they come from, f-DVL's numbers by hand, and the methods it contains."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import volvelle
from volvelle.core.errors import UserError
from volvelle.core.trainer import start
from volvelle.core.verbs import configure
from volvelle.offline.divergences import ChiSquare, ReverseKL, TotalVariation, dual_q, dual_v, mixture_chi_square, mixture_dual_q
from volvelle.offline.losses import gradient_excess
from volvelle.offline.maxima import expectile_loss, gumbel_loss
from volvelle.offline.methods.dual_rl import ChiSquareMaximum, TotalVariationMaximum, noisy_grid
from volvelle.offline.tasks import Generated

SMALL = ["network.hidden=[32]", "value_network.hidden=[32]", "batch=16", "period=2", "evaluation.episodes=2"]
PENDULUM = Generated(quality="medium", steps=1000)
ALL = [ChiSquare(), TotalVariation(), ReverseKL()]
double = lambda *x: torch.tensor(x, dtype=torch.float64)  # noqa: E731


def agent_of(method, task=PENDULUM, *overrides, small=SMALL):
    """(agent, a batch) of a freshly started run."""
    _, learner = start(configure(method, task, overrides=[*small, *overrides], device="cpu"), Path("nowhere"))
    return learner.agent, learner.sampler.draw()


# ---- divergences

@pytest.mark.parametrize("f", ALL, ids=lambda f: f.part_name)
def test_conjugates_are_the_maxima_they_are_named_for(f):
    w = torch.linspace(0, 30, 300_001, dtype=torch.float64)
    for x in (-3.0, -2.0, -0.7, -0.2, 0.3, 1.5 if f.part_name != "total-variation" else 0.49):
        best = (w * x - f.generator(w)).max()
        assert float(f.positive_conjugate(double(x))) == pytest.approx(float(best), abs=1e-6)
        assert float(f.ratio(double(x))) == pytest.approx(float(w[(w * x - f.generator(w)).argmax()]), abs=2e-3)
    assert float(f.generator(double(1.0))) == 0


def test_closed_forms_by_hand():
    x = double(-4, -2, 0, 2)
    assert ChiSquare().conjugate(x).tolist() == [0, -1, 0, 3] and ChiSquare().positive_conjugate(x).tolist() == [-1, -1, 0, 3]
    assert ChiSquare().surrogate(x).tolist() == [0, 0, 0, 3]
    assert TotalVariation().conjugate(double(0.4, 0.6)).tolist() == [0.4, math.inf] and TotalVariation().positive_conjugate(double(-9, 0.6)).tolist() == [-0.5, math.inf]
    assert TotalVariation().surrogate(x).tolist() == [0, 0, 0, 2]
    assert ReverseKL().conjugate(double(1, 2)).tolist() == pytest.approx([1, math.e])


# ---- duals, on random tabular problems solved exactly

class World:
    """Four states, three actions, a policy, a behaviour, an expert; visitations of all three in float64."""

    gamma = 0.8

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: torch.from_numpy(rng.dirichlet(np.ones(shape[-1]), shape[:-1]))  # noqa: E731
        self.P, self.start, self.r = draw(4, 3, 4), draw(1, 4)[0], torch.from_numpy(rng.normal(size=(4, 3)))
        self.pi, self.data, self.expert = (self.visits(p) for p in (draw(4, 3), draw(4, 3), draw(4, 3)))

    def visits(self, policy):
        flow = torch.einsum("sa,sat->st", policy, self.P)
        d = (1 - self.gamma) * torch.linalg.solve(torch.eye(4, dtype=torch.float64) - self.gamma * flow.T, self.start)
        return policy, d[:, None] * policy

    def backed(self, v):
        return self.gamma * self.P @ v

    def objective(self, d, f, alpha, reference):
        return (d * self.r).sum() - alpha * (reference * f.generator(d / reference)).sum()


class Weighted:
    """A mean over all pairs, weighted by a visitation, through functions that take plain means."""

    def __init__(self, d):
        self.d = d

    def __call__(self, values):
        return values.reshape(-1) * self.d.reshape(-1) * self.d.numel()


def minimum(loss, *shape):
    x = torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([x], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimiser.step(closure)
    return float(loss(x).detach()), x.detach()


def in_expectation(d, divergence):
    """The divergence with conjugates that average under d, so that the dual functions' plain means become expectations."""
    class Under:
        def conjugate(self, x):
            return Weighted(d)(divergence.conjugate(x))

        def positive_conjugate(self, x):
            return Weighted(d)(divergence.positive_conjugate(x))
    return Under()


@pytest.mark.parametrize("f", [ChiSquare(), ReverseKL()], ids=lambda f: f.part_name)
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_the_minimum_of_dual_q_is_the_policys_regularised_return(f, alpha):
    w = World(1)
    policy, visits = w.pi
    value = lambda q: (policy * q.view(4, 3)).sum(-1)  # noqa: E731
    start = Weighted(w.start)

    def loss(q):
        td = w.r + w.backed(value(q)) - q.view(4, 3)
        return dual_q(start(value(q)), td, in_expectation(w.data[1], f), alpha, w.gamma)

    found, _ = minimum(loss, 12)
    assert found == pytest.approx(float(w.objective(visits, f, alpha, w.data[1])), abs=1e-6)


@pytest.mark.parametrize("f", [ChiSquare(), ReverseKL()], ids=lambda f: f.part_name)
def test_dual_v_finds_the_best_visitation_and_its_ratios(f):
    w = World(2)
    start, alpha = Weighted(w.start), 1.0
    residual = lambda v: w.r + w.backed(v) - v[:, None]  # noqa: E731
    found, v = minimum(lambda v: dual_v(start(v), residual(v), in_expectation(w.data[1], f), alpha, w.gamma), 4)
    best = w.data[1] * f.ratio(residual(v) / alpha)
    inflow = (1 - w.gamma) * w.start + w.gamma * torch.einsum("sa,sat->t", best, w.P)
    assert torch.allclose(best.sum(-1), inflow, atol=1e-5)                              # it is the visitation of a policy ...
    assert found == pytest.approx(float(w.objective(best, f, alpha, w.data[1])), abs=1e-5)
    others = [w.objective(w.visits(p)[1], f, alpha, w.data[1]) for p in (w.pi[0], w.expert[0], w.data[0])]
    assert all(found > float(o) for o in others)                                        # ... and no other is better


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_mixture_dual_measures_the_distance_to_the_expert(share):
    w, f = World(3), ChiSquare()
    policy, visits = w.pi
    value = lambda q: (policy * q.view(4, 3)).sum(-1)  # noqa: E731
    residual = lambda q: w.backed(value(q)) - q.view(4, 3)  # noqa: E731
    mixed = share * w.expert[1] + (1 - share) * w.data[1]

    class Identity:
        conjugate = staticmethod(lambda x: x)

    def loss(q):
        td, start = residual(q), Weighted(w.start)(value(q))
        whole = mixture_dual_q(start, Weighted(w.expert[1])(td), Weighted(w.data[1])(td), Identity(), share, w.gamma)  # with f* = x ...
        return whole - (mixed * td).sum() + (mixed * f.conjugate(td)).sum()                                             # ... replaced by chi-square's

    found, q = minimum(loss, 12)
    mine = share * visits + (1 - share) * w.data[1]
    assert found == pytest.approx(-float((mixed * f.generator(mine / mixed)).sum()), abs=1e-6)
    td = residual(q)                                                                    # written with a square: the start moved to the expert's states
    here = lambda d, x: Weighted(d)(x.expand(4, 3) if x.shape == (4, 3) else x[:, None].expand(4, 3))  # noqa: E731
    root = lambda d: (Weighted(d)(td.square())).sqrt()  # noqa: E731
    moved = mixture_chi_square(here(w.expert[1], value(q)), here(w.expert[1], q.view(4, 3)), root(w.expert[1]), root(w.data[1]), share)
    assert float(moved) == pytest.approx(float(loss(q)), abs=1e-6)


def test_the_mixture_dual_by_hand():
    td = mixture_dual_q(torch.tensor([2.0]), torch.tensor([2.0]), torch.tensor([-2.0]), ChiSquare(), 0.5, 0.9)
    assert float(td) == pytest.approx(0.5 * 0.1 * 2 + 0.5 * 3 + 0.5 * -1 - 0.5 * -2)
    assert float(mixture_chi_square(torch.tensor([1.0]), torch.tensor([5.0]), torch.tensor([2.0]), torch.tensor([4.0]), 0.25)) == 0.25 * -4 + (0.25 * 4 + 0.75 * 16) / 4


# ---- what the duals contain

def test_conservative_q_learning_is_dual_q_with_chi_square():
    w, alpha = World(4), 0.7
    policy, q = w.pi[0], torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, d = (policy * q).sum(-1), w.data[1]
    td = w.r + w.backed(value) - q
    dual = dual_q(Weighted(w.start)(value), td, in_expectation(d, ChiSquare()), alpha, w.gamma)
    conservative = (d * (value[:, None] - q)).sum() + (d * td.square()).sum() / (4 * alpha)      # values of the policy down, recorded up, plus squared errors
    assert float(dual - (d * w.r).sum()) == pytest.approx(float(conservative))


def test_inverse_q_learning_is_dual_q_with_the_expert_as_data_and_no_reward():
    w = World(5)
    policy, q = w.pi[0], torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, d = (policy * q).sum(-1), w.expert[1]
    implied = q - w.backed(value)                                                                # the reward that Q stands for
    learnt = (d * (implied - implied.square() / 4)).sum() - (1 - w.gamma) * (w.start * value).sum()
    assert float(dual_q(Weighted(w.start)(value), -implied, in_expectation(d, ChiSquare()), 1.0, w.gamma)) == pytest.approx(-float(learnt))


@pytest.mark.parametrize("f", [ChiSquare(), ReverseKL()], ids=lambda f: f.part_name)
def test_corrections_of_the_stationary_distribution_are_dual_v(f):
    x, start, alpha, gamma = double(-3, -0.5, 0.2, 1.4), double(1.0, 2.0), 0.6, 0.9
    ratio = f.ratio(x / alpha)
    assert float(dual_v(start, x, f, alpha, gamma)) == pytest.approx(float((1 - gamma) * start.mean() + (ratio * x - alpha * f.generator(ratio)).mean()))


def test_xql_is_dual_v_with_reverse_kl():
    q, v = double(0.3, 1.2, -0.4), double(0.1).requires_grad_(True)
    (plain,) = torch.autograd.grad((((q - v).exp() - (q - v) - 1).mean()), v)                    # Gumbel regression
    moved = v - 1                                                                                # f* is exp(x - 1): V lies one lower
    (dual,) = torch.autograd.grad((ReverseKL().positive_conjugate(q - moved) + moved).mean(), v)
    z = q - v.detach()
    scaled = torch.autograd.grad(gumbel_loss(q - v, 1.0, 9.0).mean(), v)[0] * z.max().clamp(min=-1).exp()
    assert float(dual) == pytest.approx(float(plain)) and float(scaled) == pytest.approx(float(plain))


def test_with_an_expectile_it_is_iql_and_with_gumbel_xql_to_the_bit():
    for other, words in (("iql", ["maximum=expectile", "value=mse", "value_network.layer_norm=false"]), ("xql", ["maximum=gumbel", "maximum.beta=2.0"])):
        (mine, batch), (theirs, same) = agent_of("dual-rl", PENDULUM, *words), agent_of(other)
        assert torch.equal(batch["rows"], same["rows"])
        a, b = mine.update(batch), theirs.update(same)
        assert all(torch.equal(a[k], b[k]) for k in ("loss/value", "loss/actor", "loss/critic", "v"))


# ---- f-DVL

def test_losses_by_hand():
    chi, tv = ChiSquareMaximum(level=0.6), TotalVariationMaximum(level=0.6)
    assert chi.loss(double(1, -1.5)).tolist() == pytest.approx([0.35, 0.6]) and tv.loss(double(2, -2)).tolist() == pytest.approx([0.4, 0.8])
    assert ChiSquareMaximum(level=0.6, both_sides=True).loss(double(1, -1.5, -6)).tolist() == pytest.approx([0.35, 0.6, 0.6 * 3 + 2.4])
    assert float(chi.loss(double(-6))) == pytest.approx(2.4)
    x = double(-1, 2).requires_grad_(True)
    chi.loss(x).sum().backward()
    assert (-x.grad).tolist() == pytest.approx([0.4, -0.6 * 2 + 0.4])                            # of V: (1 - lambda) - lambda (1 + x / 2) where x > 0


@pytest.mark.parametrize("loss, wanted", [
    (ChiSquareMaximum(level=0.5).loss, 2.0), (ChiSquareMaximum(level=0.6).loss, 10 / 3), (ChiSquareMaximum(level=0.8).loss, 4.0), (ChiSquareMaximum(level=1.0).loss, 4.0),
    (lambda x: gumbel_loss(x, 1.0, 20.0), math.log((1 + math.exp(4)) / 2)), (lambda x: expectile_loss(x, 0.5), 2.0)])
def test_implicit_maxima_of_two_values(loss, wanted):
    v = torch.linspace(-1, 4 if wanted == 4 else 5, 60_001, dtype=torch.float64)
    values = loss(torch.stack([0 - v, 4 - v], -1)).mean(-1)
    if wanted == pytest.approx(math.log((1 + math.exp(4)) / 2)):                                 # a batch's rescaling changes its value, not its gradient's sign
        z = torch.stack([0 - v, 4 - v], -1)
        values = values * z.amax(-1).clamp(min=-1).exp() + 1
    assert float(v[values.argmin()]) == pytest.approx(wanted, abs=1e-3)


def test_a_level_of_one_only_pushes_up():
    x = double(-5, -1, 0.5, 3).requires_grad_(True)
    ChiSquareMaximum(level=1.0).loss(x).sum().backward()
    assert (x.grad >= 0).all() and (x.grad[2:] > 0).all()


def test_total_variation_is_a_quantile():
    q = torch.arange(1, 101, dtype=torch.float64)
    for level in (0.6, 0.8):
        v = torch.linspace(0, 101, 2021, dtype=torch.float64)
        losses = TotalVariationMaximum(level=level).loss(q - v[:, None]).mean(-1)
        assert float(v[losses.argmin()]) == pytest.approx(100 * (1 - (1 - level) / level), abs=1.01)


def test_q_regresses_values_and_only_recorded_actions_are_asked():
    agent, batch = agent_of("dual-rl")
    asked = []
    for module in (agent.critics.net.module, agent.critics.target.module):
        module.register_forward_pre_hook(lambda m, args: asked.append(args[1]))
    agent.update(batch)
    assert len(asked) == 2 and all(torch.equal(a, batch["actions"]) for a in asked)
    following = agent.v(batch["next_obs"]).detach()
    error = agent.critics.values(batch["obs"], batch["actions"]) - (batch["rewards"] + batch["discounts"] * following).unsqueeze(1)
    wanted = torch.where(error.abs() < 20, error.square() / 2, 20 * error.abs() - 200).mean(-1).sum()
    assert agent.critic_loss(batch, batch["actions"], following).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_uniform_actions_join_the_loss_of_v_only():
    agent, batch = agent_of("dual-rl", PENDULUM, "random_actions=3")
    asked = []
    agent.critics.target.module.register_forward_pre_hook(lambda m, args: asked.append(args[1]))
    agent.critics.net.module.register_forward_pre_hook(lambda m, args: asked.append(args[1]))
    agent.update(batch)
    assert [a.shape[1] for a in asked] == [16, 48, 16] and asked[1].abs().max() <= 2 and torch.equal(asked[2], batch["actions"])
    with pytest.raises(UserError, match="need continuous actions"):
        agent_of("dual-rl", noisy_grid.replace(steps=200), "random_actions=3")


def test_noise_stays_within_half_a_half_range_and_the_bounds():
    agent, batch = agent_of("dual-rl", PENDULUM, "noise=5.0")
    asked = []
    agent.critics.target.module.register_forward_pre_hook(lambda m, args: asked.append(args[1]))
    agent.value_loss(agent.drawn(batch, batch["actions"]), batch["actions"], torch.zeros(1, 16))
    gap = (asked[0] - batch["actions"]).abs()
    assert asked[0].abs().max() <= 2 and 0.5 < gap.max() <= 1.00001


def test_v_can_move_more_than_once_per_batch():
    once, batch = agent_of("dual-rl")
    thrice, _ = agent_of("dual-rl", PENDULUM, "value_updates=3")
    once.update(batch), thrice.update(batch)
    assert (once.values.steps, thrice.values.steps) == (1, 3) and once.critics.net.steps == thrice.critics.net.steps == 1


def test_steep_critics_pay_by_hand():
    penalty = gradient_excess(lambda a: torch.stack([3 * a[..., 0], 0.5 * a[..., 0]], 1), torch.zeros(1, 4, 1))
    assert penalty.tolist() == [4.0]
    agent, batch = agent_of("dual-rl", PENDULUM, "gradient_penalty=1.0")
    agent.update(batch)


# ---- online

@pytest.mark.parametrize("task, words", [("Pendulum-v1", []), ("CartPole-v1", ["learner.maximum=chi-square"])])
def test_online_it_learns_from_the_replay_buffer(task, words, tmp_path):
    small = ["warmup=60", "period=100", "replay.batch=16", "learner.network.hidden=[16]", "learner.value_network.hidden=[16]", "evaluation.episodes=2", "seeds=2"]
    made = volvelle.train("dual-rl-online", task=task, folder=tmp_path / "run", overrides=[*small, *words], steps=2)
    agent = made.learner.agent
    assert agent.inner.critics.net.steps == 141 and agent.inner.critics.seeds == 2 and "return@1" in made.result["metrics"]


@pytest.mark.parametrize("words, told", [(["learner=td3-bc"], "learner"), (["learner.decay=true"], "accepted: false"), (["replay=prioritised"], "take no weights"), (["learner=mixture-imitation"], "accepted: implicit-q, f-dvl")])
def test_online_it_takes_learners_of_rewards_only(words, told, tmp_path):
    with pytest.raises(UserError, match=told) as error:
        volvelle.train("dual-rl-online", task="Pendulum-v1", folder=tmp_path / "run", overrides=words, steps=1)
    assert "\n" not in str(error.value)
