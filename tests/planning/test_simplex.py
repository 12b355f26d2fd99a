"""Concave problems on the trembling simplex against enumeration of supports, closed forms and optimality conditions."""

import itertools

import numpy as np
import pytest
from scipy.special import softmax

from volvelle.core.errors import UserError
from volvelle.planning.simplex import equilibrium, maximise_quadratic, maximise_smoothed


def instances(count, seed, most=5):
    rng = np.random.default_rng(seed)
    for i in range(count):
        n = int(rng.integers(1, most + 1))
        factor = rng.normal(size=(rng.integers(0, n + 1), n)) * rng.choice([0.1, 1, 5])
        linear = rng.normal(size=n) * rng.choice([1, 10])
        if i % 3 == 0:
            linear = np.round(linear)  # ties
        yield linear, factor.T @ factor, float(rng.choice([0, 0.05, 0.2]))


def by_supports(linear, quadratic, floor):
    """The best stationary point over all sets of entries that sit at the floor."""
    n, best = len(linear), -np.inf
    for size in range(1, n + 1):
        for free in map(list, itertools.combinations(range(n), size)):
            rest = [j for j in range(n) if j not in free]
            system = np.zeros((size + 1, size + 1))
            system[:size, :size] = 2 * quadratic[np.ix_(free, free)]
            system[:size, size] = system[size, :size] = 1
            target = np.append(linear[free] - 2 * floor * quadratic[np.ix_(free, rest)].sum(1), 1 - floor * len(rest))
            p = np.full(n, floor)
            p[free] = np.linalg.lstsq(system, target, rcond=None)[0][:size]
            if p.min() >= floor - 1e-12 and abs(p.sum() - 1) < 1e-9:
                best = max(best, linear @ p - p @ quadratic @ p)
    return best


def test_quadratic_agrees_with_enumeration_of_supports():
    for linear, quadratic, floor in instances(200, 0):
        p = maximise_quadratic(linear, quadratic, floor)
        assert p.min() >= floor and p.sum() == pytest.approx(1, abs=1e-12)
        scale = max(1, np.abs(linear).max(), np.abs(quadratic).max())
        assert linear @ p - p @ quadratic @ p == pytest.approx(by_supports(linear, quadratic, floor), abs=1e-8 * scale)


def test_ties_give_the_shortest_optimal_distribution():
    np.testing.assert_allclose(maximise_quadratic(np.array([1.0, 1, 0]), np.zeros((3, 3))), [0.5, 0.5, 0], atol=1e-12)
    np.testing.assert_allclose(maximise_quadratic(np.zeros(4), np.zeros((4, 4)), 0.1), [0.25] * 4, atol=1e-12)
    rng = np.random.default_rng(1)
    for _ in range(50):  # an action that is there twice shares its weight equally
        factor, linear = rng.normal(size=(2, 3)), rng.normal(size=3)
        twice = [0, 1, 2, 2]
        p = maximise_quadratic(linear[twice], (factor.T @ factor)[np.ix_(twice, twice)])
        assert p[2] == pytest.approx(p[3], abs=1e-8)


def test_smoothed_is_softmax_without_a_quadratic_part():
    rng = np.random.default_rng(2)
    for _ in range(50):
        linear, temperature = rng.normal(size=5) * 3, rng.choice([0.05, 0.5, 2])
        np.testing.assert_allclose(maximise_smoothed(linear, np.zeros((5, 5)), temperature), softmax(linear / temperature), atol=1e-9)


def test_smoothed_is_stationary_interior_and_close_to_exact():
    for linear, quadratic, floor in instances(200, 3):
        n, temperature = len(linear), 0.05
        p = maximise_smoothed(linear, quadratic, temperature, floor)
        free = (p - floor) / max(1 - n * floor, 1e-300)
        if n == 1 or 1 - n * floor < 1e-12:
            continue
        slope = (1 - n * floor) * (linear - 2 * quadratic @ p) - temperature * np.log(np.maximum(free, 1e-300))
        scale = max(1, np.abs(linear).max(), np.abs(quadratic).max())
        assert slope[free > 1e-9].max() - slope @ free < 1e-7 * scale
        exact = maximise_quadratic(linear, quadratic, floor)
        value, best = (linear @ x - x @ quadratic @ x for x in (p, exact))
        assert best + 1e-8 * scale >= value >= best - temperature * np.log(n) - 1e-8 * scale


def test_smoothed_does_not_depend_on_the_start():
    for linear, quadratic, floor in instances(30, 4):
        if len(linear) * floor < 1:
            corner = np.full(len(linear), floor)
            corner[0] += 1 - floor * len(linear)
            one, two = maximise_smoothed(linear, quadratic, 0.1, floor), maximise_smoothed(linear, quadratic, 0.1, floor, corner)
            np.testing.assert_allclose(one, two, atol=1e-6)


def test_equilibrium_of_zero_sum_games_leaves_nobody_a_gain():
    rng = np.random.default_rng(5)
    solved = 0
    for _ in range(50):
        matrix = rng.normal(size=(3, 4))
        start = [np.full(3, 1 / 3), np.full(4, 1 / 4)]
        p, q = equilibrium(lambda x: [matrix @ x[1], -matrix.T @ x[0]], start, 0.02)
        gain = maximise_quadratic(matrix @ q, np.zeros((3, 3)), 0.02) @ matrix @ q - p @ matrix @ maximise_quadratic(-matrix.T @ p, np.zeros((4, 4)), 0.02)
        solved += gain < 1e-8
    assert solved == 50


@pytest.mark.parametrize("floor", [-0.1, 0.51])
def test_an_impossible_floor_is_refused(floor):
    with pytest.raises(UserError, match="2 actions the least probability"):
        maximise_quadratic(np.zeros(2), np.zeros((2, 2)), floor)
    with pytest.raises(UserError, match="temperature=0"):
        maximise_smoothed(np.zeros(2), np.zeros((2, 2)), 0)
