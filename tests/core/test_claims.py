"""Claims: the verdict is what the numbers say, and nothing else."""

import json

import numpy as np
import pytest
from planted import NOISE, Planted, PlantedTask
from scipy import stats

from volvelle.core.claims import Arm, Claim, run_claim, save_reproduction
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import method
from volvelle.core.registry import registry
from volvelle.core.run import RunConfig
from volvelle.core.verbs import reproduce


def claim(better: Planted, *expects: str, **changes) -> Claim:
    """`new` against `old`; old varies over seeds the other way round."""
    return Claim(**dict(says="new beats old", arms={"old": Planted(0.5, spread=-0.1), "new": better}, task=PlantedTask(), steps=2,
                        expects=expects or ("new > old on score",)) | changes)


@pytest.mark.parametrize("better, expects, verdict", [
    (Planted(0.9, spread=-0.1), ("new > old on score",), "reproduced"),
    (Planted(0.6, spread=0.6), ("new > old on score",), "inconclusive"),
    (Planted(0.1, spread=-0.1), ("new > old on score",), "refuted"),
    (Planted(0.49, spread=-0.1), ("new >= old - 0.02 on score",), "reproduced"),
    (Planted(0.9, spread=-0.1), ("new > old on score", "new < 0.2 on score"), "refuted"),
    (Planted(0.9, spread=-0.1), ("new > old on score", "new > 0.8 on score", "new < old on total"), "inconclusive"),
])
def test_the_verdict_is_what_the_numbers_say(tmp_path, better, expects, verdict):
    made = run_claim("toy", claim(better, *expects), tmp_path)
    assert made.verdict == verdict == made.record["verdict"]


def test_the_interval_is_the_paired_t_interval_over_seeds(tmp_path):
    made = run_claim("toy", claim(Planted(0.7, spread=0.2)), tmp_path)
    gap = np.array([0.2 + 0.3 * n for n in NOISE[:5]])
    low, high = stats.t.interval(0.95, 4, gap.mean(), stats.sem(gap))
    outcome = made.record["expectations"][0]
    assert (outcome["mean"], outcome["low"], outcome["high"]) == pytest.approx((gap.mean(), low, high))
    assert made.record["arms"]["old"]["metrics"]["score"] == pytest.approx([0.5 - 0.1 * n for n in NOISE[:5]])


def test_seeds_are_paired(tmp_path):
    made = run_claim("toy", claim(Planted(0.5)), tmp_path)
    totals = {arm: made.comparison.values[arm]["total"].tolist() for arm in ("old", "new")}
    assert totals["old"] == totals["new"] and len(set(totals["old"])) == 5


def test_expectations_name_arms_that_exist():
    with pytest.raises(UserError, match="expectation 'newer > old on score' names the arm 'newer'; the arms are old, new"):
        claim(Planted(), "newer > old on score")
    with pytest.raises(UserError, match="cannot be read"):
        claim(Planted(), "new beats old on score")


def test_an_unknown_metric_is_named(tmp_path):
    with pytest.raises(UserError) as error:
        run_claim("toy", claim(Planted(), "new > old on speed"), tmp_path)
    assert "speed" in str(error.value) and "score" in str(error.value)


def test_the_record_and_the_files(tmp_path):
    made = run_claim("toy", claim(Planted(0.9)), tmp_path / "runs")
    data, picture = save_reproduction(made, tmp_path / "reproductions")
    record = json.loads(data.read_text())
    assert record["verdict"] == made.verdict and record["seeds"] == [0, 1, 2, 3, 4] and record["scale"] == "cpu" and record["equal"] == "samples"
    assert record["arms"]["new"]["recipe_digest"] == Planted(0.9).digest and record["environment"]["versions"]["torch"]
    assert picture.read_text().lstrip().startswith("<?xml") or "<svg" in picture.read_text()
    assert made.report.is_file() and sorted(p.name for p in data.parent.iterdir()) == ["toy.json", "toy.svg"]


def test_scales(tmp_path):
    quick = claim(Planted(), paper={"steps": 1000, "seeds": 8})
    assert (quick.scaled("quick").steps, quick.scaled("quick").seeds) == (2, 2)
    assert quick.scaled("paper").steps == 1000 and quick.scaled("cpu") is quick
    with pytest.raises(UserError, match="cpu, quick, paper"):
        quick.scaled("huge")
    assert run_claim("toy", quick, tmp_path, "quick").record["seeds"] == [0, 1]


def test_an_arm_may_differ_in_more_than_its_recipe(tmp_path):
    made = run_claim("toy", claim(Planted(), arms={"old": Planted(), "new": Arm(Planted(gain=1.0), steps=4)}), tmp_path)
    assert made.record["arms"]["new"]["steps"] == 4 and made.record["arms"]["old"]["steps"] == 2
    assert made.verdict == "reproduced"


def test_arms_share_what_was_prepared_with_their_seed(tmp_path):
    """The preparation runs once per seed; every arm of that seed starts from its product."""
    shared = claim(Planted(), "new >= old on total", prepare=Planted(base=1.0), prepare_steps=3, take={"recipe.start_from": "made"}, seeds=3)
    made = run_claim("toy", shared, tmp_path)
    prepared = [float((tmp_path / "prepare" / f"seed-{s}" / "made" / "total.txt").read_text()) for s in range(3)]
    assert len(set(prepared)) == 3
    for arm in ("old", "new"):
        assert (np.array(made.comparison.values[arm]["total"]) > np.array(prepared)).all()
    assert made.comparison.values["old"]["total"].tolist() == made.comparison.values["new"]["total"].tolist()
    again = run_claim("toy", shared, tmp_path)
    assert again.record["arms"] == made.record["arms"]


def test_what_is_prepared_may_have_a_task_of_its_own(tmp_path):
    shared = claim(Planted(), "new >= old on total", prepare=Planted(), prepare_task="CartPole-v1", seeds=2, take={"recipe.start_from": "made"})
    made = run_claim("toy", shared, tmp_path)
    prepared = json.loads((tmp_path / "prepare" / "seed-0" / "result.json").read_text())
    assert "CartPole" in prepared["task"] and "CartPole" not in made.record["arms"]["old"]["task"]


def test_going_on_where_a_claim_was_broken_off(tmp_path):
    with pytest.raises(RunStopped, match="new, seed 0: step 2: planted failure"):
        run_claim("toy", claim(Planted(fails=2)), tmp_path)
    finished = tmp_path / "old" / "seed-0" / "result.json"
    stamp = finished.stat().st_mtime_ns
    with pytest.raises(UserError, match="another configuration"):
        run_claim("toy", claim(Planted()), tmp_path)
    with pytest.raises(RunStopped):
        run_claim("toy", claim(Planted(fails=2)), tmp_path)
    assert finished.stat().st_mtime_ns == stamp


def test_reproduce_finds_the_claim_of_a_method(tmp_path):
    before = dict(registry.methods)
    try:
        method("toy-claimed", Planted(), title="a", source="b", claim=claim(Planted(0.9)))
        method("toy-silent", Planted(), title="a", source="b")
        assert reproduce("toy-claimed", seeds=3, folder=tmp_path / "a").record["seeds"] == [0, 1, 2]
        with pytest.raises(UserError, match="carries no claim; methods with one: .*toy-claimed"):
            reproduce("toy-silent", folder=tmp_path / "b")
    finally:
        registry.methods.clear()
        registry.methods.update(before)


def test_every_claim_of_the_library_can_be_configured():
    """Arms, task, model and expectations of each claim fit together; nothing is run."""
    registry.load()
    for found in registry.methods.values():
        if found.claim is not None:
            for arm in found.claim.arms:
                config = found.claim.config(arm, found.name)
                assert isinstance(config, RunConfig)
                config.recipe.validate(config.task)
