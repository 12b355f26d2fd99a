"""SQIRL in its practical form against the exact Q^k, the learners of the study on problems solved by hand, its statistics on planted numbers, and the verb."""

import json

import numpy as np
import pytest

from volvelle.control.methods.ppo import ppo
from volvelle.core import verbs
from volvelle.core.claims import run_claim
from volvelle.core.errors import UserError
from volvelle.core.registry import registry
from volvelle.core.tasks import Task
from volvelle.planning.lookahead import q_iteration, random_q
from volvelle.planning.mdp import policy_evaluation
from volvelle.planning.methods import horizon_study, sqirl_tables
from volvelle.planning.methods.horizon_study import HorizonStudy, correlation, learner_steps, q_learning_steps
from volvelle.planning.methods.sqirl_tables import foretell, near_optimal, shared_sqirl, sqirl_steps
from volvelle.planning.sampling import expected_returns
from volvelle.planning.small_problems import SmallProblems, problems
from volvelle.planning.tables import Tables
from volvelle.planning.tasks import Lock, ToyText, Trap, TwoResources
from volvelle.planning.worlds import random_mdp

FEW = SmallProblems(problems={k: problems()[k] for k in ("lock-3", "trap", "random-0", "bait-4")})


def test_expected_returns_are_those_of_policy_evaluation():
    """Three random policies that depend on time, side by side, on ten random problems with absorbing states."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        mdp = random_mdp(rng, 6, 3, horizon=4, discount=0.9)
        policies = rng.integers(3, size=(3, 4, 6))
        exact = [mdp.initial @ policy_evaluation(mdp, p)[0] for p in policies]
        np.testing.assert_allclose(expected_returns(mdp, lambda t, s: policies[:, t, s], 3), exact)


def test_stored_random_play_estimates_q_k():
    """The lock of 3: its state is the time, so sharing a table over time changes nothing. Q^k(s0) = [0, .25], [0, .5], [0, 1]; 20,000 episodes: 8 standard errors."""
    mdp = Lock(length=3).mdp(0)
    q = random_q(mdp)
    for k in (1, 2, 3):
        frozen, steps = shared_sqirl(mdp, k, 20_000, 10**9, np.random.default_rng(k))
        np.testing.assert_allclose(frozen[0][0], q[0, 0], atol=0.025)
        assert len(frozen) == 3 and steps > 60_000
        q = q_iteration(mdp, q)


def test_only_random_steps_are_stored(monkeypatch):
    """If it stored what the frozen policies played, the returns of the first step would be those of greedy play, not of random play."""
    asked = []

    class Watched(sqirl_tables.TabularSampler):
        def __call__(self, episodes, act, rng):
            data = super().__call__(episodes, act, rng)
            asked.append(data)
            return data
    monkeypatch.setattr(sqirl_tables, "TabularSampler", Watched)
    mdp = Lock(length=3).mdp(0)
    frozen, _ = shared_sqirl(mdp, 1, 5000, 10**9, np.random.default_rng(0))
    right = int(random_q(mdp)[0, 0].argmax())
    assert (asked[2].actions[:, 0] == right).all()                       # frozen play at the first step of the third round
    np.testing.assert_allclose(frozen[2][0], frozen[0][0], atol=1e-12)  # and it taught nothing about that step
    assert frozen[2][0, right] == pytest.approx(0.25, abs=0.04)


def test_one_step_misleads_in_the_trap_and_two_do_not():
    """3,000 episodes: 7 standard errors between the actions of Q^1."""
    mdp = Trap().mdp()
    for k, value in ((1, 0.4), (2, 1.0)):
        frozen, _ = shared_sqirl(mdp, k, 3000, 10**9, np.random.default_rng(0))
        assert expected_returns(mdp, lambda t, s: frozen[t][s].argmax(-1)[None])[0] == value


def test_steps_are_those_of_the_first_run_that_gets_there():
    mdp = Lock(length=4).mdp(0)
    goal = near_optimal(mdp)
    assert goal == pytest.approx(0.95) and near_optimal(ToyText(env="CliffWalking-v1", horizon=30).mdp()) == pytest.approx(-13.65)
    steps = sqirl_steps(mdp, 1, goal, 10_000, np.random.default_rng(0))
    assert 4 <= steps < 3000
    assert sqirl_steps(mdp, 1, 2.0, 3000, np.random.default_rng(0)) == np.inf == q_learning_steps(mdp, 2.0, 3000, np.random.default_rng(0))
    assert q_learning_steps(mdp, goal, 10_000, np.random.default_rng(0)) < 3000
    cliff = ToyText(env="CliffWalking-v1", horizon=30).mdp()
    assert q_learning_steps(cliff, near_optimal(cliff), 60_000, np.random.default_rng(0)) < 60_000  # where one greedy step on Q^1 never gets beyond -30


def test_a_control_recipe_is_asked_exactly(tmp_path):
    """Seeds side by side; random play has .125 in the lock of 3, an untrained network cannot have the 1 always, and nobody has 2."""
    task, small = Lock(length=3), HorizonStudy().learner.override("envs=4", "length=32")
    found = learner_steps(task, small, 3, 0, near_optimal(task.mdp()), 5000, tmp_path)
    assert found.shape == (3,) and np.isfinite(found).all() and (found % 128 == 0).all()
    assert np.isinf(learner_steps(task, small, 2, 0, 2.0, 500, tmp_path)).all()


def test_correlations_of_planted_ranks():
    a = np.arange(20.0)
    assert correlation(a, np.exp(a), np.random.default_rng(0)) == pytest.approx((1, 1, 1))
    assert correlation(a, -a, np.random.default_rng(0))[0] == pytest.approx(-1)
    b = np.random.default_rng(1).permutation(20).astype(float)
    rho, low, high = correlation(a, b, np.random.default_rng(0))
    assert low < rho < high and high - low > 0.4
    assert np.isnan(correlation(a, np.ones(20), np.random.default_rng(0))[0])


def test_the_study_counts_who_solved_what(tmp_path):
    """Planted steps for two seeds: four problems, min_k at 1 % of 1, 1, 2, 4."""
    made = verbs.train(HorizonStudy(budget=100, seeds=2, depths=(1, 2)), FEW, folder=tmp_path / "run", steps=0)
    live = made.learner
    never = 200.0
    live.taken = [np.array(r) for r in ([[5, 5], [9, 9], [10, 10], [20, 20]], [[30, never], [20, never], [30, never], [40, never]],
                                        [[never, never], [50, 50], [60, 60], [never, never]], [[never] * 2, [never] * 2, [70, 70], [90, never]])]
    live.facts = [np.array([k, k, h, 2, 4.0]) for k, h in ((1, 2), (1, 3), (2, 4), (4, 5))]
    found = live.evaluate()
    assert (found["solved_sqirl@0"], found["solved_q@0"], found["solved_learner@0"]) == (0.75, 1, 0.75)
    assert (found["fall_sqirl@0"], found["fall_learner@0"], found["fall_q@0"]) == (0.5, 0.5, 0.0) and found["solved_learner_far@1"] == 0
    assert found["spearman_q@0"] == 1 and found["spearman_learner@0"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2, 4, 3])[0, 1])
    assert found["foretold_q@0"] == 1 and found["steps_lock-3_sqirl@0"] == 5 and found["near_k_bait-4@1"] == 4
    assert "both_learner@0" not in found and found["both_q@0"] == 1  # two problems that both solve are no correlation


def test_the_claim_runs_and_a_broken_run_ends_as_a_whole_one(tmp_path):
    """Three of its quick problems; every learner draws from streams of its own problem and seed, so a resumed run repeats nothing else."""
    recipe, task = HorizonStudy(budget=600, depths=(1, 2)), SmallProblems(problems={k: FEW.problems[k] for k in ("lock-3", "trap", "bait-4")})
    whole = verbs.train(recipe, task, folder=tmp_path / "whole", steps=3, strict=True)
    verbs.train(recipe, task, folder=tmp_path / "broken", steps=1)
    resumed = verbs.train(resume=tmp_path / "broken", steps=3)
    assert resumed.result["metrics"] == whole.result["metrics"] and whole.result["metrics"]["problems"] == 3
    study = Tables.load(tmp_path / "whole" / "study")
    assert study["steps"].shape == (3, 4, 1) and study["problems"] == ["lock-3", "trap", "bait-4"] and study["facts"][1, 0] == 2
    made = run_claim("horizon-study", registry.method("horizon-study").claim, tmp_path / "claim", "quick")
    assert made.report.is_file() and made.record["arms"]["study"]["metrics"]["near_k_bait-4"] == [4, 4]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="accepted: small-problems"):
        verbs.train("horizon-study", "lock", folder=tmp_path / "run")
    with pytest.raises(UserError, match="task.problems.pole=CartPole-v1: has no transition table"):
        SmallProblems(problems={"pole": Task.from_text("CartPole-v1")})
    with pytest.raises(UserError, match="learner.seeds=2"):
        HorizonStudy(learner=ppo(seeds=2)).validate(FEW)
    with pytest.raises(UserError, match="learner=sqirl: does not act in environments"):
        HorizonStudy(learner=registry.method("effective-horizon").recipe).validate(FEW)


def test_what_is_foretold():
    easy, hard = foretell(Lock(length=3), 5000), foretell(Lock(length=12, bait=0.4), 2000)
    assert easy["expected"] and (easy["min_k"], easy["effective_horizon"], easy["planning_window"]) == (1, 3, 3) and easy["sqirl_steps_k1"] < 2000
    assert not hard["expected"] and hard["min_k"] == 11 and hard["sqirl_steps_k3"] == np.inf  # luck opens it once in 2,048 runs
    with pytest.raises(UserError, match="2 components"):
        foretell(TwoResources())


def test_the_verb(monkeypatch, capsys):
    from volvelle import cli

    def said(*words):
        monkeypatch.setattr("sys.argv", ["volvelle", "horizon", *words])
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    code, out, _ = said("MiniGrid-Empty-5x5-v0", "task.horizon=20", "task.actions=[0,1,2]", "task.discount=.99", "--budget", "20000", "--seeds", "1", "--json")
    found = json.loads(out)
    assert code == 0 and found["optimal_return"] == pytest.approx(0.99**4) and found["actions"] == 3 and found["min_k"] == 1 and found["expected"] is True
    code, out, _ = said("lock", "task.length=12", "task.bait=.4", "--budget", "2000")
    assert code == 0 and "more than 2000" in out and "are not expected" in out
    code, _, err = said("CartPole-v1")
    assert code == 2 and len(err.strip().splitlines()) == 1 and "no transition table" in err


def test_the_problems_are_as_hard_as_their_names_say():
    """min_k at 1 % of the locks with a bait and of the traps, with sticky actions; every problem has a better policy than random play."""
    near = {n: horizon_study.approximate_k(t.mdp(), 0.01) for n, t in SmallProblems().sticky().items() if n.startswith(("lock", "bait", "trap"))}
    assert near == {"lock-3": 1, "lock-6": 1, "lock-9": 1, "bait-3": 2, "bait-4": 4, "bait-5": 4, "bait-6": 5, "trap": 2, "trap-0.8": 2}
