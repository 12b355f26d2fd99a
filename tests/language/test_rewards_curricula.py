"""Rewards and curricula through a real run: worked numbers, refusals that name the prompt, and state that survives a checkpoint."""

import math

import numpy as np
import pytest
import torch

from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import coerce, from_config, to_config
from volvelle.core.run import Run, RunConfig
from volvelle.core.schedule import Linear
from volvelle.core.state import load_state, save_state
from volvelle.language import curricula, rewards
from volvelle.language.recipe import LanguageRecipe
from volvelle.language.records import Prompt, Rollout
from volvelle.language.slots import Curriculum, Reward


def rollout(text="5", finish="stop", length=3, **row) -> Rollout:
    return Rollout(Prompt("p1", text="2+3?", row={"question": "23", "answer": "5", **row}), [7] * length, text, torch.zeros(length), finish)


def run(tmp_path, task="digit-sum", **parts) -> Run:
    return Run(RunConfig(recipe=LanguageRecipe(**parts), task=task), tmp_path / "run")


def started(tmp_path, reward, *words, **changes):
    found = LanguageRecipe(reward=reward).override(*words).reward.replace(**changes)
    made = run(tmp_path, reward=found)
    return made.start("reward", found)


def rewarded(live, rollouts, step=0):
    scores = live.score(rollouts)
    return scores, live.total(scores, {"rollouts": rollouts}, step)


# --------------------------------------------------------------------------------------------------------------------------- rewards

def test_verifier_is_the_tasks_own_score(tmp_path):
    scores, total = rewarded(started(tmp_path, "verifier"), [rollout("2,5>5"), rollout("6")])
    assert list(scores) == ["verifier"] and total.tolist() == [1.0, 0.0]


def test_overlong_worked_numbers(tmp_path):
    live = started(tmp_path, "overlong", cap=100, buffer=20)
    assert [live.penalty(n) for n in (1, 80, 85, 90, 100)] == [0, 0, -0.25, -0.5, -1.0]
    _, total = rewarded(live, [rollout(length=n) for n in (80, 90, 100)])
    assert total.tolist() == [0.0, -0.5, -1.0]
    assert started(tmp_path, "overlong", cap=100, buffer=20, factor=0.5).penalty(100) == -0.5


def test_overlong_takes_its_cap_from_sampling(tmp_path):
    live = started(tmp_path, "overlong")
    assert (live.cap, live.buffer) == (32, 6)  # the task's
    made = run(tmp_path, sampler=LanguageRecipe().sampler.replace(max_tokens=10))
    assert made.start("reward", rewards.Overlong()).cap == 10
    with pytest.raises(UserError, match="buffer=40: must not exceed the cap of 32"):
        started(tmp_path, "overlong", buffer=40)


def test_missing_end(tmp_path):
    _, total = rewarded(started(tmp_path, "missing_eos", penalty=0.5), [rollout(), rollout(finish="length")])
    assert total.tolist() == [0.0, -0.5]


def test_format(tmp_path):
    live = started(tmp_path, "format")
    texts = ["<think>a\nb</think> <answer>5</answer>", "<answer>5</answer>", "x <think>a</think><answer>5</answer>", "<think></think><answer>5</answer>"]
    assert rewarded(live, [rollout(t) for t in texts])[1].tolist() == [1, 0, 0, 0]
    assert rewarded(started(tmp_path, "format", pattern="b+", anywhere=True), [rollout("abbc"), rollout("ac")])[1].tolist() == [1, 0]
    with pytest.raises(UserError, match="not a regular expression"):
        rewards.Format(pattern="(")


def test_mathematics(tmp_path):
    live = started(tmp_path, "math")
    assert rewarded(live, [rollout(r"\boxed{\frac{10}{2}}"), rollout("it is 6"), rollout("five")])[1].tolist() == [1, 0, 0]
    assert live.gives == {"binary_rewards"}
    with pytest.raises(RunStopped, match="'math' on prompt 'p1': no column 'gold'; there are: question, answer"):
        started(tmp_path, "math", column="gold").score([rollout()])


def test_mix_weighs_and_logs_each(tmp_path):
    live = started(tmp_path, "mix", "reward.parts.right=verifier", "reward.parts.short=overlong", "reward.parts.short.weight=0.1",
                   "reward.parts.short.reward.cap=4", "reward.parts.short.reward.buffer=2", "reward.parts.form=format", "reward.parts.form.weight=2",
                   "reward.parts.form.reward.pattern=.*>.*")
    scores, total = rewarded(live, [rollout("2,5>5", length=3), rollout("5", length=4), rollout("6>6", length=1)])
    assert {k: v.tolist() for k, v in scores.items()} == {"right": [1, 1, 0], "short": [-0.5, -1, 0], "form": [1, 0, 1]}
    assert total.tolist() == pytest.approx([1 - 0.05 + 2, 1 - 0.1, 2])


def half(prompt, response, *, scale=1.0, **row):
    return scale * float(response == row["answer"]) / 2


def test_mix_takes_functions_nested_mixtures_and_schedules(tmp_path):
    inner = rewards.Mix(parts={"a": "verifier", "b": half})
    mix = rewards.Mix(parts={"inner": inner, "f": rewards.Weighted(half, weight=Linear(0, 1, 10))})
    made = run(tmp_path, reward=mix)
    live = made.start("reward", mix)
    scores, total = rewarded(live, [rollout("5"), rollout("6")], step=5)
    assert set(scores) == {"inner/a", "inner/b", "f"} and total.tolist() == [1.0 + 0.5 + 0.25, 0.0]
    again = run(tmp_path, reward=mix)
    fresh = again.start("reward", mix)
    resumed(made, again, tmp_path / "state")
    assert fresh.total(scores, {}, 5).tolist() == total.tolist()  # stored scores can be weighed again after a resume


def test_mix_round_trips_and_refuses():
    mix = LanguageRecipe(reward=rewards.Mix(parts={"a": "verifier", "b": rewards.Weighted("overlong", 0.5)})).reward
    assert from_config(Reward, to_config(mix)) == mix and mix.override("parts.a=none").parts.keys() == {"b"}
    with pytest.raises(UserError, match="reward=mix is empty"):
        LanguageRecipe(reward="mix").validate()
    with pytest.raises(UserError, match="'a/b' cannot be the name"):
        rewards.Mix(parts={"a/b": "verifier"})
    with pytest.raises(UserError, match="unknown reward part 'verifer'.*did you mean verifier"):
        rewards.Mix(parts={"a": "verifer"})
    with pytest.raises(UserError, match="reward.parts.a.weight"):
        LanguageRecipe().override("reward=mix", "reward.parts.a=verifier", "reward.parts.a.weight=x")


@pytest.mark.parametrize("value, said", [(math.nan, "returned nan"), (None, "NoneType"), (math.inf, "inf"), ("1", "str"), ([1.0, 2.0], "list")])
def test_a_bad_score_names_reward_and_prompt(value, said):
    with pytest.raises(RunStopped, match=f"reward 'mine' on prompt 'p1'.*{said}"):
        rewards.each("mine", [rollout()], lambda r: value)


def test_a_raising_reward_names_reward_and_prompt(tmp_path):
    def broken(prompt, response, **row):
        return 1 / 0

    mix = rewards.Mix(parts={"mine": broken})
    with pytest.raises(RunStopped, match="on prompt 'p1' raised ZeroDivisionError"):
        run(tmp_path, reward=mix).start("reward", mix).score([rollout()])


# ------------------------------------------------------------------------------------------------------------------------- curricula

def live(made: Run, name: str, **changes):
    return made.start("curriculum", coerce(Curriculum, name, "curriculum").replace(**changes))


def names(prompts) -> list[str]:
    return [p.id for p in prompts]


def resumed(made: Run, again: Run, folder):
    """The state of a run, written, read back and loaded into another."""
    folder.mkdir()
    save_state(folder, made.state_dict())
    again.load_state_dict(load_state(folder))


SMALL = "digit-sum"


def small(tmp_path, **changes) -> Run:
    made = run(tmp_path, task=SMALL)
    object.__setattr__(made.config, "task", made.config.task.replace(train=7, **changes))
    return made


def test_shuffle_visits_every_prompt_once_per_epoch(tmp_path):
    curriculum = live(small(tmp_path), "shuffle")
    drawn = names(curriculum.draw(3)) + names(curriculum.draw(4))
    assert len(set(drawn)) == 7 and curriculum.epoch == 1
    more = names(curriculum.draw(17))  # two epochs and three prompts
    assert sorted(more[:7]) == sorted(more[7:14]) == sorted(drawn) and len(set(more[14:])) == 3 and curriculum.epoch == 4
    assert len({tuple(drawn), tuple(more[:7]), tuple(more[7:14])}) == 3  # false alarm once in 1,680


@pytest.mark.parametrize("name", ["shuffle", "uniform", "fixed"])
def test_curricula_go_on_where_they_were(name, tmp_path):
    made, again = small(tmp_path), small(tmp_path)
    changes = {"first": 5} if name == "fixed" else {}
    first = live(made, name, **changes)
    assert len(first.draw(4)) == 4
    second = live(again, name, **changes)
    resumed(made, again, tmp_path / "state")
    assert names(first.draw(9)) == names(second.draw(9))


def test_shuffle_refuses_other_data(tmp_path):
    made = small(tmp_path)
    live(made, "shuffle").draw(1)
    again = run(tmp_path)
    live(again, "shuffle")
    with pytest.raises(RunStopped, match="has 2000 prompts now and had 7"):
        resumed(made, again, tmp_path / "state")


def test_shuffle_before_the_first_draw_can_be_checkpointed(tmp_path):
    made, again = small(tmp_path), small(tmp_path)
    first, second = live(made, "shuffle"), live(again, "shuffle")
    resumed(made, again, tmp_path / "state")
    assert names(first.draw(7)) == names(second.draw(7))


def test_uniform_draws_every_prompt_equally_often(tmp_path):
    drawn = names(live(small(tmp_path), "uniform").draw(7000))
    counts = np.array([drawn.count(n) for n in sorted(set(drawn))])
    assert len(counts) == 7 and ((counts - 1000) ** 2 / 1000).sum() < 35  # chi-square with 6 degrees: false alarm below 1 in 100,000


def test_fixed(tmp_path):
    made = run(tmp_path)
    prompts = made.config.task.split("train")
    assert names(live(made, "fixed").draw(4)) == [prompts[0].id] * 4  # one-shot
    assert names(live(made, "fixed", first=3).draw(4)) == names([*prompts[:3], prompts[0]])
    chosen = live(made, "fixed", ids=(prompts[9].id, prompts[2].id))
    assert names(chosen.draw(3)) == [prompts[9].id, prompts[2].id, prompts[9].id] and names(chosen.draw(1)) == [prompts[2].id]
    with pytest.raises(UserError, match="the train split has 2000 prompts"):
        live(made, "fixed", first=2001)
    with pytest.raises(UserError, match="unknown prompt 'digit-sum/train'"):
        live(made, "fixed", ids=("digit-sum/train",))


def test_curricula_are_parts_of_their_slot():
    assert {type(coerce(Curriculum, n, "c")) for n in ("shuffle", "uniform", "fixed")} == {curricula.Shuffle, curricula.Uniform, curricula.Fixed}
