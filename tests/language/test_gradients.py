"""Through real policies: the gradient of a mini-batch depends neither on how it is cut nor on what stands where nothing stands."""

import copy

import numpy as np
import pytest
import torch
import toys
from causal import prompts, random_model

from volvelle.core.trainer import start
from volvelle.core.verbs import configure
from volvelle.language.batching import make_batch, minibatches, split
from volvelle.language.methods.grpo import grpo
from volvelle.language.models import Pretrained
from volvelle.language.records import FORCED, PAD, POLICY, TOOL, Prompt, Rollout, Scores

AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum", "constant", "padded"]
RECIPES = {f"{o} {a}": [f"objective={o}", f"objective.aggregation={a}"] for o in ("clipped", "gspo", "cispo") for a in AGGREGATIONS}
RECIPES |= {"rloo": ["objective=rloo"], "reinforce": ["objective=policy-gradient"], "dual clip": ["objective=clipped", "objective.dual_clip=3"],
            "kl and entropy": ["kl=kl", "kl.estimator=k3+", "kl.coefficient=0.1", "terms.entropy=entropy", "terms.entropy.coefficient=0.1"],
            "groups": ["objective=toy-ranking", "advantage=none"], "demonstrations": ["terms.nll=nll", "terms.nll.on=both"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = random_model(11, kind="llama", shared=2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def learner(kind, folder, tmp_path, words, micro_tokens: int):
    """A learner whose one optimiser step is minus the gradient."""
    plain = ["updates.optimiser=sgd", "updates.optimiser.lr=1", f"updates.micro_tokens={micro_tokens}", "updates.epochs=2"]
    if kind == "tabular":
        config = configure(grpo, "tree", overrides=["task.prompts=4", "task.vocabulary=5", "task.depth=4", *plain, *words])
    else:
        config = configure(grpo, toys.Letters(), Pretrained(str(folder)), overrides=[*plain, *words])
    return start(config, tmp_path)[1]


def random_batch(made, kind, seed=0):
    """Groups of 2 to 4 responses of different lengths; tool and forced tokens, muted rows, advantages per token, old log-probs that differ."""
    rng, out, vocabulary = np.random.default_rng(seed), [], made.policy.vocabulary
    questions = prompts(rng, 4) if kind == "causal" else [Prompt(str(i), text="", row={"index": i}) for i in range(4)]
    for g, prompt in enumerate(questions):
        for _ in range(rng.integers(2, 5)):
            ids = rng.integers(0, vocabulary, size=rng.integers(1, 5 if kind == "tabular" else 9)).tolist()
            role = [int(rng.choice([POLICY, POLICY, POLICY, TOOL, FORCED])) for _ in ids]
            role[-1] = POLICY
            out.append(Rollout(prompt, ids, "", torch.zeros(len(ids)), role=role, group=g, exact=False, reward=float(rng.integers(0, 3)), train=rng.random() < 0.8))
    batch = make_batch(made.policy, out, 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        now = made.policy.score(batch, batch.mask).logps
    batch.old = Scores(torch.where(batch.mask, now + 0.3 * torch.randn(now.shape, generator=generator), 0.0))
    batch.reference = Scores(torch.where(batch.mask, now + 0.3 * torch.randn(now.shape, generator=generator), 0.0))
    if made.recipe.advantage is not None:
        batch.advantages = torch.where(batch.mask, torch.randn(now.shape, generator=generator), 0.0)
    return batch


def gradient(made, batch) -> dict[str, torch.Tensor]:
    before = {n: p.detach().clone() for n, p in made.policy.module.named_parameters()}
    made.improve_once(batch)
    return {n: before[n] - p.detach() for n, p in made.policy.module.named_parameters()}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["tabular", "causal"])
def test_the_size_of_micro_batches_never_matters(tmp_path, folder, kind, name):
    found = []
    for tokens in (100_000, 40, 1):
        made = learner(kind, folder, tmp_path, RECIPES[name], tokens)
        batch = random_batch(made, kind)
        pieces = len(split(batch, tokens, "groups" in made.recipe.loss_needs))
        assert (pieces == 1) == (tokens == 100_000) and (tokens > 1 or pieces == (4 if name == "groups" else len(batch)))
        found.append(gradient(made, batch))
    assert max(g.abs().max() for g in found[0].values()) > 1e-4
    for other in found[1:]:
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["tabular", "causal"])
def test_garbage_on_padding_never_matters(tmp_path, folder, kind, name):
    """NaN in every tensor of the batch and wrong ids wherever there is no token: bit for bit the same gradient."""
    clean, dirty = (learner(kind, folder, tmp_path, RECIPES[name], 60) for _ in range(2))
    batch = random_batch(clean, kind)
    spoiled = copy.deepcopy(batch)
    nothing = batch.role == PAD
    spoiled.ids[nothing] = clean.policy.vocabulary - 1
    spoiled.prompt_ids[~spoiled.prompt_mask] = 3
    for scores in (spoiled.old, spoiled.reference, spoiled.behaviour):
        scores.logps[nothing] = torch.nan
    if spoiled.advantages is not None:
        spoiled.advantages[nothing] = torch.nan
    expected, found = gradient(clean, batch), gradient(dirty, spoiled)
    for key, value in expected.items():
        assert found[key].equal(value), key


def test_tool_tokens_and_muted_rows_get_no_gradient(tmp_path, folder):
    """Changing the advantages of what has no loss changes nothing; changing those of the rest does."""
    made = learner("tabular", folder, tmp_path, [], 60)
    batch = random_batch(made, "tabular")
    silent = (batch.role != POLICY) | ~batch.train[:, None]
    for where, same in ((silent, True), (~silent, False)):
        changed = copy.deepcopy(batch)
        changed.advantages = torch.where(where, changed.advantages + 5.0, changed.advantages)
        a = gradient(learner("tabular", folder, tmp_path, [], 60), batch)["table"]
        b = gradient(learner("tabular", folder, tmp_path, [], 60), changed)["table"]
        assert a.equal(b) == same


def test_responses_share_a_pass_over_their_prompt_and_the_gradient_is_that_of_separate_ones(tmp_path, folder):
    """Every response with a prompt object of its own (no sharing) gives the gradient of the shared layout."""
    made = learner("causal", folder, tmp_path, [], 100_000)
    batch = random_batch(made, "causal")
    apart = []
    for r in batch.rollouts:
        apart.append(Rollout(Prompt(r.prompt.id, text=r.prompt.text), r.ids, "", r.logps, role=r.role, group=r.group, exact=False, reward=r.reward, train=r.train))
    other = make_batch(made.policy, apart, 0)
    assert len(other.prompt_ids) == len(apart) > len(batch.prompt_ids)
    other.old, other.advantages = batch.old, batch.advantages
    a, b = gradient(made, batch), gradient(learner("causal", folder, tmp_path, [], 100_000), other)
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, atol=2e-5, rtol=1e-3)


def test_mini_batches_hold_whole_groups_once(tmp_path, folder):
    batch = random_batch(learner("tabular", folder, tmp_path, [], 60), "tabular")
    rng = np.random.default_rng(0)
    orders = set()
    for _ in range(8):
        parts = minibatches(batch, 3, rng)
        assert sorted(torch.cat(parts).tolist()) == list(range(len(batch))) and len(parts) == 2
        for rows in parts:
            for g in batch.groups[rows].unique():
                assert (batch.groups[rows] == g).sum() == (batch.groups == g).sum()
        orders.add(tuple(parts[0].tolist()))
    assert len(orders) > 1


def test_a_constant_norm_is_constant(tmp_path, folder):
    """Dr. GRPO's divisor is the cap on the response, whatever the longest response of a mini-batch is."""
    made = learner("causal", folder, tmp_path, ["objective.aggregation=constant", "sampler.max_tokens=32"], 60)
    batch = random_batch(made, "causal")
    for rows in (torch.arange(len(batch)), torch.tensor([0, 1]), batch.lengths.argsort()[:2]):
        mini = batch.select(rows)
        weights = made.weights(mini)["objective"]
        assert weights[weights > 0].unique().tolist() == pytest.approx([1 / (len(rows) * 32)])


@pytest.mark.parametrize("per_token", [False, True])
def test_advantages_are_whitened_within_mini_batches(tmp_path, folder, per_token):
    """normalise=minibatch: over responses, or over their tokens; padding does not count, and the batch itself stays as it was."""
    found = []
    for width in (0, 3):
        made = learner("tabular", folder, tmp_path, ["updates.normalise=minibatch", "objective=policy-gradient"], 100_000)
        batch = random_batch(made, "tabular")
        batch.advantages = batch.advantages if per_token else batch.advantages[:, 0].clone()
        before = batch.advantages.clone()
        if width and per_token:
            batch.advantages = torch.where(batch.mask, batch.advantages, 99.0)
            before = batch.advantages.clone()
        found.append(gradient(made, batch)["table"])
        assert batch.advantages.equal(before)
        if not width:
            chosen = batch.acted() & batch.train[:, None]
            mean, deviation = (before[chosen].mean(), before[chosen].std()) if per_token else (before.mean(), before.std())
            reference = learner("tabular", folder, tmp_path, ["objective=policy-gradient"], 100_000)
            batch.advantages = (before - mean) / (deviation + 1e-8)
            torch.testing.assert_close(gradient(reference, batch)["table"], found[0], atol=1e-6, rtol=1e-4)
    assert found[0].equal(found[1])


def test_selecting_rows_keeps_everything_that_belongs_to_them(tmp_path, folder):
    made = learner("causal", folder, tmp_path, [], 60)
    batch = random_batch(made, "causal")
    batch.meta["noise"] = torch.arange(len(batch)).float()
    batch.scores["a"] = torch.arange(len(batch)).float()
    batch.domain = [str(i) for i in range(len(batch))]
    rows = torch.tensor([7, 2, 5])
    part = batch.select(rows)
    assert part.meta["noise"].tolist() == part.scores["a"].tolist() == [7, 2, 5] and part.domain == ["7", "2", "5"]
    assert [r is batch.rollouts[i] for r, i in zip(part.rollouts, [7, 2, 5])] == [True] * 3
    assert part.ids.shape[1] == int(batch.lengths[rows].max())
    for n, i in enumerate(rows.tolist()):
        mine, theirs = part.prompt_of[n], batch.prompt_of[i]
        assert part.prompt_ids[mine][part.prompt_mask[mine]].tolist() == batch.prompt_ids[theirs][batch.prompt_mask[theirs]].tolist()
        assert part.ids[n][part.mask[n]].tolist() == batch.rollouts[i].ids
        torch.testing.assert_close(part.old.logps[n][part.mask[n]], batch.old.logps[i][batch.mask[i]])
    empty = batch.select(torch.tensor([], dtype=torch.long))
    assert len(empty) == 0
