"""Models that a run owns: gradients, clipping, warm-up, lagging copies."""

import math

import pytest
import torch

from volvelle.core.errors import RunStopped
from volvelle.core.schedule import Linear
from volvelle.core.trainable import SGD, Adam, AdamW, Lagged, Trainable, copy_weights


def line(values=(0.0, 0.0)) -> torch.nn.Linear:
    made = torch.nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([values]))
    return made


def test_gradients_add_up_and_a_step_clears_them():
    model = Trainable("m", line(), SGD(lr=0.5))
    for _ in range(2):
        model.backward(model(torch.tensor([[3.0, 4.0]])).sum())
    assert model.step() == pytest.approx(10.0)  # the norm before clipping
    assert model.module.weight.tolist() == [[-3.0, -4.0]]
    assert model.step() == 0.0 and model.steps == 2 and model.module.weight.tolist() == [[-3.0, -4.0]]


def test_the_norm_is_clipped():
    model = Trainable("m", line(), SGD(lr=1.0, clip=1.0))
    model.backward(model(torch.tensor([[3.0, 4.0]])).sum())
    assert model.step() == pytest.approx(5.0)
    torch.testing.assert_close(model.module.weight.detach(), torch.tensor([[-0.6, -0.8]]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_moves_nothing(value):
    model = Trainable("critic.net", line((1.0, 2.0)), Adam(lr=1.0))
    model.backward(model(torch.tensor([[value, 1.0]])).sum())
    with pytest.raises(RunStopped, match="the gradient norm of critic.net is"):
        model.step()
    assert model.module.weight.tolist() == [[1.0, 2.0]] and model.steps == 0
    model.backward(model(torch.ones(1, 2)).sum())
    model.step()
    assert torch.isfinite(model.module.weight).all()


def test_a_loss_without_gradient_is_no_mistake():
    model = Trainable("m", line(), SGD())
    model.backward(torch.tensor(3.0))
    assert model.step() == 0.0


def test_seeds_do_not_share_parameters():
    """A loss with a leading axis is summed: each row's gradient is what it would be alone."""
    model = Trainable("m", torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(3, 2))]), SGD(lr=1.0, clip=None))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    model.backward((model.module[0] * x).mean(1))
    model.step()
    torch.testing.assert_close(model.module[0].detach(), -x / 2)


def test_warm_up_and_schedules_count_optimiser_steps():
    model = Trainable("m", line(), SGD(lr=Linear(1.0, 0.0, 10), warmup=2))
    rates = []
    for _ in range(4):
        model.backward(model(torch.ones(1, 2)).sum())
        model.step()
        rates.append(model.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.9, 0.8, 0.7])


def test_weight_decay_is_decoupled_in_adamw_only():
    for optimiser, moved in ((AdamW(lr=0.1, weight_decay=0.5, clip=None), 1.0 * (1 - 0.05)), (Adam(lr=0.1, weight_decay=0.5, clip=None), 1.0 - 0.1)):
        model = Trainable("m", line((1.0,)), optimiser)
        model.backward(model(torch.zeros(1, 1)).sum())  # gradient 0
        model.step()
        assert model.module.weight.item() == pytest.approx(moved, abs=1e-6)


def test_an_optimiser_can_be_forgotten():
    model = Trainable("m", line(), Adam(lr=0.1))
    model.backward(model(torch.ones(1, 2)).sum())
    model.step()
    model.reset_optimiser()
    assert model.steps == 0 and model.optimiser.state_dict()["state"] == {}


def test_state_holds_what_training_can_change():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    net[0].bias.requires_grad_(False)
    model = Trainable("m", net, SGD(lr=0.1))
    assert set(model.state_dict()["weights"]) == {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    with pytest.raises(RunStopped, match="weights of m do not fit: '0.weight' is on one side only"):
        copy_weights({}, {"0.weight": net[0].weight}, "m")
    with pytest.raises(RunStopped, match=r"'w' is \(1,\), expected \(2,\)"):
        copy_weights({"w": torch.zeros(1)}, {"w": torch.zeros(2)}, "m")


def test_lagging_by_count():
    source = Trainable("m", line((1.0,)), SGD(lr=1.0, clip=None))
    lagged = Lagged(source, every=2)
    seen = []
    for _ in range(4):
        source.backward(source(torch.ones(1, 1)).sum())
        source.step()
        lagged.update()
        seen.append(lagged.module.weight.item())
    assert seen == [1.0, -1.0, -1.0, -3.0]
    other = Lagged(source, every=2)
    other.load_state_dict(lagged.state_dict())
    assert other.count == 4 and other.module.weight.item() == -3.0
    assert not lagged(torch.ones(1, 1)).requires_grad


def test_lagging_by_average():
    source = Trainable("m", line((1.0,)), SGD())
    lagged = Lagged(source, tau=0.25)
    with torch.no_grad():
        source.module.weight.fill_(5.0)
    lagged.update()
    assert lagged.module.weight.item() == 2.0
    lagged.refresh()
    assert lagged.module.weight.item() == 5.0
    with pytest.raises(ValueError):
        Lagged(source, every=1, tau=0.5)
