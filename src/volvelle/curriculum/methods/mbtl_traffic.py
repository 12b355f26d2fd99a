"""MBTL on traffic lights: three trainings out of a range of demands, one intersection simulated by SUMO (arXiv 2408.04498, NeurIPS 2024).

Problem: a signal must serve light and heavy traffic; each demand is an environment of its own, and the simulator is slow.
Idea: MBTL's (methods/mbtl.py): train in few demands chosen by a model of transfer, and serve every demand with the best of those policies as it is.
`transfer-matrix` makes all trainings once, so that every way of choosing is compared on the same policies: it trains in each context and on their mixture, and tests
each everywhere. Its run's transfer/returns.npz is a task (transfer:PATH) for mbtl and its choosers.
Pick `mbtl-traffic` for signals with demand, speed limit or signal times as the context; pick `transfer-matrix` to find out how your family of environments transfers
before paying for a method that exploits it. Not where one training already costs all you have: it makes one per context.
The claim: far ahead of one policy on all demands, but three random demands serve as well (inconclusive): at this intersection every spread of three is near the best.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from volvelle.control.evaluation import Evaluation
from volvelle.control.methods.ppo import ppo
from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import UserError
from volvelle.core.files import write_text
from volvelle.core.parts import Recipe, method, part
from volvelle.core.plots import heat_map

from ..choosers import Equidistant, Greedy, Independent, Multitask, Oracle, RandomChooser
from ..families import Family
from ..traffic import traffic_signals
from ..transfer import Children, TransferFile, check_trainable
from .mbtl import ModelBased, mbtl


@part("transfer-matrix")
class TransferMatrix(Recipe):
    """Trains in every context of a family, at last on all of them, and tests each policy everywhere: a training a step, one more than there are contexts.

    recipe, child_steps: how a policy is trained; evaluation.episodes: per context. The run's transfer/ holds returns.npz (values, contexts, mixture) and a picture.
    """

    wing: ClassVar[str] = "curriculum"
    recipe: Recipe = ppo
    child_steps: Annotated[int, Field(gt=0)] = 30
    evaluation: Evaluation = Evaluation(episodes=4)

    def validate(self, task=None):
        super().validate(task)
        if not isinstance(task, Family):
            raise UserError(f"transfer-matrix: task {task.label() if task else None} has no contexts; accepted: a family such as family:CartPole-v1?length=0.1..4")
        check_trainable("transfer-matrix", self.recipe, task)

    def start(self, run):
        return _Matrix(self, run)


class _Matrix:
    def __init__(self, part: TransferMatrix, run):
        self.source = Children(run, run.config.task, part.recipe, part.child_steps, part.evaluation.episodes)
        self.count, self.rows, self.finished = len(self.source.contexts), [], False
        if run.config.steps <= self.count:
            raise UserError(f"--steps {run.config.steps}: transfer-matrix trains in each of {self.count} contexts and on all; expected {self.count + 1}")

    def step(self):
        k = len(self.rows)
        self.rows.append(self.source.row(k) if k < self.count else self.source.mixture())
        self.finished = k == self.count
        return {"trainings": k + 1.0, "score": float(self.rows[-1].mean())}

    def evaluate(self):
        return {"trainings": float(len(self.rows))}

    def product(self):
        return {"transfer": self} if self.finished else {}

    def save(self, folder) -> None:
        values, names = np.array(self.rows), [", ".join(f"{c:.3g}" for c in context) for context in self.source.contexts]
        np.savez(folder / "returns.npz", values=values[:-1], contexts=self.source.contexts, mixture=values[-1])
        write_text(folder / "transfer.svg", heat_map(values, [*names, "mixture"], names, value="score", y="trained in", x="tested in"))

    def state_dict(self):
        return {"rows": np.array(self.rows), "finished": self.finished}

    def load_state_dict(self, state):
        self.rows, self.finished = list(state["rows"]), bool(state["finished"])


signals = ppo.override("length=60", "gamma=0.95", "optimiser.lr=0.002", "evaluation.episodes=1")
mbtl_traffic = mbtl(recipe=signals, child_steps=22).override("evaluation.episodes=2")
stored = mbtl(chooser=ModelBased())
claim = Claim(
    says="three demands chosen by a model of transfer serve all demands at an intersection better than three random ones, than one policy trained on all, and than "
         "a policy for each",
    arms={"mbtl": stored, "random": stored(chooser=RandomChooser()), "equidistant": stored(chooser=Equidistant()), "greedy": stored(chooser=Greedy()),
          "oracle": stored(chooser=Oracle()), "multitask": stored(chooser=Multitask()), "independent": Arm(stored(chooser=Independent()), steps=traffic_signals.points)},
    prepare=TransferMatrix(recipe=signals, child_steps=22).override("evaluation.episodes=2"), prepare_task=traffic_signals, prepare_steps=traffic_signals.points + 1,
    take={"task.path": "transfer/returns.npz"}, task=TransferFile(path=""), steps=3, first_seed=10, equal="trainings", minutes=15, run={"checkpoint_every": 0},
    quick={"seeds": 2, "prepare_task": traffic_signals.replace(points=2, best=12.0, base=traffic_signals.base.replace(time_limit=12)), "prepare_steps": 3, "steps": 1,
           "arms": {"mbtl": stored, "random": stored(chooser=RandomChooser()), "multitask": stored(chooser=Multitask()),
                    "independent": Arm(stored(chooser=Independent()), steps=2)},
           "prepare": TransferMatrix(recipe=signals(envs=2, length=12), child_steps=1).override("evaluation.episodes=1")},
    expects=("mbtl > random on mean_zero_shot", "mbtl > multitask on zero_shot", "mbtl > independent on zero_shot"))

method("mbtl-traffic", mbtl_traffic, title="Model-based transfer on traffic signals", source="arXiv 2408.04498", claim=claim)
method("transfer-matrix", TransferMatrix(), title="Who transfers where: a training per context, tested in all", source="arXiv 2408.04498")
