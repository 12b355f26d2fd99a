"""Credit: worked numbers of the papers, the invariances that each estimator must have, and masks that are skipped."""

import numpy as np
import pytest
import torch
from batches import batch
from hypothesis import given
from hypothesis import strategies as st

from volvelle.language.advantages import (GeneralisedAdvantage, GroupNormalised, LeaveOneOut, ReinforcePlusPlus, Return, gae, group_mean, group_normalised,
                                          group_std, last_positions, leave_one_out, reward_to_go, whiten)
from volvelle.language.records import POLICY, TOOL

R = torch.tensor([1.0, 0.0, 0.0, 0.0])
ONE = torch.zeros(4, dtype=torch.long)


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), atol=atol, rtol=0)


# ----------------------------------------------------------------------------------------------------------- worked numbers


def test_worked_group_advantages():
    close(group_normalised(R, ONE), [1.5, -0.5, -0.5, -0.5])
    close(group_normalised(R, ONE, ddof=0), [1.732, -0.577, -0.577, -0.577], 1e-3)
    close(group_normalised(R, ONE, "none"), [0.75, -0.25, -0.25, -0.25])
    close(leave_one_out(R, ONE), [1.0, -1 / 3, -1 / 3, -1 / 3])
    assert group_std(R, ONE).tolist() == pytest.approx([0.5] * 4)


def test_worked_batch_scale():
    rewards, groups = torch.tensor([1.0, 0.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 1])
    deviation = np.std([1, 0, 2, 2], ddof=1)
    close(group_normalised(rewards, groups, "batch", epsilon=1e-4), [0.5 / (deviation + 1e-4), -0.5 / (deviation + 1e-4), 0, 0])


def test_worked_reinforce_plus_plus():
    found = ReinforcePlusPlus()(batch([1, 3], [1.0, 0.0], [0, 1]))
    close(found, [[1.5, 0, 0], [-0.5, -0.5, -0.5]])
    grouped = ReinforcePlusPlus(baseline="group")(batch([1, 3], [1.0, 0.0], [0, 0]))
    close(grouped, [[1.5, 0, 0], [-0.5, -0.5, -0.5]])


def test_worked_gae():
    """Three tokens, reward 1 on the last, values (.1, .4, .2), gamma .9, lambda .8, by hand."""
    found, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.1, 0.4, 0.2]]), torch.ones(1, 3, dtype=torch.bool), 0.9, 0.8)
    a3 = 1 - 0.2
    a2 = 0.9 * 0.2 - 0.4 + 0.72 * a3
    a1 = 0.9 * 0.4 - 0.1 + 0.72 * a2
    close(found, [[a1, a2, a3]], 1e-6)
    close(returns, [[a1 + 0.1, a2 + 0.4, a3 + 0.2]], 1e-6)


def test_gae_at_its_ends():
    rewards, values, mask = torch.randn(3, 5), torch.randn(3, 5), torch.ones(3, 5, dtype=torch.bool)
    full, _ = gae(rewards, values, mask, 0.9, 1.0)
    close(full, reward_to_go(rewards, mask, 0.9) - values, 1e-5)
    short, _ = gae(rewards, values, mask, 0.9, 0.0)
    close(short, rewards + 0.9 * torch.cat([values[:, 1:], torch.zeros(3, 1)], 1) - values, 1e-6)


def test_masked_positions_are_skipped():
    """Tool text between two turns: value and advantage pass over it unchanged, whatever stands there."""
    mask = torch.tensor([[True, False, False, True, False]])
    rewards, values = torch.tensor([[0.5, 9.0, float("nan"), 1.0, 7.0]]), torch.tensor([[0.1, float("nan"), 5.0, 0.3, float("nan")]])
    found, returns = gae(rewards, values, mask, 0.9, 0.8)
    dense, dense_returns = gae(rewards[mask][None], values[mask][None], torch.ones(1, 2, dtype=torch.bool), 0.9, 0.8)
    assert found[mask].tolist() == dense[0].tolist() and returns[mask].tolist() == dense_returns[0].tolist()
    assert found[~mask].eq(0).all() and returns[~mask].eq(0).all()
    go = reward_to_go(rewards, mask, 0.9)
    assert go[0].tolist() == pytest.approx([0.5 + 0.9, 0, 0, 1.0, 0])


def test_whitening():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = torch.tensor([[1.0, 2.0, float("nan")], [6.0, 99.0, float("inf")]])
    found = whiten(values, mask)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-6) and found[mask].var(correction=1).item() == pytest.approx(1, abs=1e-5)
    assert found[~mask].eq(0).all()
    assert whiten(values, mask, shift=False)[mask].mean().item() == pytest.approx(3.0, abs=1e-5)
    assert whiten(torch.full((1, 3), 2.0), torch.tensor([[True, False, False]])).tolist() == [[2.0, 0.0, 0.0]]
    assert whiten(torch.full((2, 2), 5.0), torch.ones(2, 2, dtype=torch.bool)).eq(0).all()


def test_last_positions():
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    assert last_positions(mask).tolist() == [[False, True, False], [False, False, True], [False, False, False]]


def test_a_group_of_one_keeps_its_reward():
    rewards, groups = torch.tensor([0.7, 1.0, 0.0]), torch.tensor([3, 5, 5])
    for found in (group_normalised(rewards, groups), group_normalised(rewards, groups, "none"), leave_one_out(rewards, groups)):
        assert found[0].item() == pytest.approx(0.7)
    assert group_std(rewards, groups)[0] == 0
    assert group_mean(rewards, groups).tolist() == pytest.approx([0.7, 0.5, 0.5])


# ------------------------------------------------------------------------------------------------------------- invariances

ESTIMATORS = {"grpo": lambda r, g: group_normalised(r, g), "dr-grpo": lambda r, g: group_normalised(r, g, "none"), "rloo": leave_one_out}
groups_of = st.integers(2, 6).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, 4)))


@st.composite
def rewards_and_groups(draw):
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    groups = [i * 7 - 3 for i, size in enumerate(sizes) for _ in range(size)]
    rewards = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 3.0]), min_size=len(groups), max_size=len(groups)))
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)


@pytest.mark.parametrize("name", ESTIMATORS)
@given(rewards_and_groups())
def test_homogeneous_groups_get_exactly_nothing(name, data):
    """Whatever the common reward is: the mean of three times 0.1 must be 0.1."""
    rewards, groups = data
    level = {int(g): float(rewards[groups == g][0]) + 0.1 * (i + 1) for i, g in enumerate(groups.unique())}
    flat = torch.tensor([level[int(g)] for g in groups], dtype=torch.float32)
    assert ESTIMATORS[name](flat, groups).eq(0).all()


@pytest.mark.parametrize("name", ESTIMATORS)
@given(rewards_and_groups(), st.randoms(use_true_random=False))
def test_group_estimators(name, data, random):
    """They sum to 0 within groups, ignore constants per group, permute with the rows; scaling changes nothing for GRPO only."""
    rewards, groups = data
    estimate = ESTIMATORS[name]
    found = estimate(rewards, groups)
    for g in groups.unique():
        assert found[groups == g].sum().abs() < 1e-6
    shift = torch.tensor([(int(g) % 5) * 0.5 for g in groups], dtype=torch.float64)
    torch.testing.assert_close(estimate(rewards + shift, groups), found, atol=1e-9, rtol=1e-9)
    order = list(range(len(rewards)))
    random.shuffle(order)
    torch.testing.assert_close(estimate(rewards[order], groups[order]), found[order], atol=1e-12, rtol=0)
    scaled = estimate(4 * rewards, groups)
    torch.testing.assert_close(scaled, found if name == "grpo" else 4 * found, atol=1e-4, rtol=1e-4)


@given(rewards_and_groups())
def test_leave_one_out_is_scaled_dr_grpo(data):
    rewards, groups = data
    size = torch.tensor([(groups == g).sum() for g in groups], dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(rewards, groups), size / (size - 1) * group_normalised(rewards, groups, "none"), atol=1e-12, rtol=0)
    direct = torch.stack([rewards[i] - rewards[(groups == groups[i]) & (torch.arange(len(rewards)) != i)].mean() for i in range(len(rewards))])
    torch.testing.assert_close(leave_one_out(rewards, groups), direct, atol=1e-12, rtol=0)


# -------------------------------------------------------------------------------------------------------------------- parts


def test_kl_in_the_reward_reaches_every_estimator():
    """Token rewards (a KL penalty, say) are summed into outcomes and stay where they are for reward to go."""
    b = batch([2, 3], [1.0, 0.0], [0, 0], token_rewards=torch.tensor([[-0.5, -0.25, 0.0], [0.0, 0.0, 0.1]]))
    close(GroupNormalised(scale="none")(b), [(0.25 - 0.1) / 2, (0.1 - 0.25) / 2])
    close(LeaveOneOut()(b), [0.15, -0.15])
    close(Return()(b), [[0.25, 0.75, 0], [0.1, 0.1, 0.1]])
    close(Return(baseline="batch")(b), [[0.25 - 0.175, 0.75 - 0.175, 0], [0.1 - 0.175] * 3])
    close(Return(gamma=0.5)(b), [[-0.5 + 0.375, 0.75, 0], [0.025, 0.05, 0.1]])


def test_batch_normalised_leave_one_out():
    found = LeaveOneOut(normalise=True)(batch([1] * 4, R.tolist()))
    raw = leave_one_out(R, ONE)
    close(found, (raw - raw.mean()) / (raw.std() + 1e-4), 1e-6)


def test_returns_are_taken_before_whitening():
    b = batch([2, 3], [1.0, 0.0], [0, 1], values=torch.tensor([[0.2, 0.4, 9.0], [0.1, 0.1, 0.1]]))
    found = GeneralisedAdvantage()(b)
    raw, returns = gae(torch.tensor([[0, 1.0, 0], [0, 0, 0]]), b.values, b.mask, 1.0, 0.95)
    assert b.returns.equal(returns) and found.equal(whiten(raw, b.mask))
    assert GeneralisedAdvantage(whiten=False)(b).equal(raw)


def test_statistics_over_acted_tokens_or_the_whole_response():
    b = batch([4], [1.0])
    b.role[0, 1:3] = TOOL
    values = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    b.values = values
    acted = GeneralisedAdvantage(whiten=False, gamma=0.5, lam=1.0)(b)
    close(acted, [[0.5, 0, 0, 1.0]])
    whole = GeneralisedAdvantage(whiten=False, gamma=0.5, lam=1.0, over="response")(b)
    close(whole, [[0.125, 0.25 - 0.5, 0.5 - 0.5, 1.0]])
    assert b.acted((POLICY,)).sum() == 2


def test_padding_of_the_inputs_never_matters():
    """NaN wherever no token stands; every estimator gives what it gives without padding."""
    lengths, rewards, groups = [1, 3, 2, 2], [1.0, 0.0, 0.5, 0.25], [0, 0, 1, 1]
    clean = dict(values=torch.rand(4, 3, generator=torch.Generator().manual_seed(0)), token_rewards=torch.rand(4, 3, generator=torch.Generator().manual_seed(1)))
    narrow = batch(lengths, rewards, groups, **{k: v.clone() for k, v in clean.items()})
    wide = batch(lengths, rewards, groups, width=5, **{k: torch.full((4, 5), float("nan")) for k in clean})
    for key, value in clean.items():
        getattr(wide, key)[:, :3] = torch.where(narrow.mask, value, torch.nan)
        getattr(narrow, key)[~narrow.mask] = 0.0
    for estimate in (GroupNormalised(), GroupNormalised(scale="batch"), GroupNormalised(scale="none"), LeaveOneOut(), LeaveOneOut(normalise=True), Return(),
                     Return(baseline="batch"), ReinforcePlusPlus(), ReinforcePlusPlus(baseline="group"), GeneralisedAdvantage()):
        a, b = estimate(narrow), estimate(wide)
        assert torch.isfinite(b).all(), estimate
        if b.ndim == 2:
            assert b[:, 3:].eq(0).all() and b[:, :3][~narrow.mask].eq(0).all(), estimate
            b = b[:, :3]
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
