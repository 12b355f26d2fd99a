"""AGAIN: expert choice, expert curriculum and stepping by hand; simulated students; a classroom made of earlier runs, before a control method."""

import numpy as np
import pytest
from helpers import stop_at
from signposts import SIGNPOST, SMALL

import volvelle
from volvelle.control.methods.ppo import ppo
from volvelle.core.claims import run_claim
from volvelle.core.errors import RunStopped, UserError
from volvelle.core.state import fingerprint, load_state
from volvelle.core.trainer import checkpoints
from volvelle.curriculum.classrooms import Record, Runs, Toy, taught_student
from volvelle.curriculum.methods.again import Again, AgainTeacher, Lesson, best_of_nearest, claim, expert_curriculum, usable
from volvelle.curriculum.students import ToyStudents
from volvelle.curriculum.taught import Taught
from volvelle.curriculum.teachers import CHANCE, AlpGmm, Origin, Uniform

LINE = np.array([[0.0], [1.0]])
FAMILY = SIGNPOST.replace(worst=-2.0, best=0.0, reveal=True)


def record(tests=((0.0,), (1.0,)), progress=((0.3,),), results=(0.5,), origins=(CHANCE,), parameters=(0.0,), name="r"):
    """A learner whose i-th mixture, fitted after 250 (i + 1) episodes, has Gaussians of these mean progresses at contexts .1, .2, ..."""
    mixtures = [(250 * (i + 1), np.column_stack([0.1 * np.arange(1, len(p) + 1), p]), np.tile(1e-6 * np.eye(2), (len(p), 1, 1))) for i, p in enumerate(progress)]
    return Record(name, np.array(tests, float), np.array(parameters), np.zeros((len(results), 1)), np.array(results, float), np.reshape(origins, (-1, 3)).astype(int), mixtures)


def following(thresholds, part=Again(queue=3, pretest=0, expert="random", base=AlpGmm(fit_every=50, components=2)), bounds=LINE):
    teacher = AgainTeacher(part, bounds, np.random.default_rng(0), [record()], (0.0,))
    teacher.follow([Lesson(np.array([[0.1 * (j + 1), 0.3 + 0.1 * j]]), 1e-6 * np.eye(2)[None], t) for j, t in enumerate(thresholds)])
    return teacher


# ---- the expert

def test_gaussians_without_enough_progress_go_and_empty_mixtures_with_them():
    made = record(progress=((0.3, 0.2, 0.21), (0.2, 0.1), (0.0, 0.5)), results=np.zeros(10), origins=np.zeros((10, 3)))
    lessons = expert_curriculum(made)
    assert [x.means[:, -1].tolist() for x in lessons] == [[0.3, 0.21], [0.5]] and [len(x.covariances) for x in lessons] == [2, 1]
    assert len(expert_curriculum(made, least=0.1)) == 3
    lessons[0].means[:] = 9
    assert made.trajectory[0][1].max() < 1  # a copy


def test_the_threshold_is_the_mean_of_the_last_rewards_on_the_gaussians_kept():
    """Mixture 0 keeps Gaussian 0: of 60 rewards on it (.1 ten times, then .5) the last 50 count, not Gaussian 1's, chance's, nor those under mixture 1."""
    origins = [(1, 0, 0)] * 60 + [(1, 0, 1)] * 5 + [CHANCE] * 5 + [(1, 1, 0)] * 5
    results = [0.1] * 10 + [0.5] * 50 + [1.0] * 10 + [0.7] * 5
    lessons = expert_curriculum(record(progress=((0.3, 0.1), (0.4, 0.3)), results=results, origins=origins))
    assert [x.threshold for x in lessons] == pytest.approx([0.5, 0.7])
    nothing = expert_curriculum(record(results=[0.2] * 600, origins=[CHANCE] * 600))
    assert nothing[0].threshold == pytest.approx(0.2)  # never drawn from: all rewards of its time


def test_the_best_final_score_among_the_nearest_wins():
    assert best_of_nearest(np.array([0.1, 0.3, 0.2, 0.9]), np.array([1.0, 5.0, 2.0, 9.0]), 2) == 2
    assert best_of_nearest(np.array([0.1, 0.3, 0.2, 0.9]), np.array([1.0, 5.0, 2.0, 9.0]), 3) == 1
    assert best_of_nearest(np.array([0.5, 0.5, 0.5]), np.array([1.0, 2.0, 3.0]), 1) == 0


def test_distances_compare_tests_of_the_same_number():
    """At the second test learner 1 looks like the new one, at the first and the last learner 0 does."""
    room = [record(tests=((0.0, 0.0), (0.9, 0.9), (0.2, 1.0)), name="0"), record(tests=((0.5, 0.5), (0.2, 0.0), (1.0, 1.0)), name="1")]
    teacher = AgainTeacher(Again(neighbours=1, pretest=2), LINE, np.random.default_rng(0), room)
    assert not teacher.tested(np.array([0.0, 0.0])) and teacher.lessons is None
    assert not teacher.tested(np.array([0.2, 0.0])) and teacher.chosen == 1


def test_only_learners_that_improved_and_made_progress_are_usable():
    assert usable(record()) and usable(record(tests=((0.5,), (0.5,))))
    assert not usable(record(tests=((0.5,), (0.4,)))) and not usable(record(progress=((0.2,), (0.1,))))
    with pytest.raises(UserError, match="none of its 1 learners"):
        AgainTeacher(Again(), LINE, np.random.default_rng(0), [record(progress=((0.1,),))])
    with pytest.raises(UserError, match="has 2 tests; the pre-test compares at test 3"):
        AgainTeacher(Again(pretest=3), LINE, np.random.default_rng(0), [record()])


def test_other_ways_to_choose():
    room = [record(parameters=(p,), name=str(p)) for p in (0.0, 1.0, 2.0)]
    truth = AgainTeacher(Again(expert="parameters", pretest=0, neighbours=1), LINE, np.random.default_rng(0), room, (1.1,))
    assert truth.chosen == 1 and truth.lessons
    chosen = {AgainTeacher(Again(expert="random", pretest=0), LINE, np.random.default_rng(s), room).chosen for s in range(30)}
    assert chosen == {0, 1, 2}  # one missing: probability 3 (2/3)^30 < 2e-5
    third = {AgainTeacher(Again(expert="parameters", pretest=0, neighbours=1, portion=0.34), LINE, np.random.default_rng(s), room, (1.0,)).chosen for s in range(30)}
    assert third == {0, 1, 2}  # only one learner is looked at, whichever it is
    with pytest.raises(UserError, match="this learner has 0 parameters"):
        AgainTeacher(Again(expert="parameters"), LINE, np.random.default_rng(0), room)
    with pytest.raises(UserError, match="pretest=0"):
        Again(pretest=0)
    own = AgainTeacher(Again(expert="own", restart=True, pretest=1), LINE, np.random.default_rng(0), [])
    own.alp.trajectory = record().trajectory
    own.learn(np.array([0.5]), 0.5, CHANCE)
    assert own.tested(np.array([0.5])) is True and len(own.lessons) == 1
    with pytest.raises(RunStopped, match="no Gaussian of the pre-test"):
        AgainTeacher(Again(expert="own", pretest=1), LINE, np.random.default_rng(0), []).tested(np.array([0.5]))


# ---- stepping

def test_rewards_on_the_expert_step_the_curriculum():
    teacher = following((0.4, 0.55))
    places = []
    for reward in (0.5, 0.3, 0.5, 0.6, 0.5, 0.6):
        teacher.learn(np.array([0.1]), reward, Origin(2, teacher.at, 0))
        places.append(teacher.at)
    assert places == [0, 0, 1, 1, 1, 1] and teacher.last_rewards == []


def test_only_the_experts_rewards_step_and_all_feed_alp_gmm():
    teacher = following((0.4, 0.4, 0.4))
    for origin in (CHANCE, Origin(1, 0, 0), Origin(2, 1, 0)):  # chance, its own mixture, an expert's mixture left behind
        for _ in range(5):
            teacher.learn(np.array([0.1]), 1.0, origin)
    assert teacher.at == 0 and teacher.last_rewards == [] and teacher.alp.count == 15


def test_time_steps_every_250_and_counts_the_pretest():
    part = Again(stepping="time", expert="random", pretest=1, base=AlpGmm(fit_every=250, components=2), stop=False)
    teacher = AgainTeacher(part, LINE, np.random.default_rng(0), [record(progress=((0.3,), (0.4,), (0.5,), (0.6,)))])
    for n in range(1, 1300):
        context = teacher.sample()
        teacher.update(context, float(context[0]))
        if n == 300:
            assert teacher.lessons is None
            teacher.tested(np.array([0.0]))
            assert teacher.at == 1
        if n in (499, 500, 1250):
            assert teacher.at == {499: 1, 500: 2, 1250: 3}[n]


def test_a_pool_holds_every_gaussian_and_never_steps():
    part = Again(stepping="pool", expert="random", pretest=0, alone=True, queue=1)
    teacher = AgainTeacher(part, LINE, np.random.default_rng(0), [record(progress=((0.3, 0.6), (0.1,), (0.9,)))])
    assert teacher.lessons[0].means[:, -1].tolist() == [0.3, 0.6, 0.9]
    for _ in range(200):
        teacher.update(teacher.sample(), 1.0)
    share = np.bincount(teacher.origins[:, 2], minlength=3) / 200
    assert (teacher.origins[:, 0] == 2).all() and abs(share - np.array([0.3, 0.6, 0.9]) / 1.8).max() < 5 * 0.5 / 200**0.5


def test_the_mixture_is_the_union_in_proportion_to_progress():
    teacher = following((2.0, 2.0), Again(queue=3, pretest=0, expert="random", random=0.25))
    teacher.alp.trajectory = [(250, np.array([[0.8, 0.9], [0.9, 0.0]]), np.tile(1e-6 * np.eye(2), (2, 1, 1)))]
    drawn = [teacher.draw() for _ in range(4000)]
    shares = {o: sum(d[1] == o for d in drawn) / 4000 for o in {d[1] for d in drawn}}
    assert set(shares) == {CHANCE, Origin(2, 0, 0), Origin(1, 0, 0)}
    for origin, share in ((CHANCE, 0.25), (Origin(2, 0, 0), 0.75 * 0.25), (Origin(1, 0, 0), 0.75 * 0.75)):  # 5 standard errors
        assert abs(shares[origin] - share) < 5 * 0.5 / 4000**0.5
    assert all(abs(c[0] - {2: 0.1, 1: 0.8}[o.source]) < 0.01 for c, o in drawn if o.source)


def test_at_the_last_mixture_the_learners_own_progress_takes_over():
    teacher = following((0.9,), Again(queue=3, pretest=0, expert="random", end_random=1.0))
    assert teacher.ending and teacher.draw()[1] == CHANCE
    for i in range(100):
        assert teacher.lessons[0].means[0, -1] == pytest.approx(0.3)
        teacher.learn(np.array([0.1]), (i % 2) * 0.5, Origin(2, 0, 0))
    assert teacher.lessons[0].means[0, -1] == pytest.approx(np.mean(teacher.alp._recent)) and 0 < np.mean(teacher.alp._recent) != 0.3
    kept = following((0.9,), Again(queue=3, pretest=0, expert="random", stop=False, end_random=1.0))
    for i in range(100):
        kept.learn(np.array([0.1]), (i % 2) * 0.5, Origin(2, 0, 0))
    assert kept.lessons[0].means[0, -1] == pytest.approx(0.3)


def test_alone_it_draws_from_the_expert_only_until_alp_gmm_takes_over():
    teacher = following((0.9,), Again(queue=3, pretest=0, expert="random", alone=True, base=AlpGmm(random=1.0)))
    for _ in range(250):
        context = teacher.sample()
        assert abs(context[0] - 0.1) < 0.01
        teacher.update(context, 0.5)
    assert teacher.handed_over and teacher.draw()[1] == CHANCE


def test_contexts_stay_inside_the_bounds():
    teacher = following((2.0, 2.0))
    teacher.lessons[0].covariances[:] = np.eye(2)
    drawn = np.array([teacher.draw()[0] for _ in range(500)])
    assert drawn.shape == (500, 1) and drawn.min() == 0 and drawn.max() == 1


# ---- simulated students

def test_the_first_cube_unlocks_its_three_neighbours():
    student = ToyStudents(cubes=5, kind=0).student(0)
    assert [student.episode(np.array([0.05, 0.05])) for _ in range(74)][-1] == 0.74
    assert student.episode(np.array([0.25, 0.05])) == 0
    student.episode(np.array([0.05, 0.05]))
    for place in ((0.05, 0.25), (0.25, 0.05), (0.25, 0.25)):
        assert student.episode(np.array(place)) == 0.01
    assert student.episode(np.array([0.05, 0.45])) == 0 and student.episode(np.array([0.45, 0.45])) == 0
    for _ in range(200):
        student.episode(np.array([0.0, 0.0]))
    assert student.competence.max() == 100 and student.test().shape == (25,) and student.test()[0] == 1


def test_the_four_kinds_start_in_four_corners_and_learn_alike():
    task = ToyStudents(cubes=4)
    starts = [task.student(k).start for k in range(4)]
    assert sorted(starts) == [(0, 0), (0, 3), (3, 0), (3, 3)] and len({task.student(k).parameters for k in range(4)}) == 4
    for k, (i, j) in enumerate(starts):
        student = task.student(k)
        inward = (1 if i == 0 else -1, 1 if j == 0 else -1)
        for _ in range(75):
            student.episode((np.array([i, j]) + 0.5) / 4)
        assert student.episode((np.array([i + inward[0], j + inward[1]]) + 0.5) / 4) == 0.01
        assert student.episode((np.array([i + 2 * inward[0], j]) + 0.5) / 4) == 0


def test_version_two_starts_anywhere_and_unlocks_four_neighbours():
    task = ToyStudents(cubes=3, version=2, kind=4)
    assert ToyStudents(cubes=20, version=2).kinds == 400
    student = task.student(0)
    for _ in range(75):
        student.episode(np.array([0.5, 0.5]))
    for place, result in (((0.2, 0.5), 0.01), ((0.5, 0.8), 0.01), ((0.2, 0.2), 0.0)):
        assert student.episode(np.array(place)) == result
    with pytest.raises(UserError, match="accepted: 0 to 8"):
        ToyStudents(cubes=3, version=2, kind=9)


# ---- whole runs

ROOM = Toy(students=4, steps=6, teacher=AlpGmm(random=0.2, components=3), seed=0)
STUDENTS = ToyStudents(cubes=4, episodes=300)
SHORT = Taught(teacher=Again(classroom=ROOM, pretest=1, neighbours=1, base=AlpGmm(random=0.2, components=3)), test_every=1)


def test_the_similar_student_is_found():
    """Every kind of student finds the one of its own kind, by its first test alone; a classroom has its own numbers per round of kinds."""
    room = ROOM.records(STUDENTS, 0)
    assert len(room) == 4 and room[0].tests.shape == (6, 16)
    for kind in range(4):
        teacher = SHORT.teacher
        live = AgainTeacher(teacher, STUDENTS.bounds, np.random.default_rng(kind), room)
        live.tested(taught_student(teacher.base, STUDENTS, kind, 1, np.random.default_rng(kind + 9)).tests[0])
        assert np.array_equal(live.records[live.chosen].parameters, STUDENTS.student(kind).parameters)
    fresh = ROOM.replace(seed=None)
    assert fresh.records(STUDENTS, 0) == fresh.records(STUDENTS, 3) != fresh.records(STUDENTS, 4)


@pytest.mark.parametrize("recipe, task", [(SHORT, STUDENTS), (SHORT.override("teacher.restart=true", "teacher.expert=own", "teacher.least=0.01"), STUDENTS)])
def test_a_run_broken_off_ends_as_one_never_stopped(tmp_path, recipe, task):
    options = {"task": task, "checkpoint_every": 2, "steps": 4}
    whole = volvelle.train(recipe, folder=tmp_path / "whole", strict=True, **options)

    with pytest.raises(KeyboardInterrupt):
        volvelle.train(recipe, folder=tmp_path / "broken", progress=stop_at(3), **options)
    volvelle.train(recipe, folder=tmp_path / "broken", resume=tmp_path / "broken", **options)
    one, other = (fingerprint(load_state(checkpoints(tmp_path / f)[-1])) for f in ("whole", "broken"))
    assert one == other and {"mastered", "mean_mastered", "half_mastered", "return", "episodes"} <= set(whole.result["metrics"])


def test_a_classroom_of_earlier_runs_teaches_a_control_method(tmp_path):
    recipe = Taught(recipe=ppo.override(*SMALL, "optimiser.lr=0.02"), teacher=AlpGmm(fit_every=64, components=3), test_every=1, parameters=(0.5,))
    for seed in range(3):
        volvelle.train(recipe, task=FAMILY, folder=tmp_path / "class" / str(seed), steps=4, seed=seed)
    room = Runs(folders=(str(tmp_path / "class"),))
    found = room.records(FAMILY, 0)
    assert len(found) == 3 and found[0].tests.shape == (4, 5) and found[0].parameters == [0.5] and len(found[0].results) == 4 * 8 * 16
    teacher = Again(classroom=room, pretest=1, neighbours=2, least=0.0, base=AlpGmm(fit_every=64, components=3), restart=True)
    made = volvelle.train(recipe(teacher=teacher), task=FAMILY, folder=tmp_path / "new", steps=3, seed=9, strict=True)
    live = made.learner.teacher
    assert 0 <= live.chosen < 3 and (live.origins[: 8 * 16, 0] != 2).all() and (live.origins[8 * 16 :, 0] == 2).any()
    assert len(read := room.replace(folders=(str(tmp_path / "new"),)).records(FAMILY, 0)) == 1 and read[0].tests.shape == (3, 5)
    with pytest.raises(UserError, match="tested in other contexts"):
        room.records(FAMILY.replace(points=4), 0)
    with pytest.raises(UserError, match="no finished run"):
        Runs(folders=(str(tmp_path / "none"),)).records(FAMILY, 0)
    with pytest.raises(UserError, match="empty"):
        volvelle.train(recipe(teacher=Again()), task=FAMILY, folder=tmp_path / "x", steps=1)


def test_a_restart_gives_the_first_networks_back(tmp_path):
    recipe = Taught(recipe=ppo.override(*SMALL), teacher=Uniform())
    learner = volvelle.train(recipe, task=FAMILY, folder=tmp_path / "run", steps=2).learner
    student, models = learner.student, learner.run.models
    before = {k: fingerprint(m.state_dict()) for k, m in models.items()}
    student.restart()
    first = {k: fingerprint(s) for k, s in student.first.items()}
    assert {k: fingerprint(m.state_dict()) for k, m in models.items()} == first != before


@pytest.mark.parametrize("recipe, task, words", [
    (SHORT(test_every=0), STUDENTS, "test_every=0"), (SHORT.override("teacher.classroom.students=1", "teacher.pretest=9"), STUDENTS, "compares at test 9"),
    (Taught(recipe=ppo.override(*SMALL), teacher=Again(classroom=ROOM), test_every=1), FAMILY, "classroom=toy"),
])
def test_what_makes_no_sense_is_refused(tmp_path, recipe, task, words):
    with pytest.raises(UserError, match=words):
        volvelle.train(recipe, task=task, folder=tmp_path / "run", steps=1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="accepted: alp-gmm"):
        Again(base=Uniform())


@pytest.mark.slow
def test_the_claim_runs_in_its_quick_form(tmp_path):
    made = run_claim("again", claim, tmp_path, "quick")
    assert made.verdict in ("reproduced", "inconclusive", "refuted") and set(made.record["arms"]) == {"again", "alp-gmm", "uniform", "random-expert", "true-expert"}
    assert all(0 <= v <= 1 for arm in made.record["arms"].values() for v in arm["metrics"]["mastered"])
