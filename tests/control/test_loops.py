"""The two loops end to end on tiny environments: every method learns, resumes exactly, trains seeds side by side, and refuses what makes no sense."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import final_state, stop_at
import torch
from toy_envs import Counter, Doubled, Factor, Faulty, Reach, Target, Zoo

import volvelle
from volvelle.control.methods.dqn import dqn
from volvelle.control.methods.ppo import ppo
from volvelle.control.policy import Policy
from volvelle.control.watching import watch
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.files import read_lines
from volvelle.core.state import load_state
from volvelle.core.trainer import checkpoints

SMALL = ["network.hidden=[32]", "evaluation.episodes=20"]
QUICK = ["period=200", "warmup=100", "replay.capacity=2000", "replay.batch=32", "every=2", *SMALL]
Q = [*QUICK, "copy_every=40", "optimiser.lr=3e-3", "epsilon_share=0.6"]
SOFT = [*QUICK, "actor_optimiser.lr=3e-3", "critic_optimiser.lr=3e-3"]
ON = ["envs=8", "length=16", "epochs=4", "minibatches=2", "anneal=false", "optimiser.lr=3e-3", *SMALL]


def train(method, task, folder, overrides=(), **options):
    return volvelle.train(method, task=task, folder=folder, overrides=list(overrides), **{"steps": 4, "checkpoint_every": 2, "seed": 0, **options})


# ---- learning

@pytest.mark.parametrize("method, overrides, steps", [
    ("ppo", ON, 12), ("a2c", ["envs=16", "optimiser.lr=1e-2", *SMALL], 60), ("reinforce", ["envs=32", "length=5", "optimiser.lr=1e-2", *SMALL], 60),
    ("dqn", Q, 6), ("dqn", [*Q, "double=true", "dueling=true", "replay.n_step=3", "value=huber"], 6),
    ("dqn", [*Q, "replay=prioritised"], 6), ("dqn", [*Q, "value=hl-gauss", "value.low=-1", "value.high=2"], 6),
    ("dqn", [*Q, "value=two-hot", "value.low=-1", "value.high=2"], 6), ("c51", [*Q, "value.low=-1", "value.high=2", "value.bins=31"], 6),
    ("qr-dqn", [*Q, "value.quantiles=8"], 6), ("sac-discrete", [*SOFT, "alpha_start=0.1", "entropy_share=0.1"], 6),
], ids=lambda v: v if isinstance(v, str) else None)
def test_every_method_for_discrete_actions_solves_a_bandit_with_three_states(method, overrides, steps, tmp_path):
    made = train(method, lambda: Target(), tmp_path / "run", overrides, steps=steps)
    assert made.result["metrics"]["return"] > 0.95, made.result


@pytest.mark.parametrize("method, overrides, steps", [
    ("ppo-continuous", [*ON, "normalise_rewards=false", "head.start=-1"], 25), ("sac", [*SOFT, "alpha=0.01"], 5), ("td3", [*SOFT, "exploration=0.3"], 5),
    ("sac", [*SOFT, "alpha=0.01", "value=hl-gauss", "value.low=-4", "value.high=1"], 6),
], ids=lambda v: v if isinstance(v, str) else None)
def test_every_method_for_continuous_actions_reaches_the_goal(method, overrides, steps, tmp_path):
    made = train(method, lambda: Reach(), tmp_path / "run", overrides, steps=steps)
    assert made.result["metrics"]["return"] > -0.03 and made.result["start"]["return"] < -0.1, made.result


def test_mixed_actions_images_and_words_train(tmp_path):
    made = train("ppo", lambda: Zoo(), tmp_path / "run", ["envs=2", "length=8", "minibatches=2", "epochs=1", "network=small-cnn", "network.hidden=[16]",
                                                        "normalise_observations=true", "evaluation.episodes=2"], steps=2)
    assert made.result["metrics"]["return"] == 4.0
    policy = Policy.load(tmp_path / "run" / "policy")
    assert list(policy.vocabulary.codes) == ["red", "blue"] and policy.vocabulary.closed


# ---- exact resume

METHODS = [("ppo", [*ON, "normalise_observations=true", "normalise_rewards=true"], lambda: Counter(5)), ("reinforce", [*SMALL, "envs=2", "length=9"], lambda: Counter(5)),
           ("dqn", [*Q, "replay.n_step=3", "normalise_observations=true"], lambda: Counter(7, ends=False)), ("dqn", [*Q, "replay=prioritised", "envs=2"], lambda: Counter(5)),
           ("sac", SOFT, lambda: Reach()), ("td3", SOFT, lambda: Reach()), ("sac-discrete", SOFT, lambda: Target())]


@pytest.mark.parametrize("method, overrides, make", METHODS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_run_broken_off_ends_bit_for_bit_as_an_unbroken_one(method, overrides, make, tmp_path):
    train(method, make, tmp_path / "whole", overrides, steps=6, strict=True)

    with pytest.raises(KeyboardInterrupt):
        train(method, make, tmp_path / "broken", overrides, steps=6, progress=stop_at(5))
    assert checkpoints(tmp_path / "broken")[-1].name == "step-000004"
    volvelle.train(method, task=make, resume=tmp_path / "broken", overrides=list(overrides), steps=6, checkpoint_every=2, seed=0)
    assert final_state(tmp_path / "whole") == final_state(tmp_path / "broken")
    a, b = (Path(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "broken"))
    assert len(a) == len(b) == 7


@pytest.mark.parametrize("method, overrides", [("ppo", ["envs=4", "length=64", "evaluation.episodes=2"]),
                                               ("dqn", ["period=200", "warmup=100", "replay.capacity=700", "replay.batch=32", "evaluation.episodes=2"])])
def test_cartpole_killed_with_signal_9_goes_on_bit_for_bit(method, overrides, tmp_path):
    options = {"task": "CartPole-v1", "overrides": overrides, "steps": 6, "checkpoint_every": 2, "seed": 3}
    volvelle.train(method, folder=tmp_path / "whole", **options)
    broken = tmp_path / "broken"
    slow = lambda step, steps, metrics: time.sleep(0.3)
    process = multiprocessing.get_context("fork").Process(target=lambda: volvelle.train(method, folder=broken, progress=slow, **options))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any(p.name == "step-000004" for p in checkpoints(broken)):
            assert process.is_alive(), "ended before it could be killed"
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert not (broken / "result.json").exists() and checkpoints(broken)[-1].name == "step-000004"
    made = volvelle.train(resume=broken)
    assert final_state(broken) == final_state(tmp_path / "whole") and made.result["steps"] == 6


# ---- seeds side by side

@pytest.mark.parametrize("method, overrides, make, steps", [
    ("ppo", [*ON, "normalise_observations=true", "normalise_rewards=true"], lambda: Counter(5), 2), ("dqn", Q, lambda: Target(), 1), ("sac", SOFT, lambda: Reach(), 1)])
def test_seeds_trained_as_one_model_are_the_runs_they_would_be_alone(method, overrides, make, steps, tmp_path):
    both = train(method, make, tmp_path / "both", [*overrides, "seeds=2"], steps=steps, seed=4)
    for s in range(2):
        alone = train(method, make, tmp_path / f"alone{s}", overrides, steps=steps, seed=4 + s)
        for key, one in alone.learner.product()["policy"].module.state_dict().items():
            if one.ndim and one.shape[0] == 1:
                stacked = both.learner.product()["policy"].module.state_dict()[key]
                assert torch.allclose(stacked[s : s + 1], one, atol=2e-4), (s, key)
        assert both.result["metrics"][f"return@{s}"] == pytest.approx(alone.result["metrics"]["return"], abs=0.15)
    assert both.result["metrics"]["return"] == pytest.approx(np.mean([both.result["metrics"][f"return@{s}"] for s in range(2)]))


# ---- what a run makes

def test_a_saved_policy_acts_as_the_trained_one_and_only_in_its_task(tmp_path):
    made = train("ppo", lambda: Counter(5), tmp_path / "run", [*ON, "normalise_observations=true"])
    policy, live = Policy.load(tmp_path / "run" / "policy"), made.learner.policy()
    observations = np.random.default_rng(0).normal(2, 3, (1, 50, 3)).astype(np.float32)
    assert torch.equal(policy.act(observations).actions, live.act(observations).actions)
    assert policy.act(observations, explore=True).actions.shape == (1, 50)
    from volvelle.control.envs import probe
    from volvelle.control.tasks import Gym
    with pytest.raises(UserError, match="was made for observations of 3 numbers and actions of 2 choices; CartPole-v1 has observations of 4 numbers") as error:
        Policy.load(tmp_path / "run" / "policy", probe(Gym()), "CartPole-v1")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no policy there"):
        Policy.load(tmp_path)


def test_a_run_is_evaluated_on_another_task_of_the_same_shape_or_refused(tmp_path):
    train("ppo", "CartPole-v1", tmp_path / "run", ["envs=2", "length=16", "minibatches=2", "evaluation.episodes=3"], steps=1, evaluate_every=1)
    shorter = volvelle.evaluate(tmp_path / "run", task="CartPole-v0", overrides=["task.time_limit=4", "evaluation.episodes=5"])
    assert shorter["return"] == 4
    with pytest.raises(UserError, match="was made for observations of 4 numbers .* Acrobot-v1 has observations of 6 numbers"):
        volvelle.evaluate(tmp_path / "run", task="Acrobot-v1")


def test_a_checkpoint_of_another_environment_is_one_line(tmp_path):
    train("ppo", "CartPole-v1", tmp_path / "run", ["envs=2", "length=16", "minibatches=2", "evaluation.episodes=1"], steps=2)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("CartPole-v1", "Acrobot-v1").replace("steps: 2", "steps: 4"))
    with pytest.raises(RunStopped, match="expected|was made for") as error:
        volvelle.train(resume=tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method, overrides", [("ppo", ["envs=1", "length=16", "minibatches=2", *SMALL]), ("dqn", ["period=16", "warmup=8", "every=4", *SMALL])])
def test_a_failing_environment_loses_nothing_that_was_trained(method, overrides, tmp_path):
    make = lambda: Faulty("nan observation", at=(13, 2))
    with pytest.raises(RunStopped, match="step 3: environment .* returned an observation of nan .*; last good checkpoint: .*step-000002") as error:
        train(method, make, tmp_path / "run", overrides, steps=50, checkpoint_every=0)
    assert "\n" not in str(error.value)
    state = load_state(checkpoints(tmp_path / "run")[-1])
    assert state["run"]["step"] == 2 and state["learner"]["env_steps"] >= 32
    name = "actor-critic" if method == "ppo" else "q"
    assert state["run"]["models"][name]["steps"] > 0


# ---- refusals

@pytest.mark.parametrize("method, task, overrides, says", [
    ("dqn", "Pendulum-v1", [], "q-learning needs discrete actions; this task has 1 continuous numbers"),
    ("sac", "CartPole-v1", [], "head=squashed needs continuous actions with finite bounds; this task has 2 choices"),
    ("td3", "CartPole-v1", [], "td3 needs continuous actions with finite bounds"),
    ("sac-discrete", "Pendulum-v1", [], "sac-discrete needs discrete actions"),
    ("ppo", "CartPole-v1", ["head=gaussian"], "head=gaussian needs continuous actions"),
    ("ppo", "CartPole-v1", ["network=cnn"], "network=cnn needs images; the observations are 4 numbers"),
    ("ppo", "CartPole-v1", ["minibatches=3"], "envs \\* length = 512 steps must divide into minibatches"),
    ("ppo", "CartPole-v1", ["value=c51"], "value=c51 learns a return distribution, but on-policy targets are numbers"),
    ("ppo", "CartPole-v1", ["value=hl-gauss"], "value_clip=0.2: clips squared errors"),
    ("ppo", "CartPole-v1", ["advantage=monte-carlo"], "advantage=monte-carlo needs whole_episodes=true"),
    ("sac", "Pendulum-v1", ["value=quantile"], "value=quantile learns a return distribution, but soft values are numbers"),
    ("dqn", "CartPole-v1", ["replay.capacity=11", "envs=2"], "replay.capacity=11: must be a multiple of the number of environments"),
    ("dqn", "CartPole-v1", ["gamma=2"], "gamma='2': expected"), ("dqn", "CartPole-v1", ["value=nothing"], "unknown value part 'nothing'"),
    ("ppo", None, [], "no task; give one, for example --task CartPole-v1"), ("ppo", "tree", [], "belongs to the"),
])
def test_what_makes_no_sense_is_refused_in_one_line_and_nothing_is_written(method, task, overrides, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        train(f"control/{method}", task, tmp_path / "run", overrides)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_value_heads_of_other_papers_fit_on_policy_too(tmp_path):
    train("ppo", lambda: Target(), tmp_path / "run", [*ON, "value=hl-gauss", "value.low=-1", "value.high=2", "value_clip=none"], steps=1)


def relabelled(batch):
    return {**batch, "rewards": batch["rewards"] * 0 - 1}


def plain_advantage(rollout, gamma):
    return rollout.rewards - rollout.rewards.mean(), rollout.rewards


def test_plain_functions_are_parts(tmp_path):
    made = train("dqn", lambda: Target(), tmp_path / "a", [*Q], steps=1)
    assert made.result["steps"] == 1
    recipe = dqn(relabels={"worse": relabelled}).override(*Q)
    made = volvelle.train(recipe, task=lambda: Target(), folder=tmp_path / "b", steps=2, seed=0)
    with torch.no_grad():
        q = made.learner.agent.module.values(torch.eye(3)[None])
    assert q.max() < 0                                       # it only ever saw the reward -1
    made = volvelle.train(ppo(advantage=plain_advantage, value_weight=0.0, value_clip=None).override(*ON), task=lambda: Target(), folder=tmp_path / "c", steps=12, seed=0)
    assert made.result["metrics"]["return"] > 0.9


# ---- watching

@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cartpole") / "run"
    train("ppo", "CartPole-v1", folder, ["envs=2", "length=16", "minibatches=2", "evaluation.episodes=1", "seeds=2"], steps=1, evaluate_every=1)
    return folder


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_a_policy_is_filmed(cartpole, tmp_path, name):
    imageio = pytest.importorskip("imageio.v2")
    returns = watch(cartpole, episodes=2, save=tmp_path / name, member=1)
    frames = imageio.mimread(tmp_path / name, memtest=False)
    pictures = sum(returns) + 2                               # CartPole pays 1 per step; a .gif keeps no picture twice
    assert len(returns) == 2 and frames[0].shape[:2] == (400, 600)
    assert abs(len(frames) - pictures) <= 1 if name == "film.mp4" else pictures / 2 < len(frames) <= pictures
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert watch(cartpole, episodes=2, save=tmp_path / name, member=1) == returns


def test_watching_says_what_is_missing(cartpole, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for options, says in (({}, "no display to open a window on; film it instead with --save FILE.mp4"), ({"save": tmp_path / "film.avi"}, "accepted: a name ending in .mp4 or .gif"),
                          ({"save": tmp_path / "film.mp4", "member": 2}, "member=2: the policy holds 2 seeds; accepted: 0 to 1"),
                          ({"save": tmp_path / "film.mp4", "task": "Acrobot-v1"}, "was made for observations of 4 numbers")):
        with pytest.raises(UserError, match=says):
            watch(cartpole, **options)
    train("ppo", lambda: Counter(3), tmp_path / "own", [*ON], steps=1)
    with pytest.raises(UserError, match="was defined inside a program"):
        watch(tmp_path / "own", save=tmp_path / "film.mp4")


def test_evaluations_are_filmed_on_request(tmp_path):
    pytest.importorskip("imageio.v2")
    train("ppo", "CartPole-v1", tmp_path / "run", ["envs=2", "length=16", "minibatches=2", "evaluation.episodes=1", "evaluation.record=1"], steps=1)
    assert sorted(p.name for p in (tmp_path / "run" / "videos").iterdir()) == ["step-000000-0.mp4", "step-000001-0.mp4"]


# ---- rewards changed on their way

@pytest.mark.parametrize("when", ["store", "sample"])
def test_a_relabel_sees_the_info_it_asks_for_and_its_state_is_kept(when, tmp_path):
    made = volvelle.train(dqn(relabels={"f": Factor(when=when)}).override(*Q, "gamma=0"), task=lambda: Counter(3), folder=tmp_path / "run", steps=4, seed=0)
    rewards = made.learner.replay.blocks.tensors["rewards"][0, :300]
    assert set(rewards.flatten().tolist()) == ({10.0, 20.0, 30.0} if when == "store" else {1.0, 2.0, 3.0})
    with torch.no_grad():
        q = made.learner.agent.module.values(torch.tensor([[[0.0, 0, 0]]]))
    assert q.mean() == pytest.approx(10, abs=3)              # the first step's own reward is 1
    assert load_state(checkpoints(tmp_path / "run")[-1])["run"]["live"]["relabels.f"] == {"seen": 4}


def test_relabels_and_shapers_on_policy(tmp_path):
    made = volvelle.train(ppo(relabels={"f": Factor()}).override(*ON), task=lambda: Counter(3), folder=tmp_path / "a", steps=1, seed=0)
    assert set(made.learner.blocks.tensors["rewards"].flatten().tolist()) == {10.0, 20.0, 30.0}
    assert made.result["metrics"]["return"] == 6             # evaluation measures the task's own reward
    made = volvelle.train(ppo(shapers={"d": Doubled()}).override(*ON), task=lambda: Counter(3), folder=tmp_path / "b", steps=1, seed=0)
    assert set(made.learner.blocks.tensors["rewards"].flatten().tolist()) == {2.0, 4.0, 6.0} and made.result["metrics"]["return"] == 6


def test_a_kl_limit_ends_the_passes_and_is_for_one_seed(tmp_path):
    free = train("ppo", lambda: Target(), tmp_path / "free", ON, steps=1)
    bound = train("ppo", lambda: Target(), tmp_path / "bound", [*ON, "target_kl=1e-7"], steps=1)
    updates = [read_lines(t.folder / "metrics.jsonl")[-1]["updates"] for t in (free, bound)]
    assert updates[0] == 8 and updates[1] < 4
    with pytest.raises(UserError, match="target_kl=0.01: would stop the passes of all seeds"):
        train("ppo", lambda: Target(), tmp_path / "no", [*ON, "target_kl=0.01", "seeds=2"])
