"""All trainings of a family made once: the matrix is what single children give, feeds every chooser, and survives a break. The claim needs volvelle[traffic]."""

import importlib.util

import numpy as np
import pytest
from helpers import stop_at
from signposts import SIGNPOST, SMALL

import volvelle
from volvelle.control.methods.ppo import ppo
from volvelle.core.claims import run_claim
from volvelle.core.errors import UserError
from volvelle.curriculum.choosers import Independent, Multitask, Oracle
from volvelle.curriculum.methods.mbtl import mbtl
from volvelle.curriculum.methods.mbtl_traffic import TransferMatrix, claim, mbtl_traffic
from volvelle.curriculum.traffic import traffic_signals
from volvelle.curriculum.transfer import TransferFile

MISSING = [p for p in ("sumo", "sumo_rl") if importlib.util.find_spec(p) is None]
FAMILY, SHORT = SIGNPOST.replace(worst=-2.0, best=0.0, points=3), ppo.override(*SMALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix") / "run"
    volvelle.train(TransferMatrix(recipe=SHORT, child_steps=2), task=FAMILY, folder=folder, steps=4)
    return folder


def test_the_matrix_holds_what_mbtl_would_have_trained(made, tmp_path):
    stored = np.load(made / "transfer" / "returns.npz")
    live = volvelle.train(mbtl(recipe=SHORT, child_steps=2, chooser=Independent()), task=FAMILY, folder=tmp_path / "live", steps=3)
    assert np.array_equal(stored["values"], np.array(live.learner.history.rows)) and stored["contexts"].ravel().tolist() == [-1, 0, 1]
    mixed = volvelle.train(mbtl(recipe=SHORT, child_steps=2, chooser=Multitask()), task=FAMILY, folder=tmp_path / "mixed", steps=1)
    assert np.array_equal(stored["mixture"], mixed.learner.history.rows[0]) and (made / "transfer" / "transfer.svg").exists()


def test_every_chooser_plays_on_it(made, tmp_path):
    task = TransferFile(path=str(made / "transfer" / "returns.npz"))
    scores = {type(c).__name__: volvelle.train(mbtl(chooser=c), task=task, folder=tmp_path / type(c).__name__, steps=1).result["metrics"]["zero_shot"]
              for c in (mbtl.chooser, Oracle(), Multitask())}
    values = task.source(0)
    assert scores == pytest.approx({"ModelBased": values.known[1].mean(), "Oracle": values.known.mean(1).max(), "Multitask": values.mixture().mean()})


def test_a_broken_run_ends_as_one_never_stopped(made, tmp_path):
    part = TransferMatrix(recipe=SHORT, child_steps=2)
    with pytest.raises(KeyboardInterrupt):
        volvelle.train(part, task=FAMILY, folder=tmp_path / "run", steps=4, progress=stop_at(2), checkpoint_every=1)
    assert not (tmp_path / "run" / "transfer").exists()
    volvelle.train(part, task=FAMILY, folder=tmp_path / "run", steps=4, resume=tmp_path / "run")
    one, other = (np.load(f / "transfer" / "returns.npz") for f in (made, tmp_path / "run"))
    assert all(np.array_equal(one[k], other[k]) for k in ("values", "contexts", "mixture"))


@pytest.mark.parametrize("task, steps, words", [(FAMILY, 3, "expected 4"), ("CartPole-v1", 3, "no contexts; accepted: a family"),
                                                (FAMILY.replace(worst=None, best=None), 4, "task.worst and task.best")])
def test_what_makes_no_sense_is_refused(tmp_path, task, steps, words):
    with pytest.raises(UserError, match=words):
        volvelle.train(TransferMatrix(recipe=SHORT), task=task, folder=tmp_path / "run", steps=steps)


def test_the_claim_compares_choosers_on_the_same_trainings():
    assert claim.prepare_steps == traffic_signals.points + 1 and claim.arms["independent"].steps == traffic_signals.points
    assert claim.prepare.recipe == mbtl_traffic.recipe and claim.prepare.child_steps == mbtl_traffic.child_steps


@pytest.mark.skipif(not MISSING, reason="SUMO is installed")
def test_without_sumo_the_claim_says_in_one_line_what_to_install(tmp_path):
    with pytest.raises(UserError, match=r"needs the package sumo(_rl)?; pip install volvelle\[traffic\]") as error:
        run_claim("mbtl-traffic", claim, tmp_path, "quick")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install volvelle[traffic]")
def test_the_claim_runs_in_its_quick_form(tmp_path):
    made = run_claim("mbtl-traffic", claim, tmp_path, "quick")
    assert made.verdict in ("reproduced", "inconclusive", "refuted") and len(made.outcomes) == 3
    values = made.comparison.values
    assert (values["mbtl"]["zero_shot"] <= values["mbtl"]["bound"] + 1e-12).all()
