"""What the sampler says it drew from is what an independent forward pass says, and what it draws follows it."""

import numpy as np
import pytest
import torch
from causal import full_logits, policy_and_plain, prompts
from scipy import stats
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from volvelle.core.errors import RunStopped, UserError
from volvelle.language.records import Prompt
from volvelle.language.sampling import Sampling, Stops, draw, generate, truncate
from volvelle.language.stepping import CausalStepper

MODELS = [dict(kind="llama", heads=4, shared=4), dict(kind="llama", heads=4, shared=2), dict(kind="llama", heads=4, shared=1, tie=True),
          dict(kind="qwen2", heads=6, shared=2), dict(kind="qwen2", heads=4, shared=1, tie=True)]
SAMPLINGS = [Sampling(), Sampling(0.6), Sampling(1.7, top_k=7), Sampling(top_p=0.8), Sampling(min_p=0.1), Sampling(0.8, 12, 0.9, 0.05), Sampling(0.0)]


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probs [T, V] after transformers' own processors, in its order."""
    chain = LogitsProcessorList()
    if sampling.temperature not in (0.0, 1.0):
        chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain(None, logits).log_softmax(-1)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("model", range(len(MODELS)))
def test_log_probs_equal_an_independent_forward_pass(model, sampling):
    policy, plain = policy_and_plain(model, **MODELS[model])
    rng = np.random.default_rng([model, SAMPLINGS.index(sampling)])
    asked = prompts(rng, 3)
    sampling = Sampling(**vars(sampling) | {"max_tokens": 8})
    rollouts = generate(policy, asked, 3, sampling, torch.Generator().manual_seed(model), entropy=True)
    assert [r.group for r in rollouts] == [0] * 3 + [1] * 3 + [2] * 3 and [r.prompt for r in rollouts] == [p for p in asked for _ in range(3)]
    for r in rollouts:
        logp = warped(full_logits(plain, policy.encode(r.prompt), r.ids), sampling)
        torch.testing.assert_close(r.logps, logp.gather(1, torch.tensor(r.ids)[:, None])[:, 0], atol=1e-4, rtol=0)
        spread = -(logp.exp() * logp.masked_fill(logp.isinf(), 0)).sum(-1)
        torch.testing.assert_close(r.entropy, spread, atol=1e-4, rtol=1e-4)
        assert r.exact == (sampling.plain) and len(r.role) == len(r.turn) == len(r.ids)
        if sampling.temperature == 0:
            assert r.ids == logp.argmax(-1).tolist()


def test_a_long_group_is_spread_over_rows_and_stays_right(monkeypatch):
    """Many branches of one prompt make its row of the cache long; each then gets a row of its own, more than once."""
    calls = []
    spread = CausalStepper._spread
    monkeypatch.setattr(CausalStepper, "_spread", lambda self: (calls.append(len(self.row)), spread(self))[1])
    policy, plain = policy_and_plain(3, kind="qwen2", heads=6, shared=2)
    asked = [Prompt("a", text="ab"), Prompt("b", text="fox")]
    rollouts = generate(policy, asked, 48, Sampling(max_tokens=14), torch.Generator().manual_seed(0))
    assert calls
    for r in rollouts:
        logp = full_logits(plain, policy.encode(r.prompt), r.ids).log_softmax(-1)
        torch.testing.assert_close(r.logps, logp.gather(1, torch.tensor(r.ids)[:, None])[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("spread_early", [False, True])
def test_forking_dropping_and_reordering_branches(monkeypatch, spread_early):
    """Random forks, drops and permutations within each prompt; every branch's logits equal those of its own text by itself."""
    if spread_early:
        monkeypatch.setattr("volvelle.language.stepping.REPACK", 0)
    policy, plain = policy_and_plain(1, kind="llama", heads=4, shared=2)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        heads = [policy.encode(p) for p in prompts(rng, 3, 9)]
        stepper = policy.stepper(heads, [2, 1, 3], 20)
        texts = [(p, []) for p, m in enumerate([2, 1, 3]) for _ in range(m)]
        for _ in range(7):
            tokens = rng.integers(3, policy.vocabulary, size=len(texts))
            stepper.advance(torch.from_numpy(tokens))
            texts = [(p, t + [int(x)]) for (p, t), x in zip(texts, tokens)]
            if rng.random() < 0.7:
                owner = np.array([p for p, _ in texts])
                kept = [rng.choice(np.flatnonzero(owner == p), size=rng.integers(1, 5)) for p in np.unique(owner) if rng.random() < 0.9 or p == owner[0]]
                index = np.concatenate(kept)
                stepper.select(torch.from_numpy(index))
                texts = [texts[i] for i in index]
            expected = torch.stack([full_logits(plain, heads[p], t + [0])[-1] for p, t in texts])
            torch.testing.assert_close(stepper.logits, expected, atol=2e-4, rtol=0)


def test_tabular_branches_can_be_forked_and_dropped_too(tmp_path):
    from volvelle.core.trainer import start
    from volvelle.core.verbs import configure

    policy = start(configure("grpo", "tree", overrides=["task.prompts=3", "task.vocabulary=4", "task.depth=3"]), tmp_path)[1].policy
    stepper = policy.stepper([[4], [6]], [2, 1], 3)
    stepper.advance(torch.tensor([0, 1, 2]))
    stepper.select(torch.tensor([1, 1, 2]))
    stepper.advance(torch.tensor([3, 0, 1]))
    for row, ids in enumerate([[4, 1, 3], [4, 1, 0], [6, 2, 1]]):
        torch.testing.assert_close(stepper.logits[row], policy.module(torch.tensor([ids]))[0, -1].detach())


# ------------------------------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("sampling", SAMPLINGS[:-1], ids=str)
def test_truncation_equals_transformers(sampling):
    """Exactly the same tokens are cut away, also where probabilities tie."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.cat([3 * torch.randn(50, 40, generator=generator), torch.randint(-2, 3, (20, 40), generator=generator).float()])
    scaled = logits / sampling.temperature
    mine, theirs = truncate(scaled, sampling), warped(logits, sampling)
    same = mine.isinf() == theirs.isinf()
    ties = torch.arange(70) >= 50
    assert same[~ties].all()
    assert same[ties].float().mean() > 0.97 or sampling.top_p < 1  # which of equal tokens falls to top-p is a matter of sorting
    torch.testing.assert_close(mine.log_softmax(-1)[~ties], theirs[~ties], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(1.3, top_k=5), Sampling(top_p=0.7), Sampling(min_p=0.2)], ids=str)
def test_draws_follow_the_distribution(sampling):
    """A chi-square test on 20,000 draws per case; five cases at level 1e-4 raise a false alarm once in 2,000 suites (the seed is fixed)."""
    logits = 1.5 * torch.randn(1, 12, generator=torch.Generator().manual_seed(4))
    token, logp, entropy = draw(logits.expand(20_000, -1), sampling, torch.Generator().manual_seed(5), entropy=True)
    probs = warped(logits, sampling)[0].exp()
    counts = torch.bincount(token, minlength=12)
    assert counts[probs == 0].sum() == 0
    possible = probs > 0
    expected = probs[possible].double() / probs[possible].double().sum() * 20_000
    assert stats.chisquare(counts[possible].double(), expected).pvalue > 1e-4
    torch.testing.assert_close(logp, probs.log()[token], atol=1e-5, rtol=1e-5)
    assert entropy[0].item() == pytest.approx(float(-(probs[possible] * probs[possible].log()).sum()), abs=1e-5)


def test_greedy_draws_are_the_most_likely_tokens():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    token, logp, _ = draw(logits, Sampling(0.0), torch.Generator())
    assert token.tolist() == [1, 0]
    torch.testing.assert_close(logp, logits.log_softmax(-1)[[0, 1], [1, 0]])


def test_the_same_generator_gives_the_same_text():
    policy, _ = policy_and_plain(0)
    asked = prompts(np.random.default_rng(0), 2)
    one, two, three = (generate(policy, asked, 2, Sampling(max_tokens=6), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert [r.ids for r in one] == [r.ids for r in two] != [r.ids for r in three]


# --------------------------------------------------------------------------------------------------------------------- ends


class Pieces:
    """A policy with a vocabulary of several-character pieces, as far as stopping needs one."""

    def __init__(self, *pieces: str):
        self.vocabulary, self.end_ids, self._pieces = len(pieces), (pieces.index("<end>"),), pieces

    def pieces(self):
        return list(self._pieces)

    def decode(self, ids):
        return "".join(self._pieces[i] for i in ids)


@pytest.mark.parametrize("ids, text, ends", [
    ([0, 1], "ab\ncd", [False, False]),  # one line break is not two
    ([0, 2], "ab", [False, True]),  # the two of different pieces
    ([3, 4], "ab", [False, True]),  # a stop string in the middle of a piece
    ([5], "", [True]),
    ([0, 6], "ab\nEN", [False, False]),
    ([6, 8], "", [False, True]),  # END over two pieces
    ([1, 7], "cd", [False, True]),
    ([7], "", [True]),
])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(ids, text, ends):
    """Stop strings: two line breaks, or END."""
    policy = Pieces("ab\n", "cd", "\nx", "ab", "\n\nD", "\n\n", "EN", "<end>", "D")
    stops = Stops(policy, ("\n\n", "END"))
    table = torch.zeros(1, 8, dtype=torch.long)
    for t, token in enumerate(ids):
        table[0, t] = token
        assert stops.ended(torch.tensor([token]), table, torch.tensor([0]), t).tolist() == [ends[t]]
    assert stops.text(ids) == (text, ends[-1])


def test_stop_strings_in_generation():
    """Every response ends at its first stop string, its end token or the cap, and never later."""
    policy, plain = policy_and_plain(2, kind="qwen2")
    asked = prompts(np.random.default_rng(1), 4)
    stop = ("e", "th", "\n")
    rollouts = generate(policy, asked, 12, Sampling(max_tokens=16, stop=stop), torch.Generator().manual_seed(0))
    kinds = {"stop string": 0, "end": 0, "cap": 0}
    for r in rollouts:
        whole = policy.decode([i for i in r.ids if i not in policy.end_ids])
        before = policy.decode(r.ids[:-1])
        assert not any(s in before for s in stop) and not set(r.ids[:-1]) & set(policy.end_ids)
        assert not any(s in r.text for s in stop)
        if r.ids[-1] in policy.end_ids:
            kinds["end"] += 1
            assert r.finish == "stop" and r.text == before
        elif any(s in whole for s in stop):
            kinds["stop string"] += 1
            assert r.finish == "stop" and r.text == whole[: min(whole.find(s) for s in stop if s in whole)]
        else:
            kinds["cap"] += 1
            assert r.finish == "length" and len(r.ids) == 16 and r.text == whole
        logp = full_logits(plain, policy.encode(r.prompt), r.ids).log_softmax(-1)
        torch.testing.assert_close(r.logps, logp.gather(1, torch.tensor(r.ids)[:, None])[:, 0], atol=1e-4, rtol=0)
    assert all(kinds.values()), kinds


def test_prompts_that_do_not_fit_are_named():
    policy, _ = policy_and_plain(0, context=24)
    with pytest.raises(RunStopped, match=r"prompt 'long' has 20 tokens; with max_tokens=5 it exceeds the policy's context of 24"):
        generate(policy, [Prompt("ok", text="a"), Prompt("long", text="a" * 20)], 1, Sampling(max_tokens=5), torch.Generator())
    assert len(generate(policy, [Prompt("fits", text="a" * 19)], 1, Sampling(max_tokens=5), torch.Generator())) == 1
    with pytest.raises(RunStopped, match="prompt 'void' is empty"):
        generate(policy, [Prompt("void", text="")], 1, Sampling(max_tokens=5), torch.Generator())
    with pytest.raises(RunStopped, match="prompt 'chat' is a conversation, and the model's tokenizer has no chat template"):
        generate(policy, [Prompt("chat", messages=[{"role": "user", "content": "hi"}])], 1, Sampling(max_tokens=5), torch.Generator())


def test_a_model_with_sliding_attention_is_refused():
    with pytest.raises(UserError, match="full attention"):
        policy_and_plain(0, kind="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0)
