"""Games and bandits through the trainer: files of a user, exact resume, refusals, claims."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from volvelle.cli import app
from volvelle.core import verbs
from volvelle.core.claims import run_claim
from volvelle.core.errors import UserError
from volvelle.core.registry import registry
from volvelle.core.statistics import Expectation
from volvelle.planning.bandit_tasks import regret_picture
from volvelle.planning.game_tasks import risk_picture
from volvelle.planning.games import random_game
from volvelle.planning.methods import rae


@pytest.fixture
def bandit_file(tmp_path):
    rng = np.random.default_rng(0)
    inputs, path = rng.normal(size=(12, 3)), tmp_path / "mine.npz"
    features = rng.normal(size=(4, 12, 2)) / 3
    np.savez(path, means=rng.normal(size=(2, 2)) @ features[1].T, features=features, inputs=inputs)
    return path


def runs(bandit_file):
    small = ["explorer.hidden=[8]", "explorer.rank=3", "explorer.fit_steps=3", "task.shown=3"]
    return {"rae": ("rae", "random-game", ["task.sizes=[3,3]", "concept.gamma=0.2"]),
            "psro-rae": ("psro-rae", "random-game", ["task.sizes=[12,12]", "concept.rounds=50"]),
            "psro": ("psro", "spiel:blotto(coins=4)", ["concept=nash"]),
            "gfucb": ("gfucb", "bandits", ["task.tasks=3", "explorer.epsilon=0.2"]),
            "gfucb-mdp": ("gfucb-mdp", "linear-mdps", ["task.tasks=2", "task.maps=4"]),
            "gfucb-neural": ("gfucb-neural", f"bandits:{bandit_file}", small),
            "gfucb-neural-greedy": ("gfucb-neural", f"bandits:{bandit_file}", [*small, "explorer.mode=greedy", "sharing=separate"])}


@pytest.mark.parametrize("name", ["rae", "psro-rae", "psro", "gfucb", "gfucb-mdp", "gfucb-neural", "gfucb-neural-greedy"])
def test_a_resumed_run_ends_as_an_unbroken_one(tmp_path, bandit_file, name):
    method, task, overrides = runs(bandit_file)[name]
    if task.startswith("spiel"):
        pytest.importorskip("pyspiel")
    whole = verbs.train(method, task, overrides=overrides, folder=tmp_path / "whole", steps=6, strict=True)
    verbs.train(method, task, overrides=overrides, folder=tmp_path / "broken", steps=6, checkpoint_every=3)
    broken = tmp_path / "again"
    first = verbs.train(method, task, overrides=overrides, folder=broken, steps=3)
    assert first.result["steps"] == 3
    rest = verbs.train(resume=broken, steps=6)
    assert rest.result["metrics"] == whole.result["metrics"]
    for made in ("equilibrium/equilibrium.json", "populations/populations.json", "regret/regret.json"):
        if (tmp_path / "whole" / made).exists():
            assert (tmp_path / "whole" / made).read_text() == (broken / made).read_text()


def test_a_payoff_file_of_ones_own(tmp_path):
    (tmp_path / "stag.csv").write_text("4,0\n3,3\n\n4,3\n0,3\n")
    made = verbs.train("rae", f"game:{tmp_path}/stag.csv", overrides=["concept.gamma=0.7", "concept.floor=0.05"], steps=60, folder=tmp_path / "run")
    data = json.loads((tmp_path / "run/equilibrium/equilibrium.json").read_text())
    np.testing.assert_allclose(data["profile"], [[0.05, 0.95]] * 2, atol=1e-9)
    assert data["risk_dominance"] == [{"equilibrium": [0, 0], "dominates": []}, {"equilibrium": [1, 1], "dominates": [[0, 0]]}]
    assert made.result["metrics"]["variance"] == pytest.approx(0)
    nash = verbs.train("rae", f"game:{tmp_path}/stag.csv", overrides=["concept=nash", "concept.select=welfare"], steps=1, folder=tmp_path / "nash")
    assert nash.result["metrics"]["exploitability"] < 1e-9 and nash.result["metrics"]["mean"] > made.result["metrics"]["mean"]


def test_the_command_line_refuses_a_wrong_file_in_one_line(tmp_path):
    (tmp_path / "bad.csv").write_text("1,2\n3\n")
    found = CliRunner().invoke(app, ["train", "rae", "--task", f"game:{tmp_path}/bad.csv", "--out", str(tmp_path / "run")])
    assert found.exit_code != 0 and isinstance(found.exception, (UserError, SystemExit)) and not (tmp_path / "run").exists()
    if isinstance(found.exception, UserError):
        assert "bad.csv, line 2" in str(found.exception)


@pytest.mark.parametrize("method, task, overrides, text", [
    ("rae", "stag-hunt", [], "task stag-hunt: has no payoff table; accepted: game:FILE"),
    ("rae", "random-game", ["concept=latest"], "concept=latest: has a meaning over populations alone"),
    ("psro", "bandits", [], "task bandits: is no game"),
    ("gfucb", "random-game", [], "task random-game: has no bandits"),
    ("gfucb", "bandits", ["explorer=gfucb-neural"], "inputs are no vectors; use explorer=gfucb"),
    ("gfucb", "bandits", ["task.shared=false", "explorer.known=true"], "no map that is known to be true for all"),
    ("gfucb", "linear-mdps", ["explorer.epsilon=0.1"], "greedy play is for bandits"),
    ("psro-rae", "random-game", ["concept.floor=0.3"], "concept.floor=0.3: 5 steps can make 6 policies"),
    ("gfucb", "bandits", ["explorer.factor=-1"], "explorer.factor")])
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, method, task, overrides, text):
    with pytest.raises(UserError, match=text):
        verbs.train(method, task, overrides=overrides, steps=5, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arrays, text", [
    ({"means": np.zeros((2, 3))}, "holds means; accepted: means with features or inputs"),
    ({"means": np.zeros((2, 3)), "features": np.zeros((2, 4, 2))}, r"features has shape \(2, 4, 2\), which does not fit the 3 inputs"),
    ({"means": np.zeros(3), "inputs": np.zeros((3, 2))}, r"means has shape \(3,\); expected 2 dimensions"),
    ({"means": np.full((1, 3), np.nan), "inputs": np.zeros((3, 2))}, "means holds a number that is not finite")])
def test_a_wrong_bandit_file_is_refused_by_name(tmp_path, arrays, text):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(UserError, match=text) as caught:
        verbs.train("gfucb", f"bandits:{tmp_path}/wrong.npz", overrides=["task.shown=1"], folder=tmp_path / "run")
    assert "wrong.npz" in str(caught.value)


def test_regret_curves_are_drawn(tmp_path):
    picture = regret_picture({"joint": np.ones((3, 10)), "separate": np.full((3, 10), 2.0)})
    assert picture.startswith("<svg") and "joint" in picture and "separate" in picture
    verbs.train("gfucb", "bandits", overrides=["task.tasks=2"], steps=5, folder=tmp_path / "run")
    data = json.loads((tmp_path / "run/regret/regret.json").read_text())
    assert np.shape(data["regret"]) == (5, 2)
    assert (tmp_path / "run/regret/regret.svg").read_text().startswith("<svg")


def test_the_price_of_safety_is_drawn():
    game, gammas = random_game((3, 3), np.random.default_rng(0), 1), [0.0, 0.1, 1.0]
    picture = risk_picture(game, gammas, [e.profile for e in rae.path(game, gammas, 0.02, steps=50)])
    assert picture.startswith("<svg") and "standard deviation" in picture and "gamma" in picture


def claims():
    registry.load()
    return {m.name: m.claim for m in registry.methods.values() if m.module.startswith("volvelle.planning.methods") and m.claim
            and m.name in ("rae", "psro-rae", "gfucb", "gfucb-mdp", "gfucb-neural")}


@pytest.mark.parametrize("name", ["gfucb", "gfucb-mdp", "rae", pytest.param("psro-rae", marks=pytest.mark.slow),
                                  pytest.param("gfucb-neural", marks=pytest.mark.slow)])
def test_quick_claims_run(tmp_path, name):
    claim = claims()[name]
    made = run_claim(name, claim, tmp_path, "quick")
    assert {o.expectation for o in made.outcomes} == set(claim.expects)
    for text in claim.expects:
        assert Expectation.parse(text).metric in made.comparison.values[next(iter(claim.arms))] or name == "psro-rae"
