"""Value heads: the histograms, projections and losses of the papers, against worked numbers."""

import math

import pytest
import torch
from torch import tensor

from volvelle.control.valueheads import C51, MSE, HLGauss, Huber, Quantile, TwoHot, project
from volvelle.core.errors import UserError

GAUSS = HLGauss(low=-10.0, high=10.0, bins=51, ratio=0.75)


def decoded(head, label):
    return float((label * head.support(label)).sum())


def test_hl_gauss_at_the_centre():
    label = GAUSS.label(tensor(0.0, dtype=torch.float64))
    assert label[25:29].tolist() == pytest.approx([0.49501, 0.22974, 0.02232, 0.00043], abs=1e-5)
    assert decoded(GAUSS, label) == pytest.approx(0, abs=1e-9)
    assert float(label.sum()) == pytest.approx(1)


def test_hl_gauss_off_centre_keeps_interior_means():
    label = GAUSS.label(tensor(0.1, dtype=torch.float64))
    assert [float(label[i]) for i in (25, 26, 24)] == pytest.approx([0.47099, 0.32350, 0.14741], abs=1e-5)
    assert decoded(GAUSS, label) == pytest.approx(0.099998, abs=1e-6)


def test_hl_gauss_near_an_edge_is_biased_inward():
    label = GAUSS.label(tensor(-9.9, dtype=torch.float64))
    assert label[:3].tolist() == pytest.approx([0.7468, 0.2374, 0.0156], abs=1e-4)
    assert decoded(GAUSS, label) == pytest.approx(-9.698, abs=1e-3)


def test_hl_gauss_coarse():
    head = HLGauss(low=0.0, high=4.0, bins=4)
    label = head.label(tensor(0.6, dtype=torch.float64))
    assert label.tolist() == pytest.approx([0.62329, 0.33741, 0.03843, 0.00087], abs=1e-5)
    assert decoded(head, label) == pytest.approx(0.91687, abs=1e-5)


def test_hl_gauss_far_outside_is_the_edge_and_finite():
    assert torch.equal(GAUSS.label(tensor(1e6)), GAUSS.label(tensor(10.0)))
    assert bool(GAUSS.label(tensor([1e6, -1e6, 10.0])).isfinite().all())


def test_hl_gauss_moves_with_the_target_by_whole_bins():
    width = 20 / 51
    a, b = GAUSS.label(tensor(0.3, dtype=torch.float64)), GAUSS.label(tensor(0.3 + width, dtype=torch.float64))
    assert torch.allclose(a[10:40], b[11:41], atol=1e-9)


@pytest.mark.parametrize("head", [GAUSS, TwoHot(), C51()])
def test_label_has_no_gradient_and_logit_gradients_sum_to_zero(head):
    outputs, target = torch.zeros(4, 51, requires_grad=True), tensor([0.1, 2.0, -3.0, 9.0], requires_grad=True)
    head.loss(outputs, target).sum().backward()
    assert target.grad is None
    assert outputs.grad.sum(-1).abs().max() < 1e-6
    expected = torch.full((51,), 1 / 51) - head.label(tensor(0.1))
    assert torch.allclose(outputs.grad[0], expected, atol=1e-6)


def test_sigma_to_zero_is_one_hot_and_the_loss_minimum_is_the_entropy():
    sharp = HLGauss(low=-10.0, high=10.0, bins=51, ratio=1e-3).label(tensor(0.0))
    assert float(sharp[25]) == pytest.approx(1)
    label = GAUSS.label(tensor(0.1, dtype=torch.float64))
    entropy = -(label * label.clamp(min=1e-300).log()).sum()
    assert float(GAUSS.loss(label.clamp(min=1e-300).log(), tensor(0.1, dtype=torch.float64))) == pytest.approx(float(entropy))
    assert float(entropy) > 0.5


def test_two_hot_of_integers_and_between():
    head = TwoHot(low=0.0, high=5.0, bins=6)
    assert head.label(tensor(2.75)).tolist() == pytest.approx([0, 0, 0.25, 0.75, 0, 0])
    assert head.label(tensor(5.0)).tolist() == pytest.approx([0, 0, 0, 0, 0, 1])
    assert head.label(tensor(7.0)).tolist() == pytest.approx([0, 0, 0, 0, 0, 1])


def test_projection_keeps_mass_and_mean():
    generator = torch.Generator().manual_seed(0)
    p, z = torch.rand(8, 11, generator=generator).softmax(-1), torch.rand(8, 11, generator=generator) * 18 - 9
    mass = project(p, z, -10.0, 10.0, 51)
    assert torch.allclose(mass.sum(-1), torch.ones(8), atol=1e-6)
    assert torch.allclose((mass * torch.linspace(-10, 10, 51)).sum(-1), (p * z).sum(-1), atol=1e-4)


def test_projection_onto_an_atom_loses_nothing():
    assert project(tensor([1.0]), tensor([3.0]), 0.0, 4.0, 5).tolist() == [0, 0, 0, 1, 0]
    assert project(tensor([0.5, 0.5]), tensor([-7.0, 99.0]), 0.0, 4.0, 5).tolist() == [0.5, 0, 0, 0, 0.5]


def test_c51_backup_of_a_terminal_step_is_the_reward():
    head = C51(low=-10.0, high=10.0, bins=21)
    label = head.backup(torch.randn(3, 21, generator=torch.Generator().manual_seed(1)), tensor([1.0, 2.5, 0.0]), torch.zeros(3))
    assert label[0].nonzero().flatten().tolist() == [11]
    assert label[1].tolist()[12:14] == pytest.approx([0.5, 0.5])
    uniform = head.backup(torch.zeros(1, 21), tensor([1.0]), tensor([0.5]))
    assert float((uniform * head.support(uniform)).sum()) == pytest.approx(1, abs=1e-5)


def test_quantile_loss_worked_example():
    head = Quantile(quantiles=2)
    assert float(head.loss(tensor([0.0, 1.0]), tensor([0.5, 3.0]))) == pytest.approx(0.90625)


def test_quantile_loss_vanishes_only_without_spread():
    spread = tensor([0.0, 1.0, 2.0])
    assert float(Quantile(quantiles=3).loss(spread, spread)) > 0
    assert float(Quantile(quantiles=1).loss(tensor([2.0]), tensor([2.0]))) == 0
    assert float(Quantile(quantiles=3).loss(torch.ones(3), torch.ones(3))) == 0


def test_quantile_regression_finds_the_quantiles():
    head, target = Quantile(quantiles=4, kappa=0.01), torch.linspace(0, 1, 101)
    theta = torch.zeros(4, requires_grad=True)
    optimiser = torch.optim.Adam([theta], lr=0.02)
    for _ in range(600):
        optimiser.zero_grad()
        head.loss(theta, target).backward()
        optimiser.step()
    assert theta.tolist() == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.03)


def test_scalar_backups_and_losses():
    assert MSE().backup(tensor([[3.0]]), tensor([1.0]), tensor([0.5])).tolist() == [2.5]
    assert MSE().loss(tensor([[3.0]]), tensor([1.0])).tolist() == [4.0]
    assert Huber().loss(tensor([[0.5], [3.0]]), tensor([0.0, 0.0])).tolist() == [0.125, 2.5]
    head = TwoHot(low=0.0, high=4.0, bins=5)
    assert head.value(tensor([0.0, 0.0, 50.0, 0.0, 0.0])).item() == pytest.approx(2)
    assert math.isclose(head.backup(torch.zeros(1, 5), tensor([1.0]), tensor([0.5])).item(), 2.0, rel_tol=1e-6)


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (2.0, 1.0), (-math.inf, 1.0)])
def test_an_empty_range_is_refused_in_one_line(low, high):
    with pytest.raises(UserError, match="hl-gauss: the range") as error:
        HLGauss(low=low, high=high)
    assert "\n" not in str(error.value)
