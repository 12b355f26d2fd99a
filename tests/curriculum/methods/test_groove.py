"""GROOVE: regret, the level buffer, runs that resume exactly, rules tested elsewhere, refusals."""

import json

import pytest
import torch

import volvelle
from volvelle.core.claims import run_claim
from volvelle.core.errors import UserError
from volvelle.core.run import RunConfig
from volvelle.core.state import load_state
from volvelle.core.trainable import SGD
from volvelle.core.trainer import start
from volvelle.curriculum.gridtasks import Grids, RandomGrids
from volvelle.curriculum.gridworlds import Levels, optimal_returns
from volvelle.curriculum.levelbuffer import LevelBuffer
from volvelle.curriculum.lpg import LPG, load_rule
from volvelle.curriculum.metalearning import MetaGradient, MetaTraining, OpenES
from volvelle.curriculum.methods.groove import Adversarial, Static, algorithmic_regret, antagonist_returns, claim, groove, small, value_loss
from volvelle.curriculum.tabular import Tabular, Values

LEVELS = RandomGrids(size=(3, 4), walls=2, limit=(5, 10), lifetime=(4, 4))
TASK = Grids(levels=LEVELS, tests=6)
TINY = MetaTraining(rule=LPG(hidden=8, embed=4), agent=Tabular(width=3, workers=4, length=5), outer=MetaGradient(updates=2), lifetimes=4, curation=Adversarial(size=14))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def live(recipe=TINY, task=TASK, seed=0):
    return start(RunConfig(recipe=recipe, task=task, seed=seed), "/nowhere")[1]


# ---- scores

def test_no_regret_where_both_earn_the_same():
    returned = torch.tensor([0.3, -1.0, 0.0])
    assert algorithmic_regret(returned, returned).tolist() == [0, 0, 0]
    assert algorithmic_regret(torch.tensor([1.0]), torch.tensor([0.25])).tolist() == [0.75]


def shut_in(count):
    """Levels whose one object lies behind walls."""
    walls = torch.zeros(count, 9, dtype=torch.bool)
    walls[:, [1, 3]] = True
    one = torch.ones(count, 1)
    return Levels(torch.full((count,), 3), walls, torch.zeros(count, dtype=torch.long), torch.full((count, 1), 8), one > 0, one, one * 0.5, one * 0.1,
                  torch.full((count,), 6), torch.full((count,), 4))


@pytest.mark.parametrize("kind", ["a2c", "ppo", "random", "expert"])
def test_a_level_that_cannot_be_solved_is_worth_nothing(kind):
    learner = live()
    learner.worlds.levels.put(torch.tensor([1, 2]), shut_in(2).__class__(**{k: _pad(v, getattr(learner.worlds.levels, k)) for k, v in shut_in(2).tensors().items()}))
    learner.worlds.refresh()
    learner.curation.part = Adversarial(size=14, antagonist=kind)
    scores = learner.curation.scores(torch.arange(4), learner)
    assert scores[[1, 2]].tolist() == [0, 0]
    if kind == "expert":
        assert (scores[[0, 3]] > 0.1).all()


def _pad(value, like):
    wider = torch.zeros(len(value), *like.shape[1:], dtype=like.dtype)
    wider[tuple(slice(n) for n in value.shape)] = value
    return wider


def test_regret_is_the_antagonists_return_less_the_agents_own():
    """An agent that has learnt the level has less regret than a new one, and against the optimum exactly the optimum less what it earns."""
    from volvelle.curriculum.tabular import actor_critic

    learner = live(TINY.replace(lifetimes=8, curation=Adversarial(size=24, score="optimal-regret")))
    levels = learner.worlds.levels
    before = learner.curation.scores(torch.arange(8), learner)
    learner.actor = actor_critic(levels, Tabular(workers=16, length=10), 40, generator())
    after = learner.curation.scores(torch.arange(8), learner)
    assert after.mean() < 0.5 * before.mean() and (before > -0.3).all()
    assert torch.equal(antagonist_returns("expert", levels, learner.part.agent, 4, generator()), optimal_returns(levels).float())


def test_value_losses_by_hand():
    """gamma = lambda = 1 and a critic of nothing: the advantage is what is still to come within the episode: shut in, nothing; else the same in both scores if positive."""
    levels = shut_in(2)
    levels.walls[0] = False
    values = Values(2, levels.states, 0.1, gamma=1.0, lam=1.0)
    actor = torch.zeros(2, levels.states + 1, 5)
    absolute, positive = (value_loss(levels, actor, values, 64, p, generator()) for p in (False, True))
    assert absolute[1] == 0 and 0 < absolute[0] == positive[0]
    levels.reward[:] = -1.0
    assert value_loss(levels, actor, values, 64, True, generator()).tolist() == [0, 0] and value_loss(levels, actor, values, 64, False, generator())[0] == absolute[0]


# ---- the buffer

def buffer(scores, active=(), new=()):
    found = LevelBuffer(LEVELS.draw(len(scores), generator()))
    found.score[:], found.new[:] = torch.tensor(scores), False
    found.active[list(active)], found.new[list(new)] = True, True
    return found


def test_new_and_active_levels_are_never_curated_and_rank_goes_by_score():
    b = buffer([0.1, 0.9, 0.5, 0.7, 0.3, 0.8], active=[1], new=[5])
    assert b.curated.tolist() == [0, 2, 3, 4] and b.rank(3, "rank", 1.0, generator()).tolist() == [3, 2, 4]
    for seed in range(20):
        chosen = b.rank(3, "proportional", 1.0, generator(seed)).tolist()
        assert set(chosen) <= {0, 2, 3, 4} and len(set(chosen)) == 3


def test_proportional_choice_follows_the_exponential_of_the_score():
    """4000 first choices: each frequency within 5 standard deviations."""
    b, g = buffer([0.0, 1.0, 2.0]), generator()
    counts = torch.bincount(torch.cat([b.rank(1, "proportional", 0.5, g) for _ in range(4000)]), minlength=3) / 4000
    expected = (torch.tensor([0.0, 1.0, 2.0]) / 0.5).softmax(0)
    assert ((counts - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_fresh_levels_take_the_places_of_new_ones_first_then_of_the_lowest_and_spare_active_ones():
    b = buffer([0.1, 0.9, 0.5, 0.7, -0.3, 0.8], active=[4], new=[5])
    before = b.levels.clone()
    b.renew(3, lambda n: LEVELS.draw(n, generator(9)))
    changed = [i for i in range(6) if not torch.equal(b.levels.reward[i], before.reward[i])]
    assert changed == [0, 2, 5] and b.fresh.tolist() == [0, 2, 5] and b.curated.tolist() == [1, 3]
    b.renew(3, None)  # enough are fresh: nothing is drawn
    b.active[0] = True
    assert b.new[[0, 2, 5]].all()  # untouched levels keep their mark


def test_chosen_levels_are_active_until_their_lifetime_ends():
    b = buffer([0.1, 0.9, 0.5, 0.7, 0.2, 0.3], new=[4, 5])
    index = b.sample(2, 2, 1.0, "rank", 1.0, lambda n: LEVELS.draw(n, generator()), generator())
    assert index.tolist() == [1, 3] and b.active.nonzero()[:, 0].tolist() == [1, 3]
    b.finish(index, torch.tensor([-1.0, 0.6]))
    assert b.rank(4, "rank", 1.0, generator()).tolist() == [3, 2, 0, 1] and not b.active.any()
    fresh = b.sample(2, 2, 0.0, "rank", 1.0, lambda n: LEVELS.draw(n, generator()), generator())
    assert sorted(fresh.tolist()) == [4, 5]
    b.finish(fresh, torch.zeros(2))
    assert not b.new.any()


def test_too_few_scored_levels_mean_fresh_ones():
    b = buffer([0.1, 0.9, 0.5, 0.7], new=[0, 2, 3])
    assert 1 not in b.sample(2, 2, 1.0, "rank", 1.0, lambda n: LEVELS.draw(n, generator()), generator()).tolist()


# ---- curation within a run

def test_scored_levels_come_back_when_their_regret_is_high(tmp_path):
    learner = live(TINY.replace(curation=Adversarial(size=20, replay=0.7)))
    for _ in range(20):
        learner.step()
    b, slots = learner.curation.buffer, learner.curation.slots
    old, idle = slots[~b.new[slots]], b.score[b.curated]
    assert 0 < len(old) < 4 and len(idle) > 4 and learner.curation.report()["curated"] == len(old) / 4
    assert b.score[old].min() >= idle.max() and b.active.sum() == 4
    assert torch.equal(learner.worlds.levels.reward, b.levels.reward[learner.curation.slots])
    learner.curation.save(tmp_path)
    assert (tmp_path / "levels.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("curation", [Adversarial(size=14, frozen=True), Adversarial(size=14, score="l1-value-loss", transform="proportional"), Static(count=3),
                                      Adversarial(size=14, score="positive-value-loss"), Adversarial(size=14, antagonist="random")])
def test_every_way_to_choose_levels_runs(curation):
    learner = live(TINY.replace(curation=curation))
    kept = learner.curation.buffer.levels.clone() if getattr(curation, "frozen", False) else None
    for _ in range(9):
        learner.step()
    if kept is not None:
        assert torch.equal(learner.curation.buffer.levels.reward, kept.reward)
    if isinstance(curation, Static):
        assert all(any(torch.equal(one, s) for s in learner.curation.levels.reward) for one in learner.worlds.levels.reward)


@pytest.mark.parametrize("recipe", [
    TINY, TINY.replace(outer=OpenES(), curation=Adversarial(size=14)), TINY.replace(agent=TINY.agent.replace(optimiser="adam", actor_lr=0.5, bootstrap_lr=0.5)),
    TINY.replace(curation=Static(count=2), outer=MetaGradient(updates=3, through_inputs=True), rule=LPG(cell="lstm", hidden=8, conditioned=True))],
    ids=["groove", "evolution", "adam", "static"])
def test_a_resumed_run_ends_as_one_never_stopped(tmp_path, recipe):
    task = TASK.replace(levels=LEVELS.replace(lifetime=(3, 5)))
    whole = volvelle.train(recipe, task=task, folder=tmp_path / "whole", steps=5, strict=True)
    volvelle.train(recipe, task=task, folder=tmp_path / "broken", steps=3)
    again = volvelle.train(recipe, task=task, folder=tmp_path / "broken", steps=5, resume=tmp_path / "broken")
    one, other = (load_state(tmp_path / f / "rule")["weights"] for f in ("whole", "broken"))
    assert all(torch.equal(one[k], other[k]) for k in one) and whole.result["metrics"] == again.result["metrics"]
    assert torch.equal(whole.learner.actor, again.learner.actor)


def test_values_computed_again_give_the_same_rule(tmp_path):
    rules = {n: volvelle.train(TINY.replace(outer=MetaGradient(updates=2, recompute=n)), task=TASK, folder=tmp_path / str(n), steps=2).learner.rule.module for n in (0, 3)}
    for (name, one), other in zip(rules[0].named_parameters(), rules[3].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


def test_evolution_keeps_pairs_on_one_level_and_moves_towards_the_better():
    """The step is the noise of each pair, forwards where plus did better and backwards where minus did; a twin tells which it was."""
    recipe = TINY.replace(outer=OpenES(), optimiser=SGD(lr=1.0), lifetimes=6, curation=Adversarial(size=20))
    learner, twin = live(recipe), live(recipe)
    levels = learner.worlds.levels
    assert torch.equal(levels.start[:3], levels.start[3:]) and torch.equal(levels.reward[:3], levels.reward[3:])
    noise, reached = twin.part.outer.compare(twin, 0.1)
    better = [(1 if p > m else -1 if p < m else 0) / 2 for p, m in zip(reached[:3], reached[3:])]
    assert any(better)
    before = learner.rule.module.read_weight.detach().clone()
    learner.step()
    expected = sum(b * noise["read_weight"][i] for i, b in enumerate(better)) / (3 * 0.1)
    assert torch.allclose(learner.rule.module.read_weight - before, expected, atol=1e-5)
    assert learner.step()["sigma"] == pytest.approx(0.0999)
    assert torch.equal(learner.worlds.levels.reward[:3], learner.worlds.levels.reward[3:])


@pytest.mark.slow
def test_a_rule_learns_to_learn(tmp_path):
    """120 meta-updates: agents trained by the rule earn more than twice what untrained ones do (three seeds of three when written)."""
    made = volvelle.train(small, task="grids:tiny", folder=tmp_path / "run", steps=120, overrides=["task.tests=32"])
    assert made.result["metrics"]["return"] > 2 * made.result["metrics"]["untrained"] and made.result["start"]["score"] < 0.4


def test_a_saved_rule_is_tested_elsewhere(tmp_path):
    volvelle.train(TINY, task=TASK, folder=tmp_path / "run", steps=2, evaluate_every=1)
    other = volvelle.evaluate(tmp_path / "run", "grids:sparse", overrides=["evaluation.lifetime=2", "evaluation.episodes=4"])
    assert other["levels"] == 8 and other["optimal"] == 1.0
    cart = volvelle.evaluate(tmp_path / "run", "CartPole-v1", overrides=["evaluation.lifetime=10", "evaluation.length=20", "evaluation.network.hidden=[8]"])
    assert 5 < cart["return"] < 100 and cart["episodes"] > 10
    again = volvelle.evaluate(tmp_path / "run", "CartPole-v1", overrides=["evaluation.lifetime=10", "evaluation.length=20", "evaluation.network.hidden=[8]"])
    assert cart == again
    assert load_rule(tmp_path / "run" / "rule").width == 3
    for task, overrides, words in (("Pendulum-v1", [], "one choice among discrete actions"), ("swing-up", [], "is tested on grids or in an environment"),
                                   (None, ["lifetimes=8"], "only evaluation")):
        with pytest.raises(UserError, match=words):
            volvelle.evaluate(tmp_path / "run", task, overrides=overrides)


def test_static_levels_are_those_of_highest_regret(tmp_path):
    volvelle.train(TINY, task=TASK, folder=tmp_path / "run", steps=1)
    static = Static(count=4, candidates=40, rule=str(tmp_path / "run" / "rule"))
    chosen, plain = (live(TINY.replace(curation=c)).curation.levels for c in (static, Static(count=40)))
    assert len(chosen) == 4 and optimal_returns(chosen).mean() > optimal_returns(plain).mean()


@pytest.mark.parametrize("overrides, task, words", [
    ({"curation.size": 10}, TASK, "curation.size=10: .*at least 12"), ({}, "CartPole-v1", "gives no levels; accepted: grids:tiny"),
    ({"outer": OpenES(), "lifetimes": 3, "curation.size": 20}, TASK, "lifetimes=3: openes compares pairs"),
    ({"outer": OpenES(), "curation.score": "l1-value-loss"}, TASK, "needs scalar critics"), ({"curation": Static(candidates=100)}, TASK, "give curation.rule"),
    ({"curation": Static(candidates=3, rule="x")}, TASK, "at least curation.count=16"), ({"curation": Static(candidates=30, rule="nowhere")}, TASK, "no update rule there"),
    ({"curation.score": "regret"}, TASK, "curation.score"), ({"outer.updates": 0}, TASK, "outer.updates"),
])
def test_what_makes_no_sense_is_refused(tmp_path, overrides, task, words):
    with pytest.raises(UserError, match=words) as caught:
        volvelle.train(TINY, task=task, folder=tmp_path / "run", overrides=overrides, steps=1)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_papers_defaults():
    assert (groove.lifetimes, groove.agent.workers, groove.agent.length, groove.outer.updates, groove.rule.hidden) == (512, 64, 20, 5, 256)
    assert (groove.curation.size, groove.curation.replay, groove.curation.transform, groove.optimiser.lr) == (4000, 0.5, "rank", 1e-4)
    assert json.loads(json.dumps([groove.outer.policy_entropy, groove.outer.prediction_entropy, groove.outer.policy_norm, groove.outer.prediction_norm])) == [.05, .001, .005, .001]


@pytest.mark.slow
def test_the_claim_runs_in_its_quick_form(tmp_path):
    made = run_claim("groove", claim, tmp_path, "quick")
    assert made.verdict in ("reproduced", "inconclusive", "refuted")
