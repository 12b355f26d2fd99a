"""The command line: a mistake is one line on standard error and exit code 2, a stopped run exit code 1, and neither leaves a folder or a traceback."""

import json
import subprocess
import sys

import pytest
import toys  # noqa: F401
from helpers import child_environment, rows

from volvelle import cli

SMALL = ["task.prompts=4", "task.vocabulary=3", "task.depth=2", "prompts=4", "updates.optimiser.lr=0.1"]


@pytest.fixture
def volvelle(monkeypatch, capsys, tmp_path):
    """Calls the command line in this process and in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["volvelle", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def one_line(code: int, err: str, *says: str) -> None:
    assert code == 2, err
    assert err.startswith("volvelle: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert [s for s in says if s not in err] == [], err


MISTAKES = [
    (["train", "grop", "--task", "tree"], ["'grop'", "did you mean grpo"]),
    (["train", "language/grop", "--task", "tree"], ["grop"]),
    (["train", "grpo", "--task", "tre"], ["'tre'", "tree"]),
    (["train", "grpo", "advantage=nggrpo", "--task", "tree"], ["'nggrpo'", "ngrpo"]),
    (["train", "grpo", "advantag=ngrpo", "--task", "tree"], ["'advantag'", "did you mean advantage"]),
    (["train", "grpo", "advantage.epsilom=1", "--task", "tree"], ["advantage.epsilom", "advantage.epsilon"]),
    (["train", "grpo", "prompts=many", "--task", "tree"], ["prompts", "'many'", "int"]),
    (["train", "grpo", "prompts=0", "--task", "tree"], ["prompts", "'0'"]),
    (["train", "grpo", "updates.optimiser.lr=-1", "--task", "tree"], ["updates.optimiser.lr", "'-1'"]),
    (["train", "grpo", "sampler=ngrpo", "--task", "tree"], ["'ngrpo'", "sampler"]),
    (["train", "grpo", "prompts=4", "prompts=5", "--task", "tree"], ["prompts", "twice"]),
    (["train", "grpo", "prompts", "--task", "tree"], ["'prompts'", "path=value"]),
    (["train", "grpo", "advantage=none", "--task", "tree"], ["advantages"]),
    (["train", "grpo", "task.winers=2", "--task", "tree"], ["task.winers", "task.winners"]),
    (["train", "grpo", "task.winners=999", "task.prompts=2", "task.vocabulary=2", "task.depth=2", "--task", "tree"], ["winners=999"]),
    (["train", "grpo", "--task", "tree", "--model", "gpt-7"], ["'gpt-7'"]),
    (["train", "grpo", "--task", "tree", "--model", "/no/such/folder"], ["/no/such/folder", "config.json"]),
    (["train", "grpo", "--task", "toy-letters", "--model", "tabular"], ["tabular"]),
    (["train", "grpo"], ["task"]),
    (["train"], ["method"]),
    (["train", "grpo", "--task", "tree", "--device", "cud"], ["cud"]),
    (["train", "grpo", "--task", "tree", "--dtype", "float8"], ["float8"]),
    (["train", "grpo", "--task", "tree", "--track", "notes"], ["notes"]),
    (["train", "grpo", "--task", "tree", "--steps", "0"], ["steps"]),
    (["train", "grpo", "--task", "tree", "--stepz", "3"], ["--stepz"]),
    (["train", "grpo", "--task", "tree", "--reward", "no_such_module_xyz:f"], ["no_such_module_xyz"]),
    (["train", "grpo", "--task", "tree", "--reward", "json:dumps"], ["json:dumps", "(prompt, response)"]),
    (["train", "grpo", "--task", "tree", "run.threads=0"], ["threads"]),
    (["train", "--resume", "nothing"], ["nothing", "config.yaml"]),
    (["train", "grpo", "--resume", "nothing"], ["--resume"]),
    (["eval", "nothing"], ["nothing"]),
    (["eval", "nothing", "--task", "tree"], ["nothing"]),
    (["compare", "grpo", "grop", "--task", "tree"], ["'grop'"]),
    (["compare", "grpo", "--task", "tree", "--seeds", "a,b"], ["a,b"]),
    (["compare", "grpo", "--task", "tree", "--backend", "slurm"], ["slurm"]),
    (["reproduce", "grpoo"], ["'grpoo'"]),
    (["reproduce", "ngrpo", "--scale", "huge"], ["huge", "quick"]),
    (["report", "nothing"], ["nothing"]),
    (["show", "grpoo"], ["'grpoo'"]),
    (["methods", "--wing", "languag"], ["languag"]),
    (["tran", "grpo"], ["tran"]),
]


@pytest.mark.parametrize("words, says", MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line_and_leave_nothing(volvelle, tmp_path, words, says):
    code, out, err = volvelle(*words)
    one_line(code, err, *says)
    assert out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("words, says", [MISTAKES[0], MISTAKES[6], (["train", "grpo", "--task", "tree", "--model", "broken"], ["broken", "cannot be read"])],
                         ids=["method", "type", "model"])
def test_mistakes_as_a_user_makes_them(tmp_path, words, says):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    done = subprocess.run([sys.executable, "-m", "volvelle.cli", *words], capture_output=True, text=True, cwd=tmp_path, env=child_environment())
    one_line(done.returncode, done.stderr, *says)
    assert done.stdout == "" and [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_a_stopped_run_is_one_line_and_exit_code_1(volvelle, tmp_path):
    (tmp_path / "mine_of_this_test.py").write_text("def bad(prompt, response, **row):\n    return None\n")
    code, _, err = volvelle("train", "grpo", *SMALL, "--task", "tree", "--reward", "mine_of_this_test:bad", "--out", "run")
    last = err.splitlines()[-1]
    assert code == 1 and last.startswith("volvelle: step 1: reward 'bad' on prompt") and "Traceback" not in err
    assert rows(tmp_path / "run")[0]["step"] == 0
    sys.modules.pop("mine_of_this_test", None)


def test_a_run_from_beginning_to_end(volvelle, tmp_path):
    code, out, err = volvelle("train", "grpo", *SMALL, "advantage=ngrpo", "advantage.max_reward=1", "--task", "tree", "--steps", 4, "--seed", 3, "--json",
                              "--evaluate-every", 2, "--checkpoint-every", 2)
    assert code == 0, err
    made = json.loads(out.splitlines()[-1])
    folder = tmp_path / made["folder"]
    assert folder.parent == tmp_path / "runs" and made["steps"] == 4 and made["seed"] == 3 and (folder / "report.html").is_file()
    code, out, _ = volvelle("train", "--resume", folder, "--steps", 6, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["steps"] == 6
    code, out, _ = volvelle("eval", folder, "--json")
    assert code == 0 and set(json.loads(out)) >= {"pass@1"}
    code, out, _ = volvelle("eval", folder, "evaluation.ks=[1,8]", "evaluation.samples=8", "--json")
    assert code == 0 and set(json.loads(out)) >= {"pass@1", "pass@8"}
    code, out, _ = volvelle("report", folder)
    assert code == 0 and "report.html" in out
    one_line(*[volvelle("train", "grpo", *SMALL, "--task", "tree", "--out", folder)[i] for i in (0, 2)], "holds a run already")


def test_comparing(volvelle, tmp_path):
    words = ["compare", "grpo", "calm=grpo advantage=ngrpo", *SMALL, "--task", "tree", "--steps", 2, "--evaluate-every", 1, "--seeds", 2, "--out", "both"]
    code, out, err = volvelle(*words, "--json")
    assert code == 0, err
    table = json.loads(out.splitlines()[-1])["table"]
    assert [r["arm"] for r in table] == ["grpo", "calm"] and "difference" in table[1]
    assert "calm" in (tmp_path / "both" / "curves.svg").read_text()
    assert (tmp_path / "both" / "report.html").is_file() and (tmp_path / "both" / "calm" / "seed-1" / "result.json").is_file()
    assert volvelle(*words)[0] == 0  # again: nothing is done twice
    code, _, err = volvelle(*words, "--metric", "speed")
    one_line(code, err.splitlines(keepends=True)[-1], "speed", "pass@1")


def test_lists(volvelle):
    for words in (["methods"], ["methods", "--wing", "language"], ["methods", "--json"], ["tasks"], ["tasks", "--json"], ["show", "grpo"],
                  ["show", "ngrpo", "--json"], ["doctor", "--json"], ["--help"], ["train", "--help"]):
        code, out, err = volvelle(*words)
        assert code == 0 and out, (words, err)
        if "--json" in words:
            assert json.loads(out)
    assert {m["name"] for m in json.loads(volvelle("methods", "--json")[1])} >= {"grpo", "ngrpo", "ppo"}


def test_watch_films_a_policy_and_says_what_is_missing(volvelle, tmp_path):
    pytest.importorskip("imageio")
    code, _, err = volvelle("train", "ppo", "--task", "CartPole-v1", "--steps", 1, "--out", "run", "envs=2", "length=16", "minibatches=2", "evaluation.episodes=1")
    assert code == 0, err
    code, out, err = volvelle("watch", "run", "--save", "film.gif", "--json")
    assert code == 0 and json.loads(out)["returns"][0] > 0 and (tmp_path / "film.gif").stat().st_size > 0, err
    code, _, err = volvelle("watch", "nowhere", "--save", "film.gif")
    one_line(code, err, "nowhere: no config.yaml there")
