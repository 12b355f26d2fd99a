"""Every sampler with every advantage and every objective: the legal ones train, the meaningless ones are refused in one line."""

import itertools
from pathlib import Path

import pytest
import torch

from volvelle.core.errors import UserError
from volvelle.core.registry import registry
from volvelle.core.run import Run, RunConfig
from volvelle.core.trainable import Adam
from volvelle.language import grpo
from volvelle.language.fittings import Updates, ValueCritic
from volvelle.language.models import Tabular
from volvelle.language.slots import Advantage, Objective, Sampler
from volvelle.language.tasks.tree import Tree

registry.load()
TASK = Tree(prompts=8, vocabulary=4, depth=3, winners=8)
BASE = grpo(prompts=4, updates=Updates(optimiser=Adam(lr=0.05), minibatch=2))


def names(slot):
    """Names of the library's own parts (other test modules register toys)."""
    owner = {n: (v if isinstance(v, type) else type(v)).__module__ for n, v in registry.table(slot).items()}
    return sorted(n for n, module in owner.items() if module.startswith("volvelle."))


def combination(sampler: str, advantage: str | None, objective: str):
    """The recipe, with a critic where the advantage needs values."""
    words = [f"sampler={sampler}", f"objective={objective}", f"advantage={advantage or 'none'}"]
    made = BASE.override(*words)
    return made(critic=ValueCritic(optimiser=Adam(lr=1e-2))) if made.advantage is not None and "values" in made.advantage.needs else made


def train(recipe, folder: Path) -> list[dict]:
    learner = recipe.start(run := Run(RunConfig(recipe=recipe, task=TASK, model=Tabular()), folder))
    out = []
    for _ in range(2):
        out.append(learner.step())
        run.step += 1
    return out


@pytest.mark.parametrize("sampler", names(Sampler))
def test_every_combination_trains_or_is_refused_in_one_line(sampler, tmp_path):
    legal = refused = 0
    for advantage, objective in itertools.product([None, *names(Advantage)], names(Objective)):
        recipe = combination(sampler, advantage, objective)
        try:
            recipe.validate(TASK)
        except UserError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 400
            parts = [p.part_name for p in (recipe.objective, recipe.advantage, recipe.sampler) if p is not None]
            assert any(name in text for name in (*parts, "sampler.", "objective.", "advantage.")), text  # names a culprit
            refused += 1
            continue
        wants = "advantages" in recipe.loss_needs
        assert wants == (advantage is not None)  # nothing that would be ignored gets through, nothing needed is missing
        for metrics in train(recipe, tmp_path):
            assert all(torch.isfinite(torch.tensor(v)) for v in metrics.values()), (sampler, advantage, objective, metrics)
        legal += 1
    assert refused and legal


def test_what_is_refused_says_why():
    def why(*words) -> str:
        with pytest.raises(UserError) as error:
            BASE.override(*words).validate(TASK)
        return str(error.value)

    assert "needs values" in why("advantage=gae") and "critic=value" in why("advantage=gae")
    assert "would be ignored" in why("critic=value")
    assert "needs advantages" in why("advantage=none")
    assert "nothing would be trained" in why("sampler=logged")
    assert "trains nothing" in why("objective=none", "advantage=none")
    assert "would be ignored" in why("objective=none", "terms.entropy=entropy")
    assert "no effect" in why("kl=kl", "kl.estimator=k1")


def test_entropy_only_training_is_a_recipe(tmp_path):
    recipe = BASE.override("objective=none", "advantage=none", "terms.entropy=entropy", "terms.entropy.coefficient=1")
    recipe.validate(TASK)
    assert len(train(recipe, tmp_path)) == 2
