"""The trainer: it stops with a named cause, keeps what is good, and goes on where it was."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import toys
from helpers import child_environment, last_state, rows, same_run

from volvelle.core.errors import RunStopped, UserError
from volvelle.core.run import RunConfig
from volvelle.core.state import load_state
from volvelle.core.trainer import checkpoints, start, train_config
from volvelle.core.verbs import configure
from volvelle.language.methods.grpo import grpo


@pytest.fixture
def script():
    """Registers what the bare learner is to do, and forgets it afterwards."""
    yield toys.SCRIPTS
    for name in [n for n in toys.SCRIPTS if n != "plain"]:
        del toys.SCRIPTS[name]


def bare(name="plain", **options) -> RunConfig:
    return RunConfig(recipe=toys.BareRecipe(name=name), task=toys.BareTask(), **dict(steps=6, checkpoint_every=2, evaluate_every=2) | options)


def tree(recipe=grpo, *words, **options) -> RunConfig:
    small = ["task.prompts=4", "task.vocabulary=3", "task.depth=2", "task.winners=2", "prompts=4", "updates.optimiser.lr=0.1"]
    return configure(recipe, "tree", overrides=[*small, *words], **dict(steps=3, checkpoint_every=1) | options)


def letters(recipe=grpo, *words, **options) -> RunConfig:
    small = ["model.layers=1", "model.width=16", "model.heads=2", "model.context=24", "model.warmup=0", "evaluation.samples=1", "evaluation.ks=[1]",
             "prompts=2", "updates.optimiser.lr=0.01"]
    return configure(recipe, "toy-letters", "tiny", overrides=small, **dict(steps=2) | options).override(*(f"recipe.{w}" for w in words))


def stopped(config, folder, **options) -> str:
    with pytest.raises(RunStopped) as error:
        train_config(config, folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------------------------- what a run leaves


def test_a_finished_run_is_complete(tmp_path):
    made = train_config(bare(), tmp_path / "run")
    assert sorted(p.name for p in made.folder.iterdir()) == ["checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "policy", "result.json"]
    assert made.result == json.loads((made.folder / "result.json").read_text())
    assert made.result["steps"] == 6 and made.result["start"] == made.result["metrics"] == {"score": 0.0}
    assert [r["step"] for r in rows(made.folder)] == list(range(7))
    assert [r["step"] for r in rows(made.folder) if "eval/score" in r] == [0, 2, 4, 6]
    environment = json.loads((made.folder / "environment.json").read_text())
    assert environment["seed"] == 0 and environment["device"] and environment["versions"]["torch"] == torch.__version__
    with pytest.raises(UserError, match="holds a run already"):
        train_config(bare(), made.folder)


def test_one_checkpoint_is_kept_and_progress_is_told(tmp_path):
    told, kept = [], []
    train_config(bare(checkpoint_every=4), tmp_path, progress=lambda *seen: (told.append(seen[:2]), kept.append([p.name for p in checkpoints(tmp_path)])))
    assert told == [(i, 6) for i in range(1, 7)]
    assert kept == [["step-000000"]] * 3 + [["step-000004"]] * 2 + [["step-000006"]]


def test_without_a_cadence_only_start_and_end_are_evaluated_and_kept(tmp_path):
    train_config(bare(checkpoint_every=0, evaluate_every=0), tmp_path)
    assert [r["step"] for r in rows(tmp_path) if "eval/score" in r] == [0, 6]
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000006"]


def test_a_learner_that_is_finished_ends_the_run(tmp_path, script):
    def stop(learner):
        learner.finished = learner.weight >= 4

    script["ends"] = {"evaluation": stop}
    made = train_config(bare("ends"), tmp_path)
    assert made.result["steps"] == 4 and [p.name for p in checkpoints(tmp_path)] == ["step-000004"]


# ----------------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_stops_the_run(tmp_path, script, value):
    script["breaks"] = {4: value}
    text = stopped(bare("breaks"), tmp_path)
    assert text.startswith(f"step 4: loss is {value}; last good checkpoint: ") and text.endswith("step-000002")
    assert [r["step"] for r in rows(tmp_path)] == [0, 1, 2, 3] and not (tmp_path / "result.json").exists()
    del script["breaks"][4]
    made = train_config(bare("breaks"), tmp_path, resume=True)  # the cause removed, it goes on from the checkpoint
    assert made.result["steps"] == 6 and [r["step"] for r in rows(tmp_path)] == list(range(7))


def test_an_evaluation_that_is_not_finite_stops_the_run(tmp_path, script):
    script["nan"] = {"scores": {4: math.nan}}
    text = stopped(bare("nan"), tmp_path)
    assert text.startswith("step 4: eval/score is nan; last good checkpoint: ") and text.endswith("step-000002")
    assert all(json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(tmp_path):
    def root(scores, batch):
        return (scores.logps * 0.0).abs().sqrt()  # the loss is 0, its gradient NaN

    text = stopped(tree(grpo(objective=root, advantage=None)), tmp_path)
    assert text.startswith("step 1: the gradient norm of policy is nan; last good checkpoint: ") and text.endswith("step-000000")
    run, learner = start(tree(grpo(objective=root, advantage=None)), tmp_path / "other")
    before = learner.policy.module.table.clone()
    with pytest.raises(RunStopped):
        learner.step()
    assert learner.policy.module.table.equal(before)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    text = stopped(tree(grpo(objective=lambda scores, batch: scores.logps * math.inf, advantage=None)), tmp_path)
    assert text.startswith("step 1: ") and ("nan" in text or "inf" in text)


def test_state_that_cannot_be_saved_fails_before_anything_is_written_or_done(tmp_path):
    with pytest.raises(UserError) as error:
        train_config(tree(grpo(curriculum="toy-unsaveable")), tmp_path / "run", progress=lambda *seen: pytest.fail("a step was made"))
    assert "/run/live/curriculum/seen" in str(error.value) and "set" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_changes_state_is_caught_when_strict(tmp_path, script):
    def nudge(learner):
        learner.weight += 0.5

    script["nudges"] = {"evaluation": nudge}
    assert "evaluation changed the state of the run" in stopped(bare("nudges", strict=True), tmp_path / "a")
    train_config(bare("nudges"), tmp_path / "b")


def test_an_evaluation_that_draws_the_runs_random_numbers_is_caught_when_strict(tmp_path, script):
    script["draws"] = {"evaluation": lambda learner: learner.run.rng("sampler").random()}
    assert stopped(bare("draws", strict=True), tmp_path).startswith("step 0: evaluation changed the state")


def test_language_evaluation_changes_nothing(tmp_path):
    train_config(tree(grpo(reward="toy-window"), strict=True, evaluate_every=1), tmp_path / "a")
    train_config(letters(grpo(reward="toy-window"), strict=True, evaluate_every=1), tmp_path / "b")


FULL = """
import sys, resource, toys
from volvelle.core.run import RunConfig
from volvelle.core.trainer import train_config, checkpoints
from volvelle.core.state import load_state
from volvelle.core.errors import RunStopped
from volvelle.core.verbs import configure
from volvelle.language.methods.grpo import grpo
from pathlib import Path
folder, limit, words = Path(sys.argv[1]), int(sys.argv[2]), ["task.prompts=50", "prompts=8", "updates.optimiser.lr=0.1"]
config = configure(grpo(reward="toy-window"), "tree", overrides=words, steps=400, checkpoint_every=1)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    train_config(config, folder)
except RunStopped as error:
    print(error)
    kept = checkpoints(folder)
    assert len(kept) == 1 and str(error).endswith(str(kept[0])), kept
    load_state(kept[0])
    assert not list((folder / "checkpoints").glob(".*")), "half a checkpoint was left"
else:
    print("not full")
"""


@pytest.mark.slow
def test_a_file_that_may_not_grow_stops_the_run_with_its_last_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "run"), "200000"], env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not write" in done.stdout and "File too large" in done.stdout


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_its_last_checkpoint(tmp_path):
    """A file system of 1.2 MB, mounted in a namespace of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system")
    inside = 'mount -t tmpfs -o size=1200k tmpfs "$0" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", inside, str(tmp_path), sys.executable, "-c", FULL, str(tmp_path / "run"), "0"]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not write" in done.stdout and "o space left on device" in done.stdout


@pytest.mark.parametrize("folder", ["/proc/nothing/here", "{file}/below"])
def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        train_config(bare(), folder.format(file=tmp_path / "file"))
    assert "cannot be" in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------- the best


def test_the_best_checkpoint_is_kept(tmp_path, script):
    script["peaks"] = {"scores": {1: 0.2, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.1, 6: 0.3}}
    made = train_config(bare("peaks", evaluate_every=1), tmp_path)
    best = json.loads((tmp_path / "best" / "result.json").read_text())
    assert best == {"step": 2, "metrics": {"score": 0.5}}
    assert (tmp_path / "best" / "policy" / "weight.txt").read_text() == "2.0"
    assert (tmp_path / "policy" / "weight.txt").read_text() == "6.0" and made.result["metrics"] == {"score": 0.3}


def test_the_best_survives_being_broken_off(tmp_path, script):
    script["peaks"] = {"scores": {1: 0.2, 2: 0.5, 3: 0.6, 4: 0.1, 5: 0.1, 6: 0.55}}

    class Interrupted(Exception):
        pass

    def stop(step, steps, metrics):
        if step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_config(bare("peaks", evaluate_every=1, checkpoint_every=4), tmp_path, progress=stop)
    train_config(bare("peaks", evaluate_every=1, checkpoint_every=4), tmp_path, resume=True)
    assert json.loads((tmp_path / "best" / "result.json").read_text())["step"] == 3


def test_no_best_when_nothing_rises(tmp_path):
    train_config(bare(evaluate_every=1), tmp_path)
    assert not (tmp_path / "best").exists()


# ----------------------------------------------------------------------------------------------------------------- resuming


def test_killed_before_the_first_evaluation(tmp_path):
    """The checkpoint of step 0 is written before the first evaluation, which may be long: a kill in between loses nothing."""
    config = tree(grpo(reward="toy-window"))
    train_config(config, tmp_path / "whole")
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train_config(config, broken, progress=interrupt)
    for path in (broken / "checkpoints").iterdir():
        shutil.rmtree(path)
    run, learner = start(config, broken)
    from volvelle.core.trainer import save_checkpoint

    save_checkpoint(run, learner)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (broken / name).write_text("")
    train_config(config, broken, resume=True)
    same_run(tmp_path / "whole", broken)


def interrupt(step, steps, metrics):
    raise KeyboardInterrupt


def test_killed_before_the_first_checkpoint(tmp_path):
    config = tree()
    train_config(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_config(config, tmp_path / "broken", progress=interrupt)
    shutil.rmtree(tmp_path / "broken" / "checkpoints")
    train_config(config, tmp_path / "broken", resume=True)
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_lengthened_run_says_so_in_its_configuration(tmp_path):
    import volvelle

    train_config(tree(steps=2), tmp_path)
    volvelle.train(resume=tmp_path, steps=4)
    assert volvelle.train(resume=tmp_path).result["steps"] == 4
    assert rows(tmp_path)[-1]["step"] == 4


def test_a_checkpoint_of_another_recipe_is_named(tmp_path):
    train_config(tree(grpo(reward="toy-window")), tmp_path)
    assert "'reward'" in stopped(tree(), tmp_path, resume=True)


def test_resuming_reads_the_newest_checkpoint(tmp_path):
    train_config(bare(), tmp_path)
    assert load_state(checkpoints(tmp_path)[-1])["run"]["step"] == 6 and last_state(tmp_path)["learner"] == {"weight": 6.0}


# ------------------------------------------------------------------------------------------------------- threads and chance


def test_threads_are_given_back(tmp_path):
    before = torch.get_num_threads()
    seen = []
    train_config(bare(threads=2, steps=1), tmp_path / "a", progress=lambda *s: seen.append(torch.get_num_threads()))
    train_config(bare(steps=1), tmp_path / "b", progress=lambda *s: seen.append(torch.get_num_threads()))
    assert seen == [2, 1] and torch.get_num_threads() == before


@pytest.mark.parametrize("config", [
    lambda: tree(grpo(reward="toy-window", kl="kl"), "updates.minibatch=2", "updates.epochs=2"),
    lambda: letters(grpo(kl="kl"), "updates.minibatch=1", "terms.entropy=entropy"),
    lambda: letters(grpo(advantage="gae", critic="value")),
    lambda: letters(grpo, "sampler.top_k=5", "sampler.top_p=0.9", "sampler.min_p=0.01"),
    lambda: letters().override("model.warmup=3"),
    lambda: letters(grpo.override("sampler=toy-tools", "objective=toy-mixed")),
    lambda: with_adapter(letters()),
], ids=["tabular", "causal", "critic", "truncated", "warm start", "forced", "adapter"])
def test_no_part_touches_the_global_random_generators(tmp_path, config):
    import random

    config = config()
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    train_config(config, tmp_path)
    assert torch.get_rng_state().equal(before[0])
    assert np.random.get_state()[1].tobytes() == before[1] and random.getstate() == before[2]


def with_adapter(config):
    from volvelle.language.models import Pretrained

    return config.replace(model=Pretrained(path=str(config.model.build(config.task)), lora="lora"))


def test_the_seed_decides_everything(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_config(letters(grpo, seed=seed), tmp_path / name)
    same_run(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")
