"""Teachers: learning progress and mixtures by hand, draws inside the bounds, a teacher in front of a control method, resuming."""

import numpy as np
import pytest
from helpers import stop_at
from signposts import SIGNPOST, SMALL

import volvelle
from volvelle.control.methods.ppo import ppo
from volvelle.core.errors import UserError
from volvelle.core.state import fingerprint, load_state
from volvelle.core.trainer import checkpoints
from volvelle.curriculum import teachers
from volvelle.curriculum.regions import Adr, Riac, Window, halves_progress
from volvelle.curriculum.taught import Taught
from volvelle.curriculum.teachers import (AlpGmm, CovarGmm, LiveTeacher, Nearest, Origin, Uniform, absolute_progress, fit_mixture, joint_draw, pick,
                                          progress_probabilities)

SQUARE = np.array([[0.0, 0.0], [1.0, 1.0]])
FAMILY = SIGNPOST.replace(worst=-2.0, best=0.0)


def test_absolute_progress_by_hand():
    teacher = AlpGmm().live(SQUARE, np.random.default_rng(0))
    tasks = [(.1, .1), (.9, .9), (.5, .5), (.2, .8), (.8, .2), (.4, .4), (.12, .1), (.85, .9), (.5, .45), (.13, .1)]
    for task, result in zip(tasks, [0, .1, .2, .3, .4, .5, .35, .05, .9, .6]):
        teacher.update(np.array(task), result)
    assert teacher.state_dict()["progress"] == pytest.approx([0] * 6 + [.35, .05, .7, .25])
    assert absolute_progress(teacher.contexts[:6], teacher.results[:6], np.array([.12, .1]), .35) == pytest.approx(.35)


def test_gaussians_are_chosen_by_their_progress():
    assert progress_probabilities(np.array([0, .3, .1])) == pytest.approx([0, .75, .25])
    assert progress_probabilities(np.zeros(4)).tolist() == [.25] * 4


def test_a_draw_is_joint_and_its_progress_dropped():
    """Context and progress almost fully correlated: the contexts drawn spread as the joint Gaussian says (4,000 draws, 5 standard errors), the silent Gaussian never."""
    means, covariance = np.array([[0.5, 0.4], [9.0, 0.0]]), np.array([[0.01, 0.00999], [0.00999, 0.01]])
    rng = np.random.default_rng(0)
    assert {pick(means[:, -1], rng) for _ in range(1000)} == {0}
    drawn = np.array([joint_draw(means[0], covariance, 1, rng, np.array([0.0]), np.array([10.0])) for _ in range(4000)])
    assert drawn.shape == (4000, 1) and drawn.max() < 2 and abs(drawn.mean() - 0.5) < 5 * 0.1 / 4000**0.5
    wide = np.array([joint_draw(means[0], 100 * covariance, 1, rng, np.array([0.0]), np.array([1.0])) for _ in range(200)])
    assert wide.min() == 0.0 and wide.max() == 1.0


def test_the_nearest_context_is_the_same_with_and_without_a_tree(monkeypatch):
    monkeypatch.setattr(teachers, "TREE_FROM", 16)
    rng, nearest = np.random.default_rng(0), Nearest()
    contexts = rng.uniform(size=(300, 2))
    for n in range(1, 300):
        probe = rng.uniform(size=2)
        assert nearest(contexts[:n], probe) == np.square(contexts[:n] - probe).sum(1).argmin()
    assert nearest.covered == 256


def test_every_result_finds_the_origin_of_its_context():
    """Contexts that are out at the same time, two of them equal; what is forgotten counts as chance."""
    class Scripted(LiveTeacher):
        def draw(self):
            i = self.given = getattr(self, "given", -1) + 1
            return np.array([0.0, i // 2]), Origin(1, i, i)

    live = Scripted(SQUARE, np.random.default_rng(0))
    out = [live.sample() for _ in range(5)]
    for i in (2, 0, 3, 1):
        live.update(out[i], i / 10)
    live.forget_open()
    live.update(out[4], 0.4)
    assert [tuple(o) for o in live.origins.tolist()] == [(1, 2, 2), (1, 0, 0), (1, 3, 3), (1, 1, 1), (0, -1, -1)]
    assert live.results == pytest.approx([0.2, 0.0, 0.3, 0.1, 0.4])


def test_covariance_with_time_chooses_what_rises():
    """Results rise with time in one corner, fall in another, stand still in the third: only the first is chosen, or the first two by size."""
    covariances = np.zeros((3, 4, 4))
    covariances[:, -1, -2] = [0.03, -0.01, 0.0]
    means = np.zeros((3, 4))
    assert CovarGmm().live(SQUARE, None).interest(means, covariances).tolist() == [0.03, 0, 0]
    assert CovarGmm(absolute=True).live(SQUARE, None).interest(means, covariances).tolist() == [0.03, 0.01, 0]


def test_riac_halves_and_a_cut_where_progress_differs():
    assert halves_progress(np.array([0.0, 0.2, 0.6, 1.0])) == pytest.approx(0.7) and halves_progress(np.array([0.0, 1.0])) == 0
    live = Riac(size=100, tries=200).live(SQUARE, np.random.default_rng(0))
    for i in range(100):  # results rise left of the middle only
        x = np.array([(i % 10 + 0.5) / 10, 0.5])
        live.update(x, i / 100 if x[0] < 0.5 else 0.0)
    assert len(live.regions) == 2 and abs(live.regions[0].high[0] - 0.5) <= 0.1 and live.regions[0].high[1] == 1
    assert live.progress()[0] > 0.3 and live.progress()[1] < 0.05 and sum(len(r.members) for r in live.regions) == 100


def test_riac_drops_its_oldest_quarter_where_nothing_can_be_cut():
    live = Riac(size=20, tries=5).live(SQUARE, np.random.default_rng(0))
    for _ in range(20):
        live.update(np.array([0.5, 0.5]), 1.0)
    assert len(live.regions) == 1 and live.regions[0].members == list(range(5, 20))


def test_adr_grows_at_the_bound_that_is_mastered_and_shrinks_at_the_one_that_is_not():
    live = Adr(step=0.1, good=0.6, bad=0.2, queue=3).live(SQUARE, np.random.default_rng(0))
    assert (live.box == 0.5).all() and (live.sample() == 0.5).all()
    for result in (0.5, 0.6, 0.7):
        live.learn(np.array([0.5, 0.5]), result, Origin(1, 1, 0))
    assert live.box.tolist() == [[0.5, 0.5], [0.6, 0.5]] and live.queues[1][0] == []
    for result in (0.5, 0.6):
        live.learn(np.array([0.5, 0.5]), result, Origin(1, 0, 1))
    live.learn(np.array([0.5, 0.5]), 0.0, Origin())
    assert live.box.tolist() == [[0.5, 0.5], [0.6, 0.5]]
    for _ in range(6):
        live.learn(np.array([0.6, 0.5]), 0.1, Origin(1, 1, 0))
    assert live.box.tolist() == [[0.5, 0.5], [0.5, 0.5]]  # no further than the other bound


def test_the_window_moves_from_easy_to_hard():
    live = Window(harder=(1, -1), width=0.25, step=0.5, good=0.5, every=4).live(SQUARE, np.random.default_rng(0))
    assert np.array(live.window()).tolist() == [[0, 0.75], [0.25, 1]]
    for result in (0, 0, 1, 0.9, 0, 0, 1, 1):
        live.update(live.sample(), result)
    assert live.place == 0.5 and np.array(live.window()).tolist() == [[0.5, 0.25], [0.75, 0.5]]
    for _ in range(8):
        live.update(live.sample(), 1.0)
    assert live.place == 0.75
    with pytest.raises(UserError, match="harder"):
        Window(harder=(1,)).live(SQUARE, np.random.default_rng(0))


@pytest.mark.parametrize("criterion", ["aic", "bic", "aicc"])
def test_the_mixture_finds_as_many_gaussians_as_there_are(criterion):
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(c, 0.02, (80, 2)) for c in ((0, 0), (1, 0), (0, 1))])
    means, covariances = fit_mixture(points, 6, criterion, 0)
    near = [np.abs(means - c).sum(1).min() for c in ((0, 0), (1, 0), (0, 1))]
    assert max(near) < 0.1 and covariances.shape == (len(means), 2, 2) and len(means) >= 3


def share(teacher, seed):
    """Of late episodes in the corner where alone a simulated learner gets better."""
    live, skill = teacher.live(SQUARE, np.random.default_rng(seed)), 0.0
    for _ in range(1500):
        task = live.sample()
        inside = (task < 0.4).all()
        skill = min(1.0, skill + 0.002 * inside)
        live.update(task, skill * task[0] / 0.4 if inside else 0.0)
    return (live.contexts[-500:] < 0.4).all(1).mean()


def test_practice_gathers_where_results_change():
    """Uniform draws spend 16 % there; ten seeds of ALP-GMM all at least twice that."""
    assert abs(np.mean([share(Uniform(), s) for s in range(10)]) - 0.16) < 5 * (0.16 * 0.84 / 5000) ** 0.5
    assert min(share(AlpGmm(fit_every=100, components=4), s) for s in range(10)) > 0.32


@pytest.mark.parametrize("teacher", [Uniform(), AlpGmm(fit_every=50, components=3), CovarGmm(fit_every=50, components=3), Riac(size=40), Adr(), Window(harder=(1,))],
                         ids=lambda t: t.part_name)
def test_a_taught_run_draws_from_its_teacher_and_resumes_exactly(tmp_path, teacher):
    recipe = Taught(recipe=ppo.override(*SMALL), teacher=teacher, test_every=2)
    options = {"task": FAMILY, "checkpoint_every": 2, "steps": 4}
    volvelle.train(recipe, folder=tmp_path / "whole", strict=True, **options)

    with pytest.raises(KeyboardInterrupt):
        volvelle.train(recipe, folder=tmp_path / "broken", progress=stop_at(3), **options)
    volvelle.train(recipe, folder=tmp_path / "broken", resume=tmp_path / "broken", **options)
    one, other = (fingerprint(load_state(checkpoints(tmp_path / f)[-1])) for f in ("whole", "broken"))
    assert one == other
    saved = load_state(tmp_path / "whole" / "curriculum")
    assert len(saved["results"]) == 4 * 8 * 16 and 0 <= saved["results"].min() <= saved["results"].max() <= 1
    assert (tmp_path / "whole" / "curriculum" / "coverage.svg").is_file() and (tmp_path / "whole" / "policy").is_dir()


@pytest.mark.parametrize("task, recipe, words", [("CartPole-v1", ppo, "has no contexts"), (FAMILY, ppo(seeds=2), "seeds=1"), (SIGNPOST, ppo, "task.worst"), (FAMILY, None, "control recipe"), ("toy-students", ppo, "brings its own learner")])
def test_what_cannot_be_taught_is_refused(tmp_path, task, recipe, words):
    with pytest.raises(UserError, match=words):
        volvelle.train(Taught(recipe=recipe), task=task, folder=tmp_path / "run", steps=1)
