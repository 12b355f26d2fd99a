"""NGRPO: every number of the paper and its code that can be worked by hand."""

import pytest
import torch
from batches import batch, scores
from hypothesis import given
from hypothesis import strategies as st

from volvelle.core.trainer import start
from volvelle.core.verbs import configure
from volvelle.language.advantages import group_normalised
from volvelle.language.methods.ngrpo import asymmetric, calibrated, drop_all_correct, ngrpo, nsr, psr, w_reinforce
from volvelle.language.records import Scores


def advantages(rewards, max_reward=1.0, virtual=1, ddof=1, epsilon=1e-6):
    r = torch.tensor(rewards)
    return calibrated(r, torch.zeros(len(r), dtype=torch.long), max_reward, virtual, ddof, epsilon)


def test_an_all_wrong_group():
    assert advantages([0.0] * 4, ddof=0).tolist() == pytest.approx([-0.5] * 4, abs=1e-4)
    assert advantages([0.0] * 4).tolist() == pytest.approx([-0.4472] * 4, abs=1e-4)


def test_one_correct_of_eight():
    one = [1.0] + [0.0] * 7
    assert advantages(one).tolist() == pytest.approx([1.764] + [-0.504] * 7, abs=1e-3)
    assert advantages(one, ddof=0).tolist() == pytest.approx([1.871] + [-0.535] * 7, abs=1e-3)
    assert advantages(one, virtual=0).tolist() == pytest.approx([2.475] + [-0.354] * 7, abs=1e-3)  # plain GRPO


def test_half_correct():
    assert advantages([1.0, 1.0, 0.0, 0.0]).tolist() == pytest.approx([0.7303, 0.7303, -1.0954, -1.0954], abs=1e-4)


@pytest.mark.parametrize("level", [1.0, 0.1, 0.9, 3.0])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_all_at_the_maximum_get_exactly_nothing(level, size):
    for ddof in (0, 1):
        assert advantages([level] * size, max_reward=level, ddof=ddof).eq(0).all()


groups_strategy = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.2, 0.5, 1.0])), min_size=1, max_size=12)


@given(groups_strategy, st.integers(1, 3), st.integers(0, 1))
def test_group_sums_are_minus_the_virtual_samples(rows, virtual, ddof):
    """The virtual responses would have the advantages that are missing from the sum: it is never positive, and 0 only where all are at the maximum."""
    rewards, groups = torch.tensor([r for _, r in rows], dtype=torch.float64), torch.tensor([g for g, _ in rows])
    found = calibrated(rewards, groups, 1.0, virtual, ddof, 0.0).nan_to_num(0.0)
    for g in groups.unique():
        mine = rewards[groups == g]
        whole = torch.cat([mine, torch.ones(virtual, dtype=torch.float64)])
        spread = whole.std(correction=ddof)
        missing = virtual * (1 - whole.mean()) / spread if spread > 0 else torch.zeros(())
        assert found[groups == g].sum().item() == pytest.approx(-missing.item(), abs=1e-9)
        assert (found[groups == g].sum() > -1e-9) == bool((mine == 1).all())


@given(groups_strategy, st.integers(0, 1))
def test_without_virtual_samples_it_is_grpo_bit_for_bit(rows, ddof):
    rewards, groups = torch.tensor([r for _, r in rows]), torch.tensor([g for g, _ in rows])
    several = torch.tensor([int((groups == g).sum()) > 1 for g in groups])  # a group of one has statistics of its own in GRPO
    assert calibrated(rewards, groups, 1.0, 0, ddof, 1e-6)[several].equal(group_normalised(rewards, groups, "group", ddof, 1e-6)[several])


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_the_push_shrinks_with_the_group(size):
    assert advantages([0.0] * size)[0].item() == pytest.approx(-((size + 1) ** -0.5), abs=1e-4)
    assert advantages([0.0] * size, ddof=0)[0].item() == pytest.approx(-(size**-0.5), abs=1e-4)


@pytest.mark.parametrize("ratio, advantage, zero", [(0.83, -1.0, True), (0.85, -1.0, False), (1.3, -1.0, False), (9.0, -1.0, False), (1.25, 1.0, True),
                                                    (1.23, 1.0, False), (0.5, 1.0, False)])
def test_asymmetric_clipping(ratio, advantage, zero):
    b = batch([1], advantages=torch.tensor([advantage]), old=Scores(torch.zeros(1, 1)))
    s = scores([[torch.tensor(ratio).log().item()]])
    asymmetric(s, b).sum().backward()
    assert s.logps.grad.item() == pytest.approx(0.0 if zero else -advantage * ratio, rel=1e-5)


def test_the_maximum_enters_the_statistics_only():
    assert (advantages([1.0] * 4, max_reward=2.0) < 0).all()
    clipping = ngrpo.override("advantage.max_reward=2").objective
    assert clipping == asymmetric


def test_all_wrong_groups_are_learnt_from_and_all_correct_ones_are_gone(tmp_path):
    """Through the real loop: with a reward that is 0 everywhere the policy moves; GRPO's does not. With 1 everywhere nothing is left."""
    options = dict(task="tree", overrides=["task.prompts=4", "prompts=4", "filter=none", "reward=language_rewards_of_this_test:nothing"])
    import sys
    import types

    module = types.ModuleType("language_rewards_of_this_test")
    module.nothing, module.everything = (lambda prompt, response, **row: 0.0), (lambda prompt, response, **row: 1.0)
    sys.modules[module.__name__] = module
    try:
        for method, moves in (("ngrpo", True), ("grpo", False)):
            _, learner = start(configure(method, **options), tmp_path)
            before = learner.policy.module.table.clone()
            learner.step()
            assert learner.policy.module.table.equal(before) != moves
        _, learner = start(configure("ngrpo", "tree", overrides=["task.prompts=4", "prompts=4", "filter.refill=off",
                                                                 "reward=language_rewards_of_this_test:everything"]), tmp_path)
        rollouts, metrics = learner.collect()
        assert rollouts == [] and metrics["groups"] == 0 and learner.step()["reward"] == 1.0
    finally:
        del sys.modules[module.__name__]


def test_all_wrong_groups_stay_and_all_correct_ones_go():
    b = batch([1] * 6, [1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0, 0, 1, 1, 2, 2])
    assert drop_all_correct(b)[0].tolist() == [False, False, True, True, True, True]


def test_baselines_of_the_papers_code():
    b = batch([1] * 3, [1.0, 0.0, 1.0])
    assert psr(b).tolist() == [1.0, 0.0, 1.0] and nsr(b).tolist() == [0.0, -1.0, 0.0]
    assert w_reinforce(b).tolist() == pytest.approx([0.1, -1.0, 0.1])


def test_the_recipe_is_the_papers():
    assert (ngrpo.objective.clip_low, ngrpo.objective.clip_high, ngrpo.objective.dual_clip) == (0.16, 0.24, None)
    assert ngrpo.filter.which == "correct" and ngrpo.filter.refill and ngrpo.kl is None and ngrpo.terms == {}
    assert (ngrpo.advantage.max_reward, ngrpo.advantage.virtual, ngrpo.advantage.ddof) == (1.0, 1, 1)
