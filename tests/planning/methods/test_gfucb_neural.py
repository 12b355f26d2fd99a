"""The neural form of GFUCB on small vectors."""

import numpy as np
import pytest
import torch

from volvelle.core.errors import UserError
from volvelle.core.trainable import AdamW, Trainable
from volvelle.planning.bandits import Bandits, play, unit
from volvelle.planning.methods.gfucb import Gfucb, practical_beta
from volvelle.planning.methods.gfucb_neural import Neural, NeuralGfucb, SharedNet


def problem(tasks=3, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(40, 4))
    means = np.tanh(unit(rng.normal(size=(tasks, 2))) @ np.stack([inputs[:, 0] * inputs[:, 1], inputs[:, 2]]))
    return Bandits(means, 0.2, 5), inputs


def player(inputs, tasks=3, seed=0, groups=None, beta=practical_beta(5, 3, 0.2, 0.1), **options):
    part = Neural(rank=3, hidden=(16,), fit_steps=5, **options)
    return NeuralGfucb(inputs, tasks, beta, torch.Generator().manual_seed(seed), part, lambda name, net: Trainable(name, net, part.optimiser), groups)


def test_features_are_at_most_of_length_one():
    net = SharedNet(4, 2, 5, 3, (16,), torch.Generator().manual_seed(0))
    x = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(1)) * 10
    lengths = net.features(x).norm(dim=2)
    assert lengths.shape == (2, 50) and lengths.max() <= 1 + 1e-6 and lengths.max() > 0.99
    values = net(x.reshape(2, 5, 10, 4)).detach()
    assert values.shape == (2, 5, 10)
    one = (net.features(x)[1, 23] * net.heads[1, 2]).sum()
    assert values[1, 2, 3] == pytest.approx(float(one.detach()), abs=1e-5)


def test_groups_share_nothing():
    _, inputs = problem(2)
    alone = player(inputs, 2, groups=[[0], [1]], mode="greedy", epsilon=0.0)
    alone.observe(np.array([3, 4]), np.array([1.0, -1.0]))
    changed = player(inputs, 2, groups=[[0], [1]], mode="greedy", epsilon=0.0)
    changed.observe(np.array([3, 9]), np.array([1.0, 5.0]))
    same = [torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1]) for a, b in zip(alone.net.module.parameters(), changed.net.module.parameters())]
    assert all(same)


@pytest.mark.parametrize("mode", ["bonus", "optimistic", "greedy"])
@pytest.mark.parametrize("groups", [None, [[0], [1], [2]]])
def test_it_plays_and_learns_from_everything_it_saw(mode, groups):
    bandits, inputs = problem()
    one = player(inputs, mode=mode, groups=groups, ascent_steps=3)
    lost = play(one, bandits, 4, np.random.default_rng(0))
    assert lost.shape == (3, 4) and one.seen.shape == (4, 3) and len(one.net.module.heads) == (3 if groups else 1)
    assert one.net.steps == 20
    again = play(player(inputs, mode=mode, groups=groups, ascent_steps=3), bandits, 4, np.random.default_rng(0))
    np.testing.assert_array_equal(lost, again)


def test_the_bonus_is_that_of_the_closed_form_on_frozen_features():
    bandits, inputs = problem()
    neural = player(inputs, mode="bonus", ridge=1e-3)
    play(neural, bandits, 6, np.random.default_rng(0))
    with torch.no_grad():
        features = neural.net.module.features(neural.inputs[None]).double().numpy()
        heads = neural.net.module.heads[0].double().numpy()
    exact = Gfucb(features, 3, neural.beta, 1e-3)
    for inputs_seen in neural.seen:  # the closed form's own fit is made to equal the network's
        exact.observe(inputs_seen, (heads @ features[0].T)[np.arange(3), inputs_seen])
    rng = np.random.default_rng(1)
    same = sum(np.array_equal(neural.choose(s), exact.choose(s)) for s in (bandits.show(rng) for _ in range(30)))
    assert same >= 28  # the exact fit differs from the heads by the ridge


def test_optimism_stays_inside_the_ball_and_beats_the_fit():
    """With radius 0 the ascent plays the fit's best actions; with a large radius it finds a larger value."""
    bandits, inputs = problem()
    still = player(inputs, mode="optimistic", beta=lambda t, m: 0.0)
    play(still, bandits, 5, np.random.default_rng(0))
    rng, moved = np.random.default_rng(2), 0
    for _ in range(10):
        shown = bandits.show(rng)
        with torch.no_grad():
            best = still.net(still.inputs[torch.as_tensor(shown)][None])[0].clamp(-1, 1).argmax(1).numpy()
        np.testing.assert_array_equal(still.choose(shown), shown[np.arange(3), best])
        still.beta = lambda t, m: 50.0
        moved += not np.array_equal(still.choose(shown), shown[np.arange(3), best])
        still.beta = lambda t, m: 0.0
    assert moved > 0
    before = [p.clone() for p in still.net.module.parameters()]
    still.choose(bandits.show(rng))
    assert all(torch.equal(a, b) for a, b in zip(before, still.net.module.parameters()))  # the fit itself does not move


def test_a_shared_network_fits_the_tasks():
    bandits, inputs = problem()
    part = Neural(rank=3, hidden=(32,), optimiser=AdamW(lr=1e-2, clip=None), fit_steps=20, mode="greedy", epsilon=1.0)
    neural = NeuralGfucb(inputs, 3, practical_beta(5, 3, 0.2), torch.Generator().manual_seed(0), part, lambda n, net: Trainable(n, net, part.optimiser))
    play(neural, Bandits(bandits.means, 0.0, 5), 40, np.random.default_rng(0))
    with torch.no_grad():
        values = neural.net(neural.inputs.expand(1, 3, -1, -1))[0].numpy()
    seen = np.array([np.abs(values[i] - bandits.means[i])[neural.seen[:, i]].mean() for i in range(3)])
    assert (seen < 0.15).all()


def test_wrong_modes_are_refused():
    with pytest.raises(UserError, match="mode='thompson'"):
        Neural(mode="thompson")
    with pytest.raises(UserError, match="consecutive tasks in groups of one size"):
        player(problem()[1], groups=[[0, 2], [1]])
