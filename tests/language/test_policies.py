"""Scoring against a direct computation, adapters, saving, precision."""

import copy

import numpy as np
import pytest
import torch
from causal import full_logits, policy_and_plain, prompts, random_model, reload

from volvelle.core.errors import UserError
from volvelle.core.run import RunConfig
from volvelle.core.trainer import start, train_config
from volvelle.core.verbs import configure, load
from volvelle.language.batching import make_batch
from volvelle.language.methods.grpo import grpo
from volvelle.language.models import LoRA, Pretrained
from volvelle.language.policies import CausalPolicy
from volvelle.language.records import PAD, POLICY, TOOL, Prompt, Rollout

SMALL = ["prompts=2", "sampler.group=3", "updates.optimiser.lr=0.02", "evaluation.samples=1", "evaluation.ks=[1]", "evaluation.prompts=3"]


def random_rollouts(policy, seed: int = 0, groups: int = 3, size: int = 3, longest: int = 9) -> list[Rollout]:
    """Responses of random tokens and lengths to random prompts, some tokens a tool's."""
    rng, out = np.random.default_rng(seed), []
    for g, prompt in enumerate(prompts(rng, groups)):
        for _ in range(size):
            ids = rng.integers(0, policy.vocabulary, size=rng.integers(1, longest)).tolist()
            role = [TOOL if rng.random() < 0.2 else POLICY for _ in ids]
            out.append(Rollout(prompt, ids, "", torch.zeros(len(ids)), role=role, group=g, exact=False, reward=float(rng.random())))
    return out


def direct(plain, policy, rollouts, shape, temperature=1.0) -> dict[str, torch.Tensor]:
    """logps, entropy, mean_logp [N, T] from one unpadded forward pass per response; NaN on padding."""
    out = {k: torch.full(shape, torch.nan) for k in ("logps", "entropy", "mean_logp")}
    for n, r in enumerate(rollouts):
        logp = (full_logits(plain, policy.encode(r.prompt), r.ids) / temperature).log_softmax(-1)
        t = len(r.ids)
        out["logps"][n, :t] = logp.gather(1, torch.tensor(r.ids)[:, None])[:, 0]
        out["entropy"][n, :t] = -(logp.exp() * logp).sum(-1)
        out["mean_logp"][n, :t] = logp.mean(-1)
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("model", [dict(kind="llama", shared=4), dict(kind="llama", shared=1, tie=True), dict(kind="qwen2", heads=6, shared=2)], ids=str)
def test_scores_equal_a_direct_computation(model, temperature):
    policy, plain = policy_and_plain(5, **model)
    rollouts = random_rollouts(policy, 1)
    batch = make_batch(policy, rollouts, 0)
    found = policy.score(batch, batch.mask, frozenset({"entropy", "mean_logp"}), temperature)
    expected = direct(plain, policy, rollouts, batch.ids.shape, temperature)
    for name, value in expected.items():
        mine = getattr(found, name)
        assert mine.dtype == torch.float32 and mine[~batch.mask].eq(0).all()
        torch.testing.assert_close(mine[batch.mask].detach(), value[batch.mask], atol=1e-4, rtol=1e-4)
    assert found.values is None and policy.score(batch, batch.mask).entropy is None


def test_only_what_is_asked_for_is_scored():
    policy, plain = policy_and_plain(6)
    rollouts = random_rollouts(policy, 2)
    batch = make_batch(policy, rollouts, 0)
    keep = batch.mask & (torch.rand(batch.ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4)
    keep[2] = False
    found = policy.score(batch, keep).logps
    expected = direct(plain, policy, rollouts, batch.ids.shape)["logps"]
    torch.testing.assert_close(found[keep].detach(), expected[keep], atol=1e-4, rtol=0)
    assert found[~keep].eq(0).all()


def test_what_stands_on_padding_never_matters():
    policy, _ = policy_and_plain(7)
    batch = make_batch(policy, random_rollouts(policy, 3), 0)
    dirty = copy.deepcopy(batch)
    dirty.ids[dirty.role == PAD] = policy.vocabulary - 1
    dirty.prompt_ids[~dirty.prompt_mask] = 7
    a, b = (policy.score(x, x.mask, frozenset({"entropy"})) for x in (batch, dirty))
    assert a.logps.equal(b.logps) and a.entropy.equal(b.entropy)


def test_large_vocabularies_are_scored_in_pieces(monkeypatch):
    """The pieces give the same numbers and the same gradient as the whole."""
    policy, _ = policy_and_plain(8)
    batch = make_batch(policy, random_rollouts(policy, 4), 0)
    found = []
    for chunk in (1 << 24, 5 * policy.vocabulary):
        monkeypatch.setattr("volvelle.language.policies.CHUNK", chunk)
        scores = policy.score(batch, batch.mask, frozenset({"entropy", "mean_logp"}))
        (scores.logps.sum() + 0.1 * scores.entropy.sum() + scores.mean_logp.sum()).backward()
        found.append((scores, [p.grad.clone() for p in policy.module.parameters()]))
        policy.module.zero_grad()
    (a, grads), (b, others) = found
    torch.testing.assert_close(a.logps, b.logps, atol=1e-6, rtol=0)
    for x, y in zip(grads, others):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_scored_under_another_prompt():
    policy, plain = policy_and_plain(9)
    other = Prompt("other", text="quite another question")
    rollout = Rollout(Prompt("seen", text="hint: b"), [5, 6, 7], "", torch.zeros(3), scored_under=other)
    batch = make_batch(policy, [rollout], 0)
    logp = full_logits(plain, policy.encode(other), rollout.ids).log_softmax(-1)
    torch.testing.assert_close(policy.score(batch, batch.mask).logps[0].detach(), logp.gather(1, torch.tensor([[5], [6], [7]]))[:, 0], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------ saving, loading


def saved(tmp_path, seed=0, **options):
    model, tokenizer = random_model(seed, **options)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def config(folder, *words, recipe=grpo, lora=None, **options) -> RunConfig:
    return configure(recipe, "toy-letters", Pretrained(folder, lora=lora), overrides=[*SMALL, *words], **dict(steps=2) | options)


@pytest.fixture(autouse=True)
def toy_task():
    import toys

    return toys.Letters


@pytest.mark.parametrize("kind, lora", [("llama", None), ("qwen2", None), ("llama", LoRA(rank=4))], ids=["llama", "qwen2", "adapter"])
def test_a_trained_policy_loads_in_plain_transformers(tmp_path, kind, lora):
    made = train_config(config(saved(tmp_path / "base", kind=kind), lora=lora), tmp_path / "run")
    policy = made.learner.policy
    plain, base = reload(made.folder / "policy"), reload(tmp_path / "base")
    ids = torch.tensor([[5, 9, 4, 30, 7]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(plain(ids).logits, logits, atol=1e-4, rtol=1e-4)
        assert (base(ids).logits - logits).abs().max() > 1e-2
    again = load(made.folder)["policy"]
    with torch.no_grad():
        assert again.model(input_ids=ids, use_cache=False).logits.equal(logits)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(made.folder / "policy")("ab=").input_ids == policy.encode(Prompt("x", text="ab="))


def test_weights_of_an_exported_policy_are_taken_over(tmp_path):
    """`eval --best`: a policy reads what another saved, adapter or not."""
    for name, lora in (("plain", None), ("adapter", LoRA(rank=2))):
        made = train_config(config(saved(tmp_path / name / "base"), lora=lora), tmp_path / name / "run")
        fresh = start(made.learner.run.config, tmp_path / "elsewhere")[1].policy
        ids = torch.tensor([[5, 9, 4]])
        with torch.no_grad():
            before, trained = (p.model(input_ids=ids, use_cache=False).logits for p in (fresh, made.learner.policy))
            assert not before.equal(trained)
            fresh.read(made.folder / "policy")
            torch.testing.assert_close(fresh.model(input_ids=ids, use_cache=False).logits, trained)


# ----------------------------------------------------------------------------------------------------------------- adapters


def test_the_reference_of_an_adapted_policy_is_the_base_model(tmp_path):
    folder = saved(tmp_path / "base")
    run, learner = start(config(folder, "kl=kl", lora=LoRA(rank=4)), tmp_path)
    policy, plain = learner.policy, reload(folder)
    assert learner.size > sum(p.numel() for p in policy.trainable.parameters) > 0
    assert all("lora" in n for n in policy.trainable.weights())
    batch = make_batch(policy, random_rollouts(policy, 5), 0)
    reference = run.reference()
    first = policy.score(batch, batch.mask).logps.detach()
    assert reference.score(batch, batch.mask).logps.equal(first)  # a fresh adapter changes nothing
    for _ in range(3):
        learner.step()
    after = policy.score(batch, batch.mask).logps.detach()
    assert (after - first).abs().max() > 1e-3
    with torch.no_grad():
        kept = reference.score(batch, batch.mask).logps
    assert kept.equal(first)
    expected = direct(plain, policy, batch.rollouts, batch.ids.shape)["logps"]
    torch.testing.assert_close(kept[batch.mask], expected[batch.mask], atol=1e-4, rtol=0)
    assert policy.score(batch, batch.mask).logps.detach().equal(after)  # and the adapter is on again


# ------------------------------------------------------------------------------------------------- critic, precision, memory


def test_the_critic_starts_at_zero_and_learns(tmp_path):
    run, learner = start(config(saved(tmp_path / "base"), "critic.optimiser.lr=0.01", "reward=toys:vowels", recipe=ppo()), tmp_path)
    batch = learner.batch(learner.collect()[0])
    learner.passes(batch)
    assert batch.values.eq(0).all()
    learner.credit(batch)
    losses = [learner.critic.fit(batch)["critic/loss"] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    values = learner.critic.values(batch)
    assert values[~batch.mask].eq(0).all() and values[batch.mask].abs().sum() > 0
    assert not {id(p) for p in learner.critic.model.module.parameters()} & {id(p) for p in learner.policy.module.parameters()}


def ppo():
    from volvelle.language.methods.ppo import ppo

    return ppo


def test_values_are_those_of_the_state_before_each_token(tmp_path):
    """The critic's value of token t does not change with token t or anything after it."""
    _, learner = start(config(saved(tmp_path / "base"), recipe=ppo()), tmp_path)
    torch.nn.init.normal_(learner.critic.model.module.value.weight, generator=torch.Generator().manual_seed(0))
    rollouts = random_rollouts(learner.policy, 6, longest=8)
    batch = make_batch(learner.policy, rollouts, 0)
    values = learner.critic.values(batch)
    for r in rollouts:
        r.ids = [*r.ids[: len(r.ids) // 2], *[(i + 11) % learner.policy.vocabulary for i in r.ids[len(r.ids) // 2:]]]
    other = learner.critic.values(make_batch(learner.policy, rollouts, 0))
    for n, r in enumerate(rollouts):
        half = len(r.ids) // 2
        torch.testing.assert_close(values[n, : half + 1], other[n, : half + 1], atol=1e-5, rtol=0)
        if len(r.ids) > half + 1:
            assert (values[n, half + 1:len(r.ids)] - other[n, half + 1:len(r.ids)]).abs().max() > 1e-4


def test_half_precision_runs_and_is_close(tmp_path):
    folder = saved(tmp_path / "base")
    made = train_config(config(folder, "kl=kl", "updates.minibatch=1", recipe=grpo, dtype="bfloat16"), tmp_path / "run")
    policy = made.learner.policy
    assert all(p.dtype == torch.float32 for p in policy.module.parameters()) and not policy.steps_exactly
    batch = make_batch(policy, random_rollouts(policy, 7), 0)
    with torch.no_grad():
        half = policy.score(batch, batch.mask).logps
        policy.dtype = "float32"
        full = policy.score(batch, batch.mask).logps
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() and (half - full)[batch.mask].abs().mean() < 0.1


def test_old_log_probs_in_half_precision_are_the_scorers_own(tmp_path):
    """The sampler's numbers differ in the third digit; ratios must still begin at exactly 1."""
    _, learner = start(config(saved(tmp_path / "base"), "updates.epochs=2", recipe=grpo, dtype="bfloat16"), tmp_path)
    batch = learner.batch(learner.collect()[0])
    learner.passes(batch)
    with torch.no_grad():
        assert learner.policy.score(batch, batch.mask).logps[batch.mask].equal(batch.old.logps[batch.mask])


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["plain", "adapter"])
def test_checkpointing_changes_memory_and_nothing_else(tmp_path, lora):
    """Also in a model whose configuration asks for dropout: the policy that is scored must be the one that sampled."""
    folder = saved(tmp_path / "base", attention_dropout=0.5)
    from transformers.modeling_layers import GradientCheckpointingLayer

    grads = []
    for checkpointing in (False, True):
        _, learner = start(config(folder, lora=lora).override(f"model.checkpointing={checkpointing}"), tmp_path)
        batch = make_batch(learner.policy, random_rollouts(learner.policy, 8), 0)
        layers = [m for m in learner.policy.module.modules() if isinstance(m, GradientCheckpointingLayer)]
        assert len(layers) == 2 and all(m.gradient_checkpointing and m.training for m in layers) == checkpointing
        state = torch.get_rng_state()
        learner.policy.score(batch, batch.mask).logps.sum().backward()
        assert torch.get_rng_state().equal(state)
        grads.append({n: p.grad for n, p in learner.policy.module.named_parameters() if p.requires_grad})
    assert any(grad.abs().max() > 1e-3 for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- refusals


def test_models_that_change_their_logits_are_refused():
    from transformers import GraniteConfig, GraniteForCausalLM

    _, tokenizer = random_model(0)
    odd = GraniteForCausalLM(GraniteConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
                                           num_key_value_heads=2, logits_scaling=8.0, eos_token_id=1, pad_token_id=0, bos_token_id=None))
    with torch.no_grad():
        for p in odd.parameters():
            p.normal_(0, 0.3)
    with pytest.raises(UserError, match="changes its logits"):
        CausalPolicy(odd, tokenizer)


def test_a_tokenizer_without_an_end_is_refused():
    model, tokenizer = random_model(0)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        CausalPolicy(model, tokenizer)


@pytest.mark.parametrize("spoil, says", [
    (lambda folder: None, "no config.json there"),
    (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "cannot be read"),
    (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("not json")), "cannot be read"),
    (lambda folder: (saved(folder), (folder / "model.safetensors").write_bytes(b"junk")), "cannot be read"),
    (lambda folder: (saved(folder), (folder / "tokenizer.json").unlink(), (folder / "tokenizer_config.json").unlink()), "cannot be read"),
], ids=["missing", "empty config", "broken config", "broken weights", "no tokenizer"])
def test_models_that_cannot_be_read_are_one_line(tmp_path, spoil, says):
    spoil(tmp_path / "model")
    with pytest.raises(UserError) as error:
        train_config(config(str(tmp_path / "model")), tmp_path / "run")
    assert says in str(error.value) and str(tmp_path / "model") in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
