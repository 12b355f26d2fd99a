"""ROVER against hand-worked numbers, its theorem on random trees, and runs through the loop."""

import math

import numpy as np
import pytest
import torch

import volvelle
from volvelle.core.errors import UserError
from volvelle.core.state import fingerprint, load_state
from volvelle.core.trainable import SGD, Adam
from volvelle.core.trainer import checkpoints
from volvelle.language.advantages import GroupNormalised
from volvelle.language.fittings import Updates
from volvelle.language.methods.grpo import grpo
from volvelle.language.methods.rover import (
    RelativeQ,
    UniformValue,
    leaf_probabilities,
    q_learning,
    rover,
    softmax_policy,
    success_bound,
    uniform_values,
)
from volvelle.language.objectives import NLL, PolicyGradient, aggregate
from volvelle.language.policies import statistics
from volvelle.language.records import PAD, POLICY, TOOL, Batch, Scores
from volvelle.language.samplers import Plain
from volvelle.language.tasks.tree import Tree

SMALL = Tree(prompts=6, vocabulary=4, depth=3, winners=8)


def batch_of(roles, advantages, old, old_mean=None, rewards=None):
    """A batch of responses whose old scores are given; roles [N, T]."""
    role = torch.tensor(roles, dtype=torch.int8)
    n = len(role)
    return Batch(prompt_ids=torch.zeros(1, 1, dtype=torch.long), prompt_mask=torch.ones(1, 1, dtype=torch.bool), prompt_of=torch.zeros(n, dtype=torch.long),
                 ids=torch.zeros(role.shape, dtype=torch.long), role=role, turn=torch.zeros(role.shape, dtype=torch.int16),
                 rewards=torch.zeros(n) if rewards is None else torch.tensor(rewards), groups=torch.zeros(n, dtype=torch.long),
                 train=torch.ones(n, dtype=torch.bool), exact=torch.ones(n, dtype=torch.bool), finished=torch.ones(n, dtype=torch.bool),
                 behaviour=Scores(old), old=Scores(old, mean_logp=old_mean), advantages=torch.as_tensor(advantages))


def total(objective, scores, batch):
    """The loss as the loop aggregates it."""
    matrix = objective(scores, batch)
    return matrix.mean() if matrix.ndim == 1 else (aggregate(batch.acted((POLICY,)), objective.aggregation) * matrix).sum()


def two_tokens(logits, beta=1.0, **options):
    """Responses of two first tokens of a vocabulary of two, old policy uniform; logits [2, 2] of the policy now."""
    old = torch.full((1, 2), math.log(0.5))
    now = statistics(logits, torch.zeros(2, dtype=torch.long), frozenset({"mean_logp"}))
    batch = batch_of([[POLICY, POLICY]], [0.5], old, old.clone())
    return RelativeQ(beta=beta, **options), Scores(now[0][None], mean_logp=now[1][None]), batch


# ------------------------------------------------------------------------------------------------------------ the language form

def test_at_the_old_policy_the_loss_is_the_mean_squared_centred_reward():
    batch = batch_of([[POLICY] * 3] * 4, [0.0] * 4, torch.full((4, 3), -1.0), torch.full((4, 3), -2.0), [1.0, 0.0, 0.0, 0.0])
    batch.advantages = GroupNormalised(scale="none")(batch)
    assert batch.advantages.tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    logps = torch.full((4, 3), -1.0, requires_grad=True)
    loss = total(RelativeQ(), Scores(logps, mean_logp=torch.full((4, 3), -2.0)), batch)
    assert loss.item() == pytest.approx(0.1875)
    loss.backward()
    torch.testing.assert_close(logps.grad, (-2 * batch.advantages / 12)[:, None].expand(4, 3))


@pytest.mark.parametrize("rho", [0.5, 3.0])
def test_the_first_gradient_scales_with_rho(rho):
    batch = batch_of([[POLICY, POLICY], [POLICY, PAD]], [0.5, -0.5], torch.zeros(2, 2), torch.zeros(2, 2))
    logps = torch.zeros(2, 2, requires_grad=True)
    total(RelativeQ(rho=rho), Scores(logps, mean_logp=torch.zeros(2, 2)), batch).backward()
    torch.testing.assert_close(logps.grad, -2 * rho * torch.tensor([[0.5, 0.5], [-0.5, 0.0]]) / 3)


def test_rewards_are_centred_and_not_divided():
    centred = rover.advantage
    batch = batch_of([[POLICY]] * 5, [0.0] * 5, torch.zeros(5, 1), rewards=[1.0, 0.0, 0.0, 1.0, 0.0])
    assert centred(batch).tolist() == pytest.approx([0.6, -0.4, -0.4, 0.6, -0.4])
    batch.rewards = batch.rewards * 10
    assert centred(batch).tolist() == pytest.approx([6, -4, -4, 6, -4])


def test_two_tokens_worked_by_hand():
    objective, scores, batch = two_tokens(torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]]))
    q = scores.logps - batch.old.logps
    assert q[0].tolist() == pytest.approx([0.405465, 0.405465], abs=1e-6)
    matrix = objective(scores, batch)
    assert matrix[0].tolist() == pytest.approx([(0.405465 - 0.356159) ** 2, (0.405465 - 0.5) ** 2], abs=1e-6)
    assert total(objective, scores, batch).item() == pytest.approx(0.005684, abs=1e-6)


def test_the_next_state_counts_the_whole_vocabulary():
    """pi_old uniform over two tokens, next logits (0, ln 3): mean next Q is -0.1438, whatever token was drawn there."""
    objective, scores, batch = two_tokens(torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]]))
    matrix = objective(scores, batch)[0]
    assert matrix[0].item() == pytest.approx((0 - (0.5 - 0.143841)) ** 2, abs=1e-6)
    assert matrix[1].item() == pytest.approx((math.log(0.25) - math.log(0.5) - 0.5) ** 2, abs=1e-6)  # after the last token: the reward alone


def test_the_mean_next_q_is_never_positive_where_the_old_policy_was_uniform():
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    mean = statistics(logits, torch.zeros(200, dtype=torch.long), frozenset({"mean_logp"}))[1]
    assert (mean + math.log(7) < 0).all()


def test_rho_and_beta_scale_the_next_state():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    for rho, beta in [(2.0, 1.0), (1.0, 0.2), (3.0, 0.5)]:
        objective, scores, batch = two_tokens(logits, beta, rho=rho)
        assert objective(scores, batch)[0, 0].item() == pytest.approx((0.5 - beta * rho * 0.143841) ** 2, abs=1e-6)


def test_padding_and_tool_tokens_contribute_nothing():
    roles = [[POLICY, TOOL, POLICY, PAD]]
    old, mean = torch.tensor([[-1.0, torch.nan, -2.0, torch.nan]]), torch.tensor([[-3.0, torch.nan, -4.0, torch.nan]])
    batch = batch_of(roles, [0.5], old, mean)
    logps = torch.tensor([[-1.5, torch.nan, -1.0, torch.nan]], requires_grad=True)
    matrix = RelativeQ()(Scores(logps, mean_logp=mean - 0.1), batch)
    kept = matrix[batch.acted((POLICY,))]
    assert kept.tolist() == pytest.approx([(-0.5 - 0.5) ** 2, (1.0 - 0.5) ** 2])  # before a tool token there is no next state of the policy
    kept.sum().backward()
    assert logps.grad[0, [1, 3]].tolist() == [0, 0]
    response = RelativeQ(level="response")(Scores(logps.detach()), batch)
    assert response.tolist() == pytest.approx([(0.25 - 0.5) ** 2])


def test_no_gradient_flows_through_the_target():
    """Moving only what was not drawn at t+1 changes the target's value; the gradient at t+1 stays that of the drawn token alone."""
    logits = torch.zeros(2, 3, requires_grad=True)
    old = torch.full((1, 2), math.log(1 / 3))

    def loss(table):
        logp, mean = statistics(table, torch.zeros(2, dtype=torch.long), frozenset({"mean_logp"}))
        batch = batch_of([[POLICY, POLICY]], [0.5], old, old.clone())
        return RelativeQ()(Scores(logp[None], mean_logp=mean[None]), batch)

    moved = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, -1.0]], requires_grad=True)
    first = loss(moved)[0, 0]
    assert first.item() != pytest.approx(loss(logits)[0, 0].item())
    first.backward()
    assert moved.grad[1].abs().max() == 0
    assert moved.grad[0].abs().max() > 0


def test_clip_stops_the_gradient_of_what_has_gone_far_enough():
    old = torch.zeros(1, 4)
    batch = batch_of([[POLICY] * 4], torch.tensor([[1.0, 0.1, -1.0, -0.1]]), old)
    logps = torch.tensor([[0.3, 0.3, -0.3, -0.3]], requires_grad=True)
    matrix = RelativeQ(beta=0.0, clip=0.2)(Scores(logps), batch)
    high, low = math.log(1.2), math.log(0.8)
    assert matrix[0].tolist() == pytest.approx([(high - 1.0) ** 2, 0.04, (low + 1.0) ** 2, 0.04], abs=1e-6)
    matrix.sum().backward()
    assert logps.grad[0].tolist() == pytest.approx([0, 0.4, 0, -0.4], abs=1e-6)


def test_response_level_averages_q_before_the_square():
    batch = batch_of([[POLICY, POLICY], [POLICY, PAD]], [0.5, -0.5], torch.zeros(2, 2))
    matrix = RelativeQ(level="response")(Scores(torch.tensor([[0.4, 0.2], [-0.1, 9.0]])), batch)
    assert matrix.tolist() == pytest.approx([(0.3 - 0.5) ** 2, (-0.1 + 0.5) ** 2])


def test_only_what_is_used_is_asked_for():
    assert RelativeQ().needs == {"old", "advantages", "mean_logp"}
    assert RelativeQ().old_needs == {"mean_logp"}
    assert RelativeQ(beta=0.0).needs == RelativeQ(level="response").needs == {"old", "advantages"}
    assert RelativeQ(level="response", clip=0.2).old_needs == {"mean_logp"}


# --------------------------------------------------------------------------------------------------------------- the exact form

LETTERS = {"ACD": 0b00_10_11, "BDC": 0b01_11_10, "CAB": 0b10_00_01, "DBA": 0b11_01_00}  # two bits a letter


def toy():
    leaves = torch.zeros(64)
    leaves[list(LETTERS.values())] = 1.0
    return leaves


def test_values_of_the_four_letter_tree():
    root, second, third = uniform_values(toy(), 4)
    assert root.tolist() == [[1 / 16] * 4]
    assert second[0].tolist() == [0, 0, 1 / 4, 0]
    assert third[2].tolist() == [0, 0, 0, 1]
    assert (third.sum(), second.sum()) == (4, 1)


def test_success_on_the_four_letter_tree():
    levels, wins = uniform_values(toy(), 4), list(LETTERS.values())
    assert leaf_probabilities(softmax_policy(levels, 0.0))[wins].sum() == 1
    for rho, expected in [(1.0, 0.1425), (0.1, 0.8023), (0.05, 0.9802)]:
        won = leaf_probabilities(softmax_policy(levels, rho))[wins]
        assert float(won.sum()) == pytest.approx(expected, abs=5e-5)
        assert won.tolist() == pytest.approx([float(won[0])] * 4)
    assert float(won[0]) == pytest.approx(0.245, abs=1e-3)


def test_q_learning_solves_the_tree_in_one_way():
    """The max operator sees no difference between actions that can succeed at all; greedy, it then always takes the same one."""
    for seed in range(20):
        levels = q_learning(toy().numpy(), 4, 1500, np.random.default_rng(seed), epsilon=0.3)
        reached = leaf_probabilities(softmax_policy(levels, 0.0))
        assert float(reached[list(LETTERS.values())].sum()) == 1
        assert int((reached > 0).sum()) == 1


def random_trees():
    rng = np.random.default_rng(0)
    for _ in range(180):
        vocabulary, depth = int(rng.integers(2, 5)), int(rng.integers(1, 5))
        leaves = np.zeros(vocabulary**depth)
        leaves[rng.choice(len(leaves), int(rng.integers(1, len(leaves) + 1)), replace=False)] = float(rng.choice([1.0, 3.0]))
        yield torch.from_numpy(leaves), vocabulary


def test_greedy_on_the_random_policys_values_is_optimal_and_values_are_success_probabilities():
    for leaves, vocabulary in random_trees():
        levels = uniform_values(leaves, vocabulary)
        assert float(leaf_probabilities(softmax_policy(levels, 0.0)) @ leaves) == float(leaves.max())
        uniform = [torch.full_like(q, 1 / vocabulary) for q in levels]
        assert float(levels[0].mean()) == pytest.approx(float(leaf_probabilities(uniform) @ leaves))
        for level, q in enumerate(levels):
            below = leaves.reshape(vocabulary ** (level + 1), -1).sum(1).reshape(q.shape)
            assert torch.equal(q > 0, below > 0)


def test_the_bound_holds_and_closes():
    gaps = []
    for leaves, vocabulary in random_trees():
        levels, best = uniform_values(leaves, vocabulary), float(leaves.max())
        for rho in (2.0, 0.5, 0.1, 1e-4):
            bound = float(success_bound(levels, rho, best))
            value = float(leaf_probabilities(softmax_policy(levels, rho)) @ leaves)
            assert bound <= value + 1e-9
            if rho == 1e-4:
                gaps.append(best - bound)
    assert max(gaps) < 1e-6


# ------------------------------------------------------------------------------------------------------------- the exact sampler

def exact(task, prompt, rho):
    leaves = torch.zeros(task.leaves)
    leaves[task.winning[prompt]] = 1.0
    return leaf_probabilities(softmax_policy(uniform_values(leaves, task.vocabulary), rho))


def sampled(task, sampler, folder):
    """A run that learns nothing, for its live sampler."""
    recipe = grpo(sampler=sampler, advantage=None, objective=NLL(on="policy"), prompts=2)
    return volvelle.train(recipe, task=task, model="tabular", steps=0, folder=folder).learner


def test_the_sampler_draws_from_the_softmax_over_exact_values(tmp_path):
    """Chi-square against exact probabilities, 2 x 2000 draws: two tests at p < 1e-6, so two false alarms in a million seeds."""
    from scipy.stats import chisquare

    task = Tree(prompts=2, vocabulary=3, depth=3, winners=4)
    learner = sampled(task, UniformValue(group=2000, rho=0.3), tmp_path / "run")
    rollouts = learner.sample(task.split("train"))
    assert [r.group for r in rollouts] == [0] * 2000 + [1] * 2000
    assert not any(r.exact for r in rollouts)
    for i in range(2):
        expected = exact(task, i, 0.3)
        mine = rollouts[2000 * i:2000 * (i + 1)]
        counts = np.bincount([task.leaf(r.text) for r in mine], minlength=27)
        assert chisquare(counts, 2000 * expected.numpy()).pvalue > 1e-6
        for r in mine[:20]:
            assert math.exp(float(r.logps.sum())) == pytest.approx(float(expected[task.leaf(r.text)]), rel=1e-4)


def test_the_greedy_sampler_always_wins(tmp_path):
    task = Tree(prompts=2, vocabulary=3, depth=3, winners=1)
    rollouts = sampled(task, UniformValue(group=5, rho=0.0), tmp_path / "run").sample(task.split("train"))
    assert all(task.score(r.prompt, r.text) == 1 for r in rollouts)
    assert all(float(r.logps.sum()) == 0 for r in rollouts)


def test_a_policy_learns_to_draw_like_the_sampler(tmp_path):
    task = Tree(prompts=2, vocabulary=3, depth=3, winners=4)
    recipe = grpo(sampler=UniformValue(group=128, rho=0.05), advantage=None, objective=NLL(on="policy"), prompts=2,
                  updates=Updates(optimiser=Adam(lr=0.2), epochs=2))
    learner = volvelle.train(recipe, task=task, model="tabular", steps=40, folder=tmp_path / "run").learner
    for i in range(2):
        distance = (learner.policy.leaf_probabilities()[i].double() - exact(task, i, 0.05)).abs().sum() / 2
        assert distance < 0.1


def test_the_sampler_refuses_what_it_cannot_enumerate(tmp_path):
    with pytest.raises(UserError, match="accepted: at most sampler.leaves=100"):
        sampled(Tree(prompts=2, vocabulary=5, depth=3), UniformValue(leaves=100), tmp_path / "run")
    recipe = grpo(sampler="rover", advantage=None, objective=NLL(on="policy"))
    with pytest.raises(UserError, match="only a tabular policy"):
        volvelle.train(recipe, task="sort-digits", model="tiny", overrides=["model.warmup=0"], steps=1, folder=tmp_path / "text")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- through the loop

FAST = rover.override("updates.optimiser.lr=0.05")


def train(folder, recipe=FAST, steps=4):
    return volvelle.train(recipe, task=SMALL, model="tabular", steps=steps, folder=folder)


def test_training_resumes_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "cut", steps=2)
    volvelle.train(resume=tmp_path / "cut", steps=4)
    one, other = (load_state(checkpoints(tmp_path / name)[-1]) for name in ("whole", "cut"))
    assert fingerprint(one) == fingerprint(other)
    start = train(tmp_path / "start", steps=0).learner.policy
    assert not torch.equal(start.module.table, whole.learner.policy.module.table)


def test_it_trains_without_reference_or_critic_and_learns(tmp_path):
    done = train(tmp_path / "run", rover(updates=Updates(optimiser=Adam(lr=0.1), epochs=4)), steps=20)
    assert list(done.learner.run.models) == ["policy"]
    assert done.learner.run._reference is None
    assert done.result["metrics"]["pass@1"] > done.result["start"]["pass@1"] + 0.3


def test_reward_only_with_one_update_is_reinforce_with_a_mean_baseline(tmp_path):
    tables = []
    for name, objective, rate in [("rover", RelativeQ(rho=0.5, beta=0.0), 3.0), ("reinforce", PolicyGradient(), 3.0 * 2 * 0.5)]:
        recipe = grpo(advantage=GroupNormalised(scale="none"), objective=objective, updates=Updates(optimiser=SGD(lr=rate)), sampler=Plain(group=16))
        tables.append(train(tmp_path / name, recipe, steps=3).learner.policy.module.table)
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-5, atol=1e-6)


def test_the_next_state_acts_from_the_second_update_on(tmp_path):
    """One update per batch: beta makes no difference. Several: it does."""
    def table(beta, epochs):
        recipe = grpo(advantage=rover.advantage, objective=RelativeQ(beta=beta), updates=Updates(optimiser=SGD(lr=5.0), epochs=epochs))
        return train(tmp_path / f"{beta}-{epochs}", recipe, steps=2).learner.policy.module.table

    torch.testing.assert_close(table(0.0, 1), table(1.0, 1), rtol=1e-5, atol=1e-6)
    assert (table(0.0, 4) - table(1.0, 4)).abs().max() > 1e-3


def test_micro_batches_do_not_change_the_gradient(tmp_path):
    one = train(tmp_path / "one", FAST.override("updates.micro_tokens=1"), steps=2).learner.policy.module.table
    all_ = train(tmp_path / "all", steps=2).learner.policy.module.table
    torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-5)


def test_it_combines_with_other_parts(tmp_path):
    for i, changes in enumerate([{"advantage": "rloo"}, {"advantage": "ngrpo"}, {"kl": "kl"}, {"filter": "dapo"}, {"terms": {"bonus": "entropy"}}]):
        done = train(tmp_path / str(i), rover(**changes), steps=1)
        assert done.result["steps"] == 1
    with pytest.raises(UserError, match="needs advantages"):
        train(tmp_path / "none", rover(advantage=None))


def test_it_trains_a_transformer(tmp_path):
    done = volvelle.train(rover(prompts=2), task="sort-digits", model="tiny", steps=1, folder=tmp_path / "run",
                          overrides=["model.warmup=0", "model.layers=1", "model.width=32", "evaluation.prompts=2", "sampler.max_tokens=6"])
    assert done.learner.policy.vocabulary > 40
