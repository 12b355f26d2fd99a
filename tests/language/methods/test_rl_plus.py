"""RL-PLUS: demonstrations among the rollouts, the mixed ratio, the focal advantage; on the tree through the real loop."""

import math

import pytest
import torch

import volvelle
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.trainer import start
from volvelle.core.verbs import configure
from volvelle.language.advantages import group_normalised
from volvelle.language.batching import make_batch
from volvelle.language.methods.rl_plus import HybridAdvantage, HybridObjective, exploration, mis_ratio, own_statistics, rl_plus
from volvelle.language.objectives import aggregate, clipped
from volvelle.language.records import FORCED, PAD, POLICY, TOOL, Batch, Prompt, Scores

LOG = torch.tensor


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, torch.tensor(expected), atol=atol, rtol=0)


def batch_of(role, rewards=None, old=None, advantages=None, **meta) -> Batch:
    """Responses of one group with these roles per token; old: probabilities."""
    role = torch.tensor(role, dtype=torch.int8)
    n, t = role.shape
    old = torch.full((n, t), 0.5) if old is None else torch.tensor(old)
    return Batch(prompt_ids=torch.zeros(1, 1, dtype=torch.long), prompt_mask=torch.ones(1, 1, dtype=torch.bool), prompt_of=torch.zeros(n, dtype=torch.long),
                 ids=torch.zeros(n, t, dtype=torch.long), role=role, turn=torch.zeros(n, t, dtype=torch.int16),
                 rewards=torch.zeros(n) if rewards is None else torch.tensor(rewards), groups=torch.zeros(n, dtype=torch.long),
                 train=torch.ones(n, dtype=torch.bool), exact=torch.ones(n, dtype=torch.bool), finished=torch.ones(n, dtype=torch.bool),
                 behaviour=Scores(torch.zeros(n, t)), old=Scores(old.log()), advantages=None if advantages is None else torch.tensor(advantages),
                 meta={k: torch.tensor(v) for k, v in meta.items()})


def gradient(objective, batch, p) -> torch.Tensor:
    """d loss / d log p per token, at probabilities p."""
    logps = torch.tensor(p).log().requires_grad_()
    objective(Scores(logps), batch).sum().backward()
    return logps.grad


# --------------------------------------------------------------------------------------------------------------- worked numbers

@pytest.mark.parametrize("p, uniform, expected", [(0.5, 1.0, 0.8), (0.5, 0.01, 1.3245), (1.0, 1.0, 1.0), (0.1, 1.0, 0.3077), (0.01, 1.0, 0.0388),
                                                  (0.01, 0.001, 1.2903)])
def test_mis_ratio_where_nothing_has_moved(p, uniform, expected):
    close(mis_ratio(LOG([p]).log(), LOG([p]).log(), uniform), [expected], atol=5e-5)


def test_mis_ratio_weighs_both_policies():
    # p = .6, p_old = .2, U = .1: 1.2 / (.5*.2 + .5*.1 + .2); prior 1: p / p_old
    close(mis_ratio(LOG([0.6]).log(), LOG([0.2]).log(), 0.1), [1.2 / 0.35])
    close(mis_ratio(LOG([0.6]).log(), LOG([0.2]).log(), 0.1, prior=1.0), [3.0])


def test_mis_ratio_is_bounded():
    rng = torch.Generator().manual_seed(0)
    p, old = torch.rand(1000, generator=rng), torch.rand(1000, generator=rng)
    assert (mis_ratio(p.log(), old.log(), 0.01) <= 2 * p / (1.5 * old) + 1e-6).all()
    close(mis_ratio(LOG([0.3]).log(), LOG([-math.inf]), 0.01), [0.6 / 0.005], atol=1e-3)


def test_exploration_weight():
    close(exploration(LOG([0.75, 0.99, 0.36, 1.0]).log(), 0.5), [0.5, 0.1, 0.8, 0.0], atol=1e-4)
    close(exploration(LOG([0.75, 0.99, 0.36, 1.0]).log(), 0.0), [1.0, 1.0, 1.0, 1.0])


def test_gradient_of_external_tokens():
    batch = batch_of([[FORCED, FORCED]], advantages=[0.5])
    close(gradient(HybridObjective(uniform=1.0), batch, [[0.5, 0.5]]), [[-0.282843, -0.282843]])
    # away from p_old: -A r_m C, nothing from differentiating C
    close(gradient(HybridObjective(uniform=0.1), batch, [[0.5, 0.9]])[0, 1:], [-0.5 * (1.8 / 0.8) * math.sqrt(0.1)])
    close(gradient(HybridObjective(uniform=1.0, gamma=0.0), batch, [[0.5, 0.5]]), [[-0.4, -0.4]])


def test_gradient_of_own_tokens_is_never_clipped():
    for advantage in (1.0, -1.0):
        batch = batch_of([[POLICY, POLICY]], old=[[0.2, 0.8]], advantages=[advantage])
        close(gradient(HybridObjective(uniform=1.0), batch, [[0.6, 0.08]]), [[-3.0 * advantage, -0.1 * advantage]])


def test_mixed_rows_use_both_ratios():
    batch = batch_of([[FORCED, POLICY]], old=[[0.25, 0.25]], advantages=[1.0])
    close(gradient(HybridObjective(uniform=0.5), batch, [[0.75, 0.75]]), [[-(1.5 / 0.625) * 0.5, -3.0]])


def test_without_external_rows_it_is_unclipped_dr_grpo():
    rng = torch.Generator().manual_seed(1)
    p, old = torch.rand(6, 4, generator=rng) * 0.9 + 0.05, torch.rand(6, 4, generator=rng) * 0.9 + 0.05
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    batch = batch_of([[POLICY] * 4] * 6, rewards=rewards.tolist(), old=old.tolist())
    batch.advantages = HybridAdvantage()(batch)
    torch.testing.assert_close(batch.advantages, group_normalised(rewards, batch.groups, "none"))
    found = HybridObjective(uniform=1.0)(Scores(p.log()), batch)
    torch.testing.assert_close(found, clipped(p / old, batch.advantages[:, None], 1e9, 1e9))


def test_which_tokens_carry_loss():
    mask = batch_of([[FORCED, POLICY, TOOL, PAD]]).acted(HybridObjective.acts_on)
    assert mask.tolist() == [[True, True, False, False]]


def test_twice_the_responses_are_twice_the_loss():
    mask, loss = torch.ones(3, 4, dtype=torch.bool), torch.arange(12.0).reshape(3, 4)
    how = rl_plus.objective.aggregation
    once = (aggregate(mask, how, 8) * loss).sum()
    twice = (aggregate(torch.cat([mask, mask]), how, 8) * torch.cat([loss, loss])).sum()
    assert once == loss.sum() / 8 and twice == 2 * once


# -------------------------------------------------------------------------------------------------------------------- advantage

def test_demonstrations_are_members_of_the_group():
    batch = batch_of([[FORCED]] + [[POLICY]] * 7, rewards=[1.0] + [0.0] * 7, external=[1.0] + [0.0] * 7)
    close(HybridAdvantage()(batch), [0.875] + [-0.125] * 7)
    close(HybridAdvantage(statistics="own")(batch), [1.0] + [0.0] * 7)
    torch.testing.assert_close(HybridAdvantage(scale="group")(batch), group_normalised(batch.rewards, batch.groups))


def test_own_statistics_with_deviation():
    rewards, groups = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5, 0.2]), torch.tensor([0, 0, 0, 0, 1, 1])
    own = torch.tensor([False, True, True, True, True, False])
    deviation = math.sqrt(1 / 3)
    close(own_statistics(rewards, groups, own, "group", 0.0), [(2 / 3) / deviation] * 2 + [(-1 / 3) / deviation] * 2 + [0.5, 0.2])
    close(own_statistics(rewards, groups, own, "none", 0.0), [2 / 3, 2 / 3, -1 / 3, -1 / 3, 0.5, 0.2])
    close(own_statistics(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3), torch.tensor([False, True, True]), "group", 0.0), [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="own responses"):
        own_statistics(rewards, groups, torch.zeros(6, dtype=torch.bool), "none", 0.0)


def test_weights_of_external_and_own_tokens():
    batch = batch_of([[FORCED, POLICY], [POLICY, POLICY]], rewards=[1.0, 0.0], external=[1.0, 0.0])
    close(HybridAdvantage(external=3.0, own=0.5)(batch), [[1.5, 0.25], [-0.25, -0.25]])


def test_a_wrong_demonstration_is_pushed_down():
    batch = batch_of([[FORCED], [POLICY]], rewards=[0.0, 1.0], external=[1.0, 0.0])
    batch.advantages = HybridAdvantage()(batch)
    assert gradient(HybridObjective(uniform=0.1), batch, [[0.5], [0.5]])[0, 0] > 0


# -------------------------------------------------------------------------------------------------------- options of the objective

def test_other_ratios_and_bounds():
    batch = batch_of([[FORCED, FORCED]], old=[[0.25, 0.25]], advantages=[1.0], teacher_logps=[[math.log(0.5), math.log(0.2)]])
    p = [[0.5, 0.5]]
    plain = dict(uniform=1.0, gamma=0.0)
    close(gradient(HybridObjective(ratio="probability", **plain), batch, p), [[-0.5, -0.5]])
    close(gradient(HybridObjective(ratio="teacher", **plain), batch, p), [[-1.0, -2.5]], atol=1e-4)
    close(HybridObjective(ratio="teacher", clamp_low=1.5, clamp_high=2.0, **plain)(Scores(LOG(p).log()), batch), [[-1.5, -2.0]])
    batch = batch_of([[FORCED, POLICY, POLICY]], old=[[0.9, 0.9, 0.4]], advantages=[1.0])
    assert HybridObjective(drop_above=0.5, **plain)(Scores(LOG([[0.9, 0.9, 0.4]]).log()), batch)[0].tolist() == [0.0, 0.0, -1.0]


def test_the_teachers_ratio_needs_the_teachers_logps():
    batch = batch_of([[FORCED], [POLICY]], advantages=[1.0, 1.0], teacher_logps=[[math.nan], [0.0]])
    with pytest.raises(RunStopped, match="without its logps"):
        HybridObjective(ratio="teacher", uniform=1.0)(Scores(torch.zeros(2, 1)), batch)


# ---------------------------------------------------------------------------------------------------------------------- sampler

def learner_of(tmp_path, *overrides):
    return start(configure("rl-plus", "tree", overrides=["prompts=4", "task.prompts=6", "task.winners=5", *overrides]), tmp_path)[1]


def test_groups_hold_demonstrations(tmp_path):
    learner = learner_of(tmp_path, "sampler.external=2", "sampler.base.group=3")
    rows = learner.sample(learner.draw(4))
    learner.score(rows)
    assert learner.recipe.sampler.group == 5 and [r.group for r in rows] == [g for g in range(4) for _ in range(5)]
    for r in rows:
        external = r.meta.get("external") == 1
        assert r.role == [FORCED if external else POLICY] * 3 and r.prompt is rows[r.group * 5].prompt
        assert not external or (r.reward == 1 and r.logps.isnan().all())
    assert sum(r.meta.get("external", 0) for r in rows) == 8


def test_the_density_is_one_over_the_vocabulary_unless_given(tmp_path):
    assert learner_of(tmp_path).losses["objective"].uniform == 1 / 8
    assert learner_of(tmp_path, "objective.uniform=1").losses["objective"].uniform == 1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_old_logps_of_demonstrations_and_continuations(tmp_path, temperature):
    learner = learner_of(tmp_path, "sampler.prefix_low=0.4", "sampler.prefix_high=0.99", f"sampler.base.temperature={temperature}")
    batch = learner.batch(learner.sample(learner.draw(4)))
    mixed = batch.meta["external"] == 1
    cut = batch.role[mixed] == FORCED
    assert cut.sum(1).unique().tolist() == [1, 2] and mixed.sum() == 4  # int(3 share), so one or two tokens are forced
    learner.passes(batch)
    logits = learner.policy.module.table.detach() / temperature
    for i in range(len(batch)):
        state, index = 0, batch.rollouts[i].prompt.row["index"]
        for t, token in enumerate(batch.ids[i].tolist()):
            expected = logits[index, learner.policy.module.starts[t] + state].log_softmax(-1)[token]
            assert batch.old.logps[i, t] == pytest.approx(float(expected), abs=1e-5)
            if batch.role[i, t] == POLICY:  # also what was drawn from: the continuation saw its beginning
                assert batch.behaviour.logps[i, t] == pytest.approx(float(expected), abs=1e-5)
            state = state * 8 + token
    assert all(len(r.text.split()) == 3 for r in batch.rollouts)


def test_no_token_kept_is_a_row_of_its_own(tmp_path):
    learner = learner_of(tmp_path, "sampler.prefix_low=0", "sampler.prefix_high=0.2")
    rows = learner.sample(learner.draw(4))
    assert all(r.role == [POLICY] * 3 and r.meta.get("external", 0) == 0 for r in rows) and len(rows) == 32
    assert HybridAdvantage(statistics="own")(learner.batch(rows)).shape == (32,)


def test_demonstrations_from_the_prompt(tmp_path):
    learner = learner_of(tmp_path, "sampler.external=2", "sampler.base.group=2", "sampler.missing=sample")

    def prompt(index, *given):
        return Prompt(f"p{index}", "x", row={"index": index, "demonstrations": list(given)})

    prompts = [prompt(0, "1 2 3"), prompt(1), prompt(2, "7 7 7", {"text": "0 1 2", "logps": [-1.0, -2.0, -3.0]})]
    rows = learner.sample(prompts)
    assert [r.group for r in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert [r.text for r in rows[2:4]] == ["1 2 3"] * 2  # one demonstration shown twice
    assert all(r.role == [POLICY] * 3 and r.prompt is prompts[1] for r in rows[4:8])  # none: sampled instead
    assert sorted(r.text for r in rows[10:]) == ["0 1 2", "7 7 7"]
    teacher = make_batch(learner.policy, rows, 0).meta["teacher_logps"]
    known = next(i for i, r in enumerate(rows) if r.text == "0 1 2" and r.meta.get("external"))
    assert teacher.shape == (12, 3) and teacher[known].tolist() == [-1.0, -2.0, -3.0]
    assert teacher[2].isnan().all() and (teacher[0] == 0).all()


@pytest.mark.parametrize("given, message", [([], "has no demonstrations"), ("1 2 3", "is a str; expected a list"),
                                            ([7], "neither a text nor a mapping"), (["1 2 3 4"], "4 tokens|5 tokens, more than"),
                                            ([{"text": "1 2 3", "logps": [-1.0]}], "1 logps; expected 3")])
def test_unusable_demonstrations_stop_the_run(tmp_path, given, message):
    with pytest.raises(RunStopped, match=message):
        learner_of(tmp_path).sample([Prompt("p", "x", row={"index": 0, "demonstrations": given})])


@pytest.mark.parametrize("method, overrides, message", [
    ("grpo", ["sampler=rl-plus"], "no loss acts on demonstrations"),
    ("rl-plus", ["advantage=canon"], "sampler=rl-plus does not record"),
    ("rl-plus", ["sampler.prefix_low=0.9", "sampler.prefix_high=0.5"], "must not exceed prefix_high"),
    ("rl-plus", ["advantage=none"], "needs advantages")])
def test_refusals(method, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        configure(method, "tree", overrides=overrides).recipe.validate()
    assert "\n" not in str(caught.value)


def test_combinations_that_are_accepted():
    for overrides in (["advantage=grpo"], ["advantage=ngrpo"], ["advantage=canon", "advantage.metric=length", "sampler.base.group=7"],
                      ["objective=clipped", "terms.nll=nll", "advantage.statistics=own"], ["objective=certain-demonstrator"]):
        configure("rl-plus", "tree", overrides=overrides).recipe.validate()


# ------------------------------------------------------------------------------------------------------------- through the loop

SMALL = ["prompts=8", "updates.minibatch=4", "updates.optimiser.lr=0.05", "task.prompts=12", "task.winners=2"]


def table(trained):
    return trained.learner.product()["policy"].module.table.detach().clone()


@pytest.mark.parametrize("extra", [[], ["sampler.prefix_low=0.2", "sampler.missing=sample"], ["objective=clipped", "terms.nll=nll"]])
def test_resumes_bit_for_bit(tmp_path, extra):
    run = dict(task="tree", overrides=SMALL + extra, strict=True)
    whole = volvelle.train("rl-plus", steps=4, folder=tmp_path / "whole", **run)
    volvelle.train("rl-plus", steps=2, folder=tmp_path / "broken", **run)
    resumed = volvelle.train(resume=tmp_path / "broken", steps=4)
    assert torch.equal(table(whole), table(resumed))
    fresh, _ = start(configure("rl-plus", "tree", overrides=SMALL + extra), tmp_path / "fresh")
    assert not torch.equal(table(whole), fresh.policy.module.table)


def test_micro_batches_do_not_change_the_step(tmp_path):
    found = [table(volvelle.train("rl-plus", "tree", steps=1, folder=tmp_path / str(n), overrides=[*SMALL, "sampler.prefix_low=0.3", f"updates.micro_tokens={n}"]))
             for n in (8, 8192)]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


def test_learns_what_sampling_would_hardly_find(tmp_path):
    overrides = ["prompts=12", "updates.optimiser.lr=0.1", "task.prompts=12"]
    done = volvelle.train("rl-plus", "tree", steps=40, folder=tmp_path / "run", overrides=overrides)
    alone = volvelle.train("grpo", "tree", steps=40, folder=tmp_path / "alone", overrides=overrides)
    assert done.result["start"]["pass@1"] < 0.01 and done.result["metrics"]["pass@1"] > 0.9
    assert alone.result["metrics"]["pass@1"] < 0.5
