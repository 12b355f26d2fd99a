"""SubRL: set functions, walks, the estimator against autograd of the exact objective, and learning."""

import itertools
import json
import math

import numpy as np
import pytest
from helpers import stop_at
import torch

import volvelle
from volvelle.control.credit import Rollout
from volvelle.control.measures import Counting, Covering, Informing, Modular, curvature, greedy_set, violation
from volvelle.control.methods.subrl import Inverse, MarginalGains
from volvelle.control.policy import Policy
from volvelle.control.roaming import AntCoverage, Covered, Ground, PointEnv, Roam, Track, TrackEnv
from volvelle.control.set_walks import Complete, Graph, GraphFile, Grid, SetWalk, best_walk, greedy_walk
from volvelle.control.setfunctions import Blend, Coverage, Detection, FacilityLocation, Information, Items, LogCount, ModularSum, kernel
from volvelle.core.errors import UserError
from volvelle.core.state import fingerprint, load_state
from volvelle.core.trainer import checkpoints

FUNCTIONS = [Coverage(), Coverage(disc="cell"), Coverage(disc="large", density="bumps"), Coverage(disc="round", density="process"), Items(), Items(required=(2,) * 6),
             LogCount(), Information(), Information(kernel="squared"), Information(kernel="linear"), Information(noise=1e-3, constant=9.965784),
             FacilityLocation(), Detection(), ModularSum(density="bumps"), Blend(share=0.3)]


def places(rows=5, columns=4):
    return Grid(rows, columns).graph().places


def rollout(rewards, **more):
    """One episode per column: rewards [T, N] as a rollout with one seed."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)[None]
    ended = torch.zeros_like(rewards, dtype=torch.bool)
    ended[:, -1] = True
    none = torch.zeros_like(rewards)
    return Rollout(rewards, more.get("values", none), ended, torch.zeros_like(ended), none, none[:, 0], torch.ones_like(ended))


# ---- worked numbers

def test_marginal_gains_of_a_walk_over_three_states():
    measure = Covering(np.eye(3, dtype=bool), np.array([1.0, 1.0, 2.0]))
    walk = [0, 1, 0, 2]
    gains = measure.marginals(walk)
    assert gains.tolist() == [1, 1, 0, 2] and gains.cumsum().tolist() == [1, 2, 2, 4]
    to_go = MarginalGains(baseline="none")(rollout(gains[1:, None]), 1.0)[0]
    assert to_go.flatten().tolist() == [3, 2, 2] and gains[1:].sum() == measure.value(walk) - measure.value(walk[:1]) == 3
    assert measure.singles[walk[1:]].tolist() == [1, 1, 2]                                    # what the modular arm is paid, 4 in all
    assert MarginalGains(credit="myopic", baseline="none")(rollout(gains[1:, None]), 1.0)[0].flatten().tolist() == [1, 0, 2]
    assert MarginalGains(credit="prefix", baseline="none")(rollout(gains[1:, None]), 1.0)[0].flatten().tolist() == [1, 1, 3]


def test_groups_pay_up_to_what_they_require():
    measure = Items(groups=((1, 2), (5,)), required=(1, 1)).bind(places())
    assert measure.value([1, 2, 5]) == 2 and measure.singles[[1, 2, 5]].sum() == 3
    assert Items(groups=((1, 2, 3),), required=(2,)).bind(places()).marginals([1, 1, 2, 3]).tolist() == [1, 0, 1, 0]


def test_the_disc_of_a_grid():
    measure, cell = Coverage().bind(places(6, 6)), lambda r, c: r * 6 + c
    at = measure.marginals([cell(2, 2), cell(2, 3), cell(3, 2), cell(3, 3), cell(2, 2)])
    assert at[0] == 4 and at[1] == 2 and measure.marginals([cell(2, 2), cell(3, 2)])[1] == 2
    assert measure.marginals([cell(2, 2), cell(3, 3)])[1] == 3 and at[4] == 0
    assert measure.singles[cell(5, 5)] == 1 and Coverage(disc="large").bind(places(6, 6)).singles[cell(1, 1)] == 9
    assert measure.value(range(36)) == 36


def test_information_is_half_a_log_determinant_and_mutual_information():
    where = places()
    covariance = kernel("matern", where, 2.0)
    measure, chosen = Informing(covariance, 0.5), [3, 7, 8, 15]
    block = covariance[np.ix_(chosen, chosen)]
    assert measure.value(chosen) == pytest.approx(0.5 * np.linalg.slogdet(np.eye(4) + block / 0.25)[1], abs=1e-10)
    entropy = lambda k: 0.5 * np.linalg.slogdet(2 * math.pi * math.e * k)[1]
    assert measure.value(chosen) == pytest.approx(entropy(block + 0.25 * np.eye(4)) - entropy(0.25 * np.eye(4)), abs=1e-10)
    raw = Information(noise=1e-3, constant=9.965784).bind(where)
    assert raw.value(chosen) == pytest.approx(0.5 * np.linalg.slogdet(block + 1e-6 * np.eye(4))[1] + 4 * 9.965784, abs=1e-8)
    tight = Informing(np.ones((3, 3)), 1e-6, 9.965784)                                        # the authors' constant does not save tight kernels
    assert tight.marginals([0, 1])[1] < 0 and Informing(np.ones((3, 3)), 1e-6).marginals([0, 1])[1] > 0


@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_every_set_function_is_monotone_and_submodular_and_gives_nothing_twice(function):
    measure, rng = function.bind(places(6, 5)), np.random.default_rng(0)
    assert violation(measure, rng) < 1e-9
    walk = rng.integers(measure.size, size=30)
    gains, singles = measure.marginals(walk), measure.singles[walk]
    assert (gains >= -1e-12).all() and (gains <= singles + 1e-9).all()
    state = measure.empty()
    for v in walk:
        assert np.allclose(measure.gains(state)[v], measure.gain(state, int(v)), atol=1e-9)
        state = measure.add(state, int(v))
    if not measure.repeats and not isinstance(function, FacilityLocation | Coverage):
        assert np.abs(measure.gains(state)[walk]).max() == 0
    elif not measure.repeats:
        assert np.abs(measure.gains(state)[walk]).max() < 1e-12


def test_the_check_finds_what_is_not_submodular():
    pairs = Counting(np.ones((6, 1), bool), np.array([[0.0, 1.0, 0.0]]))                      # pays only for a second one
    assert violation(pairs, np.random.default_rng(0)) > 0.9


# ---- the estimator against the exact objective: every walk of a small noisy world

NEXT = np.array([[0, 1], [2, 0], [1, 2]])
MEASURE = Informing(np.array([[1, 0.8, 0.1], [0.8, 1, 0.3], [0.1, 0.3, 1]]), 0.4)


def expectations(horizon, credit, baseline=None, measure=MEASURE, seed=0):
    """(autograd of J, expectation of the estimator) over every walk of Markov policies pi_h(a|s), as gradients of the logits [H, 3, 2]."""
    logits = torch.randn(horizon, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    logp, exact, surrogate = logits.log_softmax(-1), 0.0, 0.0
    for steps in itertools.product(itertools.product((0, 1), (0, 1)), repeat=horizon):     # (chosen action, action that the noise makes of it)
        at, walk, total, chance = 0, [0], torch.zeros((), dtype=torch.float64), 1.0
        terms = []
        for h, (chosen, happens) in enumerate(steps):
            terms.append(logp[h, at, chosen])
            chance *= 0.8 if chosen == happens else 0.2
            at = int(NEXT[at, happens])
            walk.append(at)
        gains = measure.marginals(walk)[1:]
        total = sum(terms)
        weights = MarginalGains(credit=credit, baseline="none")(rollout(gains[:, None]), 1.0)[0].flatten()
        if baseline is not None:
            weights = weights - torch.tensor([baseline(walk[: i + 1]) for i in range(horizon)], dtype=torch.float64)
        exact = exact + chance * total.exp() * gains.sum()
        surrogate = surrogate + chance * total.exp().detach() * (torch.stack(terms) * weights).sum()
    return torch.autograd.grad(exact, logits, retain_graph=True)[0], torch.autograd.grad(surrogate, logits)[0]


def test_reward_to_go_of_gains_is_unbiased_and_a_baseline_of_the_past_leaves_it_so():
    exact, found = expectations(4, "reward-to-go")
    assert exact.abs().max() > 0.01 and torch.allclose(exact, found, atol=1e-8)
    found = expectations(4, "reward-to-go", baseline=lambda past: 3.0 * MEASURE.value(past) + len(past))[1]
    assert torch.allclose(exact, found, atol=1e-8)


def test_the_greedy_estimator_is_another_one_and_prefix_values_have_its_expectation():
    exact, myopic = expectations(3, "myopic")
    assert (exact - myopic).abs().max() > 1e-3
    assert torch.allclose(myopic, expectations(3, "prefix")[1], atol=1e-8)
    exact, myopic = expectations(1, "myopic")
    assert torch.allclose(exact, myopic, atol=1e-8)


def test_additive_functions_give_reinforce():
    additive, states = Modular(np.array([1.0, 2.0, 0.5])), [0, 1, 0, 2, 2]
    assert additive.marginals(states).tolist() == additive.weights[states].tolist()
    exact, found = expectations(3, "reward-to-go", measure=additive)
    assert torch.allclose(exact, found, atol=1e-8)


def test_baselines():
    gains = np.array([[1.0, 3.0], [2.0, 0.0]])
    credit = MarginalGains(baseline="step")(rollout(gains), 1.0)[0]
    assert credit[0].tolist() == [[0.0, 0.0], [1.0, -1.0]]
    critic = MarginalGains(baseline="value")(rollout(gains, values=torch.full((1, 2, 2), 0.5, dtype=torch.float64)), 1.0)
    assert critic[0][0].tolist() == [[2.5, 2.5], [1.5, -0.5]] and critic[1][0].tolist() == [[3, 3], [2, 0]]
    assert [Inverse(0.1).at(s) for s in (0, 1, 9)] == [0.1, 0.05, 0.01]


# ---- bounds on small instances

def walks(graph, horizon):
    for actions in itertools.product(range(graph.next.shape[1]), repeat=horizon):
        walk = [graph.start]
        for a in actions:
            walk.append(int(graph.next[walk[-1], a]))
        yield walk


@pytest.mark.parametrize("function", [Coverage(density="bumps"), Information(), Items(count=3, members=2), ModularSum(density="bumps")], ids=repr)
def test_the_best_walk_is_that_of_brute_force_and_greedy_sets_are_near_theirs(function):
    graph = Grid(3, 3).graph()
    measure = function.bind(graph.places)
    walk, found = best_walk(graph, measure, 5)
    assert len(walk) == 6 and found == pytest.approx(max(measure.value(w) for w in walks(graph, 5))) == pytest.approx(measure.value(walk))
    greedy = greedy_walk(graph, measure, 5)
    assert len(greedy[0]) == 6 and greedy[1] == pytest.approx(measure.value(greedy[0])) and greedy[1] <= found + 1e-9
    if not measure.repeats:
        best = max(measure.value(s) for s in itertools.combinations(range(9), 3))
        assert (1 - 1 / math.e) * best - 1e-9 <= greedy_set(measure, 3)[1] <= best + 1e-9
    with pytest.raises(UserError, match="more than 3 walks"):
        best_walk(Grid(4, 4).graph(), Coverage().bind(Grid(4, 4).graph().places), 6, limit=3)


def test_greedy_walks_can_be_bad_and_the_best_one_is_found():
    nexts = np.array([[1, 3], [2, 2], [2, 2], [4, 4], [5, 5], [5, 5]])                        # 0 -> 1 -> 2, or 0 -> 3 -> 4 -> 5
    graph = Graph(nexts, np.stack([np.arange(6), np.zeros(6)], 1), 0)
    measure = Covering(np.eye(6, dtype=bool), np.array([0.0, 1.0, 0.0, 0.1, 5.0, 5.0]))
    assert greedy_walk(graph, measure, 3)[1] == 1 and best_walk(graph, measure, 3) == ([0, 3, 4, 5], pytest.approx(10.1))


def test_curvature_and_what_it_promises():
    where = places(3, 3)
    assert curvature(ModularSum(density="bumps").bind(where)) == pytest.approx(0) and curvature(Coverage().bind(where)) == 1
    half = [curvature(Blend(share=s).bind(where)) for s in (0.25, 0.5, 1.0)]
    assert half == pytest.approx([0.75, 0.5, 0.0], abs=1e-9)
    graph = Grid(3, 3, start=0).graph()
    for share in (0.2, 0.6, 1.0):                                                             # a local optimum of the exact gradient, J >= (1 - c) J*
        measure = Blend(share=share, of=Coverage(density="bumps")).bind(graph.places)
        assert climbed(graph, measure, 3, lambda logits, h, at: logits[h, at]) >= 0.999 * (1 - curvature(measure)) * best_walk(graph, measure, 3)[1]


def climbed(graph, measure, horizon, read, steps=150):
    """J after gradient ascent on the exact objective from uniform logits [H, V, A]; `read` picks the logits of time h in a state."""
    logits = torch.zeros(horizon, *graph.next.shape, dtype=torch.float64, requires_grad=True)
    found = [(w, actions) for actions in itertools.product(range(graph.next.shape[1]), repeat=horizon) for w in [[graph.start]]]
    for w, actions in found:
        for a in actions:
            w.append(int(graph.next[w[-1], a]))
    values = torch.tensor([measure.value(w) for w, _ in found], dtype=torch.float64)
    index = torch.tensor([[(h, w[h], a) for h, a in enumerate(actions)] for w, actions in found])
    optimiser = torch.optim.Adam([logits], lr=0.3)
    for _ in range(steps):
        optimiser.zero_grad()
        chosen = read(logits.log_softmax(-1), index[..., 0], index[..., 1]).gather(-1, index[..., 2:])
        objective = (chosen.sum((1, 2)).exp() * values).sum()
        (-objective).backward()
        optimiser.step()
    return float(objective.detach())


def test_free_choice_of_states_is_within_a_half():
    graph = Complete(2, 3).graph()
    for seed in range(3):                                                                     # a policy that does not look at the state
        measure = Coverage(disc="round", radius=1.0, density="process", seed=seed).bind(graph.places)
        assert climbed(graph, measure, 3, lambda logits, h, at: logits[h, 0]) >= 0.5 * best_walk(graph, measure, 3)[1]


# ---- environments

def test_what_each_way_of_paying_pays():
    pay = {p: SetWalk(world=Grid(4, 4), horizon=4, pays=p).make(training=True) for p in ("marginal", "modular", "final")}
    paid = {}
    for name, env in pay.items():
        env.reset(seed=0)
        paid[name] = [env.step(a)[1] for a in (0, 3, 1, 3)]
    assert env.walk == [10, 10, 9, 10, 9] and paid["marginal"] == [0, 2, 0, 0] and paid["modular"] == [4, 4, 4, 4] and paid["final"] == [0, 0, 0, 2]
    assert env.value == 6 and SetWalk(pays="modular").make().pays == "marginal"               # evaluation always counts F
    assert SetWalk().measure({"value": np.array([2.0, 4.0]), "distinct": np.array([1.0, 2.0])}) == {"value": 3.0, "distinct": 1.5}


@pytest.mark.parametrize("sees", ["code", "one-hot", "place", "time", "history", "indices", "walk"])
def test_observations_fit_their_spaces_and_tell_time(sees):
    env = SetWalk(world=Grid(4, 3), horizon=5, sees=sees).make()
    seen = [env.reset(seed=0)[0]] + [env.step(1)[0] for _ in range(5)]
    assert all(env.observation_space.contains(o) for o in seen) and len({str(o) for o in seen}) == 6
    if sees == "indices":
        assert seen[1][:6].tolist() == pytest.approx([7 / 12, 8 / 12, -1, -1, -1, -1])
    if sees == "history":
        assert np.flatnonzero(seen[2][3:]).tolist() == [7, 8]
    if sees == "walk":
        assert np.allclose(seen[1].reshape(6, 3), [*[[0, 0, 0]] * 4, [1 / 3, 0, 1 / 6], [1 / 3, 1, 2 / 6]])


def test_noise_takes_the_place_of_actions():
    env = SetWalk(world=Grid(5, 5), horizon=1, noise=0.5).make()
    env.reset(seed=3)
    ends = []
    for _ in range(4000):
        env.reset()
        env.step(1)
        ends.append(env.at)
    assert np.mean(np.array(ends) == 13) == pytest.approx(0.6, abs=0.03)                      # 1/2 + 1/2 * 1/5; a false alarm in 10,000
    assert SetWalk(noise=0.0).make().noise == 0


def test_a_graph_from_a_file(tmp_path):
    path = tmp_path / "graph.json"
    path.write_text(json.dumps({"edges": [[0, 1], [1, 2], [0, 2], [2, 3]], "places": [[0, 0], [0, 1], [1, 0], [2, 0]], "start": 3}))
    graph = GraphFile(str(path)).graph()
    assert graph.next.tolist() == [[0, 1, 2, 0], [1, 0, 2, 1], [2, 1, 0, 3], [3, 2, 3, 3]] and graph.start == 3
    path.write_text(json.dumps({"edges": [[0, 4]], "places": [[0, 0], [0, 1]]}))
    with pytest.raises(UserError, match="edges must join the states 0 to 1"):
        GraphFile(str(path)).graph()
    with pytest.raises(UserError, match="expected JSON with edges and places"):
        GraphFile(str(tmp_path / "none.json")).graph()
    assert Complete(2, 2).graph().next.tolist() == [[0, 1, 2, 3]] * 4


def test_weights_from_a_file(tmp_path):
    np.save(tmp_path / "w.npy", np.arange(20.0).reshape(5, 4))
    assert Coverage(disc="cell", weights=str(tmp_path / "w.npy")).bind(places()).value([3, 19]) == 22
    with pytest.raises(UserError, match="20 numbers, least 0; accepted: 9 finite ones"):
        Coverage(weights=str(tmp_path / "w.npy")).bind(places(3, 3))
    with pytest.raises(UserError, match="expected a .npy file"):
        Coverage(weights=str(tmp_path / "w.txt")).bind(places())


def test_the_ground_of_the_arena():
    ground = Ground()
    assert ground.mark(0, 0) == 25 and ground.mark(0, 0) == 0 and ground.mark(0.4, 0) == 5 and ground.mark(20.1, 0) is None and ground.mark(-19.99, -19.99) == 9
    paid = {}
    for pays in ("marginal", "cumulative", "modular"):
        env = Covered(PointEnv(), lambda env, info: (0.0, 0.4 * env.unwrapped.t), pays)
        env.reset(seed=0)
        paid[pays] = [env.step(np.zeros(2))[1] for _ in range(3)]
    assert paid == {"marginal": [0.5, 0.5, 0.5], "cumulative": [3.0, 3.5, 4.0], "modular": [2.5] * 3}
    env = Roam().make()
    env.reset(seed=0)
    steps = [env.step(np.ones(2)) for _ in range(30)]
    assert any(s[2] for s in steps) and Roam(pays="modular").make().pays == "marginal"


def test_the_ant_is_paid_for_the_ground_it_covers():
    pytest.importorskip("mujoco")
    env = AntCoverage().make(training=True)
    assert env.reset(seed=0)[1]["value"] == 25
    assert env.step(env.action_space.sample())[1] >= 0
    env.close()


def test_the_track_pays_progress_and_a_lap():
    env = TrackEnv()
    env.reset(seed=0)
    total, over = 0.0, False
    while not over:
        offset, error = env._observation()[:2]
        _, reward, over, _, info = env.step(np.array([np.clip((env.speed / 10 - error + 0.3 * offset) / 0.2, -1, 1), 1.0]))
        total += reward
    assert info["progress"] >= 1 and total == pytest.approx(10 * info["progress"] + 1 - 0.01 * env.t, abs=1e-6)
    env.reset(seed=0)
    rewards = []
    for _ in range(60):
        _, reward, over, _, info = env.step(np.array([0.0, 1.0]))
        rewards.append(reward)
        if over:
            break
    assert over and rewards[-1] < -0.9


# ---- learning

SMALL = dict(task=SetWalk(world=Grid(6, 6), horizon=10), steps=40, seed=0)
QUICK = ["envs=64", "length=10", "evaluation.episodes=20"]


def test_it_covers_more_than_the_modular_arm_and_comes_near_the_best_walk(tmp_path):
    made = volvelle.train("subrl", folder=tmp_path / "a", overrides=QUICK, **SMALL)
    modular = volvelle.train("subrl", folder=tmp_path / "b", overrides=QUICK, **{**SMALL, "task": SMALL["task"].replace(pays="modular")})
    assert made.result["metrics"]["value"] > 21 and modular.result["metrics"]["value"] < 17 and made.result["start"]["value"] < 16   # the best walk: 24
    history = volvelle.train("subrl", folder=tmp_path / "c", overrides=[*QUICK, "network.hidden=[32]", "network.activation=tanh", "optimiser.lr=1e-2"],
                             **{**SMALL, "task": SMALL["task"].replace(sees="history"), "steps": 60})
    assert history.result["metrics"]["value"] > 18.5
    recurrent = volvelle.train("subrl", folder=tmp_path / "d", overrides=[*QUICK, "network=gru", "network.units=32", "optimiser.lr=1e-2"],
                               **{**SMALL, "task": SMALL["task"].replace(sees="walk"), "steps": 80})
    assert recurrent.result["metrics"]["value"] > 20


@pytest.mark.slow
def test_the_actor_critic_drives_a_lap(tmp_path):
    made = volvelle.train("subrl-deep", task=Track(), folder=tmp_path / "run", overrides=["length=200", "optimiser.lr=3e-3"], steps=150, seed=0)
    assert made.result["start"]["progress"] < 0.2 and made.result["metrics"]["progress"] > 0.7


@pytest.mark.parametrize("method, task, overrides", [
    ("subrl", SetWalk(world=Grid(6, 6), horizon=10, noise=0.1), [*QUICK, "entropy=inverse", "seeds=2"]),
    ("subrl", SetWalk(world=Grid(4, 4), horizon=6, function=Information(), sees="history"), [*QUICK, "advantage.baseline=value", "value_weight=0.5"]),
    ("subrl-deep", Roam(horizon=10), ["envs=3", "length=10", "network.hidden=[8]", "evaluation.episodes=2"])])
def test_a_run_broken_off_ends_bit_for_bit_as_an_unbroken_one(method, task, overrides, tmp_path):
    options = {"task": task, "overrides": overrides, "steps": 6, "checkpoint_every": 2, "seed": 0}
    volvelle.train(method, folder=tmp_path / "whole", strict=True, **options)

    with pytest.raises(KeyboardInterrupt):
        volvelle.train(method, folder=tmp_path / "broken", progress=stop_at(5), **options)
    volvelle.train(resume=tmp_path / "broken")
    ends = [fingerprint(load_state(checkpoints(tmp_path / name)[-1])) for name in ("whole", "broken")]
    assert ends[0] == ends[1]
    assert Policy.load(tmp_path / "broken" / "policy").seeds == (2 if "seeds=2" in overrides else 1)


def test_a_walk_is_drawn():
    env = SetWalk(world=Grid(4, 3), horizon=3).make(render="rgb_array")
    env.reset(seed=0)
    env.step(1)
    picture = env.render()
    assert picture.shape == (96, 72, 3) and picture[2 * 24 + 5, 2 * 24 + 5].tolist() == [220, 50, 40] and picture[2 * 24 + 5, 24 + 5, 0] == 40


@pytest.mark.parametrize("overrides, says", [
    (["length=9"], "length=9: cuts the episodes of set-walk, which have 10 steps; accepted: length=10 or more"),
    (["whole_episodes=false"], "whole_episodes=false: marginal gains depend"), (["advantage.baseline=value"], "advantage.baseline=value with value_weight=0.0"),
    (["task.world.start=40"], "start=40: accepted are states from 0 to 35"), (["task.function=items", "task.function.count=20"], "count=20 groups of members=3")])
def test_what_makes_no_sense_is_refused(overrides, says, tmp_path):
    with pytest.raises(UserError, match=says):
        volvelle.train("subrl", folder=tmp_path / "run", overrides=[*QUICK, *overrides] if "length" not in overrides[0] else overrides, **SMALL)
