"""Model-based transfer: the acquisition by hand, the ways to choose, real child runs, resuming, refusals."""

import numpy as np
import pytest
from signposts import SIGNPOST, SMALL

import volvelle
from volvelle.control.methods.ppo import ppo
from volvelle.core.claims import run_claim
from volvelle.core.errors import UserError
from volvelle.core.state import load_state
from volvelle.curriculum.choosers import Equidistant, Greedy, History, Independent, Multitask, Oracle, RandomChooser
from volvelle.curriculum.methods.mbtl import ModelBased, claim, distances, fit, fitted_slope, marginal_gain, mbtl
from volvelle.curriculum.transfer import Stored, SwingUp, TransferFile


class Here:
    """A run as far as choosers ask for one."""

    def rng(self, name):
        return np.random.default_rng(0)


LINE = np.arange(3.0)[:, None]


def gains(optimism, k=2, slope=0.1, sd=(0.1, 0.0, 0.2), best=(0.4, 0.6, 0.2)):
    factor, = ModelBased(optimism=optimism).factors(k, np.random.default_rng(0))
    return marginal_gain(np.array([0.5, 0.8, 0.6]) + factor * np.array(sd), distances(LINE), slope, np.array(best))


def test_the_expected_gain_by_hand():
    """mu (.5, .8, .6), sd (.1, 0, .2), two trainings, slope .1, V (.4, .6, .2)."""
    assert ModelBased().factors(2, None) == pytest.approx(1.048147, abs=1e-6)
    assert gains("log") == pytest.approx([0.136543, 0.333333, 0.309629], abs=1e-6)


def test_nothing_is_gained_where_all_is_served_well():
    assert gains("log", best=(1.0, 1.0, 1.0)).tolist() == [0, 0, 0] and (gains("log") >= 0).all()


def test_without_loss_and_doubt_the_largest_mean_is_chosen_and_with_huge_loss_only_the_context_itself_counts():
    assert gains("none", slope=0.0).argmax() == 1
    assert gains("none", slope=1e6) == pytest.approx(np.array([0.1, 0.2, 0.4]) / 3)


def test_optimism_schedules():
    rng = np.random.default_rng(0)
    values = {name: ModelBased(optimism=name).factors(3, rng) for name in ("log", "none", "one", "decay", "sampled")}
    assert [float(values[n][0]) for n in ("none", "one", "decay")] == [0.0, 1.0, 0.25] and values["log"] == pytest.approx(np.sqrt(np.log(4)))
    assert len(values["sampled"]) == 500 and (values["sampled"] >= 0).all() and abs(values["sampled"].mean() - 0.798) < 0.14  # 5 standard errors


def history(count=11, budget=3, known=None):
    return History(np.arange(float(count))[:, None], budget, known)


def play(chooser, steps, past):
    live = chooser.start(Here())
    for _ in range(steps):
        i = live.next(past)
        past.add(i, past.known[i] if past.known is not None else np.zeros(len(past.coordinates)))
    return past.trained


def test_equidistant_and_greedy_by_hand():
    assert play(Equidistant(), 1, history(budget=1)) == [5]
    assert play(Equidistant(), 2, history(budget=2)) == [7, 2]  # 7.5 and 2.5, ties to the lower
    assert play(Greedy(), 3, history()) == [5, 2, 8]  # 5/3 -> 2; then the right end gap, 25/3 -> 8
    assert play(Equidistant(), 11, history(budget=11)) == list(range(10, -1, -1))


def matrix(seed, count=9):
    rng = np.random.default_rng(seed)
    x = np.arange(count)
    return np.clip(rng.uniform(0.5, 1, count)[:, None] - 0.05 * abs(x[:, None] - x) + rng.normal(0, 0.05, (count, count)), 0, 1)


@pytest.mark.parametrize("chooser", [ModelBased(restarts=0), ModelBased(restarts=0, slope="fit", prior="running"), RandomChooser(), Greedy(), Oracle(),
                                     ModelBased(restarts=0, acquisition="ucb"), ModelBased(restarts=0, acquisition="improvement", optimism="sampled")])
@pytest.mark.parametrize("seed", range(3))
def test_scores_never_fall_nothing_is_trained_twice_and_all_methods_end_at_the_bound(chooser, seed):
    known = matrix(seed)
    past = history(9, 9, known)
    trained = play(chooser, 9, past)
    means = [np.maximum.reduce(past.rows[:k]).mean() for k in range(1, 10)]
    assert sorted(trained) == list(range(9)) and (np.diff(means) >= 0).all()
    assert means[-1] == pytest.approx(known.max(0).mean())
    assert means[0] <= first_of_oracle(known)
    assert chooser.start(Here()).next(past) is None


def first_of_oracle(known):
    past = history(len(known), 1, known)
    play(Oracle(), 1, past)
    return past.best.mean() + 1e-12


def test_the_first_choice_is_the_middle_whatever_the_scores():
    assert {play(ModelBased(), 1, history(10, 3, matrix(s, 10)))[0] for s in range(3)} == {4}  # 4.5: the lower one


def test_the_process_is_fitted_to_the_scores_by_which_contexts_were_served():
    """A context that an earlier policy served at .9 keeps that, though its own policy reached only .2."""
    past = history(3)
    past.add(0, np.array([0.8, 0.9, 0.1]))
    past.add(1, np.array([0.1, 0.2, 0.1]))
    assert past.served == [0.8, 0.9]
    mu, sigma = ModelBased(noise=0.01).start(Here()).model(past)
    assert mu[1] == pytest.approx(0.9, abs=0.01) and sigma[1] < 0.05


def test_the_prior_mean_holds_far_from_data():
    far = np.array([[0.0], [1e4]])
    for mean in (0.0, 0.7):
        mu, sigma = fit(np.array([[0.0], [1.0]]), np.array([0.7, 0.75]), far, 0.1, 0, 0, mean)
        assert mu[1] == pytest.approx(mean, abs=1e-6) and sigma[1] > sigma[0]


def test_the_slope_is_least_squares_through_nothing():
    past = history(4)
    past.add(1, 0.9 - 0.07 * abs(np.arange(4) - 1))
    assert fitted_slope(past) == pytest.approx(0.07)


def test_two_parameters_are_measured_in_steps_of_their_own_grids():
    contexts = np.stack(np.meshgrid([0.1, 10.0], [5, 6, 7], indexing="ij"), -1).reshape(6, 2)
    assert distances(Stored(np.zeros((6, 6)), contexts).coordinates)[0].tolist() == pytest.approx([0, 1, 2, 1, 2**0.5, 5**0.5])
    with pytest.raises(UserError, match="chooser=greedy: needs one parameter"):
        Greedy().next(History(np.zeros((6, 2)), 3))


# ---- runs

def stored(folder, seed=0, **more):
    np.savez(folder / "returns.npz", values=matrix(seed), contexts=np.linspace(0.3, 2.2, 9), **more)
    return TransferFile(path=str(folder / "returns.npz"))


def test_measured_returns_are_chosen_from_offline(tmp_path):
    task = stored(tmp_path, mixture=np.full(9, 0.55))
    scores = {c.part_name: volvelle.train(mbtl(chooser=c), task=task, folder=tmp_path / c.part_name, steps=9).result["metrics"]
              for c in (ModelBased(restarts=0), Multitask(), Independent(), Oracle())}
    assert scores["mbtl"]["zero_shot"] == scores["mbtl"]["bound"] == scores["oracle"]["zero_shot"] == pytest.approx(matrix(0).max(0).mean())
    assert scores["independent"]["zero_shot"] == pytest.approx(np.diag(matrix(0)).mean())
    assert scores["multitask"] == {"zero_shot": pytest.approx(0.55), "mean_zero_shot": pytest.approx(0.55), "trainings": 1.0, "bound": scores["mbtl"]["bound"]}
    for name in ("zero-shot.svg", "transfer.svg"):
        assert (tmp_path / "mbtl" / "curriculum" / name).read_text().startswith("<svg")


def test_it_stops_when_too_little_is_left_to_gain(tmp_path):
    made = volvelle.train("mbtl", task=stored(tmp_path), folder=tmp_path / "run", overrides=["chooser.tolerance=0.9"], steps=9)
    assert made.result["metrics"]["trainings"] == 1


def test_children_are_trained_in_the_chosen_contexts_and_a_resumed_run_ends_as_one_never_stopped(tmp_path):
    task, recipe = SIGNPOST.replace(worst=-2.0, best=0.0), ppo.override(*SMALL)
    part = mbtl(recipe=recipe, child_steps=2, chooser=ModelBased(restarts=0))
    volvelle.train(part, task=task, folder=tmp_path / "whole", steps=2, strict=True)
    volvelle.train(part, task=task, folder=tmp_path / "broken", steps=1)
    volvelle.train(part, task=task, folder=tmp_path / "broken", steps=2, resume=tmp_path / "broken")
    one, other = (load_state(tmp_path / f / "curriculum") for f in ("whole", "broken"))
    assert one["trained"] == other["trained"] and one["trained"][0] == 2 and (one["rows"] == other["rows"]).all() and one["rows"].shape == (2, 5)
    assert (tmp_path / "whole" / "children" / "context-2" / "policy").is_dir()
    assert load_state(tmp_path / "whole" / "children" / "context-2" / "policy")["task"]["context"] == {"place": 0.0}
    mixed = volvelle.train(part(chooser=Multitask()), task=task, folder=tmp_path / "mixed", steps=1)
    assert 0 < mixed.result["metrics"]["zero_shot"] < 1 and (tmp_path / "mixed" / "children" / "mixture").is_dir()


@pytest.mark.parametrize("task, overrides, words", [
    (SIGNPOST, (), "task.worst and task.best"), ("CartPole-v1", (), "has no contexts; accepted: a family"),
    (SIGNPOST.replace(worst=-2.0, best=0.0), ["recipe.seeds=2"], "seeds=1"), ("swing-up", ["chooser=nobody"], "unknown chooser part 'nobody'"),
    (SIGNPOST.replace(worst=-2.0, best=0.0, context={"place": 0.0}), (), "holds the family fixed"),
])
def test_what_makes_no_sense_is_refused(tmp_path, task, overrides, words):
    with pytest.raises(UserError, match=words):
        volvelle.train("mbtl", task=task, folder=tmp_path / "run", overrides=overrides, steps=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arrays, words", [
    ({"values": np.zeros((2, 3))}, "shape \\[2, 3\\]"), ({"values": np.full((2, 2), 3.0)}, "between 0 and 1"), ({"other": np.zeros(2)}, "holds other"),
    ({"values": np.zeros((2, 2)), "contexts": np.zeros(3)}, "3 contexts for 2 rows"),
])
def test_a_file_that_is_no_transfer_matrix_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=words):
        TransferFile(path=str(tmp_path / "x.npz")).source(0)


def test_what_trains_the_policies_is_named_on_the_command_line():
    assert mbtl.override("recipe=dqn", "recipe.every=7").recipe.every == 7 and mbtl.override("recipe=ppo").recipe == ppo


def test_pendulums_move_as_gymnasiums_do():
    import gymnasium as gym

    from volvelle.curriculum.pendulums import WIDTH, rollout

    env = gym.make("Pendulum-v1").unwrapped
    env.reset(seed=0)
    env.state, env.l = np.array([2.0, 0.5]), 0.7
    weights, total = np.random.default_rng(0).normal(size=WIDTH), 0.0
    for _ in range(40):
        hidden = np.tanh(weights[:24].reshape(8, 3) @ [np.cos(env.state[0]), np.sin(env.state[0]), env.state[1]] + weights[24:32])
        total += env.step(np.array([2 * np.tanh(weights[32:40] @ hidden + weights[40])]))[1]
    assert rollout(weights, np.array(0.7), np.array([2.0]), np.array([0.5]), 40)[0] == pytest.approx(total, rel=1e-6)


def test_the_claim_runs_in_its_quick_form(tmp_path):
    made = run_claim("mbtl", claim, tmp_path, "quick")
    assert made.verdict in ("reproduced", "inconclusive", "refuted") and len(made.outcomes) == 3
    assert claim.arms["mbtl"].chooser == ModelBased() and SwingUp().points == claim.arms["independent"].steps
