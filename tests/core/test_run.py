"""A run: random numbers by name, models by path, a configuration that rebuilds it and imports nothing that it should not."""

import sys

import numpy as np
import pytest
import torch
import toys
import yaml
from helpers import python

import volvelle
from volvelle import cli
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.files import to_yaml
from volvelle.core.parts import registry
from volvelle.core.run import Run, RunConfig, config_data, pick_device, read_config
from volvelle.core.state import fingerprint
from volvelle.core.trainable import SGD
from volvelle.core.verbs import configure
from volvelle.language.methods.grpo import grpo

SMALL = ["task.prompts=4", "task.vocabulary=3", "task.depth=2", "prompts=4", "updates.optimiser.lr=0.1"]


def config(recipe=grpo, **options) -> RunConfig:
    return configure(recipe, "tree", overrides=SMALL, **dict(steps=2) | options)


def bare_run(seed=0, folder="nowhere") -> Run:
    return Run(config(seed=seed), folder)


def command(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    """The command line in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["volvelle", *map(str, words)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    told = capsys.readouterr()
    return code, told.out, told.err


# ------------------------------------------------------------------------------------------------------------------- chance


def test_random_numbers_depend_on_seed_and_name_only():
    a, b = bare_run(), bare_run()
    b.rng("other").random(5)
    assert a.rng("sampler").random(3).tolist() == b.rng("sampler").random(3).tolist()
    assert a.rng("sampler") is a.rng("sampler") and a.torch_rng("x") is a.torch_rng("x")
    fresh = {(seed, name): bare_run(seed).rng(name).random() for seed in (0, 1) for name in ("a", "b")}
    fresh |= {(seed, "torch", name): float(np.float64(torch.rand(1, generator=bare_run(seed).torch_rng(name))[0])) for seed in (0, 1)
              for name in ("a", "b")}
    assert len(set(fresh.values())) == len(fresh)


def test_random_states_are_restored_into_the_generators_that_parts_hold():
    run = bare_run()
    held, theirs = run.rng("a"), run.torch_rng("a")
    saved = run.state_dict()
    expected = held.random(4).tolist(), theirs.initial_seed(), torch.rand(3, generator=theirs).tolist()
    run.load_state_dict(saved)
    assert (held.random(4).tolist(), theirs.initial_seed(), torch.rand(3, generator=theirs).tolist()) == expected


# ------------------------------------------------------------------------------------------------------------ parts and models



def test_live_parts_and_models_are_known_by_their_path(tmp_path):
    run = Run(config(), tmp_path)

    class Inner:
        def start(self, run):
            run.model("net", torch.nn.Linear(1, 1), SGD())
            return self

    class Outer:
        def start(self, run):
            run.start("inner", Inner())
            return self

    run.start("outer", Outer())
    assert set(run.live) == {"outer", "outer.inner"} and set(run.models) == {"outer.inner.net"}
    assert run.start("nothing", None) is None
    run.model("net", torch.nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="'net' is made twice"):
        run.model("net", torch.nn.Linear(1, 1))


def test_frozen_models_learn_nothing_and_are_not_stored():
    run = bare_run()
    judge = run.model("judge", torch.nn.Linear(2, 2))
    assert not any(p.requires_grad for p in judge.module.parameters()) and judge.state_dict() == {}


def test_the_reference_is_asked_for_before_the_policy_moves(tmp_path):
    from volvelle.core.trainer import start

    run, learner = start(config(grpo(kl="kl")), tmp_path)
    first = run.reference().module.table.clone()
    learner.step()
    learner.step()
    run.step = 2
    assert run.reference().module.table.equal(first) and not learner.policy.module.table.equal(first)
    other, _ = start(config(), tmp_path)
    other.step = 1
    with pytest.raises(RuntimeError, match="before the policy moves"):
        other.reference()


# -------------------------------------------------------------------------------------------------------------- config.yaml


def test_the_configuration_rebuilds_the_run(tmp_path):
    made = volvelle.train("dapo", "tree", folder=tmp_path / "a", steps=1, overrides=[*SMALL, "filter.refill=off", "advantage=toys:scaled", "advantage.scale=3"])
    again = read_config(made.folder, allow_code=("toys",))
    assert to_yaml(config_data(again)) == (made.folder / "config.yaml").read_text()
    assert again.recipe.advantage.kwargs == {"scale": 3.0} and again.method == "dapo" and again.steps == 1


def foreign(shape: str):
    """A configuration that names code outside volvelle, written in one of the ways YAML allows."""
    data = config_data(config())
    data["recipe"] |= {"call": {"reward": {"call": "toy_evil:boom"}}, "part": {"reward": {"part": "toy_evil:boom"}}, "text": {"reward": "toy_evil:boom"},
                       "nested": {"reward": {"part": "weighted", "parts": {"a": {"call": "toy_evil:boom"}}}},
                       "term": {"terms": {"x": {"call": "toy_evil:boom"}}}}[shape]
    return data


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module whose import leaves a trace."""
    (tmp_path / "toy_evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"
                                          "def boom(prompt, response, **row):\n    return 0.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy_evil", raising=False)
    yield tmp_path / "imported"
    sys.modules.pop("toy_evil", None)


@pytest.mark.parametrize("shape", ["call", "part", "text", "term"])
def test_a_configuration_that_names_foreign_code_imports_nothing(tmp_path, evil, shape):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(foreign(shape)))
    for allowed in ((), ("toys",)):
        with pytest.raises(UserError, match="--allow-code toy_evil"):
            read_config(path, allowed)
    assert not evil.exists() and "toy_evil" not in sys.modules
    if shape != "term":
        assert read_config(path, ("toy_evil",)).recipe.reward.name == "toy_evil:boom"
        assert evil.exists()


@pytest.mark.slow
def test_parts_of_ones_own_module_are_found_again_with_allow_code(tmp_path):
    """In a fresh process, where nothing but the configuration names them."""
    made = volvelle.train(grpo(reward="toy-window"), "tree", folder=tmp_path / "run", steps=1, overrides=SMALL)
    code = """
import sys, volvelle
try:
    volvelle.train(resume=sys.argv[1])
except volvelle.UserError as error:
    print(error)
print(volvelle.train(resume=sys.argv[1], allow_code=["toys"], steps=2).result["steps"])
"""
    done = python(code, made.folder)
    refused, steps = done.stdout.splitlines() or [done.stderr, ""]
    assert "unknown reward part 'toy-window'" in refused and steps == "2"
    with pytest.raises(UserError, match="allow_code=toyz: no module named 'toyz'"):
        read_config(made.folder, ("toyz",))


def test_after_reading_a_configuration_code_may_be_named_again(tmp_path, evil):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(foreign("call")))
    with pytest.raises(UserError):
        read_config(path)
    assert grpo.override("reward=toy_evil:boom").reward.name == "toy_evil:boom"


def test_entry_points_are_trusted():
    registry.load()
    assert "volvelle" in registry.trusted and "toys" not in registry.trusted


@pytest.mark.parametrize("text, says", [
    ("steps: 3\n", "no 'recipe'"), ("- a\n", "no 'recipe'"), ("recipe:\n  part: language\nstepz: 3\n", "stepz"), ("recipe: {part: langage}\n", "langage"),
    ("recipe:\n  part: language\n  advantage: {part: grpo, epsilom: 1}\n", "recipe.advantage.epsilom"), ("recipe:\n  part: language\nsteps: many\n", "steps"),
])
def test_a_broken_configuration_is_one_line(tmp_path, text, says):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no config.yaml there"):
        read_config(tmp_path)


# ------------------------------------------------------------------------------------------- functions of this very program


def test_a_lambda_trains_but_is_not_resumed_from_the_command_line(tmp_path, monkeypatch, capsys):
    recipe = grpo(advantage=lambda batch: batch.rewards - 0.5)
    made = volvelle.train(recipe, "tree", folder=tmp_path / "run", steps=2, overrides=SMALL)
    stored = yaml.safe_load((made.folder / "config.yaml").read_text())["recipe"]["advantage"]
    assert stored["unportable"] is True and "batch.rewards - 0.5" in stored["source"]
    code, _, err = command(monkeypatch, capsys, "train", "--resume", made.folder)
    assert code == 2 and err.count("\n") == 1 and "lambda" in err and "resume=path" in err
    assert volvelle.train(recipe, "tree", resume=made.folder, steps=4, overrides=SMALL).result["steps"] == 4


def test_a_function_of_a_module_is_resumed_with_allow_code(tmp_path, monkeypatch, capsys):
    made = volvelle.train("grpo", "tree", folder=tmp_path / "run", steps=2, overrides=[*SMALL, "advantage=toys:scaled"])
    code, _, err = command(monkeypatch, capsys, "train", "--resume", made.folder, "--steps", 3)
    assert code == 2 and "--allow-code toys" in err and err.count("\n") == 1
    code, _, err = command(monkeypatch, capsys, "train", "--resume", made.folder, "--steps", 3, "--allow-code", "toys")
    assert code == 0, err


def test_a_run_can_be_looked_at_without_its_functions(tmp_path, monkeypatch, capsys, evil):
    """A report imports nothing and needs no permission; also at the end of training on the command line."""
    code, out, err = command(monkeypatch, capsys, "train", "grpo", *SMALL, "reward=toy_evil:boom", "--task", "tree", "--steps", 1, "--out", tmp_path / "a")
    assert code == 0 and "report:" in out, err
    volvelle.train(grpo(advantage=lambda batch: batch.rewards), "tree", folder=tmp_path / "b", steps=1, overrides=SMALL)
    sys.modules.pop("toy_evil")
    evil.unlink()
    for name in "ab":
        (tmp_path / name / "report.html").unlink(missing_ok=True)
        assert volvelle.report(tmp_path / name).is_file()
    assert not evil.exists() and "toy_evil" not in sys.modules


# ------------------------------------------------------------------------------------------------------------------ devices


def test_devices():
    assert pick_device("cpu").type == "cpu"
    for name in ("cud", "cuda:99", "meta device"):
        with pytest.raises(UserError, match="accepted: auto, cpu, cuda"):
            pick_device(name)


def test_state_is_the_same_however_often_it_is_asked():
    run = bare_run()
    run.rng("a").random()
    assert fingerprint(run.state_dict()) == fingerprint(run.state_dict())


def test_a_checkpoint_without_the_models_weights_is_named(tmp_path):
    run = bare_run()
    saved = run.state_dict()
    run.model("late", torch.nn.Linear(1, 1), SGD())
    with pytest.raises(RunStopped, match="no weights of 'late'"):
        run.load_state_dict(saved)
