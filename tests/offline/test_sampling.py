"""What is drawn from a dataset: transitions, hindsight goals with OGBench's proportions, from memory and from disk alike."""

import numpy as np
import pytest
import torch
from offline_data import counting

from volvelle.control.normalise import ObservationNormaliser
from volvelle.control.stacked import Streams
from volvelle.core.errors import UserError
from volvelle.offline.data.files import open_dataset, write_dataset
from volvelle.offline.goals import Goals, GoalRows, mixed_goals, trajectory_goals
from volvelle.offline.learner import prepared, standardiser
from volvelle.offline.samplers import Table, Transitions

streams = lambda seeds=2: Streams.fixed("test", range(seeds))  # noqa: E731


def test_transitions_are_whole_and_uniform(data):
    batch = Transitions().build(Table(data), streams(), 4000, 0.9).draw()
    assert batch["obs"].shape == (2, 4000, 2) and batch["actions"].shape == (2, 4000, 1)
    assert torch.equal(batch["next_obs"], batch["obs"] + torch.tensor([0.0, 1.0])) and torch.equal(batch["rewards"], batch["obs"][..., 1])
    over = (batch["obs"] == torch.tensor([0.0, 2.0])).all(-1)          # only episode 0 terminates; cut episodes are bootstrapped
    assert torch.equal(batch["discounts"], torch.where(over, 0.0, 0.9)) and over.any()
    counts = np.bincount(batch["rows"].reshape(-1).numpy(), minlength=13)
    assert (counts[[3, 9, 12]] == 0).all()
    assert abs(counts[data.rows] - 800).max() < 5 * np.sqrt(800)       # 10 counts, 5 deviations: false alarm below 1e-5
    assert not torch.equal(batch["rows"][0], batch["rows"][1])


def test_a_mapped_dataset_gives_the_same_batches_and_stays_on_disk(tmp_path, data):
    data.fields["kind"] = np.arange(13, dtype=np.int64)
    normaliser = standardiser(data, 2)
    mapped = open_dataset(write_dataset(data, tmp_path / "map", "mapped"))
    assert isinstance(mapped.fields["obs"], np.memmap) and mapped.mapped
    a, b = (Transitions().build(Table(d, normaliser), streams(), 64, 0.9).draw() for d in (data, mapped))
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a) and a["kind"].dtype == torch.int64


def test_observations_are_standardised_as_in_the_sources(data):
    made: ObservationNormaliser = standardiser(data, 2)
    steps = data.fields["obs"][data.rows]
    wanted = (steps - steps.mean(0)) / (steps.std(0) + 1e-3)
    assert np.allclose(made(np.stack([steps, steps])), wanted, atol=1e-5)


def test_rewards_are_prepared(data):
    scaled = prepared(data, "return-range")
    assert np.allclose(scaled.fields["rewards"], data.fields["rewards"] * 1000 / 9) and np.array_equal(prepared(data, "minus-one").fields["rewards"], data.fields["rewards"] - 1)
    assert data.returns().tolist() == [3.0, 10.0, 1.0]
    with pytest.raises(UserError, match="needs the field 'rewards'"):
        prepared(counting(rewards=False), "minus-one")


# ---- goals

def test_trajectory_goals_by_hand():
    rows, finals = np.array([[0, 4, 9]]), np.array([[9, 9, 9]])
    assert trajectory_goals(rows, finals, np.array([[0.0, 0.5, 0.9]]), 0.5).tolist() == [[1, 6, 9]]   # 1 + floor(log(1 - u) / log gamma)
    assert trajectory_goals(rows, finals, np.array([[0.0, 0.0, 0.3]]), None).tolist() == [[9, 9, 9]]
    assert trajectory_goals(rows, finals, np.array([[1.0, 1.0, 1.0]]), None).tolist() == [[1, 5, 9]]


def test_geometric_distances_have_the_mean_of_the_discount():
    u = np.random.default_rng(0).random((1, 200_000), np.float32)
    far = trajectory_goals(np.zeros((1, 200_000), int), np.full((1, 200_000), 10**6), u, 0.9)
    assert far.min() == 1 and abs(far.mean() - 10) < 5 * np.sqrt(90 / 200_000)  # 5 deviations


def test_mixture_of_goals():
    rows, later, random = np.array([1, 1, 1, 1]), np.array([2, 2, 2, 2]), np.array([9, 9, 9, 9])
    first, second = np.array([0.0, 0.7, 0.62, 0.63]), np.array([0.1, 0.9, 0.9, 0.9])
    assert mixed_goals(rows, later, random, (first, second), 0.2, 0.5).tolist() == [1, 9, 2, 9]   # .5 / (1 - .2) = .625


def test_goal_batches_have_the_proportions_and_never_leave_the_trajectory():
    data = counting(lengths=(50,) * 20, terminate=())
    live = Goals().build(Table(data), streams(1), 20_000, 0.9)
    batch = live.draw()
    state, goal, actor = (batch[k][0].numpy() for k in ("obs", "value_goals", "actor_goals"))
    assert np.array_equal(actor[:, 0], state[:, 0]) and (actor[:, 1] >= state[:, 1]).all() and actor[:, 1].max() == 49
    same, ahead = goal[:, 0] == state[:, 0], goal[:, 1] >= state[:, 1]
    here = (goal == state).all(1)
    assert abs(here.mean() - 0.21) < 0.02 and abs((same & ahead).mean() - (0.7 + 0.3 / 40)) < 0.02
    assert np.array_equal(batch["rewards"][0].numpy() == 0, here) and np.array_equal(batch["masks"][0].numpy(), 1.0 - here)
    assert torch.equal(batch["next_obs"][..., 1], batch["obs"][..., 1] + 1) and batch["rewards"].min() == -1


def test_steps_ahead_stop_at_the_last_goal(data):
    numbers = GoalRows(data, streams(1), 0.9)
    assert numbers.ahead(np.array([[0, 1, 4, 8]]), 3).tolist() == [[2, 2, 7, 8]]


def test_shares_of_goals_must_add_up(data):
    with pytest.raises(UserError, match="must add up to 1"):
        Goals(value_current=0.5)
    data.fields["masks"] = np.zeros(13, np.float32)
    with pytest.raises(UserError, match="'masks' has the name"):
        Goals().build(Table(data), streams(1), 4, 0.9)
