"""AGAIN: teaching a learner with what taught an earlier one (arXiv 2011.08463).

Problem: a teacher that draws contexts by learning progress explores the whole space anew for every learner it is given.
Idea: keep a classroom of learners taught before. (1) Teach the new one by ALP-GMM with much exploration for P tests. (2) Compare its test scores with
those of the classroom at the same test; of the k nearest take the one that ended best; of the mixtures that taught it keep the Gaussians with
mean progress above .2: the expert curriculum, GMM_1 ... GMM_n. (3) Teach on by the Gaussians of the present GMM_j and of the running ALP-GMM
together, in proportion to their progress, with little exploration; j rises when the last rewards on the expert's Gaussians reach what the expert's own
learner had reached (R), every 250 episodes (T), or all are pooled (P).
Pick it where many related learners (bodies, students, network sizes) are to be trained on one generator of contexts. Not for one learner without
history, nor for small spaces, where uniform draws win in the end.
"Trying AGAIN instead of Trying Longer" (the precursor): expert=own, restart=true gives the same learner, begun anew, its own distilled curriculum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from volvelle.core.claims import Claim
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import method, part

from ..classrooms import Classroom, Record, Runs, Toy
from ..students import ToyStudents
from ..taught import Taught
from ..teachers import CHANCE, AlpGmm, AlpGmmTeacher, LiveTeacher, Origin, Share, Teacher, Uniform, joint_draw, pick

Count = Annotated[int, Field(gt=0)]
KEPT_REWARDS, KEPT_PROGRESS, REFRESH_EVERY, ALONE_AFTER = 50, 100, 100, 250


@dataclass
class Lesson:
    """One mixture of an expert curriculum: means [k, d + 1] (progress last), covariances [k, d + 1, d + 1], and the mean reward its own learner reached on it."""

    means: np.ndarray
    covariances: np.ndarray
    threshold: float


def expert_curriculum(record: Record, least: float = 0.2) -> list[Lesson]:
    """The mixtures that taught a learner, without Gaussians of mean progress <= least; those left empty are gone. Threshold: mean of the last 50 rewards, while
    the mixture taught, of contexts drawn from the Gaussians kept (of any contexts, if there are none)."""
    lessons, every = [], record.trajectory[0][0] if record.trajectory else 0
    for i, (episode, means, covariances) in enumerate(record.trajectory):
        kept = np.flatnonzero(means[:, -1] > least)
        if not len(kept):
            continue
        source, mixture, gaussian = record.origins.T
        rewards = record.results[(source == 1) & (mixture == i) & np.isin(gaussian, kept)]
        rewards = rewards if len(rewards) else record.results[: episode + every]
        lessons.append(Lesson(means[kept].copy(), covariances[kept].copy(), float(rewards[-KEPT_REWARDS:].mean())))
    return lessons


def usable(record: Record, least: float = 0.2) -> bool:
    """Whether an earlier learner did not end below its first test, and one Gaussian of its teaching had progress above `least`."""
    return record.tests[-1].sum() >= record.tests[0].sum() and any((means[:, -1] > least).any() for _, means, _ in record.trajectory)


def best_of_nearest(distances: np.ndarray, finals: np.ndarray, k: int) -> int:
    """Of the k smallest distances [n] (the first at a tie), the one with the largest final score [n]."""
    near = np.argsort(distances, kind="stable")[:k]
    return int(near[finals[near].argmax()])


@part("again")
class Again(Teacher):
    """classroom: earlier learners, of which the share `portion` is looked at. pretest: P, in tests; neighbours: k. expert: chosen by test scores ("knowledge"), at
    "random", by the learners' true "parameters", or the learner's "own" past. least: mean progress a Gaussian must exceed. stepping: by "reward" (R: the
    last `queue` rewards against tolerance times the expert's), "time" (T) or "pool" (P). random: share of uniform draws; end_random: at the last mixture
    (None: the same). stop: there, the expert's progress is replaced by the learner's own. alone: the expert's Gaussians without ALP-GMM's (IN-R, IN-T,
    IN-P). restart: the learner begins anew after the pre-test. base: ALP-GMM of the pre-test and of the mixture."""

    classroom: Classroom = Runs()
    portion: Annotated[float, Field(gt=0, le=1)] = 1.0
    pretest: Annotated[int, Field(ge=0)] = 2
    neighbours: Count = 5
    expert: Literal["knowledge", "random", "parameters", "own"] = "knowledge"
    least: Share = 0.2
    stepping: Literal["reward", "time", "pool"] = "reward"
    queue: Count = 10
    tolerance: Annotated[float, Field(gt=0)] = 1.0
    random: Share = 0.02
    end_random: Share | None = None
    stop: bool = True
    alone: bool = False
    restart: bool = False
    base: Teacher = AlpGmm(random=0.1)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.base, AlpGmm):
            raise UserError(f"teacher.base={self.base.part_name}: the pre-test needs mixtures on learning progress; accepted: alp-gmm")
        if not self.pretest and self.expert in ("knowledge", "own"):
            raise UserError(f"teacher.pretest=0: expert={self.expert} is chosen after a pre-test; accepted without one: random, parameters")

    def check_task(self, task, test_every):
        if self.pretest and not test_every:
            raise UserError("test_every=0: AGAIN's pre-test ends at a test; give test_every in learner steps")

    def live(self, bounds, rng, run=None, parameters=()):
        records = [] if self.expert == "own" else self.classroom.records(run.config.task, run.seed)
        return AgainTeacher(self, bounds, rng, records, parameters)


class AgainTeacher(LiveTeacher):
    """lessons: the expert curriculum (None during the pre-test); at: which of them is taught."""

    def __init__(self, part: Again, bounds, rng, records: list[Record], parameters=()):
        super().__init__(bounds, rng)
        self.part, self.alp, self.parameters = part, AlpGmmTeacher(part.base, bounds, rng), np.asarray(parameters, float)
        self.records = [r for r in records if usable(r, part.least)]
        if part.expert != "own" and not self.records:
            raise UserError(f"classroom: none of its {len(records)} learners both improved and has a Gaussian with progress above {part.least}; no expert can be chosen")
        if few := next((r for r in self.records if len(r.tests) < part.pretest), None):
            raise UserError(f"classroom: {few.name} has {len(few.tests)} tests; the pre-test compares at test {part.pretest}")
        if part.expert == "parameters" and any(r.parameters.shape != self.parameters.shape or not r.parameters.size for r in self.records):
            raise UserError(f"teacher.expert=parameters: this learner has {self.parameters.size} parameters; expected as many, and at least one, for it and all of the classroom")
        self.heard, self.chosen, self.lessons, self.at, self.last_rewards, self.progress, self.since, self.at_end = 0, -1, None, 0, [], [], 0, 0
        if not part.pretest:
            self.choose(None)

    def tested(self, scores):
        self.heard += 1
        if self.heard != self.part.pretest:
            return False
        self.choose(scores)
        return self.part.restart

    def choose(self, scores: np.ndarray | None) -> None:
        part, records = self.part, self.records
        if part.expert == "own":
            self.follow(expert_curriculum(Record("own", np.array([scores]), self.parameters, **self.alp.record()), part.least))
            return
        looked_at = np.sort(self.rng.permutation(len(records))[: max(1, round(part.portion * len(records)))])
        if part.expert == "random":
            self.chosen = int(self.rng.choice(looked_at))
        else:
            by_tests = part.expert == "knowledge"
            mine = scores if by_tests else self.parameters
            theirs = [records[i].tests[part.pretest - 1] if by_tests else records[i].parameters for i in looked_at]
            finals = np.array([records[i].tests[-1].sum() for i in looked_at])
            self.chosen = int(looked_at[best_of_nearest(np.linalg.norm(np.array(theirs) - mine, axis=1), finals, part.neighbours)])
        self.follow(expert_curriculum(records[self.chosen], part.least))

    def follow(self, lessons: list[Lesson]) -> None:
        if not lessons:
            raise RunStopped(f"teacher.expert=own: no Gaussian of the pre-test has progress above {self.part.least}; lower teacher.least or raise teacher.pretest")
        pool = self.part.stepping == "pool"
        self.lessons = [Lesson(np.concatenate([x.means for x in lessons]), np.concatenate([x.covariances for x in lessons]), np.inf)] if pool else lessons
        self.go_to(min(self.count // self.part.base.fit_every, len(lessons) - 1) if self.part.stepping == "time" else 0)

    def go_to(self, index: int) -> None:
        self.at, self.last_rewards, self.since, self.at_end = index, [], 0, 0
        self.progress = [[] for _ in self.lessons[index].means]

    @property
    def ending(self) -> bool:
        """At the last mixture of a curriculum that is stepped through."""
        return self.part.stop and self.part.stepping != "pool" and self.at == len(self.lessons) - 1

    @property
    def handed_over(self) -> bool:
        """Without ALP-GMM in the mixture, it takes over a while after the last step."""
        return self.part.alone and self.part.stepping == "reward" and self.ending and self.at_end >= ALONE_AFTER

    def draw(self):
        part = self.part
        if self.lessons is None or self.handed_over:
            return self.alp.draw()
        rho = part.end_random if self.ending and part.end_random is not None else part.random
        if not part.alone and self.rng.random() < rho:
            return self.uniform(), CHANCE
        lesson = self.lessons[self.at]
        own = [] if part.alone else self.alp.trajectory[-1:]
        means = np.concatenate([lesson.means, *(m for _, m, _ in own)])
        covariances = np.concatenate([lesson.covariances, *(c for _, _, c in own)])
        i, k = pick(means[:, -1], self.rng), len(lesson.means)
        context = joint_draw(means[i], covariances[i], len(self.low), self.rng, self.low, self.high)
        return context, Origin(2, self.at, i) if i < k else Origin(1, len(self.alp.trajectory) - 1, i - k)

    def learn(self, context, result, origin):
        super().learn(context, result, origin)
        self.alp.learn(context, result, origin)
        if self.lessons is None:
            return
        expert = origin.source == 2 and origin.mixture == self.at
        if self.ending:
            self.at_end += 1
            if expert and not self.part.alone:
                self.refresh(origin.gaussian)
        elif self.part.stepping == "time" and self.count % self.part.base.fit_every == 0:
            self.go_to(min(self.count // self.part.base.fit_every, len(self.lessons) - 1))
        elif self.part.stepping == "reward" and expert and self.at < len(self.lessons) - 1:
            self.last_rewards = [*self.last_rewards, float(result)][-self.part.queue :]
            if len(self.last_rewards) == self.part.queue and np.mean(self.last_rewards) >= self.part.tolerance * self.lessons[self.at].threshold:
                self.go_to(self.at + 1)

    def refresh(self, gaussian: int) -> None:
        """Let the last mixture's progress become the learner's own: window means, every 100 draws from it."""
        self.progress[gaussian] = [*self.progress[gaussian], self.alp.latest][-KEPT_PROGRESS:]
        self.since += 1
        if self.since == REFRESH_EVERY:
            self.since = 0
            self.lessons[self.at].means[:, -1] = [np.mean(p) if p else 0.0 for p in self.progress]

    def metrics(self):
        return self.alp.metrics() | {"expert": float(self.chosen), "lesson": float(self.at), "lessons": float(len(self.lessons or []))}

    def record(self):
        return super().record() | {"trajectory": self.alp.record()["trajectory"]}

    def state_dict(self):
        lessons = self.lessons and [[x.means.copy(), x.covariances.copy(), x.threshold] for x in self.lessons]
        return super().state_dict() | {"alp": self.alp.state_dict(), "heard": self.heard, "chosen": self.chosen, "lessons": lessons, "at": self.at,
                                       "last_rewards": list(self.last_rewards), "progress": [list(p) for p in self.progress], "since": self.since, "at_end": self.at_end}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.alp.load_state_dict(state["alp"])
        self.heard, self.chosen, self.at, self.since, self.at_end = (state[k] for k in ("heard", "chosen", "at", "since", "at_end"))
        self.lessons = state["lessons"] and [Lesson(*x) for x in state["lessons"]]
        self.last_rewards, self.progress = list(state["last_rewards"]), [list(p) for p in state["progress"]]


students, alp_gmm = ToyStudents(cubes=8, episodes=600), AlpGmm(random=0.1, components=6)
taught = Taught(teacher=Again(classroom=Toy(students=8, steps=20, teacher=alp_gmm), neighbours=2, base=alp_gmm), test_every=1)


def arms(taught: Taught) -> dict[str, Taught]:
    teacher = taught.teacher
    return {"again": taught, "alp-gmm": taught(teacher=teacher.base), "uniform": taught(teacher=Uniform()), "random-expert": taught(teacher=teacher.replace(expert="random")),
            "true-expert": taught(teacher=teacher.replace(expert="parameters"))}


full = AlpGmm(random=0.1)
claim = Claim(
    says="a new learner taught with the curriculum of a similar, successful earlier one masters more than with learning progress alone, with uniform draws, or with "
         "the curriculum of an earlier learner drawn at random",
    arms=arms(taught), task=students, steps=20, seeds=12, equal="episodes", minutes=12, run={"checkpoint_every": 0},
    quick={"seeds": 2, "steps": 4, "task": students.replace(cubes=4, episodes=300), "arms": arms(taught.override("teacher.pretest=1", "teacher.classroom.students=4", "teacher.classroom.steps=4"))},
    paper={"seeds": 64, "task": ToyStudents(episodes=10_000), "arms": arms(taught(teacher=Again(classroom=Toy(students=128, teacher=full, seed=0), base=full)))},
    expects=("again > alp-gmm on mastered", "again > uniform on mastered", "again > alp-gmm on mean_mastered", "again > random-expert on mastered"))

method("again", taught, title="Teach with the curriculum of a similar earlier learner", source="arXiv 2011.08463", claim=claim)
method("alp-gmm", Taught(test_every=1), title="Contexts by absolute learning progress", source="arXiv 1910.07224")
