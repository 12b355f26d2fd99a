"""ReMax (arXiv 2310.10505): one greedy row per group, no loss on it, its reward subtracted."""

import pytest
import torch
from helpers import same_run

import volvelle
from volvelle.core.errors import UserError
from volvelle.core.run import Run, RunConfig
from volvelle.core.verbs import configure
from volvelle.language.methods.remax import WithGreedy, over_greedy, remax


def test_worked_numbers():
    rewards, greedy = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]), torch.tensor([True, False, False, True, False, False])
    assert over_greedy(rewards, greedy, torch.tensor([4, 4, 4, 9, 9, 9])).tolist() == [0, -1, 0, 0, 0, 1]


def test_one_greedy_row_without_loss_before_each_group(tmp_path):
    recipe = remax(sampler=WithGreedy(group=3))
    learner = recipe.start(Run(RunConfig(recipe=recipe, task="tree", model="tabular"), tmp_path))
    made = learner.sampler.sample(learner.task.split("train")[:4])
    assert [r.train for r in made] == [False, True, True, True] * 4 and [r.group for r in made] == [g for g in range(4) for _ in range(4)]
    for r in made[::4]:
        module, ids = learner.policy.module, [learner.policy.vocabulary + r.prompt.row["index"]]
        for token in r.ids:
            assert token == int(module(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)


def test_other_samplers_are_refused():
    with pytest.raises(UserError, match="advantage=remax needs a greedy response in every group, and sampler=plain makes none; use sampler=remax"):
        config = configure("grpo", "tree", None, ["advantage=remax"])
        config.recipe.validate(config.task)


def test_training_resumes_bit_for_bit(tmp_path):
    volvelle.train("remax", "tree", steps=4, folder=tmp_path / "whole", strict=True, evaluate_every=2)
    volvelle.train("remax", "tree", steps=2, folder=tmp_path / "part", evaluate_every=2)
    volvelle.train("remax", "tree", steps=4, resume=tmp_path / "part")
    same_run(tmp_path / "whole", tmp_path / "part")
