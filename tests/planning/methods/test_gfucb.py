"""GFUCB: the worked example, the closed form against its definition, and what the bound promises."""

import itertools

import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.bandits import linear_mdps, play, synthetic, unit
from volvelle.planning.methods.gfucb import Gfucb, ball, fit, gram, optimistic, practical_beta, theory_beta, widths
from volvelle.planning.methods.gfucb_mdp import GfucbMdp

MAPS = np.array([[[1, 0], [0, 1], [1, 1], [0.5, 1], [1, -0.5]], [[1, 1], [1, -1], [0.5, 0.5], [0, 1], [1, 0]]])


def gathered(data, tasks, size):
    """Counts and sums [M, X], and the sum of squares, of (task, input, reward) rows."""
    counts, sums = np.zeros((2, tasks, size))
    for i, x, y in data:
        counts[i, x] += 1
        sums[i, x] += y
    return counts, sums, sum(y * y for _, _, y in data)


EXAMPLE = gathered([(0, 0, 0.6), (0, 1, 0.2), (0, 2, 0.9), (0, 0, 0.5), (1, 1, 0.1), (1, 3, 0.35), (1, 4, 0.4)], 2, 5)


def region(features, counts, sums, beta, ridge=0.0, squares=0.0):
    inverses = gram(features, counts, ridge)
    fitted = fit(features, counts, sums, inverses, squares)
    return fitted, ball(features, counts, fitted, inverses, beta)


def tables(features, area, shown):
    """Means and widths [P, M, K] of the shown inputs."""
    phi = features[:, shown]
    return np.einsum("pmak,pmk->pma", phi, area.centres), widths(phi, area.inverses)


def test_worked_example():
    counts, sums, squares = EXAMPLE
    fitted, area = region(MAPS, counts, sums, 0.3, squares=squares)
    np.testing.assert_allclose(fitted.errors, [0.01422, 0.35306], atol=5e-6)
    np.testing.assert_allclose(fitted.heads[0], [[0.58, 0.26], [0.46, 0.1111]], atol=5e-5)
    assert fitted.best == 0
    np.testing.assert_allclose(0.3 - area.slack, [0, 0.26965], atol=5e-6)
    shown = np.array([[2, 3, 3], [0, 2, 4]])  # the second 3 only fills the row
    means, width = tables(MAPS, area, shown)
    value, best, actions = optimistic(means, width, area.slack)
    assert value == pytest.approx(1.41111 + 0.74386, abs=1e-5) and best == 0
    assert [shown[i, a] for i, a in enumerate(actions)] == [2, 2]

    def parts(p, a, b):
        return means[p, 0, a] + means[p, 1, b], np.sqrt(area.slack[p] * (width[p, 0, a] + width[p, 1, b]))

    np.testing.assert_allclose(parts(0, 0, 0), [1.3, 0.64807], atol=5e-6)
    np.testing.assert_allclose(parts(1, 0, 0), [1.09667, 0.25313], atol=5e-6)
    assert max(sum(parts(1, a, b)) for a in (0, 1) for b in range(3)) == pytest.approx(1.09667 + 0.25313, abs=1e-5)


def random_instance(rng, tasks=2, maps=3, size=6, rank=2, shown=3, points=8):
    features = unit(rng.normal(size=(maps, size, rank)))
    data = [(i, x, rng.normal()) for i in range(tasks) for x in rng.permutation(size)[: points // tasks]]
    return features, *gathered(data, tasks, size), np.stack([rng.permutation(size)[:shown] for _ in range(tasks)])


def test_closed_form_is_attained_and_never_exceeded():
    """For every map and joint action the value is that of one function of the set, and no sampled function of the set does better."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        features, counts, sums, _, shown = random_instance(rng)
        beta = rng.uniform(0.5, 5)
        fitted, area = region(features, counts, sums, beta)
        for p in np.flatnonzero(area.slack >= 0):
            actions = rng.integers(3, size=2)
            phi = features[p, shown[np.arange(2), actions]]
            total = sum(phi[i] @ area.inverses[p, i] @ phi[i] for i in range(2))
            value = (phi * area.centres[p]).sum() + np.sqrt(area.slack[p] * total)

            def distance(heads, p=p):
                return (counts * (heads @ features[p].T - fitted.predictions) ** 2).sum()

            step = np.stack([area.inverses[p, i] @ phi[i] for i in range(2)])
            best = area.centres[p] + np.sqrt(area.slack[p] / total) * step
            assert (phi * best).sum() == pytest.approx(value, abs=1e-8)
            assert distance(best) == pytest.approx(beta, rel=1e-8)
            for direction in rng.normal(size=(20, 2, 2)):
                reach = np.sqrt((beta - distance(area.centres[p])) / (distance(area.centres[p] + direction) - distance(area.centres[p])))
                inside = area.centres[p] + reach * direction
                assert distance(inside) == pytest.approx(beta, rel=1e-6) and (phi * inside).sum() <= value + 1e-8


def test_coordinate_ascent_against_all_joint_actions():
    rng = np.random.default_rng(1)
    same = 0
    for _ in range(200):
        features, counts, sums, _, shown = random_instance(rng, tasks=3, points=9)
        _, area = region(features, counts, sums, rng.uniform(0.1, 5), ridge=1e-3)
        means, width = tables(features, area, shown)
        value, best, actions = optimistic(means, width, area.slack)
        every = {(p, a): sum(means[p, i, a[i]] for i in range(3)) + np.sqrt(area.slack[p] * sum(width[p, i, a[i]] for i in range(3)))
                 for p in np.flatnonzero(area.slack >= 0) for a in itertools.product(range(3), repeat=3)}
        assert value == pytest.approx(every[best, tuple(actions)], abs=1e-10)
        assert value <= max(every.values()) + 1e-10
        same += value > max(every.values()) - 1e-8
    assert same >= 198  # local maxima are possible, and rare


def test_no_radius_means_greedy_and_the_fit_is_always_inside():
    rng = np.random.default_rng(2)
    for _ in range(50):
        features, counts, sums, _, shown = random_instance(rng)
        fitted, area = region(features, counts, sums, 0.0, ridge=1e-3)
        assert area.slack[fitted.best] == 0 and (np.delete(area.slack, fitted.best) < 0).all()
        _, best, actions = optimistic(*tables(features, area, shown), area.slack)
        assert best == fitted.best
        np.testing.assert_array_equal(actions, np.take_along_axis(fitted.predictions, shown, 1).argmax(1))


def test_more_data_shrinks_the_set_around_the_same_fit():
    rng = np.random.default_rng(3)
    for _ in range(50):
        features, counts, sums, _, shown = random_instance(rng)
        inverses = gram(features, counts, 1e-6)
        fitted = fit(features, counts, sums, inverses)
        before = ball(features, counts, fitted, inverses, 2.0)
        more = counts + rng.integers(0, 2, counts.shape)
        after = ball(features, more, fitted, gram(features, more, 1e-6), 2.0)
        assert (after.slack <= before.slack + 1e-9).all()
        assert (tables(features, after, shown)[1] <= tables(features, before, shown)[1] + 1e-9).all()
        assert optimistic(*tables(features, after, shown), after.slack)[0] <= optimistic(*tables(features, before, shown), before.slack)[0] + 1e-9


def test_the_ball_is_centred_at_the_fit_not_at_the_rewards():
    counts, sums, _ = EXAMPLE
    _, area = region(MAPS, counts, sums, 0.3)
    moved = sums.copy()
    moved[0, :3] += 0.1 * np.linalg.svd(MAPS[0, :3].T)[2][-1]  # orthogonal to the best map's features: the fit stays, other projections of Y move
    fitted, again = region(MAPS, counts, moved, 0.3)
    assert fitted.best == 0 and np.abs(fitted.heads[1] - region(MAPS, counts, sums, 0.3)[0].heads[1]).max() > 0.005
    np.testing.assert_allclose(again.slack, area.slack, atol=1e-12)
    np.testing.assert_allclose(again.centres, area.centres, atol=1e-12)


def test_a_repeated_input_tightens_only_its_task():
    counts = EXAMPLE[0]
    before = gram(MAPS, counts, 0.0)
    more = counts.copy()
    more[0, 2] += 1
    after = gram(MAPS, more, 0.0)
    np.testing.assert_array_equal(before[:, 1], after[:, 1])
    for p in range(2):
        assert np.linalg.eigvalsh(before[p, 0] - after[p, 0]).min() > -1e-12 and not np.allclose(before[p, 0], after[p, 0])


def test_one_task_and_one_map_is_linucb():
    rng = np.random.default_rng(4)
    features = unit(rng.normal(size=(1, 10, 3)))
    player = Gfucb(features, 1, lambda t, m: 0.7, ridge=0.5)
    gram_matrix, target = 0.5 * np.eye(3), np.zeros(3)
    for _ in range(30):
        shown = rng.permutation(10)[None, :4]
        chosen = player.choose(shown)[0]
        phi, inverse = features[0], np.linalg.inv(gram_matrix)
        ucb = phi[shown[0]] @ inverse @ target + np.sqrt(0.7 * np.einsum("xk,kl,xl->x", phi[shown[0]], inverse, phi[shown[0]]))
        assert chosen == shown[0, ucb.argmax()]
        reward = rng.normal()
        gram_matrix, target = gram_matrix + np.outer(phi[chosen], phi[chosen]), target + reward * phi[chosen]
        player.observe(np.array([chosen]), np.array([reward]))


def test_one_task_is_optimism_over_the_whole_class():
    """M = 1: the largest value over all functions within beta of the fit, found here on a fine grid of heads."""
    rng = np.random.default_rng(5)
    angles, lengths = np.meshgrid(np.linspace(0, 2 * np.pi, 181), np.linspace(0, 4, 201))
    heads = np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], -1).reshape(-1, 2)
    for _ in range(10):
        features, counts, sums, _, shown = random_instance(rng, tasks=1, points=6)
        fitted, area = region(features, counts, sums, 0.5)
        values = heads @ np.swapaxes(features, 1, 2)                                    # [P, G, X]
        inside = (counts[0] * (values - fitted.predictions[0]) ** 2).sum(2) <= 0.5
        grid = np.where(inside[..., None], values[..., shown[0]], -np.inf).max()
        value = optimistic(*tables(features, area, shown), area.slack)[0]
        assert value - 0.12 < grid <= value + 1e-9


def test_relabelling_tasks_and_rotating_maps_changes_no_action():
    rng = np.random.default_rng(6)
    bandits, features, _ = synthetic(4, rng)
    turn = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    order = np.array([2, 0, 3, 1])
    players = [Gfucb(f, 4, practical_beta(np.log(25), 2, 0.3)) for f in (features, features @ turn, features)]
    for _ in range(3):  # in the first round all unit inputs are equally good
        inputs, rewards = rng.integers(30, size=4), rng.normal(size=4)
        for player, o in zip(players, (slice(None), slice(None), order)):
            player.observe(inputs[o], rewards[o])
    for t in range(15):
        shown = bandits.show(rng)
        rewards = rng.normal(size=4)
        plain, turned, swapped = players[0].choose(shown), players[1].choose(shown), players[2].choose(shown[order])
        np.testing.assert_array_equal(plain, turned)
        np.testing.assert_array_equal(plain[order], swapped)
        for player, inputs, ys in ((players[0], plain, rewards), (players[1], plain, rewards), (players[2], plain[order], rewards[order])):
            player.observe(inputs, ys)


def test_the_joint_bonus_is_below_the_sum_of_separate_ones():
    rng = np.random.default_rng(7)
    for _ in range(50):
        u, beta = rng.uniform(size=5), rng.uniform(0.1, 3)
        assert np.sqrt(beta * u.sum()) <= np.sqrt(beta * u).sum()
    features, counts, sums, _, shown = random_instance(rng, tasks=2)
    _, area = region(features, counts, sums, 1.0)
    means, width = tables(features, area, shown)
    joint = optimistic(means, width, area.slack)[0]
    alone = sum(max((means[p, i] + np.sqrt(max(area.slack[p], 0) * width[p, i])).max() for p in range(3) if area.slack[p] >= 0) for i in range(2))
    assert joint <= alone


def test_radius_pays_for_the_class_once():
    for beta in (practical_beta(100.0, 2, 0.3), theory_beta(100.0, 2, 0.3, 50)):
        assert beta(20, 8) < 8 * beta(20, 1) / 3  # one joint ball against eight
        assert beta(40, 8) > beta(20, 8)
    # 8 sigma^2 log(N / delta) + 2 alpha M t (8 + sqrt(8 sigma^2 log(4 (M t)^2 / delta))), alpha = 1 / (k M T)
    alpha = 1 / (2 * 3 * 50)
    cover = 5 + 6 * np.log(1 + 4 * np.sqrt(2) / alpha)
    by_hand = 8 * 0.09 * (cover - np.log(0.05)) + 2 * alpha * 30 * (8 + np.sqrt(8 * 0.09 * np.log(4 * 900 / 0.05)))
    assert theory_beta(5.0, 2, 0.3, 50)(10, 3) == pytest.approx(by_hand)


@pytest.mark.slow
def test_sharing_pays_when_something_is_shared_and_costs_when_not():
    gaps = {}
    for shared in (True, False):
        gap = []
        for seed in range(20):
            bandits, features, _ = synthetic(8, np.random.default_rng(seed), shared=shared)
            lost = [play(Gfucb(features, 8, practical_beta(np.log(25), 2, 0.3), groups=groups), bandits, 40, np.random.default_rng(100 + seed)).sum(1).mean()
                    for groups in (None, [[i] for i in range(8)])]
            gap.append(lost[1] - lost[0])
        gaps[shared] = np.mean(gap) / (np.std(gap, ddof=1) / np.sqrt(20))
    assert gaps[True] > 3.6 and gaps[False] < -3.6  # t statistics, 19 degrees of freedom: false alarm below 0.1 % each


def test_knowing_the_map_helps():
    lost = np.zeros(2)
    for seed in range(5):
        bandits, features, truth = synthetic(2, np.random.default_rng(seed))
        for k, maps in enumerate((features, features[truth[:1]])):
            lost[k] += play(Gfucb(maps, 2, practical_beta(np.log(len(maps)), 2, 0.3)), bandits, 40, np.random.default_rng(seed)).sum()
    assert lost[1] < lost[0]


def test_decision_processes_learn():
    world = linear_mdps(3, np.random.default_rng(0), maps=10)
    player, rng = GfucbMdp(world, world.features, practical_beta(np.log(10), 2, 0.3, 0.1)), np.random.default_rng(1)
    lost = np.array([player.episode(rng)[0].mean() for _ in range(60)])
    assert lost.min() >= 0 and lost[30:].mean() < lost[:10].mean() / 2
    again = GfucbMdp(world, world.features, practical_beta(np.log(10), 2, 0.3, 0.1))
    again.load_state_dict(player.state_dict())
    assert again.episode(np.random.default_rng(2))[0] == pytest.approx(player.episode(np.random.default_rng(2))[0])


def test_shares_of_the_bonus_add_up():
    """The tasks' optimistic values sum to the joint one, wherever no clipping happens."""
    rng = np.random.default_rng(8)
    world = linear_mdps(3, rng, maps=4)
    player = GfucbMdp(world, world.features, lambda t, m: 0.05)
    for _ in range(10):
        player.episode(rng)
    area = player.plan()[0][0]
    states = rng.integers(world.states, size=(30, 3))
    shares, _ = player.values(area, states, 1e9)
    inputs = states[..., None] * world.actions + np.arange(world.actions)
    for row in range(30):
        means, width = tables(world.features, area, inputs[row])
        value = optimistic(means, width, area.slack)[0]
        if shares[row].min() > 0:
            assert shares[row].sum() == pytest.approx(value)


def test_one_step_decision_processes_are_bandits():
    rng = np.random.default_rng(9)
    world = linear_mdps(2, rng, states=1, actions=5, maps=6, horizon=1)
    beta = practical_beta(np.log(6), 2, 0.3)
    player, bandit = GfucbMdp(world, world.features, beta), Gfucb(world.features, 2, beta)
    shown = np.tile(np.arange(5), (2, 1))
    for seed in range(15):
        chosen = bandit.choose(shown)
        player.episode(np.random.default_rng(seed))
        np.testing.assert_array_equal(player.inputs[-1, 0], chosen)
        bandit.observe(chosen, player.rewards[-1, 0])


def test_wrong_numbers_are_refused():
    with pytest.raises(UserError, match="ridge=0: the inputs of task 1 do not span the features of map 0"):
        gram(MAPS, np.array([[1.0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]), 0.0)
    with pytest.raises(UserError, match="epsilon=0.1: random actions need a generator"):
        Gfucb(MAPS, 2, practical_beta(0, 2, 0.3), epsilon=0.1)
