"""The loop: it learns, it counts what it should, and mistakes of rewards, advantages and prompts stop it with step and cause."""

import math

import numpy as np
import pytest
import torch
import toys
from helpers import rows
from scipy import stats

import volvelle
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.trainer import start, train_config
from volvelle.core.verbs import configure
from volvelle.language.methods.grpo import grpo
from volvelle.language.records import Prompt

TREE = ["task.prompts=12", "task.vocabulary=3", "task.depth=2", "prompts=6"]
TEXT = ["model.layers=1", "model.width=16", "model.heads=2", "model.context=24", "model.warmup=0", "prompts=2", "sampler.group=4",
        "updates.optimiser.lr=0.02", "evaluation.samples=2", "evaluation.ks=[1,2]", "evaluation.prompts=5"]


def merged(usual, words) -> dict:
    """The usual overrides, with those of a test in their place."""
    return dict(w.split("=", 1) for w in [*usual, *words])


def tree(recipe="grpo", *words, **options):
    return configure(recipe, "tree", overrides=merged(TREE, words), **dict(steps=3, checkpoint_every=1) | options)


def text(recipe="grpo", *words, task=None, **options):
    return configure(recipe, task or toys.Letters(), "tiny", overrides=merged(TEXT, words), **dict(steps=3, checkpoint_every=1) | options)


# ----------------------------------------------------------------------------------------------------------------- learning

METHODS = {"grpo": [], "dr-grpo": [], "rloo": ["kl=none"], "reinforce": [], "reinforce++": ["kl=none"], "gspo": ["updates.epochs=2"],
           "cispo": ["updates.epochs=2"], "dapo": ["filter.refill=off"], "ngrpo": ["filter.refill=off"],
           "ppo": ["kl=none", "updates.minibatch=none", "critic.optimiser=adam", "critic.optimiser.lr=0.1"]}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_the_tree(tmp_path, name):
    """From about one in nine to better than one in three on prompts it practises, in 40 steps."""
    made = train_config(tree(name, "updates.optimiser=adam", "updates.optimiser.lr=0.1", "prompts=12", *METHODS[name], steps=40, checkpoint_every=0), tmp_path)
    assert made.result["metrics"]["pass@1"] > max(1 / 3, 2 * made.result["start"]["pass@1"])


def test_supervised_training_raises_the_likelihood_of_demonstrations(tmp_path):
    config = configure("sft", toys.Letters(), "tiny", overrides=[*(w for w in TEXT if "group" not in w)], steps=25)
    train_config(config, tmp_path)
    losses = [r["loss"] for r in rows(tmp_path) if "loss" in r]
    assert losses[-1] < 0.7 * losses[0]


def test_text_is_learnt_from_a_function(tmp_path):
    """More vowels: the share rises from chance (5 of 60 characters) well beyond three standard errors of its own mean."""
    made = train_config(text("grpo", "reward=toys:vowels", "updates.optimiser=adam", "updates.optimiser.lr=0.01", "prompts=8", steps=25), tmp_path)
    share = [r["reward"] for r in rows(tmp_path) if "reward" in r]
    first, last = np.array(share[:8]), np.array(share[-8:])
    assert stats.ttest_ind(last, first, alternative="greater").pvalue < 1e-3
    assert made.result["metrics"]["length"] <= 4


def test_one_update_is_the_update_with_old_log_probs(tmp_path):
    """With one update per batch the old pass is left out; the result is that of a run which makes it."""
    short, long = (train_config(tree("grpo", "updates.optimiser=sgd", "updates.optimiser.lr=2", *extra), tmp_path / str(i))
                   for i, extra in enumerate(([], ["updates.minibatch=6"])))
    assert short.learner.one_update and not long.learner.one_update
    torch.testing.assert_close(short.learner.policy.module.table, long.learner.policy.module.table, atol=1e-6, rtol=1e-5)


def test_a_coefficient_that_adapts_in_the_loss(tmp_path):
    config = tree("grpo", "kl=kl", "kl.coefficient=adaptive", "kl.coefficient.target=1e-3", "kl.coefficient.horizon=100", "updates.optimiser.lr=0.1")
    made = train_config(config, tmp_path)
    assert made.learner.kl.coefficient(0) != 0.2


def test_entropy_alone(tmp_path):
    """objective=none terms.entropy=entropy flattens the policy."""
    config = tree("grpo", "objective=none", "advantage=none", "terms.entropy=entropy", "terms.entropy.coefficient=1", "updates.optimiser.lr=0.1", steps=10)
    run, learner = start(config, tmp_path)
    before = learner.policy.module.table.std().item()
    for _ in range(10):
        learner.step()
    assert learner.policy.module.table.std().item() < 0.8 * before


# ----------------------------------------------------------------------------------------------------------------- counting


def test_metrics_say_what_happened(tmp_path):
    train_config(tree("grpo", "evaluation.log=3"), tmp_path)
    row = rows(tmp_path)[1]
    assert {"reward", "length", "clip_ratio", "mixed_groups", "tokens", "surprise", "rounds", "groups", "loss", "grad_norm"} <= set(row)
    assert row["tokens"] == 6 * 8 * 2 and row["length"] == 2 and row["groups"] == 6 and row["rounds"] == 1
    samples = rows(tmp_path, "samples.jsonl")
    assert [s["step"] for s in samples] == [1] * 3 + [2] * 3 + [3] * 3
    assert {"split", "prompt_id", "prompt", "response", "reward", "tokens", "finish"} <= set(samples[0])


def test_evaluation_asks_the_same_question_every_time(tmp_path):
    """Same random numbers at every evaluation: with a policy that does not move, the same completions."""
    made = train_config(text("grpo", "updates.optimiser.lr=1e-30", evaluate_every=1), tmp_path)
    found = [{k: v for k, v in r.items() if k.startswith("eval/")} for r in rows(tmp_path)]
    assert found[0] == found[1] == found[2] and set(made.result["metrics"]) >= {"pass@1", "pass@1_low", "pass@1_high", "pass@2", "score", "length"}
    evaluated = [s for s in rows(tmp_path, "samples.jsonl") if s["split"] == "validation"]
    by_step = [[s["response"] for s in evaluated if s["step"] == t] for t in range(4)]
    assert len(by_step[0]) == 5 and by_step[0] == by_step[1] == by_step[3]


def test_runs_are_evaluated_on_the_test_split_and_on_other_settings(tmp_path):
    made = train_config(text(), tmp_path / "run")
    found = volvelle.evaluate(made.folder, overrides=["evaluation.samples=4", "evaluation.ks=[1,4]"])
    assert {"pass@1", "pass@4"} <= set(found)
    again = volvelle.evaluate(made.folder, overrides=["evaluation.split=validation"])
    assert again == made.result["metrics"]
    assert volvelle.evaluate(made.folder / "policy", toys.Letters(), overrides=["evaluation.split=validation", *[w for w in TEXT if w.startswith("evaluation")]]) \
        .keys() == again.keys()


def test_exact_pass_at_k_of_a_table(tmp_path):
    """pass@k = 1 - (1 - q)^k per prompt, and sampling agrees within five standard errors (a false alarm once in two million)."""
    _, learner = start(tree(), tmp_path)
    learner.recipe = learner.recipe.override("evaluation.samples=16", "evaluation.ks=[1,4]")
    exact = learner.evaluate()
    leaves = learner.policy.leaf_probabilities()
    assert leaves.sum(1).tolist() == pytest.approx([1.0] * 12)
    from volvelle.language.sampling import Sampling, generate

    prompts = learner.task.split("test")
    drawn = generate(learner.policy, prompts, 400, Sampling(max_tokens=2), torch.Generator().manual_seed(0))
    right = np.array([learner.task.score(r.prompt, r.text) for r in drawn]).reshape(12, 400).mean(1)
    error = math.sqrt(sum(q * (1 - q) / 400 for q in right)) / 12
    assert abs(right.mean() - exact["pass@1"]) < 5 * error
    assert exact["pass@1"] < exact["pass@4"] < 1


# ------------------------------------------------------------------------------------------------------------------ filters


def test_dynamic_sampling_keeps_whole_mixed_groups(tmp_path):
    _, learner = start(tree("dapo", "prompts=4", "filter.max_rounds=0", "sampler.group=4"), tmp_path)
    for _ in range(5):
        rollouts, metrics = learner.collect()
        groups = {}
        for r in rollouts:
            groups.setdefault(r.group, []).append(r.reward)
        assert len(groups) == 4 == metrics["groups"] and all(len(g) == 4 and len(set(g)) == 2 for g in groups.values())


def test_a_filter_that_keeps_nothing_gives_up_with_a_way_out(tmp_path):
    config = tree("grpo", "filter=drop", "filter.max_rounds=2", "reward=toys:vowels")
    with pytest.raises(RunStopped, match=r"step 1: after 2 rounds the filter has kept 0 of 6 groups; raise filter.max_rounds"):
        train_config(config, tmp_path)


def test_a_step_without_groups_leaves_the_policy_alone(tmp_path):
    run, learner = start(tree("grpo", "filter=drop", "filter.refill=off", "reward=toys:vowels"), tmp_path)
    before = learner.policy.module.table.clone()
    metrics = learner.step()
    assert learner.policy.module.table.equal(before) and metrics["groups"] == 0 and "loss" not in metrics


def test_rows_without_loss_may_fill_whole_micro_batches(tmp_path):
    train_config(text("dapo", "filter.refill=off", "filter.which=none", "updates.micro_tokens=1", "updates.epochs=2"), tmp_path)


# ----------------------------------------------------------------------------------------------------------------- mistakes


def raises(prompt, response, **row):
    raise ZeroDivisionError("by zero")


def readable(folder):
    """What a stopped run leaves can be reported, evaluated and read."""
    assert volvelle.report(folder).is_file()
    assert rows(folder)[0]["step"] == 0


@pytest.mark.parametrize("reward, says", [
    (raises, "reward 'raises' on prompt 't0' raised ZeroDivisionError: by zero"),
    (lambda prompt, response, **row: None, "returned NoneType None; expected one number"),
    (lambda prompt, response, **row: float("nan"), "returned nan; expected a finite number"),
    (lambda prompt, response, **row: float("inf"), "returned inf; expected a finite number"),
    (lambda prompt, response, **row: "1", "returned str '1'; expected one number"),
    (lambda prompt, response, **row: [1.0, 2.0], "returned list"),
    (lambda prompt, response, **row: torch.ones(2), "expected one number"),
], ids=["raises", "none", "nan", "inf", "text", "list", "tensor"])
def test_a_reward_function_that_goes_wrong(tmp_path, reward, says):
    recipe = grpo(reward=reward, curriculum="fixed")
    with pytest.raises(RunStopped) as error:
        train_config(tree(recipe), tmp_path / "run")
    message = str(error.value)
    assert message.startswith("step 1: reward ") and says.replace("'t0'", message.split("prompt ")[1].split()[0]) in message and "\n" not in message
    assert message.endswith("checkpoints/step-000000")
    if reward is raises:
        readable(tmp_path / "run")


class Odd(toys.Window):
    """A reward part whose live object returns what it is told to."""

    def __init__(self, scores=None, total=None):
        self.told = scores, total

    def start(self, run):
        return self

    def score(self, rollouts):
        return self.told[0](rollouts)

    def total(self, scores, meta, step):
        return self.told[1](scores) if self.told[1] else sum(scores.values())


@pytest.mark.parametrize("scores, total, says", [
    (lambda rs: {"a": torch.zeros(len(rs) - 1)}, None, "reward 'a' returned 47 values for 48 responses"),
    (lambda rs: {"a": [0.0] * (len(rs) - 1) + [math.nan]}, None, "reward 'a' on prompt"),
    (lambda rs: {"a": torch.zeros(len(rs))}, lambda s: s["a"].mean(), "the total reward has shape (); expected (48,)"),
    (lambda rs: {"a": torch.zeros(len(rs))}, lambda s: s["a"] / 0, "the total reward of prompt"),
    (lambda rs: {"a": torch.zeros(len(rs))}, lambda s: None, "the total reward has shape"),
], ids=["length", "nan", "scalar", "division", "none"])
def test_a_reward_part_that_goes_wrong(tmp_path, scores, total, says):
    _, learner = start(tree(), tmp_path)
    learner.reward = Odd(scores, total)
    with pytest.raises(RunStopped) as error:
        learner.step()
    assert says in str(error.value)


@pytest.mark.parametrize("advantage, says", [
    (lambda batch: batch.rewards[:-1], "the advantage has shape (47,); expected (48,) or (48, 2)"), (lambda batch: batch.rewards.mean(), "shape ()"),
    (lambda batch: None, "NoneType"),
], ids=["length", "scalar", "none"])
def test_an_advantage_of_the_wrong_shape(tmp_path, advantage, says):
    with pytest.raises(RunStopped) as error:
        train_config(tree(grpo(advantage=advantage)), tmp_path)
    assert str(error.value).startswith("step 1: ") and says in str(error.value)


@pytest.mark.parametrize("objective", [lambda scores, batch: scores.logps.mean(), lambda scores, batch: scores.logps[:, :1], lambda scores, batch: None],
                         ids=["scalar", "narrow", "none"])
def test_an_objective_of_the_wrong_shape(tmp_path, objective):
    """A scalar would broadcast over the weights and train something else without a word."""
    with pytest.raises(RunStopped, match=r"step 1: the loss 'objective' has (shape|type) .*; expected \(48, 2\) or \(48,\)"):
        train_config(tree(grpo(objective=objective, advantage=None)), tmp_path)


def test_a_prompt_that_does_not_fit(tmp_path):
    """Four of the eight training prompts exceed, with the response's cap, the context of 24."""
    task = toys.Letters(wide=True, max_tokens=17)
    with pytest.raises(RunStopped, match=r"step 1: prompt 'p\d+' has \d+ tokens; with max_tokens=17 it exceeds the policy's context of 24"):
        train_config(text("grpo", "prompts=8", task=task), tmp_path / "a")
    readable(tmp_path / "a")
    with pytest.raises(RunStopped, match="step 1: every prompt drawn is longer than the policy's context allows"):
        train_config(text("grpo", "sampler.overlong=skip", "curriculum=fixed", task=task), tmp_path / "b")
    made = train_config(text("grpo", "sampler.overlong=skip", "prompts=8", task=task), tmp_path / "c")
    assert made.result["steps"] == 3 and [r["groups"] for r in rows(tmp_path / "c")[1:]] == [4, 4, 4]
    made = train_config(text("grpo", "sampler.overlong=skip", "prompts=8", "evaluation.split=train", task=task), tmp_path / "d")
    assert made.result["metrics"]["skipped"] == 4
    with pytest.raises(RunStopped, match="exceeds the policy's context of 24"):
        train_config(text("sft", "evaluation.split=train", task=task), tmp_path / "e")


@pytest.mark.parametrize("words, says", [
    (["advantage=none"], "objective=clipped needs advantages, and advantage is none"),
    (["objective=nll"], "advantage=grpo would be ignored: objective=nll uses no advantages"),
    (["objective=none", "advantage=none"], "trains nothing"),
    (["advantage=gae"], "advantage=gae needs values, and critic is none; add critic=value"),
    (["critic=value"], "critic=value would be ignored"),
    (["reward=none"], "needs rewards, and reward is none"),
    (["kl=kl", "kl.estimator=k1"], "kl.estimator=k1"),
    (["evaluation.ks=[1,8]"], "evaluation.samples"),
])
def test_meaningless_combinations_are_refused_before_a_folder_exists(tmp_path, words, says):
    with pytest.raises(UserError) as error:
        train_config(tree("grpo", *words), tmp_path / "run")
    assert says in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_language_recipe_needs_task_and_model(tmp_path):
    with pytest.raises(UserError, match="needs a task"):
        train_config(configure("grpo"), tmp_path / "run")
    with pytest.raises(UserError, match="needs a model"):
        train_config(configure("grpo", toys.Letters()), tmp_path / "run")
    with pytest.raises(UserError, match="model tabular fits the prompt-tree tasks only"):
        train_config(configure("grpo", toys.Letters(), "tabular"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_table_knows_its_prompts(tmp_path):
    _, learner = start(tree(), tmp_path)
    for index in (None, 12, -1):
        with pytest.raises(RunStopped, match=r"a tabular policy needs row\['index'\] in 0..11"):
            learner.policy.encode(Prompt("x", text="", row={} if index is None else {"index": index}))
