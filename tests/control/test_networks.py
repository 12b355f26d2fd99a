"""Networks with a leading axis of copies: every copy is a network of its own, and seeds are clipped and stepped on their own."""

import math
from copy import deepcopy

import pytest
import torch

from volvelle.control.networks import CNN, MLP, Dueling, FourierMLP, Linear, Output, ResNet, SmallCNN, repeat, reset
from volvelle.control.recurrent import GRU
from volvelle.control.spaces import Layout
from volvelle.control.stacked import Stacked
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.trainable import Adam

VECTOR, PIXELS = Layout(4), Layout(0, {"image": (4, 84, 84)}, {"image": "uint8"})
GRID, BOTH = Layout(0, {"image": (3, 10, 10)}, {"image": "bool"}), Layout(2, {"camera": (3, 10, 10)}, {"camera": "uint8"})


def generators(n, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


def example(layout, copies=1, batch=5):
    g = torch.Generator().manual_seed(9)
    parts = {}
    for name, (shape, dtype) in layout.fields().items():
        value = torch.rand(copies, batch, *shape, generator=g)
        parts[name] = value if dtype == "float32" else (value * 255).byte() if dtype == "uint8" else value > 0.5
    return next(iter(parts.values())) if layout.single else parts


@pytest.mark.parametrize("part, layout", [(MLP(), VECTOR), (MLP(layer_norm=True, activation="gelu"), BOTH), (FourierMLP(), VECTOR), (GRU(features=2, hidden=(8,)), VECTOR), (MLP(), GRID), (CNN(), PIXELS),
                                          (SmallCNN(), GRID), (SmallCNN(), BOTH), (ResNet(channels=(4, 8), hidden=(16,)), GRID)])
def test_a_copy_computes_what_it_would_compute_alone(part, layout):
    stacked = reset(Output(part.build(layout, 3), 3, 2), generators(3))
    x = example(layout)
    three = stacked({k: v.repeat(3, *[1] * (v.ndim - 1)) for k, v in x.items()} if isinstance(x, dict) else x.repeat(3, *[1] * (x.ndim - 1)))
    for i in range(3):
        alone = reset(Output(part.build(layout, 1), 1, 2), generators(1, i))
        assert torch.allclose(alone(x)[0], three[i], atol=1e-5)
    assert not torch.allclose(three[0], three[1], atol=1e-3)


def test_pytorch_initialisation_has_the_pytorch_bounds():
    layer = reset(torch.nn.Sequential(Linear(2, 100, 50)), generators(2))[0]
    assert layer.weight.abs().max() <= 0.1 and layer.weight.abs().max() > 0.099
    assert layer.bias.abs().max() <= 0.1 and layer.bias.std() > 0.04


def test_orthogonal_initialisation():
    layer = reset(torch.nn.Sequential(Linear(2, 64, 32, "orthogonal", math.sqrt(2))), generators(2))[0]
    for weight in layer.weight:
        assert torch.allclose(weight.T @ weight, 2 * torch.eye(32), atol=1e-5)
    assert layer.bias.abs().max() == 0


def test_fan_avg_initialisation():
    layer = reset(torch.nn.Sequential(Linear(1, 200, 100, "fan-avg")), generators(1))[0]
    assert float(layer.weight.detach().var()) == pytest.approx(2 / 300, rel=0.05)


def test_waves_of_a_fourier_network():
    body = FourierMLP(hidden=(4,), period=8.0, octaves=2).build(Layout(vector=1), 1)
    seen = []
    body.dense.dense.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    body.dense.forward(torch.tensor([[[2.0]]]))
    quarter = 2 * math.pi * 2.0 / 8                        # a quarter turn, then a half
    wanted = torch.tensor([[[2.0, math.sin(quarter), math.sin(2 * quarter), math.cos(quarter), math.cos(2 * quarter)]]])
    assert torch.allclose(seen[0], wanted, atol=1e-6) and body.width == 4


def test_a_recurrent_network_computes_what_torch_computes_from_the_first_step_there_is():
    body = reset(GRU(features=3, units=7).build(Layout(vector=12), 2), generators(2))
    unit, rows = body.dense, torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(1))
    rows[:, 1, :2] = 0                                       # the second of the batch has only two steps
    found = body(rows.flatten(2))
    for i in range(2):
        peer = torch.nn.GRU(3, 7, batch_first=True)
        with torch.no_grad():
            for name, value in (("weight_ih_l0", unit.into[i].T), ("weight_hh_l0", unit.back[i].T), ("bias_ih_l0", unit.bias[i, 0]), ("bias_hh_l0", unit.back_bias[i, 0])):
                getattr(peer, name).copy_(value)
        assert torch.allclose(peer(rows[i])[0][:, -1][[0, 2, 3, 4]], found[i][[0, 2, 3, 4]], atol=1e-6)
        assert torch.allclose(peer(rows[i, 1:2, 2:])[0][:, -1], found[i, 1:2], atol=1e-6)
    assert unit.into.abs().max() <= 7**-0.5 and body.width == 7


def test_a_recurrent_network_refuses_what_is_no_row_of_steps():
    for layout in (Layout(vector=7), GRID):
        with pytest.raises(UserError, match="network.features=3: the observations are"):
            GRU().build(layout, 1)


def test_dueling_streams_are_identifiable():
    net = reset(Dueling(MLP().build(VECTOR, 1), 1, 3, 1), generators(1))
    x = example(VECTOR)
    q = net(x)
    assert q.shape == (1, 5, 3)
    assert torch.allclose(q.mean(-1, keepdim=True), net.value(net.body(x)), atol=1e-6)


def test_members_of_an_ensemble_share_the_input_of_their_seed():
    x = torch.arange(4.0).view(2, 2, 1)
    assert torch.equal(repeat(x, 2), x[[0, 0, 1, 1]]) and torch.equal(repeat(x[:1], 3), x[[0, 0, 0]])
    critic = reset(Output(MLP().build(VECTOR, 4, extra=2), 4, 1, members=2), generators(4))
    assert critic(torch.zeros(2, 5, 4), torch.zeros(2, 5, 2)).shape == (4, 5, 1)


def test_images_too_small_for_the_network_and_missing_images_are_refused():
    with pytest.raises(UserError, match="images of 10x10 are too small"):
        CNN().build(GRID, 1)
    with pytest.raises(UserError, match="network=cnn needs images; the observations are 4 numbers"):
        CNN().build(VECTOR, 1)


def net(seeds, first=0):
    return reset(Output(MLP(hidden=(8,)).build(VECTOR, seeds), seeds, 1), generators(seeds, first))


def loss_of(made, scales):
    x = example(VECTOR, made.seeds)
    return (made(x).squeeze(-1).square().mean(-1) * torch.tensor(scales)).sum()


def test_seeds_train_as_they_would_alone_with_a_clip_of_their_own():
    optimiser = Adam(lr=1e-2, clip=0.5)
    together = Stacked("net", net(2), optimiser, "cpu", 2)
    x = example(VECTOR, 2)
    alone = [Stacked("net", net(1, i), optimiser, "cpu", 1) for i in range(2)]
    scales = [1e3, 1e-2]  # one seed is clipped, the other is not
    for _ in range(3):
        together.backward(together(x).squeeze(-1).square().mean(-1) * torch.tensor(scales))
        together.step()
        for i, single in enumerate(alone):
            single.backward(single(x[i : i + 1]).squeeze(-1).square().mean(-1) * scales[i])
            single.step()
    for i, single in enumerate(alone):
        for mine, other in zip(together.module.parameters(), single.module.parameters(), strict=True):
            assert torch.allclose(mine[i], other[0], atol=1e-5)


def test_clip_bounds_the_norm_and_step_returns_it_before_clipping():
    made = Stacked("net", net(1), Adam(lr=1e-3, clip=0.5), "cpu", 1)
    made.backward(loss_of(made, [1e3]))
    before = float(made.flat.grad.norm())
    seen = []
    made.optimiser.step = lambda: seen.append(float(made.flat.grad.norm()))
    assert made.step() == pytest.approx(before) and before > 0.5
    assert seen[0] == pytest.approx(0.5, rel=1e-4) and made.flat.grad.abs().max() == 0


def test_state_round_trip_goes_on_bit_for_bit():
    made = Stacked("net", net(2), Adam(lr=1e-2), "cpu", 2)
    copy = Stacked("net", net(2, 7), Adam(lr=1e-2), "cpu", 2)

    def advance(m):
        m.backward(loss_of(m, [1.0, 1.0]))
        m.step()

    advance(made)
    copy.load_state_dict(deepcopy(made.state_dict()))
    advance(made), advance(copy)
    assert torch.equal(made.flat, copy.flat) and made.steps == copy.steps == 2


def test_a_gradient_that_is_not_finite_stops_and_names_the_seed():
    made = Stacked("critic", net(2), Adam(), "cpu", 2)
    made.backward(loss_of(made, [1.0, float("nan")]))
    before = made.flat.detach().clone()
    with pytest.raises(RunStopped, match="the gradient norm of critic of seed 1 .* is nan"):
        made.step()
    assert torch.equal(made.flat, before)


def test_learning_rate_is_scaled_for_one_step_only():
    made = Stacked("net", net(1), Adam(lr=1e-2), "cpu", 1)
    made.backward(loss_of(made, [1.0]))
    before = made.flat.detach().clone()
    made.step(0.0)
    assert torch.equal(made.flat, before)
    made.backward(loss_of(made, [1.0]))
    made.step()
    assert not torch.equal(made.flat, before)
