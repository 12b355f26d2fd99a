"""Losses: worked numbers, where the gradient is zero, aggregation, and that neither padding nor micro-batches matter."""

import math

import pytest
import torch
from batches import batch, scores
from hypothesis import given
from hypothesis import strategies as st

from volvelle.language.objectives import CISPO, GSPO, NLL, Clipped, Entropy, PolicyGradient, SequenceClipped, aggregate, clipped, log_ratio
from volvelle.language.records import FORCED, Scores

MEAN = {"token_mean": 0.75, "sequence_mean": 0.5, "sequence_sum": 1.5, "padded": 0.75, "constant": 0.375}
EVERY = [Clipped(), Clipped(0.2, 0.28, dual_clip=3.0), Clipped(aggregation="sequence_mean"), Clipped(aggregation="sequence_sum"),
         Clipped(aggregation="constant", length=9), Clipped(aggregation="padded", length=9), PolicyGradient(), GSPO(), GSPO(0.2, 0.2), CISPO(),
         CISPO(0.2, 0.28), SequenceClipped(), SequenceClipped(5.0, 5.0)]


def loss_and_gradient(objective, logps, old, advantages, b) -> tuple[float, torch.Tensor]:
    """The aggregated loss of a batch and its gradient with respect to the log-probs."""
    s = scores(logps)
    b.old, b.advantages = Scores(torch.as_tensor(old, dtype=torch.float32)), torch.as_tensor(advantages, dtype=torch.float32)
    matrix = objective(s, b)
    weights = torch.full((len(b),), 1 / len(b)) if matrix.ndim == 1 else aggregate(b.mask, objective.aggregation, objective.length)
    loss = torch.where(weights > 0, matrix * weights, 0.0).sum()
    loss.backward()
    return loss.item(), s.logps.grad


def gradient_of_one_token(objective, ratio: float, advantage: float) -> float:
    return loss_and_gradient(objective, [[math.log(ratio)]], [[0.0]], [advantage], batch([1]))[1].item()


# ------------------------------------------------------------------------------------------------------------- aggregation


@pytest.mark.parametrize("how", MEAN)
def test_worked_aggregation(how):
    """Lengths 1 and 3, loss 1 on every token of the long one and 0 on the short one, padded to 4."""
    b = batch([1, 3], width=4)
    matrix = torch.tensor([[0.0] * 4, [1.0] * 4])
    assert (aggregate(b.mask, how) * matrix).sum().item() == pytest.approx(MEAN[how])


def test_muted_rows_weigh_nothing_and_still_count_as_responses():
    mask = batch([2, 2, 2]).mask & torch.tensor([[True], [True], [False]])
    ones = torch.ones(3, 2)
    assert aggregate(mask, "token_mean").sum().item() == pytest.approx(1.0)
    assert (aggregate(mask, "sequence_mean") * ones).sum().item() == pytest.approx(2 / 3)
    assert (aggregate(mask, "sequence_sum") * ones).sum().item() == pytest.approx(4 / 3)
    for how in MEAN:
        assert aggregate(torch.zeros(2, 3, dtype=torch.bool), how).eq(0).all()  # nobody has loss: no NaN
    with pytest.raises(ValueError):
        aggregate(mask, "median")


# ------------------------------------------------------------------------------------------------------------------ clipping


def test_worked_dual_clip():
    ratio, bad = torch.tensor([5.0]), torch.tensor([-1.0])
    assert clipped(ratio, bad, 0.2, 0.2).item() == 5.0
    assert clipped(ratio, bad, 0.2, 0.2, 3.0).item() == 3.0
    assert gradient_of_one_token(Clipped(dual_clip=3.0), 5.0, -1.0) == 0.0
    assert gradient_of_one_token(Clipped(dual_clip=3.0), 2.9, -1.0) == pytest.approx(2.9, rel=1e-5)
    assert gradient_of_one_token(Clipped(dual_clip=3.0), 5.0, 1.0) == 0.0  # for good tokens the usual clip holds


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28), (0.16, 0.24), (0.0, 0.5)])
@pytest.mark.parametrize("advantage", [1.5, -0.5])
@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 0.9, 1.1, 1.19, 1.21, 1.27, 1.29, 1.6, 4.0])
def test_the_gradient_is_zero_exactly_beyond_the_clip(low, high, advantage, ratio):
    found = gradient_of_one_token(Clipped(low, high), ratio, advantage)
    dropped = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
    assert found == pytest.approx(0.0 if dropped else -advantage * ratio, rel=1e-5)


@pytest.mark.parametrize("objective", [Clipped(), Clipped(0.0, 0.0), Clipped(0.2, 0.28), Clipped(0.2, 0.2, dual_clip=3.0), CISPO(), CISPO(0.0, 0.0)], ids=str)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_on_the_old_policy_clipping_is_reinforce(objective, advantages):
    """logp == logp_old: the gradient equals that of -A log p, whatever the clip."""
    logps = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -3.0, -0.1]])
    credit = torch.tensor([[*advantages[:2], 7.0], advantages[1:]])
    _, found = loss_and_gradient(objective, logps, logps, credit, batch([2, 3]))
    _, expected = loss_and_gradient(PolicyGradient(), logps, logps, credit, batch([2, 3]))
    torch.testing.assert_close(found, expected)


def test_on_the_old_policy_gspo_is_the_advantage_over_the_length():
    b, logps = batch([1, 3]), torch.tensor([[-1.0, 0.0, 0.0], [-0.5, -3.0, -0.1]])
    _, found = loss_and_gradient(GSPO(), logps, logps, [2.0, -1.0], b)
    torch.testing.assert_close(found, torch.tensor([[-2.0, 0, 0], [1 / 3] * 3]) / 2)


def test_worked_gspo():
    """Log-ratios (.2, -.1, .2): s = e^.1 = 1.105, on every token."""
    b = batch([3])
    s, old = scores([[0.2, -0.1, 0.2]]), Scores(torch.zeros(1, 3))
    b.old, b.advantages = old, torch.tensor([1.0])
    assert GSPO(1.0, 1.0)(s, b).tolist()[0] == pytest.approx([-1.1052] * 3, abs=1e-4)
    for advantage, gradient in ((1.0, 0.0), (-1.0, 1.1052 / 3)):  # above the window: good sequences get nothing more, bad ones are pushed down
        _, found = loss_and_gradient(GSPO(), s.logps.detach(), old.logps, [advantage], b)
        assert found.tolist()[0] == pytest.approx([gradient] * 3, abs=1e-4)


def test_gspo_takes_advantages_per_token():
    b = batch([2])
    _, found = loss_and_gradient(GSPO(), [[-1.0, -1.0]], [[-1.0, -1.0]], [[1.0, -3.0]], b)
    assert found.tolist()[0] == pytest.approx([-0.5, 1.5])


@pytest.mark.parametrize("ratio, weight, objective", [(7.0, 5.0, CISPO()), (0.01, 0.01, CISPO()), (0.5, 0.8, CISPO(0.2, 0.28)), (2.0, 1.28, CISPO(0.2, 0.28)),
                                                      (1.1, 1.1, CISPO(0.2, 0.28))])
def test_cispo_clips_the_weight_and_drops_no_token(ratio, weight, objective):
    for advantage in (1.0, -0.5):
        assert gradient_of_one_token(objective, ratio, advantage) == pytest.approx(-weight * advantage, rel=1e-5)


def test_rloo_takes_the_ratio_of_whole_responses():
    b = batch([1, 2])
    old = torch.zeros(2, 2)
    logps = torch.tensor([[math.log(1.1), 0.0], [math.log(1.1), math.log(1.3)]])
    loss, found = loss_and_gradient(SequenceClipped(), logps, old, [1.0, 1.0], b)
    assert loss == pytest.approx(-(1.1 + 1.2) / 2)  # 1.43 is clipped at 1.2
    torch.testing.assert_close(found, torch.tensor([[-0.55, 0.0], [0.0, 0.0]]))
    _, found = loss_and_gradient(SequenceClipped(), logps, old, [1.0, -1.0], b)
    torch.testing.assert_close(found[1], torch.tensor([1.43 / 2] * 2))


def test_ratios_stay_finite():
    assert log_ratio(torch.tensor([1e3, -1e3]), torch.zeros(2)).tolist() == [20.0, -20.0]
    for objective in EVERY:
        _, found = loss_and_gradient(objective, [[0.0, 0.0]], [[-500.0, -900.0]], [-1.0], batch([2]))
        assert torch.isfinite(found).all(), objective


# ------------------------------------------------------------------------------------------------------ supervised, entropy


def test_nll_acts_on_the_roles_it_names():
    assert NLL().acts_on == (FORCED,) and set(NLL(on="both").acts_on) == {FORCED, 1} and NLL(on="policy").acts_on == (1,)
    assert NLL(coefficient=0.5)(scores([[-2.0, -4.0]]), batch([2])).tolist() == [[1.0, 2.0]]


def test_entropy_bonus():
    b = batch([2], step=5)
    s = scores([[0.0, 0.0]], entropy=torch.tensor([[1.0, 3.0]]))
    assert Entropy(0.5)(s, b).tolist() == [[-0.5, -1.5]]
    from volvelle.core.schedule import Linear

    assert Entropy(Linear(0.0, 1.0, 10))(s, b).tolist() == [[-0.5, -1.5]]


# -------------------------------------------------------------------------------------------------------- soft invariances


@st.composite
def problems(draw):
    lengths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    n, t = len(lengths), max(lengths)
    number = st.floats(-2, 0, width=32)
    table = st.lists(st.lists(number, min_size=t, max_size=t), min_size=n, max_size=n)
    return lengths, torch.tensor(draw(table)), torch.tensor(draw(table)), torch.tensor(draw(st.lists(st.floats(-2, 2, width=32), min_size=n, max_size=n)))


@pytest.mark.parametrize("objective", EVERY, ids=str)
@given(problems(), st.booleans())
def test_padding_never_matters(objective, problem, per_token):
    """NaN in every padded place of log-probs, old log-probs and advantages: same loss, same gradient, none on the padding."""
    lengths, logps, old, advantages = problem
    credit = advantages[:, None].expand(logps.shape).clone() if per_token else advantages
    mask = batch(lengths).mask
    clean = [torch.where(mask, x, 0.0) if x.ndim == 2 else x for x in (logps, old, credit)]
    extra = torch.full((len(lengths), 2), torch.nan)
    dirty = [torch.cat([torch.where(mask, x, torch.nan), extra], 1) if x.ndim == 2 else x for x in (logps, old, credit)]
    dirty[0] = torch.where(dirty[0].isnan(), 0.0, dirty[0])  # the loop leaves 0 where nothing was scored
    if objective.__dict__.get("aggregation") in ("constant", "padded"):
        assert objective.length == 9
    loss, found = loss_and_gradient(objective, *clean, batch(lengths))
    other, padded = loss_and_gradient(objective, *dirty, batch(lengths, width=mask.shape[1] + 2))
    assert other == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(padded[:, : mask.shape[1]][mask], found[mask], atol=1e-7, rtol=1e-6)
    assert found[~mask].nan_to_num(9.0).abs().sum() == 0


@pytest.mark.parametrize("objective", EVERY, ids=str)
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_responses_never_matters(objective, problem, random):
    lengths, logps, old, advantages = problem
    order = list(range(len(lengths)))
    random.shuffle(order)
    loss, found = loss_and_gradient(objective, logps, old, advantages, batch(lengths))
    other, moved = loss_and_gradient(objective, logps[order], old[order], advantages[order], batch([lengths[i] for i in order], width=logps.shape[1]))
    assert other == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(moved, found[order], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("objective", EVERY, ids=str)
@given(problems(), st.integers(1, 3))
def test_micro_batches_never_matter(objective, problem, size):
    """Losses and gradients of micro-batches under weights of the whole mini-batch add up to those of the mini-batch."""
    lengths, logps, old, advantages = problem
    b = batch(lengths)
    loss, whole = loss_and_gradient(objective, logps, old, advantages, b)
    s, total = scores(logps), 0.0
    for at in range(0, len(b), size):
        rows = torch.arange(at, min(at + size, len(b)))
        micro = b.select(rows)
        width = micro.ids.shape[1]
        matrix = objective(Scores(s.logps[rows][:, :width]), micro)
        weights = torch.full((len(rows),), 1 / len(b)) if matrix.ndim == 1 else aggregate(b.mask, objective.aggregation, objective.length)[rows][:, :width]
        part = (matrix * weights).sum()
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(torch.where(b.mask, s.logps.grad, 0.0), torch.where(b.mask, whole, 0.0), atol=1e-6, rtol=1e-5)


def test_no_advantage_no_gradient():
    """A homogeneous group gives advantage 0, and the surrogate then nothing."""
    for objective in EVERY:
        _, found = loss_and_gradient(objective, [[-1.0, -2.0]], [[-1.5, -0.2]], [0.0], batch([2]))
        assert found.eq(0).all(), objective
