"""The planning methods as runs: they train, resume exactly, save what they made, refuse what does not fit, and carry their claims."""
import numpy as np
import pytest

from volvelle.core import verbs
from volvelle.core.claims import run_claim
from volvelle.core.errors import UserError
from volvelle.core.registry import registry
from volvelle.planning.cvar import maximise_cvar
from volvelle.planning.distributions import cvar
from volvelle.planning.mdp import backward_induction, policy_evaluation
from volvelle.planning.stock import achievable_returns
from volvelle.planning.stock_grid import total_range
from volvelle.planning.tables import Tables
from volvelle.planning.tasks import Lock, LotteryGrid, Trap

GRID = LotteryGrid(size=3, horizon=5)


def trained(folder, method="distributional-dp", task=GRID, overrides=(), **options):
    return verbs.train(method, task, folder=folder, overrides=overrides, steps=20, **options)


def test_a_run_finds_the_exact_cvar_and_stops_at_the_horizon(tmp_path):
    made = trained(tmp_path / "run", overrides=["objective.tau=0.5"], strict=True)
    assert made.result["steps"] == 5
    assert made.result["metrics"]["value"] == pytest.approx(maximise_cvar(GRID.mdp(0), 0.5).value, abs=1e-10)
    assert made.result["metrics"]["value"] == made.result["metrics"]["cvar@0.5"] > made.result["start"]["value"]


def test_the_mean_objective_is_backward_induction(tmp_path):
    made = trained(tmp_path / "run", overrides=["objective=mean"])
    assert made.result["metrics"]["return"] == pytest.approx(backward_induction(GRID.mdp(0)).values[0, 0], abs=1e-10)


def test_the_saved_policy_does_what_was_promised(tmp_path):
    """Walk the saved tables with a running stock; 4,000 episodes against the reported CVaR, tolerance 5 standard errors of the worst half."""
    made = trained(tmp_path / "run", overrides=["objective.tau=0.5"])
    tables, mdp = Tables.load(tmp_path / "run" / "policy"), GRID.mdp(0)
    action = {(int(s), round(c, 8)): tables["policy"][:, i] for i, (s, c) in enumerate(zip(tables["state"], tables["stock"]))}
    rng, returns = np.random.default_rng(0), []
    for _ in range(4000):
        state, stock, total = int(mdp.initial.argmax()), tables["start_stock"], 0.0
        for t in range(mdp.horizon):
            row = state * 4 + action[state, round(stock, 8)][t]
            o = rng.choice(np.arange(mdp.offsets[row], mdp.offsets[row + 1]), p=mdp.probability[mdp.offsets[row]:mdp.offsets[row + 1]])
            state, stock, total = int(mdp.next_state[o]), stock + mdp.reward[o], total + mdp.reward[o]
        returns.append(total)
    worst = np.sort(returns)[:2000]
    assert abs(worst.mean() - made.result["metrics"]["value"]) < 5 * np.std(returns) / np.sqrt(2000)


@pytest.mark.parametrize("method, task, overrides", [
    ("distributional-dp", GRID, ()), ("distributional-dp", GRID, ["points=40"]), ("distributional-dp", GRID, ["stock=blind"]),
    ("distributional-dp", "two-resources", ["objective=homeostasis"]), ("effective-horizon", Lock(repeat=0.2), ["depth=2"]),
    ("gorp", Lock(), ["episodes=20"]),
])
def test_a_resumed_run_ends_as_one_never_stopped(tmp_path, method, task, overrides):
    whole = trained(tmp_path / "whole", method, task, overrides)
    verbs.train(method, task, folder=tmp_path / "broken", overrides=overrides, steps=2)
    resumed = verbs.train(resume=tmp_path / "broken", steps=20)
    assert resumed.result["metrics"] == whole.result["metrics"] and resumed.result["steps"] == whole.result["steps"]
    one, two = (Tables.load(tmp_path / f / "policy") for f in ("whole", "broken"))
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])


def test_grid_and_exact_agree_on_the_lattice(tmp_path):
    mdp = GRID.mdp(0)
    exact = trained(tmp_path / "exact").result["metrics"]
    low, high = total_range(mdp)
    returns = achievable_returns(mdp)
    points = int(round((high - returns.min()) - (low - returns.max()))) + 1  # unit spacing
    grid = trained(tmp_path / "grid", overrides=[f"points={points}"]).result["metrics"]
    assert grid["grid_error"] > 0
    for key, value in exact.items():
        assert grid[key] == pytest.approx(value, abs=1e-9)


def worst_outcome_aware(atoms, weights):
    return float(weights @ np.minimum(atoms - 4, 0))


def variance(atoms, weights):
    return -float(weights @ (atoms - weights @ atoms) ** 2)


def test_plain_functions_are_objectives_and_are_checked(tmp_path):
    recipe = registry.method("distributional-dp").recipe
    mine = verbs.train(recipe(objective=worst_outcome_aware), GRID, folder=tmp_path / "mine", steps=5).result["metrics"]
    named = trained(tmp_path / "named", overrides=["objective=shortfall", "objective.threshold=4"]).result["metrics"]
    assert mine["value"] == pytest.approx(named["value"], abs=1e-10)
    with pytest.raises(UserError, match="variance' is not indifferent to mixtures"):
        verbs.train(recipe(objective=variance), GRID, folder=tmp_path / "refused", steps=5)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("task, overrides, words", [
    (None, (), "distributional-dp: task None has no transition table"),
    ("two-resources", (), "objective=cvar needs a scalar reward"),
    (GRID, ["objective=homeostasis"], "its stock has 2 components, the task's reward has 1"),
    (GRID, ["objective.tau=1.5"], "objective.tau|tau='1.5'"),
    (GRID, ["points=40", "stock=blind"], "points=40: a stock-blind plan has no stock grid"),
    (GRID, ["objective=nothing"], "unknown objective part 'nothing'"),
])
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, task, overrides, words):
    with pytest.raises(UserError, match=words):
        trained(tmp_path / "run", task=task, overrides=overrides)
    assert not (tmp_path / "run").exists()


def test_sqirl_and_gorp_runs_report_exact_values(tmp_path):
    made = trained(tmp_path / "sqirl", "effective-horizon", Trap(), ["depth=2", "episodes=3000"])
    assert made.result["metrics"]["share"] == 1 and made.result["start"]["share"] == pytest.approx(0)
    policy = Tables.load(tmp_path / "sqirl" / "policy")["policy"]
    mdp = Trap().mdp()
    assert mdp.initial @ policy_evaluation(mdp, policy)[0] == made.result["metrics"]["value"] == 1
    assert trained(tmp_path / "gorp", "gorp", Lock(length=3), ["episodes=50"]).result["metrics"]["share"] == 1


def my_regress(observations, actions, targets, n_actions):
    from volvelle.planning.regression import table
    return table(20, 0.0)(observations, actions, targets, n_actions)


def test_a_plain_function_is_a_regressor(tmp_path):
    recipe = registry.method("effective-horizon").recipe
    made = verbs.train(recipe(regress=my_regress, episodes=300), Lock(length=3), folder=tmp_path / "run", steps=3)
    assert made.result["metrics"]["share"] == 1


@pytest.mark.parametrize("name", ["distributional-dp", "effective-horizon"])
def test_claims_run_in_their_quick_form(tmp_path, name):
    registry.load()
    made = run_claim(name, registry.method(name).claim, tmp_path, "quick")
    assert made.report.is_file() and made.verdict != "refuted"
    assert all(outcome.interval.mean > 0 for outcome in made.outcomes)


def test_the_blind_arm_is_the_greedy_heuristic(tmp_path):
    """It may not know the stock, so at each (time, state) it takes one action; on this grid that costs CVaR."""
    blind = trained(tmp_path / "blind", overrides=["stock=blind"])
    assert len(blind.learner.pairs.state) == GRID.mdp(0).states
    _, law = blind.learner.choose()
    assert cvar(law, 0.25)[0] == blind.result["metrics"]["value"] < maximise_cvar(GRID.mdp(0), 0.25).value
