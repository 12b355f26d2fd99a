"""Datasets on disk in every layout, the faults that are found in them, and what they are turned into."""

import json

import gymnasium as gym
import h5py
import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.offline.data.dataset import mix
from volvelle.offline.data.files import open_dataset, open_source, write_dataset
from volvelle.offline.data.source import faults

from offline_data import counting

LAYOUTS = {"minari": "set", "d4rl": "set.hdf5", "ogbench": "set.npz", "mapped": "map"}


def same(a, b, but=()):
    assert set(a.fields) - set(but) == set(b.fields) - set(but)
    for name in set(a.fields) - set(but):
        assert np.array_equal(a.fields[name], b.fields[name]), name
    assert np.array_equal(a.lengths, b.lengths) and a.spec.actions == b.spec.actions


@pytest.mark.parametrize("layout, name", LAYOUTS.items())
def test_every_layout_gives_back_what_was_written(layout, name, tmp_path):
    data = counting(speed=np.arange(13, dtype=np.float32)) if layout != "d4rl" else counting()
    path = write_dataset(data, tmp_path / name, layout)
    assert not list(faults(open_source(path)))
    same(data, open_dataset(path))


def test_a_step_field_of_the_users_comes_back_without_its_last_row(tmp_path):
    data = counting()
    data.fields["cost"] = np.where(data.fields["obs"][:, 1] == data.lengths[data.episode_of], 0, 1).astype(np.float32)
    for layout in ("minari", "d4rl", "mapped"):
        same(data, open_dataset(write_dataset(data, tmp_path / f"{layout}{'.hdf5' if layout == 'd4rl' else ''}", layout)))


def test_rows_lengths_and_returns(data):
    assert data.rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11] and data.lasts.tolist() == [3, 9, 12] and data.steps == 10
    assert data.returns().tolist() == [3.0, 10.0, 1.0]
    assert data.episode(2)["obs"].tolist() == [[2, 0], [2, 1], [2, 2]] and data.episode(2)["rewards"].tolist() == [0, 1]
    mean, std = data.moments("obs", block=3)
    steps = data.fields["obs"][data.rows]
    assert np.allclose(mean, steps.mean(0)) and np.allclose(std, steps.std(0))
    found = data.statistics()
    assert found["terminated"] == 1 and found["truncated"] == 2 and found["return"]["max"] == 10
    assert found["fields"]["rewards"]["mean"] == pytest.approx(1.4)


# ---- the package minari and OGBench's loader read what is written

def test_minari_loads_what_is_written(tmp_path):
    minari = pytest.importorskip("minari")
    data = counting(place=np.arange(26, dtype=np.float32).reshape(13, 2))
    found = minari.MinariDataset(write_dataset(data, tmp_path / "set"))
    assert (found.total_episodes, found.total_steps) == (3, 10)
    for i, episode in enumerate(found.iterate_episodes()):
        mine = data.episode(i)
        assert np.array_equal(episode.observations, mine["obs"]) and np.array_equal(episode.actions, mine["actions"])
        assert np.array_equal(episode.rewards, mine["rewards"]) and np.array_equal(episode.terminations, mine["terminated"] > 0)
        assert np.array_equal(episode.truncations, mine["truncated"] > 0) and np.array_equal(episode.infos["place"], mine["place"])
    assert found.action_space == data.action_space and found.sample_episodes(2)


def test_what_minari_writes_is_read(tmp_path):
    pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    space = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8), "numbers": gym.spaces.Box(-1, 1, (2,)), "kind": gym.spaces.Discrete(3)})
    storage = MinariStorage.new(tmp_path / "made", space, gym.spaces.Discrete(4, start=2), jpeg_encoding=True)
    buffer = EpisodeBuffer(observations={"image": [np.full((32, 32, 3), 80 * t, np.uint8) for t in range(3)], "numbers": [np.array([t, -t], np.float32) / 4 for t in range(3)],
                                         "kind": [0, 2, 1]}, actions=[3, 5], rewards=[1.0, 2.0], terminations=[False, True], truncations=[False, False], infos={})
    storage.update_episodes([buffer])
    metadata = json.loads((tmp_path / "made" / "metadata.json").read_text()) | {"dataset_id": "x/y-v0", "minari_version": "0.5.4"}
    (tmp_path / "made" / "metadata.json").write_text(json.dumps(metadata))
    data = open_dataset(tmp_path / "made")
    assert data.fields["obs/image"].shape == (3, 3, 32, 32) and abs(int(data.fields["obs/image"][1].mean()) - 80) <= 2
    assert data.fields["obs/vector"].tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 0.25, -0.25], [0, 1, 0, 0.5, -0.5]]
    assert data.fields["actions"].tolist()[:2] == [1, 3] and data.spec.actions.codes == (4,)


def test_ogbench_loads_what_is_written(tmp_path):
    ogbench = pytest.importorskip("ogbench")
    data = counting(rewards=False, terminate=())
    write_dataset(data, tmp_path / "set.npz")
    found = ogbench.load_dataset(str(tmp_path / "set.npz"))
    assert np.array_equal(found["observations"], data.fields["obs"][data.rows]) and np.array_equal(found["next_observations"], data.fields["obs"][data.rows + 1])
    assert found["terminals"].tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0, 1]


def test_d4rl_files_without_next_observations_lose_no_terminal_reward_and_say_what_they_lose(tmp_path):
    with h5py.File(tmp_path / "old.hdf5", "w") as file:
        file["observations"], file["actions"] = np.arange(14, dtype=np.float32).reshape(7, 2), np.zeros((7, 1), np.float32)
        file["rewards"], file["terminals"], file["timeouts"] = np.arange(7.0), np.array([0, 0, 1, 0, 0, 0, 0], bool), np.array([0, 0, 0, 0, 1, 0, 0], bool)
        file["metadata/algorithm"] = "sac"
    source = open_source(tmp_path / "old.hdf5")
    data = open_dataset(tmp_path / "old.hdf5")
    assert data.lengths.tolist() == [3, 1, 1] and data.episode(0)["rewards"].tolist() == [0, 1, 2] and data.episode(0)["terminated"].tolist() == [0, 0, 1]
    assert data.episode(1)["obs"].tolist() == [[6, 7], [8, 9]] and data.episode(1)["truncated"].tolist() == [1]
    assert any("the file ends within an episode" in n for n in source.notes) and any("2 cut episodes" in n for n in source.notes)


# ---- faults

def broken(tmp_path, change, **options):
    """A written Minari dataset, changed on disk."""
    path = write_dataset(counting(**options), tmp_path / "set")
    with h5py.File(path / "main_data.hdf5", "a") as file:
        change(file)
    return path


def replace(file, name, value):
    del file[name]
    file[name] = value


@pytest.mark.parametrize("change, told", [
    (lambda f: f["episode_1/observations"].__setitem__((2, 0), np.nan), "episode 1, field 'observations': holds nan at step 2"),
    (lambda f: f["episode_2/rewards"].__setitem__(1, np.inf), "episode 2, field 'rewards': holds inf at step 1"),
    (lambda f: replace(f, "episode_1/observations", np.zeros((6, 3), np.float32)), "episode 1, field 'observations': has rows of shape (3,); expected (2,)"),
    (lambda f: replace(f, "episode_1/observations", np.zeros((5, 2), np.float32)), "episode 1, field 'observations': has 5 rows; expected 6"),
    (lambda f: replace(f, "episode_0/rewards", np.zeros(2)), "episode 0, field 'rewards': has shape (2,); expected (3,)"),
    (lambda f: f["episode_0/terminations"].__setitem__(2, False), "episode 0, field 'terminations': the last step neither terminates nor truncates"),
    (lambda f: f["episode_1/truncations"].__setitem__(2, True), "episode 1, field 'terminations': the episode goes on after its end at step 2"),
    (lambda f: f.__delitem__("episode_1/terminations"), "episode 1, field 'terminations': is missing"),
    (lambda f: f.__delitem__("episode_1/actions"), "episode 1, field 'actions': is missing"),
    (lambda f: f["episode_1/actions"].__setitem__((3, 0), 7.0), "episode 1, field 'actions': holds 7 at step 3, outside [-1, 1]"),
    (lambda f: [replace(f, f"episode_2/{k}", np.zeros((0, *f[f"episode_2/{k}"].shape[1:]), f[f"episode_2/{k}"].dtype)) for k in ("actions", "rewards", "terminations", "truncations")],
     "episode 2, field 'terminations': the episode has no steps"),
    (lambda f: f.__delitem__("episode_1/infos/cost"), "episode 1, field 'cost': is there in some episodes only"),
])
def test_a_fault_is_named_with_its_episode_and_field(change, told, tmp_path):
    path = broken(tmp_path, change, cost=np.zeros(13, np.float32))
    listed = [str(f) for f in faults(open_source(path))]
    assert any(told in line for line in listed) or "some episodes only" in told, listed
    with pytest.raises(UserError) as error:
        open_dataset(path)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_mixed_action_ranges_are_told_where_no_bounds_are_declared(tmp_path):
    rng, rows = np.random.default_rng(0), 40
    actions = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    actions[20:30] *= 100
    terminals = np.arange(rows) % 10 == 9
    np.savez(tmp_path / "mixed.npz", observations=np.zeros((rows, 3), np.float32), actions=actions, terminals=terminals)
    with pytest.raises(UserError, match="episode 2, field 'actions': reaches .* action ranges are mixed"):
        open_dataset(tmp_path / "mixed.npz")
    actions[20:30] /= 100
    np.savez(tmp_path / "sound.npz", observations=np.zeros((rows, 3), np.float32), actions=actions, terminals=terminals)
    assert not list(faults(open_source(tmp_path / "sound.npz")))


def test_flat_files_without_ends_or_with_an_empty_episode_are_refused(tmp_path):
    base = {"observations": np.zeros((6, 2), np.float32), "actions": np.zeros((6, 1), np.float32)}
    np.savez(tmp_path / "open.npz", **base, terminals=np.array([0, 0, 1, 0, 0, 0]))
    with pytest.raises(UserError, match="episode 1, field 'terminals'"):
        open_source(tmp_path / "open.npz")
    np.savez(tmp_path / "empty.npz", **base, terminals=np.array([0, 0, 1, 1, 0, 1]))
    with pytest.raises(UserError, match="episode 1, field 'terminations': the episode has no steps"):
        open_dataset(tmp_path / "empty.npz")
    with h5py.File(tmp_path / "none.hdf5", "w") as file:
        for k, v in base.items():
            file[k] = v
        file["terminals"] = np.zeros(6, bool)
    with pytest.raises(UserError, match="nothing marks an end"):
        open_source(tmp_path / "none.hdf5")
    with pytest.raises(UserError, match="not there"):
        open_source(tmp_path / "nowhere")


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", observations=np.array([object()], dtype=object), actions=np.zeros(1), terminals=np.ones(1))
    with pytest.raises(UserError, match="plain arrays"):
        open_source(tmp_path / "evil.npz")


# ---- mixing

def test_mixing_takes_shares_of_episodes_and_refuses_what_does_not_fit():
    first, second = counting(lengths=(2,) * 10, terminate=()), counting(lengths=(3,) * 4, terminate=())
    mixed = mix([(first, 0.5), (second, 1.0)], np.random.default_rng(0))
    assert sorted(mixed.lengths.tolist()) == [2] * 5 + [3] * 4 and mixed.lengths.tolist() != sorted(mixed.lengths.tolist())
    again = mix([(first, 0.5), (second, 1.0)], np.random.default_rng(0))
    assert np.array_equal(mixed.fields["obs"], again.fields["obs"])
    with pytest.raises(UserError, match="'rewards' is in one of"):
        mix([(first, 1.0), (counting(rewards=False), 1.0)], np.random.default_rng(0))
    from dataclasses import replace as changed

    from volvelle.control.spaces import Actions
    wide = changed(second, spec=changed(second.spec, actions=Actions((), (-2.0,), (2.0,), False)))
    with pytest.raises(UserError, match=r"in \[-2, 2\].* in \[-1, 1\]"):
        mix([(first, 1.0), (wide, 1.0)], np.random.default_rng(0))


def test_refuses_to_overwrite(tmp_path, data):
    write_dataset(data, tmp_path / "set")
    with pytest.raises(UserError, match="exists already"):
        write_dataset(data, tmp_path / "set")
