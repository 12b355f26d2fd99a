"""Boosted trees: the worked numbers, splits, files, and the three losses on them."""

import gymnasium as gym
import numpy as np
import pytest
from helpers import stop_at
import torch
from gymnasium import spaces
from toy_envs import Reach, Target

import volvelle
from volvelle.control.categories import Categories
from volvelle.control.envs import open_env, probe
from volvelle.control.policy import Policy
from volvelle.control.symbolic_grid import KeyDoorGoal, SymbolicGrid
from volvelle.control.trees import Boosted, Ensemble, Forest, Trees, clip_rows, control_variates, from_bytes, to_bytes
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import coerce
from volvelle.core.state import fingerprint, load_state
from volvelle.core.tasks import Task
from volvelle.core.trainer import checkpoints

pytest.importorskip("gbrl")

X = np.array([[1], [2], [3], [4]], np.float32)
G = np.array([[-1, 2], [-1, 2], [1, 2], [1, 2]], np.float32)
RATES = [(0, 1, 0.5), (1, 2, 0.1)]
SMALL = ["envs=8", "length=16", "minibatches=2", "epochs=2", "policy_lr=0.3", "value_lr=0.3", "evaluation.episodes=20"]


def ensemble(features=1, categorical=(), width=2, rates=RATES, total=None, **part):
    return Ensemble(Trees(**{"depth": 1, **part}), features, categorical, width, rates, total)


def splits(e):
    """(feature, threshold) of every tree's first test."""
    data = e.model.get_ensemble_data()
    return [(int(f[0]), float(v[0])) for f, v in zip(data["feature_indices"], data["feature_values"])]


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- one tree

def test_the_worked_tree_splits_at_two_and_moves_the_outputs_by_the_two_learning_rates():
    e = ensemble()
    e.step(X, G)
    assert splits(e)[0] == (0, 2.0)
    assert e.predict(X) == pytest.approx(np.array([[0.5, -0.2], [0.5, -0.2], [-0.5, -0.2], [-0.5, -0.2]]))


def cosine(groups):
    return np.sqrt(sum(len(g) * np.square(g.mean(0)).sum() for g in groups))


def test_the_cosine_score_is_the_root_of_the_raw_l2_score_and_prefers_the_better_split():
    assert cosine([G[:2], G[2:]]) == pytest.approx(4.472, abs=1e-3) and cosine([G[:1], G[1:]]) == pytest.approx(4.163, abs=1e-3)
    for left in (1, 2, 3):
        groups = [G[:left], G[left:]]
        quotient = sum((g * g.mean(0)).sum() for g in groups) / cosine(groups)
        assert quotient == pytest.approx(cosine(groups))


def test_a_second_tree_on_negated_gradients_takes_everything_back():
    e = ensemble()
    e.step(X, G)
    e.step(X, -G)
    assert np.abs(e.predict(X)).max() < 1e-7 and e.trees == 2


def test_predictions_add_up_over_trees():
    x, r = rng().normal(size=(100, 3)).astype(np.float32), rng(1)
    e = ensemble(3, width=2, depth=3)
    parts = []
    for _ in range(4):
        before = e.predict(x)
        e.step(x, r.normal(size=(100, 2)).astype(np.float32))
        parts.append(e.predict(x) - before)
    one = [np.asarray(e.model.predict(x, None, i, i + 1)) for i in range(4)]
    assert np.allclose(parts, one, atol=1e-6) and np.allclose(e.predict(x), sum(parts), atol=1e-6)


def test_the_value_rate_changes_neither_splits_nor_policy_outputs():
    x, g = rng().normal(size=(200, 3)).astype(np.float32), rng(1).normal(size=(200, 2)).astype(np.float32)
    a, b = ensemble(3, depth=3), ensemble(3, depth=3, rates=[(0, 1, 0.5), (1, 2, 7.0)])
    for e in (a, b):
        e.step(x, g)
    assert splits(a) == splits(b) and np.array_equal(a.predict(x)[:, 0], b.predict(x)[:, 0])
    assert np.allclose(a.predict(x)[:, 1] * 70, b.predict(x)[:, 1], atol=1e-5)


def test_l2_splits_do_not_feel_the_scale_of_value_gradients_and_cosine_splits_do():
    x = np.stack([np.tile([0, 1], 40), np.repeat([0, 1], 40)], 1).astype(np.float32)
    g = np.stack([np.where(x[:, 0] > 0, 1, -1) + 0.0, 0.5 * np.where(x[:, 1] > 0, 1, -1)], 1) + 0.3 * rng(3).normal(size=(80, 2))
    first = {(score, scale): splits(tree)[0][0] for score in ("l2", "cosine") for scale in (1, 100)
             if (tree := ensemble(2, score=score)) is not None and tree.step(x, (g * [1, scale]).astype(np.float32)) is None}
    assert first["l2", 1] == first["l2", 100]
    assert (first["cosine", 1], first["cosine", 100]) == (0, 1)


def test_a_categorical_test_is_equality_and_the_order_of_categories_means_nothing():
    codes = np.array([[0], [1], [2], [1], [0], [2]], np.float32)
    g = np.where(codes == 1, -1.0, 1.0) * np.ones((1, 2))
    plain, renamed = ensemble(categorical=[0]), ensemble(categorical=[0])
    plain.step(codes, g)
    names = np.array([7, 0, 3], np.float32)[codes.astype(int)]
    renamed.step(names, g)
    assert np.allclose(plain.predict(codes), renamed.predict(names)) and np.allclose(plain.predict(codes)[:, 0], np.where(codes[:, 0] == 1, 0.5, -0.5))
    ordered = ensemble()
    ordered.step(codes, g)
    assert not np.allclose(ordered.predict(codes)[:, 0], plain.predict(codes)[:, 0])     # no threshold separates the middle one
    assert np.allclose(plain.predict(np.array([[-1.0], [500.0]]))[:, 0], -0.5)           # never seen: equal to nothing


def test_an_oblivious_tree_has_all_leaves_and_a_greedy_one_may_stop_earlier():
    x, g = rng().normal(size=(400, 4)).astype(np.float32), rng(1).normal(size=(400, 2)).astype(np.float32)
    e = ensemble(4, depth=3)
    e.step(x, g)
    data = e.model.get_ensemble_data()
    assert e.model.get_metadata()["n_leaves"] == 8 and int(np.asarray(data["depths"]).reshape(-1)[0]) == 3
    greedy = ensemble(1, depth=4, grow="greedy")
    greedy.step(X, G)
    assert greedy.model.get_metadata()["n_leaves"] < 16


def test_more_quantiles_than_samples_are_the_same_thresholds():
    x, r = np.round(rng().normal(size=(64, 4)), 1).astype(np.float32), rng(1)
    many, few = (Ensemble(Trees(), 4, (), 2, RATES, rows=rows) for rows in (None, 64))
    assert (many.bins, few.bins) == (256, 63)
    for _ in range(6):
        g = r.normal(size=(64, 2)).astype(np.float32)
        many.step(x, g)
        few.step(x, g)
    assert np.array_equal(many.predict(x), few.predict(x))


def test_rates_that_fall_linearly_are_a_function_of_the_trees_number():
    e = ensemble(total=4)
    moved = []
    for _ in range(4):
        before = e.predict(X)[0, 1]
        e.step(X, G)
        moved.append(before - e.predict(X)[0, 1])
    assert moved == pytest.approx([0.2, 0.15, 0.1, 0.05], rel=1e-3)


def test_control_variates_lower_the_variance_and_keep_the_mean():
    r = rng(2)
    momentum = r.normal(size=(500, 2))
    g = np.stack([0.6 * momentum[:, 0] + 0.1 * r.normal(size=500) + 3, 5 * momentum[:, 1]], 1)
    made = control_variates(g, momentum)
    assert np.allclose(made.mean(0), g.mean(0)) and made[:, 0].std() == pytest.approx(0.1, abs=0.01)
    assert np.allclose(made[:, 1] - made[:, 1].mean(), 4 * (momentum[:, 1] - momentum[:, 1].mean()))       # alpha is at most 1
    e = ensemble(control_variates=True)
    e.step(X, G)
    assert np.allclose(e.momentum(X, None), 0.1 * G / np.sqrt(0.1), atol=1e-6)                              # one tree: (1 - beta) leaf / sqrt(1 - beta)


# ---- the Trainable

def forest(width=2, clips=()):
    made = Forest(1, Trees(depth=1), 1, (), width, [(0, 1, 0.5), (1, 2, 0.1)])
    return Boosted("trees", made, clips)


def test_autograd_of_a_mean_loss_times_n_is_the_gradient_per_sample():
    target = torch.tensor([[[1.0, 0], [1, 0], [-1, 0], [-1, 3]]])
    net = forest()
    net.backward((net(torch.from_numpy(X)[None]) - target).square().sum(-1).mul(0.5).mean(-1))
    assert torch.allclose(net.gradients(), -target)
    net.step()
    direct = ensemble()
    direct.step(X, -target[0].numpy())
    assert np.allclose(net.module.ensembles[0].predict(X), direct.predict(X)) and net.module.trees == 1


def test_gradients_are_clipped_before_the_tree_sees_them():
    assert torch.allclose(clip_rows(torch.tensor([[6.0, 8.0], [0.3, 0.4]]), 5.0), torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    net = Boosted("trees", Forest(1, Trees(depth=1), 1, (), 3, [(0, 2, 1.0), (2, 3, 1.0)]), [(0, 2, "row", 5.0), (2, 3, "element", 3.0)])
    outputs = net(torch.from_numpy(X)[None])
    net.backward((outputs * torch.tensor([6.0, 8.0, 7.0])).sum(-1).mean(-1))
    assert torch.allclose(net.gradients(), torch.tensor([3.0, 4.0, 3.0]).expand(1, 4, 3))


def test_a_gradient_that_is_not_finite_stops_before_a_tree_grows():
    net = forest()
    net.backward((net(torch.from_numpy(X)[None]) * torch.nan).mean())
    with pytest.raises(RunStopped, match="a sample's gradient of trees is nan"):
        net.step()
    assert net.module.trees == 0


@pytest.mark.parametrize("part", [{}, {"grow": "greedy", "score": "l2", "candidates": "uniform"}, {"outputs": "adam"}, {"control_variates": True}], ids=str)
def test_an_ensemble_read_back_goes_on_bit_for_bit(part, capfd):
    x, r = rng().normal(size=(100, 3)).astype(np.float32), rng(1)
    gradients = [r.normal(size=(100, 2)).astype(np.float32) for _ in range(12)]
    whole, again = ensemble(3, depth=3, **part), ensemble(3, depth=3, **part)
    for g in gradients[:6]:
        whole.step(x, g)
    state = whole.state_dict()
    again.load_state_dict(state)
    for g in gradients[6:]:
        whole.step(x, g)
        again.step(x, g)
    assert np.array_equal(whole.predict(x), again.predict(x)) and whole.state_dict() == again.state_dict()
    assert capfd.readouterr().out == ""
    assert to_bytes(from_bytes(state["model"])) == state["model"]


def test_a_broken_file_is_one_line():
    with pytest.raises(RunStopped, match="the tree ensemble cannot be read"):
        from_bytes(b"nonsense")


def test_distillation_keeps_the_outputs_and_bounds_the_trees():
    x = rng().normal(size=(500, 2)).astype(np.float32)
    e = ensemble(2, depth=3, distil_above=40, distil_to=60, total=200)
    wanted = np.stack([np.sin(2 * x[:, 0]), np.sign(x[:, 1])], 1)
    for _ in range(100):
        e.step(x, (e.predict(x) - wanted).astype(np.float32))
    before = e.predict(x)
    error = e.distil(x)
    assert e.trees == 60 and error < 0.1 * before.std() and np.sqrt(np.mean((e.predict(x) - before) ** 2)) == pytest.approx(error)
    e.step(x, np.ones((500, 2), np.float32))
    assert e.trees == 61
    copy = ensemble(2, depth=3, distil_above=40, distil_to=60, total=200)
    copy.load_state_dict(e.state_dict())
    assert np.array_equal(copy.predict(x), e.predict(x))
    assert (e.model.predict(x, None, 0, 0)[0] == pytest.approx([-0.25, -0.05], rel=1e-3))    # half of the schedule is over


def test_shap_values_add_up_to_the_prediction_and_name_the_feature_that_matters():
    x = rng().normal(size=(200, 3)).astype(np.float32)
    e = ensemble(3, depth=2)
    for _ in range(20):
        e.step(x, np.stack([e.predict(x)[:, 0] - 2 * np.sign(x[:, 1]), np.zeros(200)], 1).astype(np.float32))
    phi, base = e.shap(x)
    assert phi.shape == (200, 3, 2) and np.allclose(base + phi.sum(1), e.predict(x), atol=1e-4)
    assert np.abs(phi[:, 1, 0]).mean() > 20 * np.abs(phi[:, [0, 2], 0]).mean()


def test_weights_keep_a_feature_out_of_the_splits():
    x = np.repeat(np.array([[0, 0], [1, 1]], np.float32), 10, 0)
    g = np.where(x[:, :1] > 0, 1.0, -1.0) * np.ones((1, 2))
    for weights, feature in (((1.0, 0.0), 0), ((0.0, 1.0), 1)):
        e = ensemble(2, weights=weights)
        e.step(x, g)
        assert splits(e)[0][0] == feature
    with pytest.raises(UserError, match="trees.weights: has 2 numbers; the observations have 3"):
        ensemble(3, weights=(1.0, 1.0))


# ---- categories

class Mixed(gym.Env):
    observation_space = spaces.Dict({"board": spaces.Box(2, 4, (2, 2), np.int64), "kind": spaces.Discrete(3, start=1), "size": spaces.Box(0, 1, (1,)), "word": spaces.Text(8)})
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"board": np.array([[2, 3], [4, 2]]), "kind": 3, "size": np.array([0.5], np.float32), "word": "red"}, {}

    def step(self, action):
        return self.reset()[0], 0.0, True, False, {}


def test_whole_numbers_and_words_become_categories_and_real_numbers_stay(tmp_path):
    env, spec = open_env(coerce(Task, Categories(Mixed()), "task"))
    assert spec.observations.categorical == (0, 1, 2, 3, 4, 6) and env.reset()[0].tolist() == [0, 1, 2, 0, 2, 0.5, 0]
    assert probe(coerce(Task, "categories:FrozenLake-v1", "task")).observations.categorical == (0,)
    with pytest.raises(UserError, match="holds only real numbers"):
        probe(coerce(Task, "categories:CartPole-v1", "task"))


def test_the_symbolic_grid_needs_the_key_before_the_door():
    env = KeyDoorGoal(size=4, decoration="random", noise=3)
    assert env.reset(seed=0)[0].shape == (16,)
    env.at, env.held = env.door - (0, 1), False
    before = env.at.copy()
    env.step(0)
    assert (env.at == before).all()
    env.held = True
    env.step(0)
    assert (env.at == env.door).all()
    env.at = env.goal - (1, 0) if env.goal[0] else env.goal + (1, 0)
    _, reward, won, *_ = env.step(1 if env.goal[0] else 3)
    assert won and reward == pytest.approx(1 - 0.9 * 3 / 60)
    assert env.observation_space.contains(env.reset(seed=1)[0])


@pytest.mark.parametrize("where", ["beside", "goal"])
def test_the_cue_keeps_to_the_goal_in_training_and_moves_in_the_test(where):
    def follows(env):
        return (env.mark - env.goal).tolist() in ([[0, 0]] if where == "goal" else [[1, 0]] if env.goal[0] < 5 else [[-1, 0]])

    env = SymbolicGrid(decoration=where, test="both").make(training=True)
    env.reset(seed=0)
    assert all(follows(env) and not env.moved for _ in range(30) if env.reset())
    env, moved, free = SymbolicGrid(decoration=where, test="both").make(), [], []
    for i in range(40):
        env.reset(seed=0 if i == 0 else None)
        moved.append(env.moved)
        free.append(not follows(env))
        assert env.moved or follows(env)
    assert moved == [False, True] * 20 and sum(free) > 15
    task = SymbolicGrid(test="both")
    assert task.measure({"paid": np.array([1.0, 0.0, 0.5, 0.5]), "moved": np.array([0.0, 1, 0, 1])}) == {"kept": 0.75, "moved": 0.25, "drop": 0.5}
    assert open_env(SymbolicGrid(coded=True, noise=20))[1].observations.categorical == tuple(range(33)) and SymbolicGrid().measure({}) == {}


# ---- training

def train(method, task, folder, overrides=(), **options):
    return volvelle.train(method, task=task, folder=folder, overrides=list(overrides), **{"steps": 4, "checkpoint_every": 2, "seed": 0, **options})


AWR = ["envs=8", "length=16", "value_steps=10", "policy_steps=20", "gradient_steps=20", "batch=64", "rollouts=3", "policy_lr=0.1", "value_lr=0.3", "evaluation.episodes=20"]


@pytest.mark.parametrize("method, overrides, steps", [
    ("gbrl", SMALL, 15), ("gbrl", [*SMALL, "shared=true", "trees.score=l2"], 15), ("gbrl", [*SMALL, "critic=network", "optimiser.lr=1e-2"], 15),
    ("gbrl", [*SMALL, "value=hl-gauss", "value.low=-1", "value.high=2"], 15), ("gbrl-a2c", ["evaluation.episodes=20", "policy_lr=0.5"], 40),
    ("gbrl-awr", AWR, 6), ("gbrl-awr", [*AWR, "shared=true"], 6)], ids=lambda v: v if isinstance(v, str) else None)
def test_every_loss_solves_a_bandit_with_three_states(method, overrides, steps, tmp_path):
    made = train(method, lambda: Target(), tmp_path / "run", overrides, steps=steps)
    assert made.result["metrics"]["return"] > 0.95, made.result


def test_a_gaussian_policy_moves_its_spread_by_an_optimiser_of_its_own(tmp_path):
    made = train("gbrl", lambda: Reach(), tmp_path / "run", [o for o in SMALL if "policy_lr" not in o] + ["policy_lr=0.01", "std_optimiser.lr=1e-2"], steps=120)
    assert made.result["metrics"]["return"] > -0.1 > made.result["start"]["return"], made.result
    assert abs(made.learner.net.module.log_std.free.item() + 2) > 0.01


@pytest.mark.parametrize("overrides, per_step", [([], 2), (["shared=true"], 1)], ids=["separate", "shared"])
def test_a_tree_per_step_and_ensemble(overrides, per_step, tmp_path):
    made = train("gbrl", lambda: Target(), tmp_path / "run", [*SMALL, *overrides], steps=3)
    assert sum(f.trees for f in made.learner.net.module.forests.values()) == 3 * 2 * 2 * per_step


RESUMED = [("gbrl", [*SMALL, "trees.bins=16", "anneal=true"], lambda: KeyDoorGoal(limit=9)), ("gbrl", [*SMALL, "shared=true", "trees.control_variates=true", "seeds=2"], lambda: Target()),
           ("gbrl", [*SMALL, "trees.distil_above=9", "trees.distil_to=5"], lambda: Reach()), ("gbrl", [*SMALL, "critic=network"], lambda: Reach()),
           ("gbrl", SMALL, lambda: Categories(Mixed())), ("gbrl-awr", [*(o for o in AWR if "_steps" not in o), "value_steps=5", "policy_steps=8", "trees.bins=8", "trees.distil_above=15", "trees.distil_to=5"], lambda: KeyDoorGoal(limit=9))]


@pytest.mark.parametrize("method, overrides, make", RESUMED, ids=[str(i) for i in range(len(RESUMED))])
def test_a_run_broken_off_ends_bit_for_bit_as_an_unbroken_one(method, overrides, make, tmp_path):
    train(method, make, tmp_path / "whole", overrides, steps=6, strict=True)

    with pytest.raises(KeyboardInterrupt):
        train(method, make, tmp_path / "broken", overrides, steps=6, progress=stop_at(5))
    volvelle.train(method, task=make, resume=tmp_path / "broken", overrides=list(overrides), steps=6, checkpoint_every=2, seed=0)
    ends = [fingerprint(load_state(checkpoints(tmp_path / name)[-1])) for name in ("whole", "broken")]
    assert ends[0] == ends[1]


def test_a_saved_policy_of_trees_acts_as_the_trained_one(tmp_path):
    made = train("gbrl", lambda: Categories(Mixed()), tmp_path / "run", [*SMALL, "seeds=2"])
    policy, live = Policy.load(tmp_path / "run" / "policy"), made.learner.policy()
    x = rng().integers(3, size=(2, 30, 7)).astype(np.float32)
    assert torch.equal(policy.act(x).actions, live.act(x).actions)
    assert policy.module.forests["policy"].shap(x)[0].shape == (2, 30, 7, 2)


@pytest.mark.parametrize("task, overrides, says", [
    ("MinAtar/Breakout-v1", [], "trees read vectors; the observations are an image"),
    ("categories:FrozenLake-v1", ["normalise_observations=true"], "would turn categories into numbers"),
    ("CartPole-v1", ["optimiser.lr=1e-2"], "network and optimiser are those of critic=network"),
    ("CartPole-v1", ["critic=network", "shared=true"], "a network cannot share the actor's trees"),
    ("CartPole-v1", ["trees.depth=0"], "trees.depth='0': expected"),
])
def test_what_makes_no_sense_is_refused_in_one_line(task, overrides, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        train("gbrl", task, tmp_path / "run", overrides)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
