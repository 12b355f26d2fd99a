"""Many runs: in this process, in others, on Ray; the results are the same, and nothing is done twice."""

import pytest
from helpers import last_state, rows
from planted import Planted, PlantedTask

from volvelle.core.comparing import compare_arms
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.launch import Job, execute, run_jobs
from volvelle.core.run import RunConfig
from volvelle.core.state import fingerprint
from volvelle.core.verbs import compare, configure
from volvelle.language.methods.grpo import grpo

SMALL = ["task.prompts=4", "task.vocabulary=3", "task.depth=2", "prompts=4", "updates.optimiser.lr=0.1", "kl=kl"]


def planted(steps=2, **fields) -> RunConfig:
    return RunConfig(recipe=Planted(**fields), task=PlantedTask(), steps=steps)


def arms() -> dict[str, RunConfig]:
    return {name: configure(name, "tree", overrides=SMALL, steps=3) for name in ("grpo", "rloo")}


def same_results(one, other):
    assert list(one.results) == list(other.results)
    for arm in one.arms:
        for seed in one.seeds:
            a, b = one.run_folder(arm, seed), other.run_folder(arm, seed)
            assert rows(a) == rows(b) and fingerprint(last_state(a)) == fingerprint(last_state(b))
        assert {m: v.tolist() for m, v in one.values[arm].items()} == {m: v.tolist() for m, v in other.values[arm].items()}


@pytest.mark.slow
def test_processes_give_the_same_results(tmp_path):
    here = compare_arms(arms(), [0, 3], tmp_path / "here")
    there = compare_arms(arms(), [0, 3], tmp_path / "there", workers=2)
    same_results(here, there)


@pytest.mark.slow
def test_ray_gives_the_same_results(tmp_path):
    pytest.importorskip("ray")
    here = compare_arms(arms(), [0, 3], tmp_path / "here")
    there = compare_arms(arms(), [0, 3], tmp_path / "there", backend="ray", workers=2)
    same_results(here, there)
    with pytest.raises(RunStopped, match="bad, seed 0: step 1: planted failure"):
        list(run_jobs([Job("bad, seed 0", planted(fails=1), tmp_path / "bad")], "ray", 1))


@pytest.mark.slow
def test_a_job_that_fails_in_another_process_is_named(tmp_path):
    jobs = [Job("good, seed 0", planted(), tmp_path / "good"), Job("bad, seed 0", planted(fails=2), tmp_path / "bad")]
    with pytest.raises(RunStopped, match="bad, seed 0: step 2: planted failure"):
        list(run_jobs(jobs, workers=2))


def test_a_job_that_fails_is_named_and_the_finished_ones_stay(tmp_path):
    jobs = [Job("good, seed 0", planted(), tmp_path / "good"), Job("bad, seed 0", planted(fails=2), tmp_path / "bad")]
    with pytest.raises(RunStopped, match="bad, seed 0: step 2: planted failure"):
        list(run_jobs(jobs))
    stamp = (tmp_path / "good" / "result.json").stat().st_mtime_ns
    assert execute(jobs[0])["steps"] == 2 and (tmp_path / "good" / "result.json").stat().st_mtime_ns == stamp


def test_a_job_that_was_broken_off_is_resumed(tmp_path):
    whole = execute(Job("a", planted(4), tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        execute(Job("a", planted(4), tmp_path / "broken"), progress=_interrupt)
    assert execute(Job("a", planted(4), tmp_path / "broken")) | {"seconds": 0} == whole | {"seconds": 0}
    assert rows(tmp_path / "whole") == rows(tmp_path / "broken")


def _interrupt(step, steps, metrics):
    if step == 2:
        raise KeyboardInterrupt


def test_a_folder_with_another_run_is_refused(tmp_path):
    execute(Job("a", planted(), tmp_path / "a"))
    with pytest.raises(UserError, match="another configuration"):
        execute(Job("a", planted(base=1.0), tmp_path / "a"))


def test_functions_of_this_program_are_compared_here_and_nowhere_else(tmp_path):
    lambdas = {"a": grpo(advantage=lambda batch: batch.rewards), "b": grpo(advantage=lambda batch: batch.rewards - 1.0)}
    options = dict(task="tree", seeds=2, folder=tmp_path, overrides=SMALL, steps=2)
    made = compare(lambdas, **options)
    again = compare(lambdas, **options)  # it goes on where it stopped, though config.yaml cannot rebuild the function
    assert made.results == again.results
    with pytest.raises(UserError, match="exists only inside this program"):
        compare(lambdas, workers=2, **options)


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="unknown backend 'slurm'"):
        list(run_jobs([], "slurm"))
    with pytest.raises(UserError, match="no arms"):
        compare_arms({}, [0], tmp_path)
    for seeds in ([0, 0], []):
        with pytest.raises(UserError, match="seeds"):
            compare_arms({"a": planted()}, seeds, tmp_path)
    with pytest.raises(UserError, match="two arms have the same name"):
        compare(["grpo", "grpo"], "tree", folder=tmp_path)
    with pytest.raises(UserError, match="unknown method"):
        compare(["grpo", "grop"], "tree", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tables_pair_by_seed(tmp_path):
    made = compare_arms({"a": planted(base=0.2, spread=0.1), "b": planted(base=0.5, spread=0.1)}, [0, 1, 2], tmp_path)
    first, second = made.table("score")
    assert "difference" not in first and second["difference"]["mean"] == pytest.approx(0.3)
    assert second["difference"]["low"] == pytest.approx(0.3) and second["low"] < second["mean"] < second["high"]
    steps, values = made.curves("a")["work"]
    assert steps == [1, 2] and values.shape == (3, 2)
