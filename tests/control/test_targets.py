"""Targets, advantages and losses against numbers worked out by hand."""

import math

import pytest
import torch
from torch import tensor

from volvelle.control.losses import approximate_kl, clipped_surrogate, clipped_value_error, standardise, weighted_mean
from volvelle.control.targets import bootstrap_cuts, discounted_returns, gae, lambda_returns, n_step, soft_target


def column(*values):
    return torch.tensor(values).unsqueeze(-1)


def test_gae_worked_example():
    open_ = torch.zeros(3, 1, dtype=torch.bool)
    found = gae(column(1.0, 1, 1), column(0.5, 0.5, 0.5), tensor([0.5]), open_, 0.99, 0.95)
    assert found.squeeze().tolist() == pytest.approx([2.81092, 1.93080, 0.99500], abs=1e-5)


def test_gae_at_lambda_one_is_return_minus_value_and_at_zero_is_delta():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 7, 3, generator=generator), torch.randn(2, 7, 3, generator=generator)
    last, ended = torch.randn(2, 3, generator=generator), torch.rand(2, 7, 3, generator=generator) < 0.3
    returns = discounted_returns(rewards, ended, 0.9, last)
    assert torch.allclose(gae(rewards, values, last, ended, 0.9, 1.0), returns - values, atol=1e-5)
    following = torch.cat([values[:, 1:], last.unsqueeze(1)], 1)
    assert torch.allclose(gae(rewards, values, last, ended, 0.9, 0.0), rewards + 0.9 * ~ended * following - values, atol=1e-6)
    assert torch.allclose(lambda_returns(rewards, values, last, ended, 0.9, 1.0), returns, atol=1e-5)


def test_returns_stop_at_an_end_and_do_not_change_their_input():
    rewards, ended = column(1.0, 2, 4), torch.tensor([[False], [True], [False]])
    assert discounted_returns(rewards, ended, 0.5, tensor([8.0])).squeeze().tolist() == [2.0, 2.0, 8.0]
    assert rewards.squeeze().tolist() == [1, 2, 4]


def test_a_cut_episode_is_bootstrapped_and_a_terminated_one_is_not():
    rewards, ended = column(1.0, 1), torch.tensor([[True], [True]])
    cut = torch.tensor([[True], [False]])
    with_bootstrap = bootstrap_cuts(rewards, cut, column(10.0, float("nan")), 0.9)
    assert with_bootstrap.squeeze().tolist() == [10.0, 1.0]
    found = gae(with_bootstrap, column(0.0, 0), tensor([99.0]), ended, 0.9, 0.95)
    assert found.squeeze().tolist() == [10.0, 1.0]


def test_n_step_stops_at_the_first_end():
    rewards = tensor([[1.0, 2, 4], [1, 2, 4], [1, 2, 4]])
    terminated = tensor([[False, False, False], [False, True, False], [False, False, False]])
    ended = tensor([[False, False, False], [False, True, False], [False, True, True]])
    total, discount, last = n_step(rewards, terminated, ended, 0.5)
    assert total.tolist() == [3.0, 2.0, 2.0]
    assert discount.tolist() == [0.125, 0.0, 0.25]
    assert last.tolist() == [2, 1, 1]


def test_one_step_is_the_plain_target():
    total, discount, last = n_step(tensor([[3.0], [5.0]]), tensor([[False], [True]]), tensor([[False], [True]]), 0.9)
    assert total.tolist() == [3, 5] and discount.tolist() == pytest.approx([0.9, 0]) and last.tolist() == [0, 0]


def test_soft_target():
    assert float(soft_target(tensor(1.0), tensor(0.9), tensor(2.0), tensor(-1.0), 0.5)) == pytest.approx(1 + 0.9 * 2.5)


def test_clipped_surrogate_is_the_pessimistic_bound():
    logp = tensor([1.5, 0.5, 1.5, 0.5]).log()
    found = clipped_surrogate(logp, torch.zeros(4), tensor([1.0, 1, -1, -1]), 0.2)
    assert found.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8])


def test_a_clipped_sample_has_no_gradient():
    logp = tensor([math.log(1.5), math.log(1.1)], requires_grad=True)
    clipped_surrogate(logp, torch.zeros(2), torch.ones(2), 0.2).sum().backward()
    assert logp.grad.tolist() == pytest.approx([0.0, -1.1])


def test_standardise_uses_the_sample_deviation():
    found = standardise(tensor([[1.0, 2, 3], [0, 0, 6]]))
    assert found[0].tolist() == pytest.approx([-1, 0, 1], abs=1e-6)
    assert float(found[1].mean()) == pytest.approx(0, abs=1e-6)
    weighted = standardise(tensor([[1.0, 2, 3, 100]]), tensor([[1.0, 1, 1, 0]]))
    assert weighted[0, :3].tolist() == pytest.approx([-1, 0, 1], abs=1e-6)


def test_weighted_mean_ignores_rows_of_weight_zero():
    values = tensor([[1.0, 3, 100]])
    assert float(weighted_mean(values, tensor([[1.0, 1, 0]]))) == 2
    assert float(weighted_mean(values, None)) == pytest.approx(104 / 3)


def test_kl_estimate_is_never_negative():
    assert float(approximate_kl(tensor([0.0, 0.0]), tensor([0.0, 0.0]))) == 0
    log_ratio = math.log(2)
    assert float(approximate_kl(tensor([log_ratio]), tensor([0.0]))) == pytest.approx(1 - log_ratio)
    assert float(approximate_kl(tensor([-log_ratio]), tensor([0.0]))) == pytest.approx(-0.5 + log_ratio)


def test_value_clipping_takes_the_larger_error():
    found = clipped_value_error(tensor([2.0, 0.1]), tensor([0.0, 0.0]), tensor([3.0, 3.0]), 0.2)
    assert found.tolist() == pytest.approx([(0.2 - 3) ** 2, (0.1 - 3) ** 2])
