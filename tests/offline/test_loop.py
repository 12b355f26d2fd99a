"""The offline loop end to end: training, seeds side by side, exact resume, evaluation, refusals."""

import numpy as np
import pytest
from helpers import final_state, stop_at
import torch

import volvelle
from volvelle.control.policy import Policy
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import part
from volvelle.core.trainer import checkpoints
from volvelle.offline.behaviours import FromRun, PendulumSwing, Walker
from volvelle.offline.commands import Maze
from volvelle.offline.data.collect import collect
from volvelle.offline.data.files import write_dataset
from volvelle.offline.samplers import Transitions
from volvelle.offline.tasks import Generated
from volvelle.control.tasks import Gym

PENDULUM = Generated(quality="medium", steps=1000)
MAZE = Generated(env=Maze(maze="small"), behaviour=Walker(), quality="navigate", steps=3000)
SMALL = ["network.hidden=[32]", "batch=32", "period=20", "evaluation.episodes=2"]


def train(method, task, folder, overrides=(), **options):
    small = [w for w in SMALL if w.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    return volvelle.train(method, task=task, folder=folder, overrides=[*small, *overrides], **{"steps": 4, "checkpoint_every": 2, "seed": 0, **options})


def test_cloning_the_driver_learns_and_reports_the_normalised_score(tmp_path):
    made = train("bc", Generated(quality="expert", steps=4000), tmp_path / "run", ["period=600", "network.hidden=[64,64]", "optimiser.lr=3e-3", "evaluation.episodes=10"])
    found = made.result["metrics"]
    assert found["score"] > made.result["start"]["score"] + 20 and found["score"] == pytest.approx(
        100 * (found["return"] - (low := MADE()["ref_min_score"])) / (MADE()["ref_max_score"] - low))


def MADE():
    return Generated(quality="expert", steps=4000).dataset().meta


def test_goals_are_reached_and_every_task_is_reported(tmp_path):
    """Six seeds lie between .47 and .9."""
    made = train("gcbc", MAZE, tmp_path / "run", ["period=900", "network.hidden=[64,64]", "optimiser.lr=3e-3", "batch=128", "evaluation.episodes=6", "sampler.actor_geometric=true", "gamma=0.9"])
    found = made.result["metrics"]
    assert found["success"] > 0.3 and found["success"] == pytest.approx(np.mean([found[f"success/{n}"] for n in range(1, 6)]))
    policy = Policy.load(tmp_path / "run" / "policy")
    assert policy.spec.observations.goal == 2
    assert volvelle.evaluate(tmp_path / "run")["success"] == found["success"]
    only = volvelle.evaluate(tmp_path / "run", task=Maze(maze="small", goal=3))
    assert only["success"] == found["success/3"] and "success/3" not in only


@pytest.mark.parametrize("method, task, more", [("bc", PENDULUM, ["normalise_observations=true"]), ("bc", PENDULUM, ["head=none"]), ("gcbc", MAZE, [])])
def test_a_run_broken_off_ends_bit_for_bit_as_an_unbroken_one(method, task, more, tmp_path):
    train(method, task, tmp_path / "whole", more, steps=6, strict=True)

    with pytest.raises(KeyboardInterrupt):
        train(method, task, tmp_path / "broken", more, steps=6, progress=stop_at(5))
    assert checkpoints(tmp_path / "broken")[-1].name == "step-000004"
    volvelle.train(resume=tmp_path / "broken")
    assert final_state(tmp_path / "whole") == final_state(tmp_path / "broken")


def test_seeds_side_by_side_are_the_runs_one_by_one(tmp_path):
    together = train("bc", PENDULUM, tmp_path / "all", ["seeds=2"], seed=3)
    for i in range(2):
        alone = train("bc", PENDULUM, tmp_path / str(i), seed=3 + i)
        assert together.result["metrics"][f"return@{i}"] == pytest.approx(alone.result["metrics"]["return"], rel=1e-4)


def test_an_unknown_environment_leaves_the_distance_to_the_data(tmp_path):
    path = write_dataset(collect(Maze(maze="small"), Walker(), "stitch", 500), tmp_path / "set.npz")
    made = train("gcbc", f"offline:{path}", tmp_path / "run")
    assert set(made.result["metrics"]) == {"action_error"} and made.result["metrics"]["action_error"] < made.result["start"]["action_error"]


def test_a_policy_learnt_offline_collects_again(tmp_path):
    train("bc", PENDULUM, tmp_path / "run", ["seeds=2"])
    data = collect(Gym(id="Pendulum-v1"), FromRun(path=str(tmp_path / "run"), member=1), "expert", 100)
    assert data.steps == 100
    with pytest.raises(UserError, match="holds 2 seeds"):
        collect(Gym(id="Pendulum-v1"), FromRun(path=str(tmp_path / "run"), member=2), "expert", 100)


def test_a_changed_dataset_is_noticed_on_resume(tmp_path):
    path = write_dataset(collect(Gym(id="Pendulum-v1"), PendulumSwing(), "random", 400), tmp_path / "set")
    train("bc", f"offline:{path}", tmp_path / "run", steps=2)
    path.rename(tmp_path / "old")
    write_dataset(collect(Gym(id="Pendulum-v1"), PendulumSwing(), "random", 600), tmp_path / "set")
    with pytest.raises(RunStopped, match="another dataset"):
        volvelle.train(resume=tmp_path / "run", steps=3)


@pytest.mark.parametrize("method, task, more, told", [
    ("bc", "Pendulum-v1", [], "Pendulum-v1 is no dataset"), ("bc", None, [], "no task; give a dataset"),
    ("bc", MAZE, [], "learns from rewards, and maze-small commands goals"), ("gcbc", PENDULUM, [], "Pendulum-v1 commands none"),
    ("gcbc", MAZE, ["normalise_observations=true"], "not for recipes with goals"), ("gcbc", MAZE, ["rewards=minus-one"], "make their rewards from goals"),
    ("bc", Generated(quality="medium", steps=1000).replace(env="MountainCarContinuous-v0"), [], "PLACE"),
])
def test_what_makes_no_sense_is_told_in_one_line(method, task, more, told, tmp_path):
    if told == "PLACE":
        path = write_dataset(PENDULUM.dataset(), tmp_path / "set")
        from volvelle.offline.tasks import Recorded

        task, told = Recorded(path=str(path), env="MountainCarContinuous-v0"), "was made for"
    with pytest.raises(UserError, match=told) as error:
        train(method, task, tmp_path / "run", more)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_relabels_change_sampled_batches(tmp_path):
    from volvelle.core.parts import Call
    from volvelle.control.slots import Relabel
    from volvelle.offline.methods.bc import bc

    seen = []

    def zero(batch):
        seen.append(batch["actions"].shape)
        return {**batch, "actions": torch.zeros_like(batch["actions"])}

    made = volvelle.train(bc(relabels={"zero": Call(zero).bound(Relabel)}, period=200, batch=32, head=None), task=PENDULUM, folder=tmp_path / "run", steps=2)
    rows = PENDULUM.dataset().fields["obs"][None, :200]
    assert len(seen) == 400 and made.learner.policy().act(rows).actions.abs().mean() < 0.1


@part("weighing")
class Weighing(Transitions):
    """Batches with weights of their own."""

    def build(self, table, rng, batch, gamma):
        made = super().build(table, rng, batch, gamma)
        draw = made.draw
        made.draw = lambda: draw() | {"weights": torch.ones(rng.uniform(batch).shape)}
        return made


@pytest.mark.parametrize("method, task, sampler, told", [
    ("iql", PENDULUM, "recorded-actions", "sampler=recorded-actions: its batches have no discounts, next_obs, which implicit-q learns from; accepted: transitions"),
    ("td3-bc", PENDULUM, "recorded-actions", "no discounts, next_obs, which td3-bc learns from"),
    ("dual-rl", PENDULUM, "state-pairs", "no rewards, discounts, which"),
    ("gciql", MAZE, "goal-transitions", "no value_goals, actor_goals, rewards, masks, which goal-implicit-q learns from; accepted: goals"),
    ("hiql", MAZE, "goals", "two levels need goals for both; accepted: subgoals, options"),
    ("iql", PENDULUM, "weighing", "its batches have weights, which implicit-q does not heed"),
])
def test_a_sampler_that_gives_too_little_or_weights_is_refused_in_one_line(method, task, sampler, told, tmp_path):
    with pytest.raises(UserError) as error:
        train(method, task, tmp_path / "run", [f"sampler={sampler}"])
    assert told in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_critic_that_needs_returns_says_so(tmp_path):
    with pytest.raises(UserError, match="its batches have no returns, which value-guided learns from; accepted: labelled-demonstrations"):
        volvelle.train("v-gps", task=PENDULUM, folder=tmp_path / "run", overrides=[f"base={__name__}:still", "sampler=transitions"], steps=1)


def still(observations):
    return np.zeros((len(observations), 1), np.float32)
