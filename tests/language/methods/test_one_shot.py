"""One-shot RLVR (arXiv 2504.20571): ranking by history, training on copies of few examples, switching loss terms, controls."""

import json

import numpy as np
import pytest
import torch
from helpers import same_run

import volvelle
from volvelle.cli import main
from volvelle.core.errors import UserError
from volvelle.core.files import read_lines
from volvelle.core.run import Run, RunConfig
from volvelle.core.trainable import SGD, Adam
from volvelle.core.verbs import configure
from volvelle.language.advantages import group_normalised
from volvelle.language.batching import make_batch
from volvelle.language.curricula import Shuffle
from volvelle.language.fittings import Updates
from volvelle.language.methods.one_shot import (OneShot, entropy_only, historical_variance, learning_impact, one_shot, rank, saturation, select)
from volvelle.language.models import Tiny
from volvelle.language.records import Prompt, Rollout
from volvelle.language.samplers import Plain

FAST = {"prompts": 8, "updates": Updates(optimiser=Adam(lr=0.05)), "sampler": Plain(group=8)}
TINY = Tiny(layers=1, width=16, heads=2, context=64, warmup=0)


def learner(recipe, tmp_path, task="strategies", model=None):
    config = configure(recipe, task, model)
    return config.recipe.start(Run(config, tmp_path))


# ------------------------------------------------------------------------------------------------------------------- selection

def test_historical_variance_worked():
    found = historical_variance([[0, 1, 0, 1], [0.3, 0.3, 0.3], [0.25, 0.75]])
    assert found.tolist() == [0.25, 0.0, 0.0625] and found[0] ** 0.5 == 0.5


def test_the_ranking_does_not_change_when_a_constant_is_added():
    history = {str(i): (np.random.default_rng(i).random(6) / 2).tolist() for i in range(20)}
    shifted = {k: [v + 0.37 for v in h] for k, h in history.items()}
    assert [r["id"] for r in rank(history)] == [r["id"] for r in rank(shifted)]
    variances = [r["variance"] for r in rank(history)]
    assert variances == sorted(variances, reverse=True) and [r["rank"] for r in rank(history)] == list(range(1, 21))


def test_learning_impact_worked():
    assert learning_impact([[0.2, 0.6, 0.8]] * 3).tolist() == [1.0, 1.0, 1.0]  # every history is the pool's mean
    # means .25 and .75; squared distances 1/8 for both, (1 - m)^2 sums to .5625 + .0625 = .625
    assert learning_impact([[0.0, 1.0, 0.3], [0.5, 0.5]]) == pytest.approx([1 - 0.125 / 0.625] * 2)  # cut to two visits
    with pytest.raises(UserError, match="always right"):
        learning_impact([[1.0, 1.0], [1.0, 1.0]])


def test_rank_by_impact_at_random_and_refusals():
    history = {"a": [0.0, 0.5, 1.0], "b": [1.0, 0.0, 0.0], "c": [0.1, 0.4, 0.9], "seen once": [1.0]}
    assert [r["id"] for r in rank(history, "impact")][-1] == "b" and len(rank(history)) == 3
    orders = {tuple(r["id"] for r in rank(history, "random", np.random.default_rng(s))) for s in range(30)}
    assert len(orders) == 6  # all orders of three; one would be missing once in 40 times were the seeds not fixed
    with pytest.raises(UserError, match="score='luck': accepted: variance, impact, random"):
        rank(history, "luck")
    with pytest.raises(UserError, match="no example was visited twice"):
        rank({"a": [1.0]})


def test_select_ranks_the_pool_by_what_training_saw(tmp_path):
    path, rows = select("strategies", steps=6, folder=tmp_path / "pool", overrides=["task.train=16", "prompts=8", "updates.optimiser=adam", "updates.optimiser.lr=0.05"])
    written = read_lines(path)
    assert [r["id"] for r in written] == [r["id"] for r in rows] and written[0]["prompt"].startswith("problem ")
    assert len(rows) == 16 and all(len(r["history"]) == 3 for r in rows)  # 6 steps of 8 prompts: every example three times
    for r in rows:
        assert r["variance"] == pytest.approx(np.var(r["history"])) and all(0 <= v <= 1 for v in r["history"])
    logged = [row["reward"] for row in read_lines(tmp_path / "pool" / "metrics.jsonl") if "reward" in row]
    assert np.mean([r["history"] for r in rows]) == pytest.approx(np.mean(logged))  # nothing counted twice or lost
    exported = read_lines(tmp_path / "pool" / "ranking" / "ranking.jsonl")
    assert exported == written


def test_the_history_survives_a_kill_and_a_visit_is_the_mean_over_copies(tmp_path):
    recipe = one_shot(**FAST, curriculum=OneShot(ids=("strategies/3", "strategies/5")))
    volvelle.train(recipe, "strategies", steps=4, folder=tmp_path / "whole", strict=True, evaluate_every=2)
    volvelle.train(recipe, "strategies", steps=2, folder=tmp_path / "part", evaluate_every=2)
    again = volvelle.train(recipe, "strategies", steps=4, resume=tmp_path / "part")
    same_run(tmp_path / "whole", tmp_path / "part")
    assert {k: len(v) for k, v in again.learner.history.items()} == {"strategies/3": 4, "strategies/5": 4}


def test_training_a_causal_model_resumes_bit_for_bit(tmp_path):
    recipe = one_shot(prompts=3, sampler=Plain(group=4, max_tokens=6), updates=Updates(optimiser=Adam(lr=1e-3)), reward=length_reward)
    for name, steps in (("whole", 4), ("part", 2)):
        volvelle.train(recipe, "sort-digits", TINY, steps=steps, folder=tmp_path / name, evaluate_every=2, overrides=["evaluation.prompts=4"])
    volvelle.train(recipe, "sort-digits", TINY, steps=4, resume=tmp_path / "part", evaluate_every=2, overrides=["evaluation.prompts=4"])
    same_run(tmp_path / "whole", tmp_path / "part")


def length_reward(prompt, response):
    return float(len(set(response)) > 3)


def test_training_on_the_tree(tmp_path):
    made = volvelle.train(one_shot(**FAST), "tree", steps=2, folder=tmp_path / "run", overrides=["task.prompts=4"])
    assert list(made.learner.history) == ["tree/0"]


# ------------------------------------------------------------------------------------------------------------- one example, copied

def test_every_copy_is_a_group_of_its_own(tmp_path):
    made = learner(one_shot(prompts=128, sampler=Plain(group=8)), tmp_path)
    rollouts = made.sample(made.draw(128))
    batch = make_batch(made.policy, rollouts, 0)
    assert torch.equal(batch.groups.bincount(), torch.full((128,), 8)) and {r.prompt.id for r in rollouts} == {"strategies/0"}


def test_the_first_few_of_a_ranking_are_practised(tmp_path):
    path = tmp_path / "ranking.jsonl"
    path.write_text("".join(json.dumps({"id": f"strategies/{i}"}) + "\n" for i in (7, 2, 9)))
    for first, expected in ((1, {"7"}), (2, {"7", "2"}), (3, {"7", "2", "9"})):
        drawn = learner(one_shot(curriculum=OneShot(ranking=str(path), first=first)), tmp_path).draw(6)
        assert {p.id.partition("/")[2] for p in drawn} == expected and len(drawn) == 6
    with pytest.raises(UserError, match="holds 3 examples, and curriculum.first=4"):
        learner(one_shot(curriculum=OneShot(ranking=str(path), first=4)), tmp_path)
    assert learner(one_shot(curriculum=OneShot(ranking=str(path), ids=("strategies/1",))), tmp_path).draw(1)[0].id == "strategies/1"


def test_seven_of_eight_right_the_miss_dominates():
    rewards = torch.tensor([1.0] * 7 + [0.0])
    found = group_normalised(rewards, torch.zeros(8, dtype=torch.long))
    assert found[:7].tolist() == pytest.approx([0.354] * 7, abs=5e-4) and float(found[7]) == pytest.approx(-2.475, abs=5e-4)


def gradient(tmp_path, rewards: float, steps_away: bool = False, **changes):
    """Gradient of one update of the strategy logits when every response earns `rewards`."""
    recipe = one_shot(prompts=4, sampler=Plain(group=4), updates=Updates(optimiser=SGD(lr=1000.0)), **changes)
    made = learner(recipe, tmp_path)
    if steps_away:
        with torch.no_grad():
            made.policy.module.logits += torch.linspace(0, 1, 12)
    rollouts = made.sample(made.draw(4))
    for r in rollouts:
        r.reward = rewards
    batch = made.batch(rollouts)
    made.passes(batch)
    made.credit(batch)
    before = made.policy.module.logits.detach().clone()
    made.improve(batch)
    return (before - made.policy.module.logits.detach()) / 1000, made, batch


def test_a_saturated_example_leaves_only_kl_and_entropy(tmp_path):
    assert not gradient(tmp_path, 1.0, kl=None, terms={})[0].any()
    assert gradient(tmp_path, 1.0, kl=None)[0].any()                      # entropy
    assert not gradient(tmp_path, 1.0, terms={})[0].any()                 # the KL is 0 at the reference
    assert gradient(tmp_path, 1.0, True, terms={})[0].any()               # and pulls away from it


def test_without_policy_gradient_and_kl_the_gradient_is_that_of_the_mean_entropy(tmp_path):
    found, made, batch = gradient(tmp_path, 0.0, objective=None, advantage=None, kl=None)
    logits = (made.policy.module.logits + 1000 * found).detach().requires_grad_()  # where the update started
    # half of the tokens choose a strategy; the others' entropy does not depend on the logits
    p = torch.nn.functional.pad(logits, (0, 2), value=-1e4).log_softmax(0)
    ((-(p.exp() * p).sum()) / 2).backward()
    assert torch.allclose(found, -0.001 * logits.grad, atol=1e-6 * 0.001)


def test_entropy_only_needs_no_verifier_and_raises_entropy(tmp_path):
    recipe = entropy_only(prompts=8, sampler=Plain(group=8), updates=Updates(optimiser=Adam(lr=0.05)))
    made = volvelle.train(recipe, "strategies", steps=10, folder=tmp_path / "run")

    def entropy(logits):
        return float(-(logits.softmax(0) * logits.log_softmax(0)).sum().detach())

    start = learner(recipe, tmp_path / "other").policy.module.logits
    assert entropy(made.learner.policy.module.logits) > entropy(start) + 0.1
    assert recipe.reward is None and made.learner.history == {}


def test_the_reference_does_not_move(tmp_path):
    made = volvelle.train(one_shot(**FAST), "strategies", steps=3, folder=tmp_path / "run")
    reference, policy = made.learner.run.reference().module.logits, made.learner.policy.module.logits
    assert torch.equal(reference, learner(one_shot(**FAST), tmp_path / "x").policy.module.logits) and not torch.equal(reference, policy)
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[1]["loss/kl"] == 0.0


# --------------------------------------------------------------------------------------------------------- measurements, controls

def test_one_log_holds_train_and_test_accuracy_and_saturation_is_read_from_it(tmp_path):
    volvelle.train(one_shot(**FAST), "strategies", steps=4, folder=tmp_path / "run", evaluate_every=2)
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all("reward" in r and ("eval/pass@1" in r) == (r["step"] % 2 == 0) for r in rows[1:])
    made = [{"step": 0, "eval/pass@1": 0.1}] + [{"step": s, "reward": min(1.0, s / 10), **({"eval/pass@1": s / 40} if s % 5 == 0 else {})} for s in range(1, 31)]
    # the mean over 4 steps reaches .95 at step 11: (8 + 9 + 10 + 10) / 40 = .925 at 11, (.9 + 1 + 1 + 1) / 4 = .975 at 12
    assert saturation(made, window=4) == {"step": 12, "then": 0.25, "final": 0.75, "best": 0.75, "gain": 0.5}
    assert saturation(made, level=1.1)["step"] is None and saturation(made, level=1.1)["gain"] is None


def test_reflection_and_marked_answers_are_counted(tmp_path):
    made = learner(one_shot(**FAST), tmp_path)
    texts = [r"let me recheck, Rechecking: \boxed{4}", "rethink it", "<answer>3</answer>", "unchecked 5"]
    found = made.describe([Rollout(Prompt("p", text="?"), [1], t, torch.zeros(1)) for t in texts])
    assert found["reflection"] == 0.75 and found["marked"] == 0.5


def test_a_wrong_label_is_what_earns(tmp_path):
    reward = configure("one-shot", "digit-sum", None, ["reward=label", "reward.answer=4", "reward.match=number"]).recipe.reward
    rollouts = [Rollout(Prompt("p", text="?", row={"answer": "5"}), [1], t, torch.zeros(1)) for t in ("1,4>4", "2,5>5")]
    assert reward.score(rollouts)["label"].tolist() == [1.0, 0.0]


def test_the_example_in_the_prompt(tmp_path):
    task = configure("grpo", "shown:digit-sum", None, ["task.example=digit-sum/train-3"]).task
    base = task.base
    example, prompt = base.split("train")[3], task.split("test")[5]
    assert prompt.text == f"{example.text}{base.demonstration(example, np.random.default_rng(0))}\n{base.split('test')[5].text}"
    assert task.score(prompt, base.demonstration(base.split("test")[5], np.random.default_rng(1))) == 1.0
    with pytest.raises(UserError, match="task.example='nobody': no such prompt"):
        task.replace(example="nobody").split("test")
    with pytest.raises(UserError, match="expected a task of prompts after the colon"):
        configure("grpo", "shown:stag-hunt")


def test_weight_decay_entropy_and_kl_are_the_papers():
    assert one_shot.terms["entropy"].coefficient == 0.001 and one_shot.kl.coefficient == 0.001 and one_shot.kl.estimator == "k3"
    assert one_shot.updates.optimiser.weight_decay == 0.01 and one_shot.sampler.temperature == 0.6 and one_shot.prompts == 128
    assert one_shot(curriculum=Shuffle()).curriculum == Shuffle()


# ------------------------------------------------------------------------------------------------------------------ command line

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command line here, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["volvelle", *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_the_verb_writes_a_ranking_that_train_takes(tmp_path, command):
    words = ["task.train=8", "prompts=8", "updates.optimiser=adam"]
    code, out, err = command("select", "one-shot", "--task", "strategies", "--steps", "3", "--out", "pool", "--json", *words)
    assert code == 0, err
    found = json.loads(out)
    assert len(found["examples"]) == 8 and (tmp_path / "pool" / "ranking.jsonl").is_file()
    code, out, err = command("train", "one-shot", "--task", "strategies", "--steps", "1", "--out", "one", f"curriculum.ranking={found['ranking']}", *words)
    assert code == 0, err
    rows = [r for r in read_lines(tmp_path / "one" / "samples.jsonl") if r["split"] == "train"]
    assert {r["prompt_id"] for r in rows} == {found["examples"][0]["id"]}


@pytest.mark.parametrize("words,text", [(["two-shot", "--task", "tree"], "unknown selection 'two-shot'; did you mean one-shot? accepted: one-shot"),
                                        (["one-shot"], "select: no task"), (["one-shot", "--task", "tree", "--score", "luck"], "score='luck': accepted: variance")])
def test_mistakes_are_one_line(tmp_path, command, words, text):
    code, _, err = command("select", *words)
    assert code == 2 and text in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
