"""Limit of RLVR (arXiv 2504.13837): the estimators by hand, the study on real runs, its page and its verb."""

import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import same_run
from scripted import Scripted, prompts

import volvelle
from volvelle.cli import main
from volvelle.core.errors import UserError
from volvelle.core.files import read_json, read_lines
from volvelle.core.run import Run, RunConfig
from volvelle.core.statistics import pass_at_k
from volvelle.core.trainable import Adam
from volvelle.language.batching import make_batch
from volvelle.language.fittings import Updates
from volvelle.language.methods.grpo import grpo
from volvelle.language.methods.limit_of_rlvr import limit_of_rlvr, study
from volvelle.language.methods.sft import sft
from volvelle.language.models import Tiny
from volvelle.language.records import Prompt
from volvelle.language.samplers import Plain
from volvelle.language.sampling import Sampling, generate
from volvelle.language.study import (Outcomes, accuracy_histogram, coverage, crossover, draw_outcomes, matching_temperature, mean_entropy, merge,
                                     over_problems, perplexity, read_outcomes, seeded, without_reasoning)
from volvelle.language.tasks.strategies import Strategies

TINY = Tiny(layers=1, width=16, heads=2, context=64, warmup=0)
FAST = {"prompts": 8, "updates": Updates(optimiser=Adam(lr=0.1))}


def outcomes(counts, n, seeds=(0,), setting=None):
    return Outcomes([f"p{i}" for i in range(len(counts))], np.arange(n)[None] < np.array(counts)[:, None], seeds, setting or {"task": "t"})


# ------------------------------------------------------------------------------------------------------------------ estimators

def test_pass_at_k_worked():
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - math.comb(7, 5) / math.comb(10, 5)) == pytest.approx(0.9167, abs=5e-5)
    assert [pass_at_k(10, c, 1) for c in range(11)] == pytest.approx([c / 10 for c in range(11)])
    assert outcomes([4, 1, 0], 8).curve([1, 2, 4, 8]).mean(0) == pytest.approx([0.2083, 0.3452, 0.4952, 0.6667], abs=5e-5)


def test_curves_rise_and_end_at_whether_anything_was_right():
    found = outcomes(range(0, 41, 5), 40).curve(range(1, 41))
    assert (np.diff(found, axis=1) >= 0).all() and found[:, -1].tolist() == [0.0] + [1.0] * 8 and not found[0].any()


def test_no_overflow_and_agreement_with_exact_binomials():
    assert np.isfinite(outcomes(range(0, 1025, 64), 1024).curve(range(1, 1025))).all()
    for n in (1, 7, 60):
        for c in range(n + 1):
            exact = [1 - math.comb(n - c, k) / math.comb(n, k) for k in range(1, n + 1)]
            assert abs(pass_at_k(n, c, np.arange(1, n + 1)) - exact).max() < 1e-10


def test_the_estimator_is_unbiased_where_the_plug_in_is_not():
    p, n, k = 0.15, 12, 6
    counts = np.random.default_rng(0).binomial(n, p, size=40_000)
    found, plug_in = pass_at_k(n, counts, k), 1 - (1 - counts / n) ** k
    truth, error = 1 - (1 - p) ** k, found.std() / 200
    assert abs(found.mean() - truth) < 4 * error  # wrong once in 16,000 by chance
    assert abs(plug_in.mean() - truth) > 10 * error


def test_the_mean_of_pass_at_k_is_not_pass_at_k_of_the_mean():
    found = outcomes([0, 64], 64).curve([1, 2, 8])
    assert found.mean(0).tolist() == [0.5, 0.5, 0.5]
    assert outcomes([32, 32], 64).curve([8]).mean() == pytest.approx(1 - 0.5**8, abs=5e-3)


def test_samples_of_one_seed_or_of_different_settings_are_not_joined():
    one, two = outcomes([1, 2], 4, (0,)), outcomes([3, 0], 4, (1,))
    both = merge([one, two])
    assert both.n == 8 and both.right.sum(1).tolist() == [4, 2] and both.seeds == (0, 1)
    with pytest.raises(UserError, match="seed 1 is there twice"):
        merge([both, two])
    with pytest.raises(UserError, match="temperature differs"):
        merge([outcomes([1], 4, (0,), {"temperature": 1.0}), outcomes([1], 4, (1,), {"temperature": 0.6})])


def test_crossover_or_none():
    assert crossover([1, 2, 4], [0.1, 0.3, 0.9], [0.5, 0.6, 0.7]) == 4
    assert crossover([1, 2, 4], [0.1, 0.3, 0.7], [0.5, 0.6, 0.7]) == 4  # as good counts
    assert crossover([1, 2, 4], [0.1, 0.3, 0.6], [0.5, 0.6, 0.7]) is None


def test_coverage_at_equal_n_only():
    found = coverage(outcomes([1, 0, 2, 0], 4), outcomes([0, 3, 1, 0], 4))
    assert found == {"both": ["p2"], "base": ["p0"], "tuned": ["p1"], "neither": ["p3"]}
    with pytest.raises(UserError, match="4 samples against 8"):
        coverage(outcomes([1], 4), outcomes([1], 8))


def test_the_twelve_bins():
    values = [0, 0.05, 0.1, 0.101, 0.3, 0.31, 0.9, 0.95, 0.999, 1, 1]
    assert accuracy_histogram(values).tolist() == [1, 2, 1, 1, 1, 0, 0, 0, 0, 1, 2, 2]
    assert accuracy_histogram(np.arange(0, 129) / 128).sum() == 129


def test_intervals_over_problems_cover():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        interval = over_problems(rng.random(40))
        hits += interval.low <= 0.5 <= interval.high
    assert 0.88 <= hits / 200  # expected about .94; below .88 once in 500 by chance


# ---------------------------------------------------------------------------------------------------------- policies and texts

def learner(tmp_path, task="sort-digits", model=TINY, **changes):
    return (made := grpo(**changes)).start(Run(RunConfig(recipe=made, task=task, model=model), tmp_path))


def test_perplexity_is_over_the_responses_tokens_only(tmp_path):
    made = learner(tmp_path, sampler=Plain(group=3, max_tokens=7))
    rollouts = made.sampler.sample(made.task.split("train")[:4])
    found = perplexity(made.policy, rollouts)
    expected = [float(torch.exp(-r.logps.double().mean())) for r in rollouts]  # sampled at temperature 1: what was drawn is what is scored
    assert found == pytest.approx(expected, rel=1e-4)
    longer = [Prompt("x", text="sort 99" + r.prompt.text) for r in rollouts]
    for r, p in zip(rollouts, longer):
        r.prompt = p
    other = perplexity(made.policy, rollouts)  # another prefix changes the log-probs, not what they are averaged over
    batch = make_batch(made.policy, rollouts, 0)
    with torch.no_grad():
        assert other == pytest.approx([float(torch.exp(-v[m].mean())) for v, m in zip(made.policy.score(batch, batch.mask).logps, batch.mask)], rel=1e-4)


def test_entropy_is_that_of_the_sampling_distribution_and_a_temperature_matches_it():
    p = np.array([0.7, 0.2, 0.1])

    def entropy(t):
        q = p ** (1 / t) / (p ** (1 / t)).sum()
        return -(q * np.log(q)).sum()

    policy = Scripted(lambda _, prefix: {3 + i: float(v) for i, v in enumerate(p)})
    sampling = Sampling(temperature=0.6, max_tokens=5)
    assert mean_entropy(policy, prompts(3), 4, sampling, 0) == pytest.approx(entropy(0.6), abs=1e-5)
    found = matching_temperature(policy, prompts(3), 4, sampling, entropy(1.3), 0, tolerance=1e-3)
    assert found == pytest.approx(1.3, abs=0.02)
    assert matching_temperature(policy, prompts(3), 4, sampling, entropy(0.5), 0) is None       # that high already
    assert matching_temperature(policy, prompts(3), 4, sampling, 1.0987, 0) is None             # not even at 4


class Right:
    """A task that is solved by the token 3."""

    def score(self, prompt, text):
        return float(text == "3")

    def solved(self, score):
        return score >= 1


def test_outcomes_are_distinct_draws_that_a_seed_repeats(tmp_path):
    policy = Scripted(lambda prompt, prefix: {3: 0.3, 4: 0.7} if prompt else {3: 1.0})
    args = (policy, Right(), prompts(2), 600, Sampling(max_tokens=1))
    one, same, other = draw_outcomes(*args, 0), draw_outcomes(*args, 0), draw_outcomes(*args, 1)
    assert one.right.shape == (2, 600) and one.right[0].all() and (one.right == same.right).all() and (one.right != other.right).any()
    assert abs(one.right[1].mean() - 0.3) < 4 * math.sqrt(0.21 / 600)  # once in 16,000
    assert [r.prompt.id for r in one.kept] == ["0"] * 4 + ["1"] * 4 and one.correct["1"] == ["3"] * 4
    assert len(np.unique(one.right[1].reshape(3, 200), axis=0)) == 3  # later chunks are not the first one again
    one.save(tmp_path / "o.jsonl")
    again = read_outcomes(tmp_path / "o.jsonl", prompts(2))
    assert (again.right == one.right).all() and again.seeds == (0,) and [r.ids for r in again.kept] == [r.ids for r in one.kept] and again.correct == one.correct


def test_a_prompt_that_asks_for_the_bare_answer():
    text, turns = Prompt("a", text="2+2?"), Prompt("b", messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}])
    one, two = without_reasoning([text, turns], "{prompt} Only the number:")
    assert one.text == "2+2? Only the number:" and two.messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2? Only the number:"}]
    assert text.text == "2+2?" and turns.messages[-1]["content"] == "2+2?"


# ------------------------------------------------------------------------------------------------------------ the shared strategies

def test_strategy_policy_is_exact(tmp_path):
    made = learner(tmp_path, Strategies(train=4, test=3), "strategies", sampler=Plain(group=3000))
    prompts_ = made.task.split("test")
    rollouts = generate(made.policy, prompts_, 3000, Sampling(max_tokens=2), seeded(0, "x"))
    rate = np.mean([made.task.score(r.prompt, r.text) for r in rollouts])
    exact = made.task.exact_pass_at_k(made.policy.leaf_probabilities(), [1])["pass@1"]
    assert abs(rate - exact) < 4.5 * math.sqrt(exact * (1 - exact) / 9000)  # once in 150,000
    batch = make_batch(made.policy, rollouts[:50], 0)
    assert torch.allclose(made.policy.score(batch, batch.mask).logps, batch.behaviour.logps, atol=1e-5)
    assert made.task.score(prompts_[0], made.task.demonstration(prompts_[0], np.random.default_rng(0))) == 1.0
    assert sum(p.numel() for p in made.policy.module.parameters()) == 12


def test_training_resumes_bit_for_bit(tmp_path):
    for task in ("tree", "strategies"):
        recipe = limit_of_rlvr(**FAST)
        for name, steps in (("whole", 4), ("part", 2)):
            volvelle.train(recipe, task, steps=steps, folder=tmp_path / task / name, evaluate_every=2, strict=True)
        volvelle.train(recipe, task, steps=4, resume=tmp_path / task / "part", evaluate_every=2, strict=True)
        same_run(tmp_path / task / "whole", tmp_path / task / "part")


# --------------------------------------------------------------------------------------------------------------------- the study

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of reinforcement learning and a distilled one, from one base."""
    root = tmp_path_factory.mktemp("runs")
    for name, recipe, steps in (("long", grpo(**FAST), 40), ("short", grpo(**FAST), 3), ("taught", sft(**FAST), 40)):
        volvelle.train(recipe, "strategies", steps=steps, folder=root / name)
    return root


@pytest.fixture(scope="module")
def made(runs):
    return study("strategies", [str(runs / "long"), f"early={runs / 'short'}"], distilled=[str(runs / "taught")], samples=40, prompts=30, temperature=1.0,
                 top_p=1.0, seeds=(0, 1), temperatures=(1.5,), gap_at=64, folder=runs / "study")


def test_the_study_measures_what_training_did(runs, made):
    models, n = made.summary["models"], 80
    assert made.summary["n"] == n and made.summary["gap_at"] == 64 and list(models) == ["base", "long", "early", "taught"]
    assert [models[m]["steps"] for m in models] == [0, 40, 3, 40] and [models[m]["kind"] for m in models] == ["base", "tuned", "tuned", "distilled"]
    for name, row in models.items():
        found = made.outcomes[name]
        assert found.right.shape == (30, n) and row["curve"][0] == pytest.approx(found.right.mean()) and sum(row["histogram"]) == 30
        assert row["curve"][-1] == pytest.approx(found.right.any(1).mean())
    assert models["long"]["curve"][0] > 2 * models["base"]["curve"][0]
    gap = models["long"]["gap"]
    assert gap["mean"] == pytest.approx(models["base"]["curve"][63] - models["long"]["curve"][0]) and gap["low"] < gap["mean"] < gap["high"]
    assert sum(map(len, models["long"]["coverage"].values())) == 30
    assert read_json(runs / "study" / "study.json") == json.loads(json.dumps(made.summary))


def test_policies_of_runs_are_those_runs_and_share_their_base(runs, made):
    """The exact accuracy of each run's final policy on these problems is what the samples show."""
    for name, folder in (("long", "long"), ("early", "short"), ("taught", "taught")):
        leaf = volvelle.load(runs / folder)["policy"].leaf_probabilities()
        p = leaf.unflatten(1, (14, 14))[200:230, :, -1].sum(1).double().detach().numpy()
        error = np.sqrt((p * (1 - p)).sum() / 80) / 30
        assert abs(made.outcomes[name].right.mean() - p.mean()) < 4.5 * error  # three checks: once in 50,000


def test_perplexity_of_what_was_learnt_under_the_base(made):
    found = made.summary["perplexity"]
    assert set(found) == {"base responses", "long responses", "early responses", "taught responses", "teacher"}
    assert set(found["base responses"]) == set(found["teacher"]) == {"base", "long", "early", "taught"} and set(found["long responses"]) == {"base", "long"}
    assert found["long responses"]["long"][2] < found["long responses"]["base"][2] and found["teacher"]["taught"][2] < found["teacher"]["base"][2]


def test_entropy_matching_and_the_temperature_sweep(made):
    assert made.summary["matched"]["long"]["temperature"] > 1.0 and made.summary["temperatures"]["base"]["1.5"]["1"] != made.summary["models"]["base"]["curve"][0]
    assert set(made.summary["temperatures"]) == {"base", "long", "early", "taught"} and list(made.summary["temperatures"]["base"]["1.5"]) == ["1", "2", "4", "8", "16", "32", "64"]


def test_the_page_stands_alone_and_shows_every_section(made):
    page = made.report.read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["pass@k", "Sampling-efficiency gap and crossover", "Coverage", "Accuracy of single problems", "Reinforcement learning and distillation",
                      "Perplexity", "At equal entropy", "Temperatures", "Along training"]
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "") and page.count("<svg") >= 5


def test_hard_problems_solved_now_and_then_are_laid_out_for_reading(runs, made):
    rows = read_lines(runs / "study" / "inspect.jsonl")
    assert rows and all(0 < r["accuracy"] < 0.05 and r["response"].endswith("right") for r in rows) and "base" in {r["policy"] for r in rows}


def test_finished_outcomes_are_read_back_and_others_are_not(runs, made):
    path = runs / "study" / "outcomes" / "long-t1-s0.jsonl"
    before = path.stat().st_mtime_ns
    args = {"samples": 40, "prompts": 30, "temperature": 1.0, "top_p": 1.0, "match_entropy": False, "folder": runs / "study"}
    again = study("strategies", [str(runs / "long")], **args)
    assert path.stat().st_mtime_ns == before and (again.outcomes["long"].right == made.outcomes["long"].right[:, :40]).all()
    study("strategies", [f"long={runs / 'short'}"], **args)  # other weights under the same name
    assert path.stat().st_mtime_ns != before


def test_guessable_problems_are_dropped(runs):
    args = {"samples": 40, "prompts": 30, "temperature": 1.0, "top_p": 1.0, "match_entropy": False}
    made = study("strategies", [str(runs / "long")], guess="{prompt}!", folder=runs / "guess", **args)
    rate = read_outcomes(runs / "guess" / "outcomes" / "guess-t1-s0.jsonl", [Prompt(f"strategies/{200 + i}", text="") for i in range(30)]).accuracy
    dropped = {f"strategies/{200 + i}": r for i, r in enumerate(rate) if 0 < r < 0.05}
    assert made.summary["dropped"] == dropped and 0 < len(dropped) < 30
    assert made.summary["problems"] == 30 - len(dropped) and not set(made.outcomes["long"].ids) & set(dropped)


def test_a_causal_model_and_its_run(tmp_path):
    volvelle.train(grpo(prompts=2, sampler=Plain(group=4)), "sort-digits", TINY, steps=1, folder=tmp_path / "run", overrides=["evaluation.prompts=4"])
    from volvelle.core.verbs import configure

    folder = configure("grpo", "sort-digits", TINY).model.build(configure("grpo", "sort-digits").task)
    made = study(str(folder), [str(tmp_path / "run")], samples=6, prompts=3, folder=tmp_path / "study", responses=2)
    assert made.summary["task"] == "sort-digits" and made.summary["n"] == 6 and made.summary["gap_at"] == 6
    assert made.summary["perplexity"]["teacher"]["base"][2] > 1


def test_mistakes_are_one_line(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = str(runs / "long")
    for words, text in ((["limits"], "unknown study 'limits'"), (["limit-of-rlvr"], "give at least one --tuned RUN"),
                        (["limit-of-rlvr", "--tuned", str(tmp_path)], "not the folder of a run"), (["limit-of-rlvr", "--tuned", run, "--tuned", run], "one name twice"),
                        (["limit-of-rlvr", "--tuned", run, "--seeds", "1,1"], "one seed twice"), (["limit-of-rlvr", "--tuned", run, "--seeds", "a"], "--seeds 'a'"),
                        (["limit-of-rlvr", "--tuned", run, "--guess", "now"], "expected a text with {prompt}"),
                        (["limit-of-rlvr", "--tuned", f"a/b={run}"], "cannot be the name of a policy")):
        monkeypatch.setattr("sys.argv", ["volvelle", "study", words[0], "--base", "strategies", *words[1:]])
        with pytest.raises(SystemExit) as end:
            main()
        err = capsys.readouterr().err
        assert end.value.code == 2 and text in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())
