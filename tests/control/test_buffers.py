"""Replay: what is stored comes back, n-step sums stop where they must, priorities follow the errors, segments restore everything."""

import numpy as np
import pytest
import torch

from volvelle.control.buffers import Prioritised, SumTree, Uniform
from volvelle.control.spaces import Actions, Layout, Spec
from volvelle.control.stacked import Streams
from volvelle.core.errors import RunStopped, UserError

SPEC = Spec(Layout(2), Actions((3,)))
PIXELS = Spec(Layout(1, {"camera": (1, 2, 2)}, {"camera": "uint8"}), Actions((), (-1.0,), (1.0,), plain=False))


def build(part, seeds=1, count=1, spec=SPEC, gamma=0.5, extra=None):
    return part.build(seeds, count, gamma, spec, extra or {}, Streams.fixed("replay", range(seeds)))


def fill(buffer, steps, ends=(), terminates=(), first=0):
    """Row t of environment n of seed s holds obs (t, n + 10 s), reward t, next_obs (t + 1, n + 10 s)."""
    s, n = buffer.seeds, buffer.count
    tag = np.arange(n)[None] + 10 * np.arange(s)[:, None]
    for t in range(first, first + steps):
        obs = np.stack([np.full((s, n), t), tag], -1)
        buffer.add(obs, np.full((s, n), t % 3), np.full((s, n), t), np.full((s, n), t in terminates), np.full((s, n), t in ends or t in terminates),
                   obs + [1, 0])


def test_rows_stay_together_and_belong_to_their_seed():
    buffer = build(Uniform(capacity=40, batch=64), seeds=2, count=4)
    fill(buffer, 7)
    batch = buffer.sample()
    assert batch["obs"].shape == (2, 64, 2) and len(buffer) == 28
    assert torch.equal(batch["obs"][..., 0], batch["rewards"]) and torch.equal(batch["actions"], batch["rewards"].long() % 3)
    assert torch.equal(batch["next_obs"], batch["obs"] + torch.tensor([1.0, 0]))
    assert set(batch["obs"][0, :, 1].tolist()) == {0, 1, 2, 3} and set(batch["obs"][1, :, 1].tolist()) == {10, 11, 12, 13}
    assert set(batch["rewards"].flatten().tolist()) == set(range(7))


def test_the_ring_forgets_the_oldest():
    buffer = build(Uniform(capacity=10, batch=200))
    fill(buffer, 25)
    assert set(buffer.sample()["rewards"].flatten().tolist()) == set(range(15, 25)) and len(buffer) == 10


def test_only_terminations_stop_the_bootstrap():
    buffer = build(Uniform(capacity=10, batch=100))
    fill(buffer, 4, ends=[1], terminates=[2])
    batch = buffer.sample()
    by_reward = {r: d for r, d in zip(batch["rewards"][0].tolist(), batch["discounts"][0].tolist())}
    assert by_reward == {0: 0.5, 1: 0.5, 2: 0, 3: 0.5}


def test_n_step_sums_stop_at_ends_and_at_the_newest_row():
    buffer = build(Uniform(capacity=8, batch=400, n_step=3))
    fill(buffer, 13, ends=[7], terminates=[10])     # rows 5 ... 12 are left
    batch = buffer.sample()
    found = {int(o): (r, d, int(n)) for o, r, d, n in zip(batch["obs"][0, :, 0], batch["rewards"][0].tolist(), batch["discounts"][0].tolist(), batch["next_obs"][0, :, 0])}
    assert found == {5: (5 + 3 + 1.75, 0.125, 8), 6: (6 + 3.5, 0.25, 8), 7: (7.0, 0.5, 8), 8: (8 + 4.5 + 2.5, 0.0, 11), 9: (9 + 5.0, 0.0, 11), 10: (10.0, 0.0, 11),
                     11: (11 + 6.0, 0.25, 13), 12: (12.0, 0.5, 13)}


def test_n_step_keeps_environments_apart():
    buffer = build(Uniform(capacity=30, batch=200, n_step=2), seeds=2, count=3)
    fill(buffer, 6)
    batch = buffer.sample()
    assert torch.equal(batch["next_obs"][..., 1], batch["obs"][..., 1])


def test_cut_closes_open_episodes_with_a_bootstrap():
    buffer = build(Uniform(capacity=8, batch=200, n_step=3))
    fill(buffer, 3)
    buffer.cut()
    fill(buffer, 3, first=3)
    batch = buffer.sample()
    found = {int(o): (d, int(n)) for o, d, n in zip(batch["obs"][0, :, 0], batch["discounts"][0].tolist(), batch["next_obs"][0, :, 0])}
    assert found[1] == (0.25, 3) and found[2] == (0.5, 3) and found[3] == (0.125, 6)


def test_images_vectors_and_extra_fields():
    buffer = build(Uniform(capacity=4, batch=5), spec=PIXELS, extra={"factors": ((2,), np.float32)})
    obs = {"vector": np.ones((1, 1, 1)), "camera": np.full((1, 1, 1, 2, 2), 200, np.uint8)}
    buffer.add(obs, np.zeros((1, 1, 1)), np.zeros((1, 1)), np.zeros((1, 1), bool), np.zeros((1, 1), bool), obs, factors=np.array([[[3.0, 4.0]]]))
    batch = buffer.sample()
    assert batch["obs"]["camera"].dtype == torch.uint8 and batch["obs"]["camera"].shape == (1, 5, 1, 2, 2) and batch["obs"]["camera"].max() == 200
    assert batch["factors"][0, 0].tolist() == [3, 4] and batch["next_obs"]["vector"].shape == (1, 5, 1)


def test_capacity_must_fit_the_environments():
    with pytest.raises(UserError, match=r"replay.capacity=10: must be a multiple of the number of environments \(4\)"):
        build(Uniform(capacity=10), count=4)


# ---- priorities

def test_sum_tree_finds_in_proportion():
    tree = SumTree(2, 5)
    weights = np.array([[1.0, 0, 3, 4, 2], [2, 2, 0, 0, 6]])
    tree.set(np.broadcast_to(np.arange(5), (2, 5)), weights)
    assert tree.nodes[:, 1].tolist() == [10, 10]
    rows, share = tree.find(np.broadcast_to((np.arange(1000) + 0.5) / 1000, (2, 1000)))
    for s in range(2):
        assert np.allclose(np.bincount(rows[s], minlength=5) / 1000, weights[s] / 10, atol=2e-3)
    assert np.allclose(share, np.take_along_axis(weights, rows, 1) / 10)


def test_sum_tree_never_returns_an_empty_row():
    tree = SumTree(1, 6)
    tree.set(np.array([[0, 1, 2]]), np.array([[0.1, 0.7, 0.2]]))
    assert tree.find(np.array([[0.0, 1 - 1e-16, 0.9999999]]))[0].max() <= 2


def test_priorities_follow_the_errors_and_weights_undo_the_bias():
    part = Prioritised(capacity=4, batch=1000, alpha=1.0, beta=1.0)
    buffer = build(part)
    fill(buffer, 4)
    first = buffer.sample()
    assert np.allclose(np.bincount(first["obs"][0, :, 0].int().numpy()) / 1000, 0.25, atol=0.02) and first["weights"].unique().tolist() == [1.0]
    buffer.learnt(first, first["obs"][..., 0] + 1)            # errors 1, 2, 3, 4
    second = buffer.sample()
    t = second["obs"][0, :, 0]
    assert np.allclose(np.bincount(t.int().numpy()) / 1000, np.array([1, 2, 3, 4]) / 10, atol=0.01)
    assert torch.allclose(second["weights"][0], 1 / (t + 1), atol=1e-4)      # n p ^ -1, divided by the largest
    fill(buffer, 1, first=4)                                  # a new row gets the largest priority seen
    assert buffer.tree.leaves()[0, :4] == pytest.approx([4, 2, 3, 4], abs=1e-4)


# ---- checkpoints

@pytest.mark.parametrize("part", [Uniform(capacity=12, batch=6, n_step=2), Prioritised(capacity=12, batch=6)])
def test_segments_hold_only_new_rows_and_restore_everything(part, tmp_path):
    buffer = build(part, seeds=2, count=2)
    fill(buffer, 3)
    buffer.save(tmp_path)
    first = {p.name: (p / "rows.safetensors").read_bytes() for p in tmp_path.iterdir()}
    fill(buffer, 5, first=3)                                  # the ring holds 6 time steps: rows 2 ... 7
    buffer.save(tmp_path)
    assert buffer.segments == ["rows-000000000-000000003", "rows-000000003-000000008"]
    assert (tmp_path / "rows-000000000-000000003" / "rows.safetensors").read_bytes() == first["rows-000000000-000000003"]
    state = buffer.state_dict()
    other = build(part, seeds=2, count=2)
    other.load(state, tmp_path)
    for a, b in zip(buffer.blocks.tensors.values(), other.blocks.tensors.values()):
        assert torch.equal(a, b)
    other.rng = Streams.fixed("replay", range(2))
    buffer.rng = Streams.fixed("replay", range(2))
    a, b = buffer.sample(), other.sample()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_files_nobody_lists_are_dropped_one_checkpoint_later(tmp_path):
    buffer = build(Uniform(capacity=4, batch=2))
    for start in range(0, 12, 3):
        fill(buffer, 3, first=start)
        buffer.save(tmp_path)
    listed = set(buffer.segments)
    assert listed == {"rows-000000006-000000009", "rows-000000009-000000012"}
    assert listed <= {p.name for p in tmp_path.iterdir()} and len(list(tmp_path.iterdir())) <= 4
    buffer.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == listed


def test_rewritten_rows_are_saved_again(tmp_path):
    buffer = build(Uniform(capacity=6, batch=2))
    fill(buffer, 4)
    buffer.save(tmp_path)
    buffer.blocks.tensors["rewards"].fill_(9.0)
    buffer.rewritten = True
    buffer.save(tmp_path)
    other = build(Uniform(capacity=6, batch=2))
    other.load(buffer.state_dict(), tmp_path)
    assert other.blocks.tensors["rewards"][0, :4].unique().tolist() == [9.0]


def test_a_missing_or_foreign_segment_is_named(tmp_path):
    buffer = build(Uniform(capacity=6, batch=2))
    fill(buffer, 4)
    buffer.save(tmp_path)
    with pytest.raises(RunStopped, match="does not fit this task: 'obs'"):
        build(Uniform(capacity=6), spec=Spec(Layout(5), Actions((3,)))).load(buffer.state_dict(), tmp_path)
    with pytest.raises(RunStopped, match="file .*rows-000000000-000000004.* is missing"):
        build(Uniform(capacity=6)).load(buffer.state_dict(), tmp_path / "elsewhere")
