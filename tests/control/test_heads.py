"""Policy heads: densities against worked numbers and integrals, samples against densities."""

import math

import pytest
import torch
from torch import tensor

from volvelle.control.heads import Auto, Categorical, Gaussian, Mixed, Squashed
from volvelle.control.spaces import Actions
from volvelle.core.errors import UserError

DISCRETE, CODES = Actions((3,)), Actions((2, 3), plain=False)
BOX = Actions((), (-1.0,), (1.0,), plain=False)
WIDE = Actions((), (-2.0, 0.0), (2.0, 1.0), plain=False)
MIXED = Actions((3,), (-1.0,), (1.0,), plain=False)


def noise(head, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, head.noise_width, generator=generator)
    gumbel = -torch.empty(n, head.noise_width).exponential_(generator=generator).log()
    if head.noise == "mixed":
        return torch.cat([normal[:, : head.normals], gumbel[:, head.normals :]], -1)
    return normal if head.noise == "normal" else gumbel


def test_squashed_worked_example():
    head = Squashed(low=-20.0, high=2.0, smooth=False).bind(BOX)
    outputs = tensor([0.2, math.log(0.4)])
    action, logp = head.draw(outputs, tensor([(0.5 - 0.2) / 0.4]))
    assert float(action) == pytest.approx(0.462117, abs=1e-6)
    assert float(logp) == pytest.approx(-0.043670, abs=2e-6)
    assert float(head.log_prob(outputs, action)) == pytest.approx(float(logp), abs=1e-5)


@pytest.mark.parametrize("smooth", [True, False])
def test_squashed_density_integrates_to_one(smooth):
    head = Squashed(smooth=smooth).bind(Actions((), (-2.0,), (3.0,), plain=False))
    a = torch.linspace(-2, 3, 200_001)[1:-1].double().unsqueeze(-1)
    head.scale, head.bias = head.scale.double(), head.bias.double()
    density = head.log_prob(tensor([0.3, -0.4], dtype=torch.float64).expand(len(a), 2), a).exp()
    assert float(density.sum() * 5 / 200_000) == pytest.approx(1, abs=1e-3)


def test_squashed_bounds_and_smooth_deviation():
    head = Squashed().bind(WIDE)
    action, logp = head.draw(torch.full((500, 4), 9.0), noise(head, 500))
    assert (action >= tensor([-2.0, 0.0])).all() and (action <= tensor([2.0, 1.0])).all() and logp.isfinite().all()
    assert head.split(tensor([0.0, 0, 0, 0]))[1].tolist() == [-1.5, -1.5]
    assert head.mode(torch.zeros(4)).tolist() == [0.0, 0.5]


def test_squashed_refuses_unbounded_and_discrete_actions():
    for actions in (Actions((), (-math.inf,), (1.0,), plain=False), DISCRETE, MIXED):
        with pytest.raises(UserError, match="head=squashed needs continuous actions with finite bounds") as error:
            Squashed().bind(actions)
        assert "\n" not in str(error.value)


def test_gaussian_density_and_entropy():
    head = Gaussian().bind(WIDE)
    outputs = (tensor([0.5, -1.0]), tensor([math.log(2.0), 0.0]))
    reference = torch.distributions.Normal(tensor([0.5, -1.0]), tensor([2.0, 1.0]))
    action = tensor([1.7, 0.3])
    logp, entropy = head.score(outputs, action)
    assert float(logp) == pytest.approx(float(reference.log_prob(action).sum()), abs=1e-6)
    assert float(entropy) == pytest.approx(float(reference.entropy().sum()), abs=1e-6)
    assert float(head.entropy(outputs)) == pytest.approx(float(entropy), abs=1e-6)


def test_gaussian_deviation_is_free_or_from_the_network():
    free, state = Gaussian().bind(WIDE), Gaussian(std="state").bind(WIDE)
    assert (free.free, free.width, state.free, state.width) == (2, 2, 0, 4)
    outputs, actions = tensor([[0.5, -1.0, 0.3, 0.1]]), tensor([[0.2, 0.4]])
    assert torch.equal(free.log_prob((outputs[:, :2], outputs[:, 2:]), actions), state.log_prob(outputs, actions))


def test_gumbel_samples_follow_the_softmax():
    head = Categorical().bind(DISCRETE)
    logits = tensor([0.0, 1.0, -1.0])
    counts = torch.bincount(head.sample(logits.expand(20_000, 3), noise(head, 20_000)), minlength=3) / 20_000
    assert (counts - logits.softmax(-1)).abs().max() < 0.02  # 4 standard errors are 0.014


def test_categorical_scores_one_and_several_parts():
    head = Categorical().bind(DISCRETE)
    logits = tensor([[0.0, 1.0, -1.0]])
    reference = torch.distributions.Categorical(logits=logits)
    logp, entropy = head.score(logits, tensor([1]))
    assert float(logp) == pytest.approx(float(reference.log_prob(tensor([1])))) and float(entropy) == pytest.approx(float(reference.entropy()))
    head = Categorical().bind(CODES)
    outputs = tensor([[0.3, -0.3, 0.0, 1.0, -1.0]])
    logp, entropy = head.score(outputs, tensor([[1, 2]]))
    first, second = (torch.distributions.Categorical(logits=part) for part in outputs.split([2, 3], -1))
    assert float(logp) == pytest.approx(float(first.log_prob(tensor(1)) + second.log_prob(tensor(2))))
    assert float(entropy) == pytest.approx(float(first.entropy() + second.entropy()))
    assert float(head.entropy(outputs)) == pytest.approx(float(entropy))
    assert head.mode(outputs).tolist() == [[0, 1]]


def test_mixed_is_the_sum_of_its_parts():
    head = Mixed().bind(MIXED)
    outputs = (tensor([[0.5, 0.0, 1.0, -1.0]]), tensor([[math.log(2.0)]]))
    action = head.sample(outputs, noise(head, 1))
    logp, entropy = head.score(outputs, action)
    normal = torch.distributions.Normal(0.5, 2.0)
    codes = torch.distributions.Categorical(logits=outputs[0][0, 1:])
    assert float(logp) == pytest.approx(float(normal.log_prob(action[0, 0]) + codes.log_prob(action[0, 1])), abs=1e-5)
    assert float(entropy) == pytest.approx(float(normal.entropy() + codes.entropy()), abs=1e-5)
    assert head.mode(outputs).tolist() == [[0.5, 1.0]]
    assert head.free == 1 and head.width == 4


def test_auto_takes_what_fits():
    assert type(Auto().bind(DISCRETE)).__name__ == "Categories" and type(Auto().bind(BOX)).__name__ == "Normal"
    assert type(Auto().bind(MIXED)).__name__ == "Both"
    for head, actions in ((Categorical(), BOX), (Gaussian(), DISCRETE), (Mixed(), BOX)):
        with pytest.raises(UserError, match="needs"):
            head.bind(actions)
