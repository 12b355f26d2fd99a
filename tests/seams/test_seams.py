"""Every seam trains, and a run that was broken off and resumed ends bit for bit as one that never was."""

import pytest
import torch
import toys
from helpers import last_state, rows, same_run

from volvelle.core.errors import RunStopped
from volvelle.core.plan import Plan, Stage
from volvelle.core.run import RunConfig
from volvelle.core.state import fingerprint
from volvelle.core.trainable import Adam
from volvelle.core.trainer import start, train_config
from volvelle.core.verbs import configure
from volvelle.language.methods.grpo import grpo

TREE = dict(task="tree", steps=6, checkpoint_every=2, evaluate_every=3)
SMALL = ["task.prompts=6", "task.vocabulary=3", "task.depth=2", "task.winners=2"]
TEXT = dict(task="toy-letters", model="tiny", steps=4, checkpoint_every=2, evaluate_every=2)
TINY = ["model.layers=1", "model.width=16", "model.heads=2", "model.context=24", "model.warmup=0", "evaluation.samples=2", "evaluation.ks=[1]",
        "evaluation.prompts=4", "sampler.group=4"]
base = grpo(prompts=4).override("updates.optimiser=adam", "updates.optimiser.lr=0.1", "sampler.group=4")


def tree(recipe, *words, **options) -> RunConfig:
    return configure(recipe, overrides=[*SMALL, *words], **TREE | options).replace(strict=True)


def text(recipe, *words, **options) -> RunConfig:
    return configure(recipe.override("updates.optimiser.lr=0.01"), overrides=[*TINY, *words], **TEXT | options).replace(strict=True)


class Interrupted(Exception):
    pass


def broken_off(config: RunConfig, folder, at: int) -> None:
    """Train, stop after step `at`, and go on in a new Run."""

    def stop(step, steps, metrics):
        if step == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_config(config, folder, progress=stop)
    train_config(config, folder, resume=True)


def plan(first, second, **options):
    return Plan(stages={"first": Stage(recipe=first, steps=3, **options), "second": Stage(recipe=second, steps=3)})


SEAMS = {
    "reward total with a memory": lambda: tree(base(reward="toy-window")),
    "sampler that lags": lambda: tree(base.override("sampler=toy-lagged")),
    "learner with a step of its own": lambda: tree(toys.Replay(**{f: getattr(base, f) for f in ("sampler", "objective", "updates")}, prompts=3)),
    "objective over groups": lambda: tree(base.override("objective=toy-ranking", "advantage=none", "updates.micro_tokens=12", "updates.epochs=2")),
    "forced and tool rows": lambda: text(base.override("sampler=toy-tools", "objective=toy-mixed", "updates.epochs=2")),
    "inexact rows": lambda: tree(base.override("sampler=toy-tempered", "updates.minibatch=2")),
    "filter that refills": lambda: tree(base.override("filter=toy-epoch", "prompts=2")),
    "second model": lambda: tree(base(advantage="toy-baseline", critic="toy-critic")),
    "child runs": lambda: tree(toys.Outer(recipe=base), steps=3, checkpoint_every=1, evaluate_every=1),
    "trainable of another make": lambda: tree(base(advantage="toy-baseline", critic="toy-trees")),
    "function": lambda: tree(base.override("advantage=toys:scaled", "advantage.scale=2")),
    "coefficient that adapts": lambda: tree(base(kl="kl").override("kl.place=reward", "kl.estimator=k1", "kl.coefficient=adaptive",
                                                                 "kl.coefficient.target=0.01", "kl.coefficient.horizon=50")),
    "schedules": lambda: tree(base.override("updates.optimiser.lr=cosine", "updates.optimiser.lr.start=0.2", "updates.optimiser.warmup=2",
                                            "terms.entropy=entropy", "terms.entropy.coefficient=linear", "terms.entropy.coefficient.steps=5")),
    "two stages": lambda: tree(plan(base, base(objective="toy-ranking", advantage=None))),
    "two stages, the first cut short": lambda: tree(plan(base, base(reward="toy-window"), until="length > 1")),
    "causal policy with critic": lambda: text(base.override("advantage=gae", "critic=value", "kl=kl", "reward=toys:vowels", "updates.minibatch=2")),
    "causal policy that lags": lambda: text(base.override("sampler=toy-lagged", "kl=kl")),
}


@pytest.mark.parametrize("name", SEAMS)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, name):
    config = SEAMS[name]()
    train_config(config, tmp_path / "whole")
    for at in (1, 3):  # before the first checkpoint, and one step past one
        broken_off(config, tmp_path / f"broken-{at}", at)
        same_run(tmp_path / "whole", tmp_path / f"broken-{at}")
    assert len({row["step"] for row in rows(tmp_path / "whole")}) == len(rows(tmp_path / "whole"))
    first = start(config, tmp_path / "fresh")[0].state_dict()["models"]
    assert not first or fingerprint(first) != fingerprint(last_state(tmp_path / "whole")["run"]["models"])  # it did train


def test_the_comparison_notices_forgotten_state(tmp_path):
    config = tree(base(reward="toy-forgetful"))
    train_config(config, tmp_path / "whole")
    broken_off(config, tmp_path / "broken", 3)
    with pytest.raises(AssertionError):
        same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_broken_off_twice_and_lengthened_equals_a_longer_one(tmp_path):
    config = tree(base(reward="toy-window"))
    longer = config.replace(steps=8)
    train_config(longer, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train_config(longer, tmp_path / "broken", progress=_stop_at(3))
    with pytest.raises(Interrupted):
        train_config(longer, tmp_path / "broken", resume=True, progress=_stop_at(7))
    train_config(longer, tmp_path / "broken", resume=True)
    same_run(tmp_path / "whole", tmp_path / "broken")


def _stop_at(at):
    def stop(step, steps, metrics):
        if step == at:
            raise Interrupted

    return stop


# ------------------------------------------------------------------------------------------- what each seam promises besides


def learner_of(config, tmp_path):
    return start(config, tmp_path)[1]


def test_the_window_is_saved_with_its_types(tmp_path):
    train_config(SEAMS["reward total with a memory"](), tmp_path)
    state = last_state(tmp_path)["run"]["live"]["reward"]
    assert state["calls"] == 6 and len(state["seen"]) == 20 and set(map(type, state["by_prompt"])) == {int}


def test_the_lagged_policy_is_behind_and_frozen(tmp_path):
    learner = learner_of(SEAMS["sampler that lags"](), tmp_path)
    behind = learner.sampler.behind
    assert not any(p.requires_grad for p in behind.module.parameters()) and all(p.requires_grad for p in learner.policy.module.parameters())
    start_weights, seen = behind.module.table.clone(), []
    for _ in range(4):
        learner.step()
        seen.append(behind.module.table.clone())
    assert seen[0].equal(start_weights)
    assert not seen[1].equal(start_weights) and seen[2].equal(seen[1]) and not seen[2].equal(learner.policy.module.table)
    assert "sampler.lagged" in learner.run.state_dict()["models"]


def test_an_adapted_policy_may_lag_too(tmp_path):
    """The lagged twin of a LoRA policy is a copy; the policy itself goes on learning."""
    from volvelle.language.models import Pretrained

    config = text(base.override("sampler=toy-lagged"))
    folder = config.model.build(config.task)
    config = config.replace(model=Pretrained(path=str(folder), lora="lora"))
    learner = learner_of(config, tmp_path)
    assert any(p.requires_grad for p in learner.policy.module.parameters())
    before = [p.clone() for p in learner.policy.trainable.parameters]
    learner.step()
    assert any(not a.equal(b) for a, b in zip(before, learner.policy.trainable.parameters))
    broken_off(config, tmp_path / "broken", 3)
    train_config(config, tmp_path / "whole")
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_whole_groups_reach_the_objective(tmp_path):
    """With micro-batches far smaller than a group, the coupled loss still sees every group whole."""
    config = SEAMS["objective over groups"]()
    sizes = []

    def spy(scores, batch):
        sizes.append(sorted(torch.unique(batch.groups, return_counts=True)[1].tolist()))
        return (scores.logps * batch.acted()).sum(1)

    spy.needs = frozenset({"groups"})
    learner_of(config.replace(recipe=config.recipe(objective=spy)), tmp_path).step()
    assert len(sizes) > 2 and all(set(s) == {4} for s in sizes)


def test_roles_decide_who_gets_loss(tmp_path):
    learner = learner_of(SEAMS["forced and tool rows"](), tmp_path)
    rollouts, _ = learner.collect()
    batch = learner.batch(rollouts)
    learner.passes(batch)
    weights = learner.weights(batch)["objective"]
    roles = {toys.POLICY: True, toys.TOOL: False, toys.FORCED: True, 0: False}
    for role, acted in roles.items():
        assert (batch.role == role).any() and ((weights[batch.role == role] > 0) == acted).all()
    assert torch.isfinite(batch.old.logps).all()
    full = learner.policy.score(batch, batch.mask).logps
    scored = batch.acted((toys.POLICY, toys.FORCED))
    torch.testing.assert_close(batch.old.logps[scored], full[scored].detach(), atol=1e-5, rtol=0)
    assert batch.turn[batch.role == toys.TOOL].eq(1).all() and batch.turn.max() == 2
    assert batch.meta["external"].tolist() == [float(r.role[0] == toys.FORCED) for r in rollouts]


def test_inexact_rows_get_old_log_probs_of_their_own(tmp_path):
    learner = learner_of(SEAMS["inexact rows"](), tmp_path)
    rollouts, _ = learner.collect()
    batch = learner.batch(rollouts)
    learner.passes(batch)
    hot = batch.meta["hot"] > 0
    assert batch.exact.logical_not().equal(hot) and 0 < hot.sum() < len(batch)
    torch.testing.assert_close(batch.old.logps, learner.policy.score(batch, batch.mask).logps.detach(), atol=1e-6, rtol=0)
    assert (batch.old.logps[hot] - batch.behaviour.logps[hot]).abs().max() > 0.01
    assert batch.old.logps[~hot].equal(batch.behaviour.logps[~hot])


def test_the_filter_refills_whole_groups(tmp_path):
    learner = learner_of(SEAMS["filter that refills"](), tmp_path)
    for _ in range(4):
        rollouts, metrics = learner.collect()
        groups = [r.group for r in rollouts]
        assert len(set(groups)) == 2 == metrics["groups"] and all(groups.count(g) == 4 for g in set(groups))
        assert all(max(r.reward for r in rollouts if r.group == g) > 0 for g in set(groups))


def test_the_second_model_has_its_own_optimiser(tmp_path):
    train_config(SEAMS["second model"](), tmp_path)
    models = last_state(tmp_path)["run"]["models"]
    assert set(models) == {"policy", "critic.net"}
    assert "momentum_buffer" in models["critic.net"]["optimiser"]["state"][0] and models["critic.net"]["steps"] == 6


def test_boosted_trees_are_stored_as_bytes_and_learn(tmp_path):
    config = SEAMS["trainable of another make"]()
    train_config(config, tmp_path)
    assert isinstance(last_state(tmp_path)["run"]["models"]["critic.trees"]["file"], bytes)
    errors = [row["critic/error"] for row in rows(tmp_path) if "critic/error" in row]
    assert len(errors) == 6


def test_children_are_runs_of_their_own_and_are_not_made_twice(tmp_path):
    config = SEAMS["child runs"]()
    train_config(config, tmp_path / "a")
    children = sorted((tmp_path / "a" / "children").iterdir())
    assert [c.name for c in children] == ["0", "1", "2"] and all((c / "result.json").is_file() for c in children)
    stamps = [(c / "result.json").stat().st_mtime_ns for c in children]
    train_config(config.replace(steps=3), tmp_path / "a", resume=True)
    assert stamps == [(c / "result.json").stat().st_mtime_ns for c in children]


def test_a_child_that_was_broken_off_is_resumed(tmp_path):
    config = SEAMS["child runs"]()
    train_config(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train_config(config, tmp_path / "broken", progress=_stop_at(1))
    child = tmp_path / "broken" / "children" / "0"
    (child / "result.json").unlink()  # as if killed inside it
    for file in (tmp_path / "broken" / "checkpoints").iterdir():
        if file.name != "step-000000":
            import shutil

            shutil.rmtree(file)
    train_config(config, tmp_path / "broken", resume=True)
    assert (child / "result.json").is_file() and rows(child) == rows(tmp_path / "whole" / "children" / "0")


def test_a_stage_starts_from_the_one_before(tmp_path):
    config = tree(plan(base, base))
    train_config(config, tmp_path)
    from safetensors.torch import load_file

    first = load_file(tmp_path / "stages" / "first" / "policy" / "table.safetensors")["table"]
    second = load_file(tmp_path / "policy" / "table.safetensors")["table"]
    assert not first.equal(second)
    learner = learner_of(config, tmp_path)
    learner.enter(1)
    assert learner.learner.policy.module.table.equal(first)
    assert learner.learner.policy.trainable.optimiser.state_dict()["state"] == {}
    assert [row["stage"] for row in rows(tmp_path)[1:]] == [0, 0, 0, 1, 1, 1]


def test_until_ends_a_stage_early_and_a_misspelt_metric_is_named(tmp_path):
    train_config(SEAMS["two stages, the first cut short"](), tmp_path / "a")
    assert [row["stage"] for row in rows(tmp_path / "a")[1:]] == [0, 1, 1, 1]
    assert (tmp_path / "a" / "result.json").is_file()
    with pytest.raises(RunStopped, match="step 1: until='lenth > 1': the step reported no 'lenth'"):
        train_config(tree(plan(base, base, until="lenth > 1")), tmp_path / "b")


def test_rounds_repeat_the_stages(tmp_path):
    config = tree(Plan(stages={"a": Stage(recipe=base, steps=1), "b": Stage(recipe=base, steps=1)}, rounds=2), steps=4)
    train_config(config, tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "whole" / "stages").iterdir()) == ["0-a", "0-b", "1-a", "1-b"]
    broken_off(config, tmp_path / "broken", 3)
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_plan_is_a_method_like_any_other():
    from volvelle.core.parts import method
    from volvelle.core.registry import registry

    before = dict(registry.methods)
    try:
        made = method("toy-plan", plan(base, base), title="a", source="b")
        assert registry.method("toy-plan").wing == "language" and registry.method("language/toy-plan").recipe == made
        assert configure("toy-plan", "tree").steps == 6
    finally:
        registry.methods.clear()
        registry.methods.update(before)


def test_a_function_part_of_this_program_trains(tmp_path):
    config = tree(base(advantage=lambda batch: batch.rewards - 0.5))
    train_config(config, tmp_path / "whole")
    broken_off(config, tmp_path / "broken", 3)  # train(recipe, resume=path) goes on with it
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_adam_moments_survive(tmp_path):
    config = tree(base.override("updates.optimiser.lr=0.05"))
    assert isinstance(config.recipe.updates.optimiser, Adam)
    train_config(config, tmp_path)
    assert last_state(tmp_path)["run"]["models"]["policy"]["optimiser"]["state"][0]["step"].item() == 6
