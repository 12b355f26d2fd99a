"""CANON: the halves, the two baselines, their mixture and its schedules; on the tree through the real loop."""

from itertools import combinations

import pytest
import torch

import volvelle
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.files import read_lines
from volvelle.core.schedule import at
from volvelle.core.trainer import start
from volvelle.core.verbs import configure
from volvelle.language.advantages import group_normalised, leave_one_out
from volvelle.language.batching import make_batch
from volvelle.language.methods.canon import Accuracy, Conditional, WarmCosine, canon, conditional, efficient, half_means, upper_half
from volvelle.language.methods.dr_grpo import dr_grpo
from volvelle.language.records import FORCED, POLICY, Batch, Rollout, Scores

ONE = torch.zeros(4, dtype=torch.long)
R = torch.tensor([1.0, 0.0, 1.0, 1.0])
RISING = torch.tensor([0.1, 0.2, 0.3, 0.4])


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def random_groups(seed, size=8, groups=5):
    """Rewards, shuffled group numbers and a metric without ties."""
    rng = torch.Generator().manual_seed(seed)
    index = (torch.arange(size * groups) % groups)[torch.randperm(size * groups, generator=rng)]
    return torch.randint(0, 2, index.shape, generator=rng).float(), index * 7 - 3, torch.randperm(len(index), generator=rng).float()


def batch_of(entropy, rewards=(1.0, 0.0, 1.0, 1.0), role=None, **more) -> Batch:
    """One group of responses with these entropies per token."""
    entropy = torch.tensor(entropy)
    n, t = entropy.shape
    role = torch.full((n, t), POLICY, dtype=torch.int8) if role is None else torch.tensor(role, dtype=torch.int8)
    fields = dict(prompt_ids=torch.zeros(1, 1, dtype=torch.long), prompt_mask=torch.ones(1, 1, dtype=torch.bool), prompt_of=torch.zeros(n, dtype=torch.long),
                  ids=torch.zeros(n, t, dtype=torch.long), role=role, turn=torch.zeros(n, t, dtype=torch.int16), rewards=torch.tensor(rewards),
                  groups=torch.zeros(n, dtype=torch.long), train=torch.ones(n, dtype=torch.bool), exact=torch.ones(n, dtype=torch.bool),
                  finished=torch.ones(n, dtype=torch.bool), behaviour=Scores(torch.zeros(n, t), entropy=entropy))
    return Batch(**fields | more)


def credit(part, batch):
    """The advantage of a part that needs no random numbers."""
    return part.start(None)(batch)


# --------------------------------------------------------------------------------------------------------------- worked numbers

@pytest.mark.parametrize("mu, expected", [(1.0, [0.0, -1.0, 0.5, 0.5]), (0.0, [0.5, -0.5, 0.0, 0.0]), (0.5, [0.25, -0.75, 0.25, 0.25])])
def test_inter_intra_and_their_mean(mu, expected):
    close(conditional(R, ONE, RISING, mu), expected)


def test_discounting_the_long_half():
    close(conditional(R, ONE, RISING, 1.0, alpha=0.9), [0.1, -0.9, 0.4, 0.4])


def test_discounting_the_low_half_is_the_codes_entropy_form():
    # high: r - alpha mean_low, low: alpha r - mean_high
    close(conditional(R, ONE, RISING, 1.0, alpha=0.9, discount="low"), [0.9 - 1.0, -1.0, 1 - 0.45, 1 - 0.45])


def test_alpha_and_beta_act_in_the_inter_part_only():
    close(conditional(R, ONE, RISING, 0.0, alpha=0.5, beta=3.0), [0.5, -0.5, 0.0, 0.0])
    close(conditional(R, ONE, RISING, 1.0, beta=0.25), [-0.25, -1.25, 0.75, 0.75])
    close(conditional(R, ONE, RISING, 0.5, beta=0.5), [0.0, -1.0, 0.5, 0.5])


def test_halves_ties_and_odd_groups():
    same = torch.zeros(5)
    assert upper_half(same, torch.zeros(5, dtype=torch.long)).tolist() == [False, False, True, True, True]
    assert upper_half(torch.tensor([5.0, 1.0, 2.0, 9.0, 1.0]), torch.tensor([3, 8, 3, 8, 8])).tolist() == [True, False, False, True, True]
    low, high = half_means(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.long), torch.tensor([False, True, True]))
    close(low, [1.0, 1.0, 1.0]), close(high, [2.5, 2.5, 2.5])


def test_a_group_of_one_keeps_its_reward():
    close(conditional(torch.tensor([0.7, 1.0, 0.0]), torch.tensor([4, 5, 5]), torch.tensor([1.0, 1.0, 2.0]), 0.3), [0.7, 0.3, -0.3])


# ------------------------------------------------------------------------------------------------------------------- properties

@pytest.mark.parametrize("seed", range(5))
def test_half_and_half_is_the_mean_baseline_for_any_metric_in_even_groups_only(seed):
    rewards, groups, metric = random_groups(seed)
    torch.testing.assert_close(conditional(rewards, groups, metric, 0.5), group_normalised(rewards, groups, "none"), atol=1e-6, rtol=0)
    rewards, groups, metric = random_groups(seed, size=7)
    assert (conditional(rewards, groups, metric, 0.5) - group_normalised(rewards, groups, "none")).abs().max() > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_sums_over_halves(seed):
    rewards, groups, metric = random_groups(seed)
    high = upper_half(metric, groups)
    inter, intra = conditional(rewards, groups, metric, 1.0), conditional(rewards, groups, metric, 0.0)
    for g in groups.unique():
        low_rows, high_rows = (groups == g) & ~high, (groups == g) & high
        assert low_rows.sum() == high_rows.sum() == 4
        assert metric[low_rows].max() < metric[high_rows].min()
        gap = rewards[high_rows].mean() - rewards[low_rows].mean()
        for rows, sign in ((low_rows, -1), (high_rows, 1)):
            assert intra[rows].sum().abs() < 1e-5
            assert (inter[rows].sum() - sign * 4 * gap).abs() < 1e-5
        assert inter[groups == g].sum().abs() < 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_only_the_order_counts_and_no_direction_is_assumed(seed):
    rewards, groups, metric = random_groups(seed)
    for mu in (0.0, 0.3, 1.0):
        found = conditional(rewards, groups, metric, mu)
        torch.testing.assert_close(conditional(rewards, groups, (metric / 9).exp(), mu), found)
        torch.testing.assert_close(conditional(rewards, groups, -metric, mu), found)
    assert not torch.allclose(conditional(rewards, groups, -metric, 1.0, alpha=0.8), conditional(rewards, groups, metric, 1.0, alpha=0.8))


def test_homogeneous_groups():
    same = torch.ones(4)
    for mu in (0.0, 0.3, 1.0):
        close(conditional(same, ONE, RISING, mu), [0.0] * 4)
    close(conditional(same, ONE, RISING, 1.0, alpha=0.9), [0.1, 0.1, -0.1, -0.1])
    close(conditional(0 * same, ONE, RISING, 1.0, alpha=0.9), [0.0] * 4)


def test_no_division_rewards_scale_advantages():
    rewards, groups, metric = random_groups(0)
    torch.testing.assert_close(conditional(5 * rewards, groups, metric, 0.8, 0.9), 5 * conditional(rewards, groups, metric, 0.8, 0.9))


def test_a_random_cut_is_leave_one_out_on_average():
    # over all 6 ways to choose the high half of 4: the other half never holds the response itself
    found = torch.stack([conditional(R, ONE, torch.tensor([float(i in high) for i in range(4)]), 1.0) for high in combinations(range(4), 2)])
    torch.testing.assert_close(found.mean(0), leave_one_out(R, ONE))


# ---------------------------------------------------------------------------------------------------------------------- metrics

def test_entropy_is_the_mean_over_own_tokens_at_sampling_time():
    entropy = [[0.1, 9.0], [0.2, 0.2], [0.4, 0.2], [0.4, 0.4]]
    role = [[POLICY, FORCED], [POLICY, POLICY], [POLICY, POLICY], [POLICY, POLICY]]
    later = Scores(torch.zeros(4, 2), entropy=torch.tensor([[4.0, 4.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]))
    batch = batch_of(entropy, role=role, old=later)
    batch.behaviour.entropy.requires_grad_()
    live = Conditional().start(None)
    close(live.metric(batch).detach(), [0.1, 0.2, 0.3, 0.4])
    batch.behaviour.entropy = batch.behaviour.entropy.detach()
    close(live(batch), [0.0, -1.0, 0.5, 0.5])


def test_length_and_named_metrics():
    role = [[POLICY] * 4, [POLICY] + [0] * 3, [POLICY] * 3 + [0], [POLICY] * 2 + [0] * 2]
    batch = batch_of([[0.0] * 4] * 4, role=role, meta={"cost": RISING, "per_token": torch.zeros(4, 4)})
    close(credit(Conditional(metric="length"), batch), [0.5, -1.0, 0.5, 0.0])
    close(credit(Conditional(metric="cost"), batch), [0.0, -1.0, 0.5, 0.5])
    with pytest.raises(RunStopped, match="per_token.*known per response: entropy, length, random, cost"):
        credit(Conditional(metric="per_token"), batch)


def test_metrics_that_are_missing_or_broken_stop_the_run():
    batch = batch_of([[0.1], [0.2], [0.3], [float("nan")]])
    with pytest.raises(RunStopped, match="not finite for 1 of 4"):
        credit(Conditional(), batch)
    batch.behaviour = Scores(torch.zeros(4, 1))
    with pytest.raises(RunStopped, match="recorded no entropy"):
        credit(Conditional(), batch)


# -------------------------------------------------------------------------------------------------------------------- schedules

def test_accuracy_schedules_add_to_one():
    first, second = Accuracy("inter"), Accuracy("intra")
    for rewards in ([1.0, 0.0, 1.0, 1.0], [0.0] * 4, [1.0] * 4):
        batch = batch_of([[0.1], [0.2], [0.3], [0.4]], rewards=rewards)
        assert first.of(batch) + second.of(batch) == 1
        assert second.of(batch) == sum(rewards) / 4
    batch = batch_of([[0.1], [0.2], [0.3], [0.4]])
    close(credit(Conditional(mu=first), batch), conditional(R, ONE, RISING, 0.25).tolist())
    with pytest.raises(RunStopped, match="mean reward is 1.5"):
        first.of(batch_of([[0.1]] * 4, rewards=[1.5] * 4))


def test_cosine_schedule():
    schedule = WarmCosine()
    for step, value in ((9, 1 / 3), (29, 1.0), (30, 1.0), (40, 0.9121), (60, 0.4879), (70, 1.0), (110, 1.0)):
        assert at(schedule, step) == pytest.approx(value, abs=5e-5)
    values = [at(schedule, s) for s in range(30, 150)]
    assert min(values) >= 0.4 and max(values) <= 1 and at(schedule, 69) == pytest.approx(0.4, abs=0.002)
    turned = WarmCosine(peak=0.6, floor=0.0, first="intra")
    assert at(turned, 30) == pytest.approx(0.4) and at(turned, 0) == pytest.approx(0.98) and 0.4 <= min(at(turned, s) for s in range(150))
    batch = batch_of([[0.1], [0.2], [0.3], [0.4]], step=60)
    close(credit(Conditional(mu=schedule), batch), conditional(R, ONE, RISING, at(schedule, 60)).tolist())
    with pytest.raises(UserError, match="leaves no step"):
        WarmCosine(total=32, cycles=3)
    with pytest.raises(UserError, match="must not exceed peak"):
        WarmCosine(floor=0.5, peak=0.4)


# ---------------------------------------------------------------------------------------------------------------------- recipes

@pytest.mark.parametrize("overrides, message", [
    (["advantage.mu=0.5", "sampler.group=15"], "even group"),
    (["sampler.group=1"], "at least 2"),
    (["advantage.mu=1.5"], "mu=.*less than or equal to 1"),
    (["advantage.discount=long"], "high | low")])
def test_refusals(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        configure("canon", "tree", overrides=overrides).recipe.validate()
    assert "\n" not in str(caught.value)


def test_what_is_accepted():
    for overrides in (["advantage.mu=0.4", "sampler.group=15"], ["advantage.mu=warm-cosine", "advantage.mu.total=60"], ["advantage=canon-eff"]):
        configure("canon", "tree", overrides=overrides).recipe.validate()
    assert canon.sampler.group == 16 and (efficient.metric, efficient.alpha) == ("length", 0.96)
    assert "entropy" not in canon(advantage=efficient).sampling_needs and "entropy" in canon.sampling_needs


def test_the_loss_is_divided_by_responses_and_the_length_cap(tmp_path):
    _, learner = start(configure("canon", "tree"), tmp_path)
    prompt = learner.task.split("train")[0]
    batch = make_batch(learner.policy, [Rollout(prompt, [1, 2], "1 2", torch.zeros(2)), Rollout(prompt, [3], "3", torch.zeros(1))], 0)
    weights = learner.weights(batch)["objective"]
    close(weights, [[1 / 6, 1 / 6], [1 / 6, 0.0]])


def test_sampling_delivers_the_entropy_of_the_policy(tmp_path):
    run, learner = start(configure("canon", "tree", overrides=["prompts=3"]), tmp_path)
    batch = learner.batch(learner.sample(learner.draw(3)))
    exact = learner.score_in_parts(learner.policy, batch, batch.mask, frozenset({"entropy"})).entropy
    torch.testing.assert_close(batch.behaviour.entropy, exact)
    with torch.no_grad():
        learner.policy.module.table.mul_(5)
    torch.testing.assert_close(learner.advantage.metric(batch), exact.mean(1))


# ------------------------------------------------------------------------------------------------------------- through the loop

SMALL = ["prompts=8", "updates.minibatch=4", "updates.optimiser.lr=0.05", "task.prompts=12", "task.winners=16"]


def table(trained):
    return trained.learner.product()["policy"].module.table.detach().clone()


@pytest.mark.parametrize("advantage", ["canon", "canon-dynamic", "canon-eff", "random"])
def test_resumes_bit_for_bit(tmp_path, advantage):
    chosen = ["advantage=canon", "advantage.metric=random"] if advantage == "random" else [f"advantage={advantage}"]
    run = dict(task="tree", overrides=SMALL + chosen, strict=True)
    whole = volvelle.train("canon", steps=4, folder=tmp_path / "whole", **run)
    volvelle.train("canon", steps=2, folder=tmp_path / "broken", **run)
    resumed = volvelle.train(resume=tmp_path / "broken", steps=4)
    assert torch.equal(table(whole), table(resumed))
    fresh, _ = start(configure("canon", "tree", overrides=SMALL + chosen), tmp_path / "fresh")
    assert not torch.equal(table(whole), fresh.policy.module.table)


def test_the_weight_that_held_is_logged(tmp_path):
    volvelle.train("canon", "tree", steps=2, folder=tmp_path / "run", overrides=[*SMALL, "advantage=canon-dynamic"])
    rows = [r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "reward" in r]
    assert len(rows) == 2 and all(r["advantage/mu"] == pytest.approx(1 - r["reward"]) for r in rows)


def test_mu_one_half_trains_like_dr_grpo_and_inter_does_not(tmp_path):
    same = canon.override("advantage.mu=0.5", *SMALL[:3])
    plain = same(advantage=dr_grpo.advantage)
    found = {name: table(volvelle.train(recipe, "tree", steps=2, folder=tmp_path / name, overrides=SMALL[3:]))
             for name, recipe in {"half": same, "plain": plain, "inter": same.override("advantage.mu=1")}.items()}
    torch.testing.assert_close(found["half"], found["plain"], atol=1e-4, rtol=0)
    assert (found["inter"] - found["plain"]).abs().max() > 0.01


def test_learns_the_tree(tmp_path):
    overrides = ["prompts=12", "updates.optimiser.lr=0.1", "task.prompts=12", "task.winners=16"]
    done = volvelle.train("canon", "tree", steps=40, folder=tmp_path / "run", overrides=overrides)
    assert done.result["metrics"]["pass@1"] > 2 * done.result["start"]["pass@1"]
