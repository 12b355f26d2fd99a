"""Filters, KL, critic and updates: worked numbers and what each promises."""

import math

import pytest
import torch
from batches import batch, scores
from hypothesis import given
from hypothesis import strategies as st

from volvelle.core.errors import UserError
from volvelle.core.run import Run
from volvelle.core.verbs import configure
from volvelle.language.fittings import KL, Adaptive, Drop, homogeneous, kl_estimate, value_loss
from volvelle.language.methods.grpo import grpo
from volvelle.language.records import POLICY, TOOL, Scores

P, Q = math.log(0.5), math.log(0.25)


# ----------------------------------------------------------------------------------------------------------------------- KL


def estimate(name, p, q):
    logp = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    value = kl_estimate(logp, torch.tensor(q, dtype=torch.float64), name)
    value.backward()
    return value.item(), logp.grad.item()


@pytest.mark.parametrize("name, value, gradient", [("k1", 0.6931, 1.0), ("k2", 0.2402, P - Q), ("k3", 0.1931, 1 - 0.5), ("k3+", 0.1931, P - Q)])
def test_worked_kl(name, value, gradient):
    found, slope = estimate(name, P, Q)
    assert found == pytest.approx(value, abs=1e-4) and slope == pytest.approx(gradient)


@given(st.floats(-8, 0), st.floats(-8, 0))
def test_kl_estimators(p, q):
    """k3 is never negative and k1 may be; k2 and k3+ have the gradient logp - logq; k3's is 1 - q/p."""
    assert estimate("k3", p, q)[0] >= 0 and estimate("k2", p, q)[0] >= 0
    assert estimate("k1", p, q)[0] == pytest.approx(p - q)
    assert estimate("k2", p, q)[1] == pytest.approx(p - q) == estimate("k3+", p, q)[1]
    value, slope = estimate("k3", p, q)
    if value < 10:
        assert slope == pytest.approx(1 - math.exp(q - p))
    assert estimate("k3+", p, q)[0] == pytest.approx(value)


def test_estimators_in_expectation():
    """Under p, k1 and k3 average to KL(p, q); the gradient of k2 is that of KL(p, q), the gradient of k1 is nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = (0.5 * torch.randn(5, generator=generator, dtype=torch.float64)).requires_grad_()
    q = (0.5 * torch.randn(5, generator=generator, dtype=torch.float64)).log_softmax(0)
    p = logits.log_softmax(0)
    kl = (p.exp() * (p - q)).sum()
    exact, = torch.autograd.grad(kl, logits, retain_graph=True)
    weights = p.detach().exp()
    assert (weights * kl_estimate(p, q, "k1")).sum().item() == pytest.approx(kl.item())
    assert (weights * kl_estimate(p, q, "k3")).sum().item() == pytest.approx(kl.item())
    slopes = {name: torch.autograd.grad((weights * kl_estimate(p, q, name)).sum(), logits, retain_graph=True)[0] for name in ("k1", "k2", "k3", "k3+")}
    torch.testing.assert_close(slopes["k2"], exact)
    torch.testing.assert_close(slopes["k3+"], exact)
    torch.testing.assert_close(slopes["k1"], torch.zeros(5, dtype=torch.float64))
    reverse = (q.exp() * (q - p)).sum()
    torch.testing.assert_close(slopes["k3"], torch.autograd.grad(reverse, logits)[0])


def test_far_apart_stays_finite():
    for name in ("k2", "k3", "k3+"):
        value, slope = estimate(name, -1e4, 0.0)
        assert math.isfinite(value) and math.isfinite(slope)
    assert estimate("k3", -1e4, 0.0)[0] == 10.0


def test_kl_in_the_reward_is_a_penalty_on_the_policys_own_tokens():
    b = batch([3, 1])
    b.role[0, 1] = TOOL
    b.old, b.reference = Scores(torch.full((2, 3), P)), Scores(torch.full((2, 3), Q))
    b.old.logps[~b.acted((POLICY,))] = torch.nan
    live = KL(estimator="k1", place="reward", coefficient=0.1).start(Run(configure(grpo, "tree"), "nowhere"))
    assert live.penalty(b)[0].tolist() == pytest.approx([-0.06931, 0, -0.06931], abs=1e-5)
    assert live.penalty(b)[1].tolist() == pytest.approx([-0.06931, 0, 0], abs=1e-5)


def test_kl_in_the_loss_is_weighted():
    live = KL(estimator="k2", coefficient=0.5).start(Run(configure(grpo, "tree"), "nowhere"))
    b = batch([1], reference=Scores(torch.tensor([[Q]])))
    assert live.loss(scores([[P]]), b).item() == pytest.approx(0.5 * 0.2402, abs=1e-4)


def test_k1_in_the_loss_is_refused():
    with pytest.raises(UserError, match="kl.estimator=k1 with kl.place=loss has no effect"):
        grpo(kl=KL(estimator="k1", place="loss")).validate()
    grpo(kl=KL(estimator="k1", place="reward")).validate()


def test_adaptive_coefficient():
    live = Adaptive(initial=1.0, target=2.0, horizon=100.0).start(None)
    live.observe(2.2, 50)  # 10 % above: beta grows by .1 * .5
    assert live.value == pytest.approx(1.05)
    live.observe(100.0, 50)  # never more than 20 %
    assert live.value == pytest.approx(1.05 * 1.1)
    live.observe(0.0, 100)
    assert live.value == pytest.approx(1.05 * 1.1 * 0.8)


# ------------------------------------------------------------------------------------------------------------------ filters


def test_homogeneous_groups():
    rewards, groups = torch.tensor([1.0, 1, 0, 1, 0.5, 0.5, 0.5, 0.2]), torch.tensor([0, 0, 1, 1, 2, 2, 2, 9])
    assert homogeneous(rewards, groups).tolist() == [True, True, False, False, True, True, True, False]


@pytest.mark.parametrize("which, kept", [("homogeneous", [1]), ("correct", [1, 2]), ("wrong", [0, 1]), ("none", [0, 1, 2])])
def test_drop(which, kept):
    """Groups 0 (all correct), 1 (mixed) and 2 (all wrong), their rows mixed up."""
    b = batch([1] * 6, [1.0, 0.0, 1.0, 0.0, 1.0, 0.0], [0, 1, 0, 2, 1, 2])
    keep, train = Drop(which=which)(b)
    assert sorted(set(b.groups[keep].tolist())) == kept and train.all()


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=12),
       st.sampled_from(["homogeneous", "correct", "wrong", "none"]))
def test_groups_are_never_split(rows, which):
    b = batch([1] * len(rows), [r for _, r in rows], [g for g, _ in rows])
    keep, _ = Drop(which=which)(b)
    for g in b.groups.unique():
        assert len(set(keep[b.groups == g].tolist())) == 1


def test_overlong_rows_are_muted_and_stay():
    b = batch([1] * 3, [1.0, 0.0, 0.0], finished=torch.tensor([True, False, True]), train=torch.tensor([True, True, False]))
    keep, train = Drop(which="none", mute_overlong=True)(b)
    assert keep.all() and train.tolist() == [True, False, False]
    assert Drop(which="none")(b)[1].tolist() == [True, True, False]


def test_graded_rewards_have_their_own_limits():
    b = batch([1] * 4, [0.9, 0.95, 0.3, 0.95], [0, 0, 1, 1])
    assert Drop(which="correct", best=0.9)(b)[0].tolist() == [False, False, True, True]
    assert Drop(which="wrong", worst=0.95)(b)[0].tolist() == [False] * 4


# ------------------------------------------------------------------------------------------------------------------- critic


def test_worked_value_loss():
    """Half the larger of the two squared errors: a value that has moved past the clip towards the return gets no credit for it."""
    new, old, returns = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0])
    assert value_loss(new, old, returns, None).item() == 0.0
    assert value_loss(new, old, returns, 0.2).item() == pytest.approx(0.32)
    assert value_loss(torch.tensor([-1.0]), old, returns, 0.2).item() == pytest.approx(2.0)
    assert value_loss(torch.tensor([0.1]), old, returns, 0.2).item() == pytest.approx(0.405)
