"""Comparisons train an arm's seeds as one model, and what comes out looks like the runs one by one."""

import numpy as np
from toy_envs import Target

import volvelle
from volvelle.control.methods.dqn import dqn
from volvelle.control.methods.ppo import ppo
from volvelle.core.files import read_json, read_lines

ON = ["envs=4", "length=8", "minibatches=2", "network.hidden=[16]", "evaluation.episodes=8", "anneal=false", "optimiser.lr=3e-3"]
OFF = ["period=100", "warmup=50", "replay.capacity=1000", "replay.batch=16", "network.hidden=[16]", "evaluation.episodes=8", "copy_every=40"]


def arms():
    return {"ppo": ppo.override(*ON), "dqn": dqn.override(*OFF)}


def test_seeds_of_an_arm_become_one_run_and_then_folders_of_their_own(tmp_path):
    options = {"task": lambda: Target(), "seeds": 3, "steps": 4, "evaluate_every": 2, "folder": tmp_path / "c"}
    made = volvelle.compare(arms(), **options)
    assert made.seeds == [0, 1, 2] and made.values["ppo"]["return"].shape == (3,)
    whole = read_json(tmp_path / "c" / "ppo" / "together" / "result.json")
    for i in range(3):
        place = tmp_path / "c" / "ppo" / f"seed-{i}"
        result = read_json(place / "result.json")
        assert result["seed"] == i and result["metrics"]["return"] == whole["metrics"][f"return@{i}"] == made.values["ppo"]["return"][i]
        assert [row["step"] for row in read_lines(place / "metrics.jsonl")] == [0, 1, 2, 3, 4]
        assert "seeds: 1" in (place / "config.yaml").read_text() and f"seed: {i}" in (place / "config.yaml").read_text()
    steps, curve = made.curves("dqn")["eval/return"]
    assert steps == [0, 2, 4] and curve.shape == (3, 3) and (tmp_path / "c" / "report.html").exists()
    again = volvelle.compare(arms(), **options)              # read back, nothing trained
    assert np.array_equal(again.values["dqn"]["return"], made.values["dqn"]["return"])


def test_seeds_that_do_not_follow_one_another_or_were_begun_alone_train_alone(tmp_path):
    options = {"task": "CartPole-v1", "steps": 1}
    small = {"ppo": ppo.override(*ON)}
    volvelle.compare(small, seeds=[0, 2], folder=tmp_path / "gap", **options)
    assert not (tmp_path / "gap" / "ppo" / "together").exists()
    volvelle.compare(small, seeds=[0], folder=tmp_path / "one", **options)
    volvelle.compare(small, seeds=[0, 1], folder=tmp_path / "one", **options)
    assert not (tmp_path / "one" / "ppo" / "together").exists()


def test_a_seed_within_a_comparison_is_close_to_the_run_alone(tmp_path):
    options = {"task": lambda: Target(), "steps": 2}
    both = volvelle.compare({"ppo": ppo.override(*ON)}, seeds=2, folder=tmp_path / "both", **options)
    alone = [volvelle.train(ppo.override(*ON), seed=s, folder=tmp_path / str(s), **options) for s in range(2)]
    assert np.allclose(both.values["ppo"]["return"], [a.result["metrics"]["return"] for a in alone], atol=0.13)  # one episode of eight
