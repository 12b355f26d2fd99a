"""LATR (arXiv 2510.24302): the rules one by one on scripted probabilities, the cache on a real model, and training through the verbs."""

import numpy as np
import pytest
import torch
from helpers import same_run
from hypothesis import given, strategies as st
from scripted import Scripted, prompts

import volvelle
from volvelle.core.errors import UserError
from volvelle.core.run import Run, RunConfig
from volvelle.core.trainable import AdamW
from volvelle.core.verbs import configure
from volvelle.language.batching import make_batch
from volvelle.language.branching import edit, rouge, suffix
from volvelle.language.diversity import GroupRecipe, MostDiverse, diversity, farthest
from volvelle.language.fittings import Updates
from volvelle.language.methods.dapo import dapo
from volvelle.language.methods.grpo import grpo
from volvelle.language.methods.latr import Growth, Latr
from volvelle.language.models import Tiny
from volvelle.language.recipe import Evaluation
from volvelle.language.samplers import Plain
from volvelle.language.similarity import common_subsequence, edit_distance, rouge_l, suffix_match
from volvelle.language.tasks.forks import Forks

TINY = Tiny(layers=2, width=32, heads=2, context=64, warmup=0)


class Live:
    """A live sampler over a scripted policy, without a run."""

    def __init__(self, part: Latr, policy, seed=0, entropy=False, tokens=20):
        self.part, self.policy, self.level, self.entropy = part, policy, 0, entropy
        self.run = self
        self.rng = torch.Generator().manual_seed(seed)
        self.sampling = part.replace(max_tokens=tokens, stop=()).sampling(None)

    def grow(self, count=1, width=None):
        growth = Growth(self, prompts(count), self.part.group if width is None else width)
        growth.grow()
        return growth


def texts(growth, count=1):
    f = growth.forest
    return [[f.ids[s, : f.length[s]].tolist() for s in range(p * f.room, (p + 1) * f.room)] for p in range(count)]


def fork_at(places, first=0.5, second=0.4):
    """Probabilities that fork at the given positions (tokens 1 and 2), certain (token 3) elsewhere."""
    def probs(_, prefix):
        return {1: first, 2: second, 4: 1 - first - second} if len(prefix) in places else {3: 1.0}
    return probs


# ------------------------------------------------------------------------------------------------------------------- branching

@pytest.mark.parametrize("first,second,opens", [(0.5, 0.4, True), (0.6, 0.3, False), (0.3, 0.24, False)])
def test_a_child_opens_when_the_second_token_is_likely_and_nearly_as_likely_as_the_first(first, second, opens):
    made = Live(Latr(group=4, prune={}), Scripted(fork_at({0}, first, second))).grow()
    assert made.count["forks"] == opens
    assert ([2] in [t[:1] for t in texts(made)[0]]) == opens


def test_both_thresholds_are_strict():
    even = Scripted(lambda _, prefix: {1: 0.5, 2: 0.5} if not prefix else {3: 1.0})
    for absolute, relative, forks in ((0.499, 0.001, 1), (0.5, 0.001, 0), (0.499, 0.0, 0)):
        assert Live(Latr(group=4, absolute=absolute, relative=relative, prune={}), even).grow().count["forks"] == forks


def test_without_a_fork_the_tree_is_greedy_and_its_copies_are_finished_by_sampling():
    def probs(_, prefix):
        return {5: 0.9, 6: 0.1} if len(prefix) < 10 else {7: 0.62, 8: 0.38}
    live = Live(Latr(group=8, cap=10, windows=(5,)), Scripted(probs), tokens=20)
    rows = texts(live.grow())[0]
    assert all(r[:10] == [5] * 10 for r in rows)
    assert len({tuple(r) for r in rows}) > 4  # 2^10 endings
    greedy = texts(Live(Latr(group=8, windows=(5,)), Scripted(probs), tokens=20).grow())[0]
    assert all(r[:10] == [5] * 10 and len(set(r[10:])) == 1 for r in greedy)


def test_capacity_is_never_exceeded_and_finished_branches_hold_their_place():
    def probs(_, prefix):
        return {1: 0.52, 2: 0.48} if not (prefix and prefix[-1] == 2) else {0: 1.0}
    live = Live(Latr(group=5, windows=(50,)), Scripted(probs), tokens=30)
    growth = Growth(live, prompts(2), 5)
    most, forest = 0, growth.forest
    advance = forest.advance
    def watched():
        nonlocal most
        most = max(most, int(forest.used.view(2, 5).sum(1).max()))
        return advance()
    forest.advance = watched
    growth.grow()
    assert most == 5 and growth.count["suppressed"] > 0
    assert growth.count["forks"] == 8  # the children end after two tokens, and none is replaced


def test_surplus_children_go_by_rank_and_branch_or_by_probability():
    # two branches after step 0, each with a second candidate (.45 and .47); one place left
    def probs(_, prefix):
        if not prefix:
            return {1: 0.52, 2: 0.48}
        if len(prefix) == 1:
            return {3: 0.55, 4: 0.45} if prefix[0] == 1 else {5: 0.53, 6: 0.47}
        return {7: 1.0}
    by_rank = texts(Live(Latr(group=3, windows=(50,)), Scripted(probs)).grow())[0]
    by_probability = texts(Live(Latr(group=3, windows=(50,), surplus="probability"), Scripted(probs)).grow())[0]
    assert sorted(r[:2] for r in by_rank) == [[1, 3], [1, 4], [2, 5]]
    assert sorted(r[:2] for r in by_probability) == [[1, 3], [2, 5], [2, 6]]


def test_rank_bounds_the_candidates_and_the_second_come_before_the_third():
    policy = Scripted(lambda _, prefix: {1: 0.35, 2: 0.33, 3: 0.32} if len(prefix) < 1 else {4: 1.0})
    assert Live(Latr(group=8, windows=(50,)), policy).grow().count["forks"] == 1
    assert Live(Latr(group=8, windows=(50,), rank=3), policy).grow().count["forks"] == 2
    assert sorted({r[0] for r in texts(Live(Latr(group=2, windows=(50,), rank=3), policy).grow())[0]}) == [1, 2]


# -------------------------------------------------------------------------------------------------------------------- pruning

def test_worked_window_of_twenty_tokens():
    parent = list(range(20))
    assert edit([*range(100, 107), *parent[7:]], parent, None)       # 7 / 20 = .35 < .4: pruned
    assert not edit([*range(100, 108), *parent[8:]], parent, None)   # 8 / 20 = .40: kept
    assert edit_distance([*range(100, 107), *parent[7:]], parent) == 7


def reference_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def reference_lcs(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


@given(st.lists(st.integers(0, 3), max_size=70), st.lists(st.integers(0, 3), max_size=70))
def test_distance_and_subsequence_agree_with_their_tables(a, b):
    assert edit_distance(a, b) == reference_distance(a, b)
    assert common_subsequence(a, b) == reference_lcs(a, b)


def test_other_measures():
    assert rouge_l([1, 2, 3, 4], [1, 9, 3, 8]) == 0.5 and not rouge([1, 2, 3, 4], [1, 9, 3, 8], None)  # .5 is not above .5
    assert suffix_match([1, 2, 3, 4, 5], [9, 4, 5, 7, 8]) == 0.4                                     # "4 5" ends one, stands inside the other
    assert suffix([1, 2, 3, 4, 5], [9, 4, 5, 7, 8], None) and not suffix([1, 2, 3, 4, 5], [9, 8, 5, 7, 6], None)  # 2/5 > .2, 1/5 is not


def same_again(_, prefix):
    """A fork whose two sides say the same afterwards, at positions 0 and 2."""
    return {1: 0.52, 2: 0.48} if len(prefix) in (0, 2) else {3: 1.0}


def test_a_child_is_judged_once_per_window_when_it_has_that_many_tokens():
    live = Live(Latr(group=2, windows=(3, 5), prune={"edit": edit.replace(threshold=0.0)}), Scripted(fork_at({0})), tokens=12)
    seen = []
    growth = Growth(live, prompts(1), 2)
    judge = growth.judge
    def watched():
        before = growth.count["judged"]
        judge()
        if growth.count["judged"] > before:
            seen.append((growth.forest.step, growth.count["judged"] - before))
    growth.judge = watched
    growth.grow()
    assert seen == [(3, 1), (5, 1)]


def test_pruning_takes_the_descendants_and_leaves_parent_and_root():
    live = Live(Latr(group=8, windows=(4,)), Scripted(same_again), tokens=8)
    growth = Growth(live, prompts(1), 8)
    kept = []
    growth.fill = lambda: kept.append([growth.forest.ids[s, :8].tolist() for s in range(8) if growth.forest.used[s]])
    growth.grow()
    # step 4: the child of position 0 differs from the root in 1 of 4 tokens and goes together with its own child of position 2;
    # step 6: the root's child of position 2 follows
    assert growth.count["forks"] == 3 and growth.count["judged"] == 2 and growth.count["pruned"] == 3
    assert kept == [[[1, 3, 1, 3, 3, 3, 3, 3]]]


def test_different_continuations_survive():
    def probs(_, prefix):
        if not prefix:
            return {1: 0.52, 2: 0.48}
        return {10 + len(prefix): 1.0} if prefix[0] == 1 else {30 + len(prefix): 1.0}
    made = Live(Latr(group=2, windows=(4, 8)), Scripted(probs)).grow()
    assert made.count["judged"] == 2 and made.count["pruned"] == 0


@pytest.mark.parametrize("who", [1, 2])
def test_a_window_that_holds_an_end_is_never_pruned(who):
    def probs(_, prefix):
        if not prefix:
            return {1: 0.55, 2: 0.45}
        return {0: 1.0} if len(prefix) == 3 and prefix[0] == who else {3: 1.0}
    made = Live(Latr(group=2, windows=(4,)), Scripted(probs), tokens=10).grow()
    assert made.count["forks"] == 1 and made.count["judged"] == 0 and made.count["pruned"] == 0


def test_spared_symbols():
    policy = Scripted(fork_at({0}))
    assert Live(Latr(group=2, windows=(4,)), policy).grow().count["pruned"] == 1
    assert Live(Latr(group=2, windows=(4,), spare="0123456789"), policy).grow().count["pruned"] == 0


def test_cumulative_pruning_takes_unlikely_branches_of_trees_that_are_not_full():
    def probs(_, prefix):
        return {1: 0.52, 2: 0.48} if not prefix else ({5: 1.0} if prefix[0] == 1 else {6: 0.6, 7: 0.4})
    settings = dict(group=4, windows=(50,), relative=0.15, interval=5)
    assert Live(Latr(**settings, cumulative=0.7), Scripted(probs)).grow().count["pruned"] == 1  # .6 a step is below .7
    assert Live(Latr(**settings, cumulative=0.5), Scripted(probs)).grow().count["pruned"] == 0


def test_random_branching_and_random_pruning():
    certain = Scripted(lambda _, prefix: {3: 0.999, 4: 0.001})
    made = Live(Latr(group=4, windows=(2,), random_branching=1.0, prune={"random": "random"}), certain, tokens=10).grow()
    assert made.count["forks"] > 0 and 0 < made.count["pruned"]
    assert Live(Latr(group=4, windows=(2,), random_branching=0.0), certain, tokens=10).grow().count["forks"] == 0


# ------------------------------------------------------------------------------------------------------- the end of the tree phase

def test_the_tree_phase_ends_when_the_trees_are_full_and_judged():
    full = Scripted(lambda _, prefix: {20: 0.52, 40: 0.48} if not prefix else {prefix[0] + len(prefix): 0.52, 3: 0.48})
    assert Live(Latr(group=2, windows=(4,)), full).grow().count["steps"] == 4          # full at once, judged after four tokens
    assert Live(Latr(group=2, windows=(4,), prune={}), full).grow().count["steps"] == 1  # nothing to wait for
    assert Live(Latr(group=2, windows=(4,), cap=2), full).grow().count["steps"] == 2
    lonely = Scripted(lambda _, prefix: {1: 1.0})
    assert Live(Latr(group=2, windows=(4,)), lonely).grow().count["steps"] == 20       # never full
    assert Live(Latr(group=2, windows=(4,), full=0.98, slack=1.0), lonely).grow().count["steps"] == 6  # round(2 (.98 - 5/20)) = 1
    assert Live(Latr(group=2, windows=(4,)), Scripted(lambda _, prefix: {0: 1.0})).grow().count["steps"] == 1  # all ended counts as full


def test_a_tree_of_one_place_is_a_sample():
    policy = Scripted(lambda _, prefix: {1: 0.5, 2: 0.5})
    made = Live(Latr(group=1), policy).grow()
    assert made.count["steps"] == 0 and len(set(texts(made)[0][0])) == 2


def test_branching_looks_at_untempered_probabilities_and_the_rest_is_sampled_at_the_training_temperature():
    def probs(_, prefix):
        return {1: 0.5, 2: 0.4, 4: 0.1} if not prefix else {5: 0.7, 6: 0.3}
    for temperature, ratio in ((0.5, 0.49 / (0.49 + 0.09)), (1.0, 0.7)):
        live = Live(Latr(group=2, temperature=temperature, cap=1), Scripted(probs), tokens=801, entropy=True)
        made = live.grow()
        assert made.count["forks"] == 1
        share = np.mean([np.mean(np.array(t[1:]) == 5) for t in texts(made)[0]])
        assert abs(share - ratio) < 4 * np.sqrt(ratio * (1 - ratio) / 1600)  # fails once in 16,000 by chance
        assert torch.allclose(made.forest.logps[0, 0].exp(), torch.tensor(0.5))  # tree tokens: untempered


# -------------------------------------------------------------------------------------------------- on a real model, through a run

def live(part: Latr, tmp_path, seed=0, task="countdown-text", model=TINY, step=0):
    run = Run(RunConfig(recipe=grpo(sampler=part), task=task, model=model, seed=seed), tmp_path)
    run.step = step
    return run.config.recipe.start(run)


def test_eta_zero_is_plain_sampling_bit_for_bit(tmp_path):
    chosen = live(Latr(), tmp_path).task.split("train")[:3]
    one = live(Latr(eta=0.0, max_tokens=8), tmp_path).sampler.sample(chosen)
    two = live(Plain(max_tokens=8), tmp_path).sampler.sample(chosen)
    assert [r.ids for r in one] == [r.ids for r in two] and all(torch.equal(a.logps, b.logps) for a, b in zip(one, two)) and all(r.exact for r in one)


@pytest.mark.parametrize("eta,width", [(1.0, 8), (0.5, 4), (0.1, 1)])
def test_the_count_is_always_the_group_and_eta_is_its_tree_share(tmp_path, eta, width):
    learner = live(Latr(eta=eta, absolute=0.0, relative=1.0, windows=(2, 3), max_tokens=9), tmp_path)
    made = learner.sampler.sample(learner.task.split("train")[:5])
    assert [r.group for r in made] == [g for g in range(5) for _ in range(8)]
    assert [r.meta["tree"] for r in made] == [float(i < width) for _ in range(5) for i in range(8)]
    assert [r.exact for r in made] == [i >= width for _ in range(5) for i in range(8)]


def test_eta_follows_its_schedule(tmp_path):
    part = Latr(eta="table", max_tokens=4).override("eta.steps=[0,10]", "eta.values=[1.0,0.5]")
    for step, width in ((9, 8), (10, 4)):
        learner = live(part, tmp_path, step=step)
        assert sum(r.meta["tree"] for r in learner.sampler.sample(learner.task.split("train")[:1])) == width


@pytest.mark.parametrize("seed", range(3))
def test_recorded_log_probs_are_those_of_the_finished_texts(tmp_path, seed):
    """The cache rows that branches were given are theirs: scoring the finished texts from scratch gives what was seen while growing."""
    part = Latr(group=6, eta=0.67, absolute=0.0, relative=1.0, windows=(2, 4, 6), prune={"edit": edit.replace(threshold=0.6), "random": "random"},
                max_tokens=14, random_branching=0.4)
    learner = live(part, tmp_path, seed)
    made = learner.sampler.sample(learner.task.split("train")[seed:seed + 5])
    batch = make_batch(learner.policy, made, 0)
    with torch.no_grad():
        fresh = learner.policy.score(batch, batch.mask).logps
    assert learner.sampler.seen["forks"] > 10 and learner.sampler.seen["pruned"] > 0
    assert torch.allclose(fresh, batch.behaviour.logps, atol=2e-5)


def test_children_share_their_parents_past(tmp_path):
    learner = live(Latr(group=6, absolute=0.0, relative=1.0, windows=(3,), max_tokens=10, prune={}), tmp_path)
    growth = Growth(learner.sampler, learner.task.split("train")[:4], 6)
    forest = growth.grow()
    children = [s for s in range(24) if forest.parent[s] >= 0]
    assert children
    for s in children:
        born, parent = int(forest.birth[s]), int(forest.parent[s])
        assert torch.equal(forest.ids[s, :born], forest.ids[parent, :born]) and forest.ids[s, born] != forest.ids[parent, born]


def test_no_token_is_computed_twice(tmp_path):
    """Token passes: what is returned, minus what branches share, minus last tokens, plus what pruned children grew before they went."""
    learner = live(Latr(group=6, absolute=0.0, relative=1.0, windows=(3,), max_tokens=10, prune={}), tmp_path)
    growth = Growth(learner.sampler, learner.task.split("train")[:4], 6)
    forest = growth.grow()
    own = sum(int(forest.length[s]) - int(forest.birth[s]) for s in range(24))
    assert forest.computed == own - 24  # the last token of a text is nobody's past


def test_adaptive_thresholds_move_by_a_hundredth_and_stop_after_ten(tmp_path):
    learner = live(Latr(group=4, adaptive=True, max_tokens=4), tmp_path)
    sampler = learner.sampler
    for _ in range(12):
        sampler.seen.update(places=10.0, empty=1.0)
        sampler.update(None)
    assert sampler.level == -10
    sampler.seen.update(places=10.0, suppressed=5.0)  # more than a tenth of 10 places x 4 tokens
    sampler.update(None)
    assert sampler.level == -9
    part, policy = Latr(group=2, windows=(50,)), Scripted(fork_at({0}, 0.5, 0.255))
    one = Live(part.replace(relative=0.5), policy)
    assert one.grow().count["forks"] == 1
    one.level = 1  # .255 is not above .26
    assert one.grow().count["forks"] == 0


def test_refusals():
    with pytest.raises(UserError, match="engine=vllm: a tree needs logits step by step; accepted: transformers"):
        configure("grpo", "tree", None, ["sampler=latr", "sampler.engine=vllm"])
    with pytest.raises(UserError, match="sampler.rank"):
        configure("grpo", "tree", None, ["sampler=latr", "sampler.rank=1"])


SMALL = dict(prompts=4, updates=Updates(optimiser=AdamW(lr=1e-3)))
TREES = Latr(group=4, eta=0.75, absolute=0.05, relative=0.9, windows=(2, 3), max_tokens=8, adaptive=True)


@pytest.mark.parametrize("recipe,task,model", [
    (grpo(**SMALL, sampler=TREES.replace(max_tokens=None)), "tree", None),
    (grpo(**SMALL, sampler=TREES), "countdown-text", TINY),
    (dapo(prompts=4, sampler=TREES, filter=None, updates=Updates(optimiser=AdamW(lr=1e-3), epochs=2, minibatch=2)), "countdown-text", TINY),
], ids=["tree", "causal", "causal-dapo"])
def test_training_resumes_bit_for_bit(tmp_path, recipe, task, model):
    if task == "countdown-text":
        recipe = recipe(reward=lambda prompt, response: float(len(set(response))))
    whole = volvelle.train(recipe, task, model, steps=4, folder=tmp_path / "whole", strict=True, evaluate_every=2)
    volvelle.train(recipe, task, model, steps=2, folder=tmp_path / "part", evaluate_every=2)
    volvelle.train(recipe, task, model, steps=4, resume=tmp_path / "part")
    same_run(tmp_path / "whole", tmp_path / "part")
    assert whole.learner.sampler.report()["forks"] >= 0 and "sampler/forks" in (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("method,words", [("gspo", []), ("rloo", []), ("ngrpo", ["filter=none"]), ("reinforce++", ["sampler.group=4"]), ("ppo", ["sampler.group=4"])])
def test_it_samples_for_every_update(tmp_path, method, words):
    made = volvelle.train(method, "tree", overrides=["sampler=latr", "prompts=4", *words], steps=2, folder=tmp_path / "run")
    assert made.result["steps"] == 2


# ---------------------------------------------------------------------------------------------------------- what it is good for

def test_groups_hold_more_outcomes_than_samples_and_pruning_is_what_brings_them(tmp_path):
    """200 fork worlds, one seed: the standard errors of the three means are .06, .10 and .15, so each gap below is beyond 2.5 of its own."""
    found = {}
    for name, part in {"sampling": Plain(), "unpruned": Latr(prune={}), "latr": Latr(windows=(8,))}.items():
        recipe = GroupRecipe(sampler=part, evaluation=Evaluation(prompts=200, samples=1, ks=(1,)))
        run = Run(RunConfig(recipe=recipe, task=Forks(worlds=200), model="forks"), tmp_path)
        found[name] = recipe.start(run).evaluate()
    assert found["latr"]["distinct"] > found["sampling"]["distinct"] + 0.2 > found["unpruned"]["distinct"] + 0.5
    assert found["latr"]["any_right"] > found["sampling"]["any_right"]


def test_the_most_diverse_are_those_farthest_apart():
    assert farthest([[1, 1, 1], [1, 1, 2], [5, 6, 7], [1, 2, 2], [5, 6, 8]], 3) == [0, 2, 3]
    assert farthest([[1], [1], [1]], 2) == [0, 1]


def test_over_generation_keeps_more_different_texts(tmp_path):
    chosen = live(Plain(), tmp_path).task.split("train")[:8]
    kept = diversity(live(MostDiverse(group=4, factor=4, max_tokens=3), tmp_path).sampler.sample(chosen))
    drawn = diversity(live(Plain(group=4, max_tokens=3), tmp_path).sampler.sample(chosen))
    assert kept["distinct"] >= drawn["distinct"] and len(live(MostDiverse(group=4, max_tokens=3), tmp_path).sampler.sample(chosen)) == 32


def test_the_fork_policy_scores_what_it_samples_and_knows_its_outcomes(tmp_path):
    recipe = grpo(sampler=Plain(group=400))
    learner = recipe.start(Run(RunConfig(recipe=recipe, task=Forks(worlds=4, length=12, synonyms=2), model="forks"), tmp_path))
    made = learner.sampler.sample(learner.task.split("train"))
    batch = make_batch(learner.policy, made, 0)
    found = learner.policy.score(batch, batch.mask, frozenset({"entropy"}))
    assert torch.allclose(found.logps, batch.behaviour.logps, atol=1e-5)
    exact = learner.policy.leaf_probabilities()
    assert torch.allclose(exact.sum(1), torch.ones(4))
    for w in range(4):
        counts = np.bincount([learner.task.outcome(r.text) for r in made if r.group == w], minlength=8)
        assert (abs(counts / 400 - exact[w].detach().numpy()) < 4.5 * np.sqrt(exact[w].detach().numpy() / 400)).all()  # 32 checks: once in 5,000
