"""PACS against hand-worked numbers, its group coupling, and runs through the loop with hard resets."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import volvelle
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.files import read_lines
from volvelle.core.state import fingerprint, load_state
from volvelle.core.trainable import Adam
from volvelle.core.trainer import checkpoints
from volvelle.language.fittings import Updates
from volvelle.language.methods.pacs import Residual, class_weights, pacs, relative
from volvelle.language.models import LoRA, Pretrained, Tiny
from volvelle.language.records import FORCED, PAD, POLICY, Batch, Scores
from volvelle.language.rewards import Format
from volvelle.language.tasks.text import SortDigits
from volvelle.language.tasks.tree import Tree

SMALL = Tree(prompts=6, vocabulary=4, depth=3, winners=16)
FAST = pacs.override("updates.optimiser.lr=0.05")


def batch_of(labels, old=None, roles=None, groups=None, train=None, reference=None):
    """A batch with labels [N]; one token each unless roles [N, T] say otherwise; old log-probs 0 unless given."""
    n = len(labels)
    role = torch.full((n, 1), POLICY, dtype=torch.int8) if roles is None else torch.tensor(roles, dtype=torch.int8)
    groups = torch.zeros(n, dtype=torch.long) if groups is None else torch.tensor(groups)
    old = torch.zeros(role.shape, dtype=torch.float64) if old is None else torch.as_tensor(old, dtype=torch.float64)
    return Batch(prompt_ids=torch.zeros(1, 1, dtype=torch.long), prompt_mask=torch.ones(1, 1, dtype=torch.bool), prompt_of=torch.zeros(n, dtype=torch.long),
                 ids=torch.zeros(role.shape, dtype=torch.long), role=role, turn=torch.zeros(role.shape, dtype=torch.int16),
                 rewards=torch.tensor(labels, dtype=torch.float64), groups=groups,
                 train=torch.ones(n, dtype=torch.bool) if train is None else torch.tensor(train), exact=torch.ones(n, dtype=torch.bool),
                 finished=torch.ones(n, dtype=torch.bool), behaviour=Scores(old), old=Scores(old),
                 reference=None if reference is None else Scores(torch.as_tensor(reference, dtype=torch.float64)),
                 meta={"group_size": torch.bincount(groups)[groups].float()})


def scores(logps):
    return Scores(torch.tensor(logps, dtype=torch.float64, requires_grad=True))


def gradient(objective, logps, batch):
    now = scores(logps)
    objective(now, batch).mean().backward()
    return now.logps.grad


# ----------------------------------------------------------------------------------------------------------------------- numbers

def test_two_responses_worked_by_hand():
    loss = Residual()(scores([[0.2], [-0.1]]), batch_of([1, 0]))
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-0.3))] * 2)
    assert loss.mean().item() == pytest.approx(0.554355, abs=1e-6)


def test_beta_scales_the_proxy():
    loss = Residual(beta=2.0)(scores([[0.2], [-0.1]]), batch_of([1, 0]))
    assert loss[0].item() == pytest.approx(math.log1p(math.exp(-0.6)))


@pytest.mark.parametrize("how", ["leave-one-out", "centred", "normalised"])
def test_scores_sum_to_zero_in_a_group_and_ignore_a_shift(how):
    rng = torch.Generator().manual_seed(0)
    values, groups = torch.randn(12, generator=rng, dtype=torch.float64), torch.tensor([0, 1, 2] * 4)
    psi = relative(values, groups, how)
    for g in range(3):
        assert float(psi[groups == g].sum()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(relative(values + torch.tensor([5.0, -3.0, 100.0])[groups], groups, how), psi)


def test_the_four_scores():
    values, groups = torch.tensor([0.9, 0.0, 0.3], dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    assert relative(values, groups, "raw").tolist() == values.tolist()
    assert relative(values, groups, "centred").tolist() == pytest.approx([0.5, -0.4, -0.1])
    assert relative(values, groups, "leave-one-out").tolist() == pytest.approx([0.75, -0.6, -0.15])
    assert relative(values, groups, "normalised").tolist() == pytest.approx([0.5 / 0.458258, -0.4 / 0.458258, -0.1 / 0.458258], rel=1e-5)


@pytest.mark.parametrize("how", ["leave-one-out", "centred", "normalised"])
def test_scores_differentiate_through_mean_and_deviation(how):
    values = torch.tensor([0.9, 0.0, 0.3, -1.0, 0.4], dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 0, 0, 1, 1])
    assert gradcheck(lambda v: relative(v, groups, how), values)
    equal = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    relative(equal, torch.zeros(3, dtype=torch.long), how)[0].backward()
    assert equal.grad.isfinite().all()
    assert equal.grad[0] > 0


def test_at_the_reference_the_loss_is_ln_two_and_the_gradient_is_half():
    batch = batch_of([1, 0], old=[[-1.3], [-0.2]])
    assert Residual()(scores([[-1.3], [-0.2]]), batch).mean().item() == pytest.approx(math.log(2))
    assert gradient(Residual(), [[-1.3], [-0.2]], batch).flatten().tolist() == pytest.approx([-0.5, 0.5])
    eight = batch_of([1, 0, 0, 0, 0, 0, 0, 0])
    assert Residual()(scores([[0.0]] * 8), eight).mean().item() == pytest.approx(math.log(2))


def test_the_gradient_is_the_residual_minus_that_of_the_others():
    """dL/drhat_i = (e_i - mean of the other e_j) / B, e_i = w_i (sigma(psi_i) - y_i); without the second term it would be another method."""
    rhat, labels = torch.tensor([0.4, -0.3, 0.1, 0.6], dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    psi = 4 / 3 * (rhat - rhat.mean())
    e = torch.tensor([2.0, 2 / 3, 2 / 3, 2 / 3], dtype=torch.float64) * (psi.sigmoid() - labels)
    expected = (e - (e.sum() - e) / 3) / 4
    found = gradient(Residual(), rhat[:, None].tolist(), batch_of(labels.tolist())).flatten()
    torch.testing.assert_close(found, expected)
    assert (found - e / 4).abs().max() > 0.05  # what a detached mean would give


def test_homogeneous_groups():
    """Equal scores: exactly no gradient. Unequal scores: there is one, unlike in GRPO."""
    batch = batch_of([0, 0, 0])
    assert gradient(Residual(), [[0.2]] * 3, batch).abs().max() == 0
    assert gradient(Residual(), [[0.2], [0.0], [0.1]], batch).abs().max() > 1e-3


def test_a_response_that_is_rightly_predicted_stops_learning():
    batch = batch_of([1, 0])
    sizes = [float(gradient(Residual(), [[x], [-x]], batch).abs().max()) for x in (0.0, 1.0, 5.0, 20.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-15


def test_the_proxy_is_a_sum_over_tokens():
    roles = [[POLICY] * 4, [POLICY, POLICY, PAD, PAD]]
    batch = batch_of([1, 0], old=[[0.0] * 4] * 2, roles=roles)
    once = Residual(score="raw", weights="none")(scores([[0.1] * 4, [0.1] * 4]), batch)
    assert once.tolist() == pytest.approx([math.log1p(math.exp(-0.4)), math.log1p(math.exp(0.2))])
    likelihood = Residual(proxy="likelihood", score="raw", weights="none")(scores([[0.1] * 4, [0.1] * 4]), batch)
    assert likelihood.tolist() == pytest.approx([math.log1p(math.exp(-0.1)), math.log1p(math.exp(0.1))])


def test_class_weights():
    labels, one = torch.tensor([1.0] + [0.0] * 7), torch.zeros(8, dtype=torch.long)
    assert class_weights(labels, one).tolist() == pytest.approx([4.0] + [4 / 7] * 7)
    assert float(class_weights(labels, one).sum()) == pytest.approx(8)
    assert class_weights(torch.ones(3), torch.zeros(3, dtype=torch.long)).tolist() == [1, 1, 1]
    mixed = class_weights(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 1, 0, 1]))
    assert mixed.tolist() == [1, 1, 1, 1]  # one of each in the first group, only wrong ones in the second
    assert class_weights(labels, one, "positive").tolist() == [1] + [0] * 7
    assert class_weights(labels, one, "negative").tolist() == [0] + [1] * 7
    assert class_weights(labels, one, "none").tolist() == [1] * 8


def test_the_actor_term_is_the_loss_times_grad_log_p():
    batch = batch_of([1, 0], old=[[-1.0], [-2.0]])
    plain, more = (gradient(Residual(actor=a), [[-0.8], [-2.1]], batch) for a in (0.0, 0.5))
    loss = Residual()(scores([[-0.8], [-2.1]]), batch)
    torch.testing.assert_close(more - plain, 0.5 * loss.detach()[:, None] / 2)


def test_padding_may_hold_anything():
    roles = [[POLICY, POLICY], [POLICY, PAD]]
    clean = batch_of([1, 0], old=[[-1.0, -1.0], [-1.0, 0.0]], roles=roles)
    dirty = batch_of([1, 0], old=[[-1.0, -1.0], [-1.0, math.nan]], roles=roles)
    for objective in (Residual(), Residual(proxy="likelihood"), Residual(actor=1.0)):
        one, other = gradient(objective, [[-0.9, -1.2], [-1.1, 0.0]], clean), gradient(objective, [[-0.9, -1.2], [-1.1, math.nan]], dirty)
        torch.testing.assert_close(one, other)
        assert other[1, 1] == 0


def test_order_within_a_group_does_not_matter():
    labels, logps, order = [1, 0, 0, 1, 0, 1], [[0.3], [0.1], [-0.4], [0.2], [0.0], [-0.6]], [4, 2, 0, 5, 3, 1]
    groups = [0, 0, 0, 1, 1, 1]
    loss = Residual()(scores(logps), batch_of(labels, groups=groups))
    moved = Residual()(scores([logps[i] for i in order]), batch_of([labels[i] for i in order], groups=[groups[i] for i in order]))
    torch.testing.assert_close(moved, loss[order])


def test_a_group_that_is_not_whole_stops_the_run():
    batch = batch_of([1, 0, 0, 1, 1, 0], groups=[0, 0, 0, 1, 1, 1])
    assert len(Residual()(scores([[0.0]] * 3), batch.select(torch.tensor([3, 4, 5])))) == 3
    with pytest.raises(RunStopped, match="of group 0 there are 2 of 3 responses"):
        Residual()(scores([[0.0]] * 5), batch.select(torch.tensor([0, 1, 3, 4, 5])))


def test_muted_rows_and_demonstrations_leave_their_group():
    pair = Residual()(scores([[0.2], [-0.1]]), batch_of([1, 0]))
    muted = Residual()(scores([[0.2], [7.0], [-0.1]]), batch_of([1, 1, 0], train=[True, False, True]))
    assert muted.tolist() == pytest.approx([pair[0].item(), 0.0, pair[1].item()])
    given = Residual()(scores([[0.2], [7.0], [-0.1]]), batch_of([1, 1, 0], roles=[[POLICY], [FORCED], [POLICY]]))
    assert given.tolist() == pytest.approx(muted.tolist())


def test_only_labels_are_accepted():
    with pytest.raises(RunStopped, match="0 or 1; got 0.1"):
        Residual()(scores([[0.0], [0.0]]), batch_of([1, 0.1]))


# ------------------------------------------------------------------------------------------------------------- through the loop

def train(folder, recipe=FAST, steps=4):
    return volvelle.train(recipe, task=SMALL, model="tabular", steps=steps, folder=folder)


def state(folder):
    return load_state(checkpoints(folder)[-1])["run"]["models"]


RESET = FAST.override("objective.reference=fixed", "objective.reset_every=2")


@pytest.mark.parametrize("recipe", [FAST, FAST.override("objective.reference=fixed"), RESET, RESET.override("objective.reset_every=3")],
                         ids=["rollout", "fixed", "reset", "reset-later"])
def test_training_resumes_bit_for_bit(tmp_path, recipe):
    whole = train(tmp_path / "whole", recipe)
    train(tmp_path / "cut", recipe, steps=2)
    volvelle.train(resume=tmp_path / "cut", steps=4)
    one, other = (load_state(checkpoints(tmp_path / name)[-1]) for name in ("whole", "cut"))
    assert fingerprint(one) == fingerprint(other)
    start = train(tmp_path / "start", recipe, steps=0).learner.policy
    assert not torch.equal(start.module.table, whole.learner.policy.module.table)


def test_a_hard_reset_moves_the_reference_and_empties_the_optimiser(tmp_path):
    start = train(tmp_path / "run", RESET, steps=1).learner
    assert list(start.run.models) == ["policy", "objective.lagged"]
    before = state(tmp_path / "run")
    assert not torch.equal(before["objective.lagged"]["weights"]["table"], before["policy"]["weights"]["table"])
    assert before["policy"]["optimiser"]["state"]
    volvelle.train(resume=tmp_path / "run", steps=2)
    reset = state(tmp_path / "run")
    assert torch.equal(reset["objective.lagged"]["weights"]["table"], reset["policy"]["weights"]["table"])
    assert not reset["policy"]["optimiser"]["state"]
    assert reset["policy"]["steps"] == 0
    volvelle.train(resume=tmp_path / "run", steps=3)
    after = state(tmp_path / "run")
    assert torch.equal(after["objective.lagged"]["weights"]["table"], reset["policy"]["weights"]["table"])
    assert not torch.equal(after["policy"]["weights"]["table"], reset["policy"]["weights"]["table"])
    assert after["policy"]["steps"] == 4


def test_the_loss_is_taken_against_the_reference_that_was_reset(tmp_path):
    """Right after a reset the first update sees psi = 0: a loss of ln 2. Without resets psi has grown by then."""
    one_update = Updates(optimiser=Adam(lr=0.3))
    losses = {}
    for name, recipe in [("reset", RESET), ("fixed", FAST.override("objective.reference=fixed"))]:
        train(tmp_path / name, recipe(updates=one_update), steps=3)
        rows = [r["loss"] for r in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in r]
        losses[name] = rows
    assert losses["reset"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses["reset"][2] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(losses["fixed"][2] - math.log(2)) > 1e-3


def test_it_learns(tmp_path):
    for i, objective in enumerate([Residual(), Residual(score="centred", weights="none"), Residual(score="normalised"), Residual(beta=5.0, actor=0.1)]):
        done = train(tmp_path / str(i), FAST(objective=objective, updates=Updates(optimiser=Adam(lr=0.1), epochs=4)), steps=20)
        assert done.result["metrics"]["pass@1"] > done.result["start"]["pass@1"] + 0.2


def test_micro_batches_keep_groups_whole_and_do_not_change_the_gradient(tmp_path):
    one = train(tmp_path / "one", FAST.override("updates.micro_tokens=1"), steps=2).learner.policy.module.table
    all_ = train(tmp_path / "all", steps=2).learner.policy.module.table
    torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    for recipe, line in [
        (FAST(advantage="grpo"), "advantage=grpo would be ignored"),
        (FAST.override("sampler.group=1"), "sampler.group=1: objective.score=leave-one-out compares"),
        (FAST.override("kl=kl", "kl.place=reward"), "kl.place=reward would be ignored"),
        (FAST(reward=lambda prompt, response: 0.5), "needs rewards of 0 or 1"),
    ]:
        with pytest.raises(UserError, match=line):
            train(tmp_path / "run", recipe)
    with pytest.raises(UserError, match="reset_every=3 would be ignored"):
        Residual(reset_every=3)
    with pytest.raises(UserError, match="reference=fixed would be ignored"):
        Residual(proxy="likelihood", reference="fixed")
    assert not list(tmp_path.iterdir())


def test_it_combines_with_other_parts(tmp_path):
    for i, changes in enumerate([{"kl": "kl"}, {"filter": "dapo"}, {"terms": {"bonus": "entropy"}}]):
        train(tmp_path / str(i), FAST(**changes), steps=1)
    train(tmp_path / "single", FAST.override("sampler.group=1", "objective.score=raw"), steps=1)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_a_transformer_resets_and_resumes(tmp_path, lora):
    """With adapters the reference keeps adapters of its own: what is trained stays trainable."""
    base = Tiny(layers=1, width=32, warmup=0).build(SortDigits())
    options = {"task": SortDigits(), "model": Pretrained(str(base), lora=lora), "overrides": ["evaluation.prompts=2", "sampler.max_tokens=6"]}
    recipe = RESET(prompts=2, reward=Format(r"[a-z].*"), updates=Updates(optimiser=Adam(lr=0.01)))
    done = volvelle.train(recipe, folder=tmp_path / "whole", steps=3, **options)
    volvelle.train(recipe, folder=tmp_path / "cut", steps=1, **options)
    volvelle.train(resume=tmp_path / "cut", steps=3)
    one, other = (load_state(checkpoints(tmp_path / name)[-1]) for name in ("whole", "cut"))
    assert fingerprint(one) == fingerprint(other)
    learnt, kept = one["run"]["models"]["policy"], one["run"]["models"]["objective.lagged"]["weights"]
    assert learnt["steps"] == 1  # reset after the second step
    assert all(p.requires_grad == (lora is None or "lora" in name) for name, p in done.learner.policy.module.named_parameters())
    assert any(not torch.equal(kept[name], value) for name, value in learnt["weights"].items())


def yes_or_no(prompt, response) -> bool:
    return len(response) % 2 == 0


def graded(prompt, response) -> float:
    return len(response) % 2


def test_a_function_of_ones_own_says_by_its_annotation_that_it_is_binary(tmp_path):
    made = volvelle.train(FAST(reward=yes_or_no), task=SMALL, model="tabular", steps=1, folder=tmp_path / "run")
    assert made.result["steps"] == 1
    with pytest.raises(UserError, match="needs rewards of 0 or 1.*by its annotation, -> bool"):
        volvelle.train(FAST(reward=graded), task=SMALL, model="tabular", steps=1, folder=tmp_path / "other")
