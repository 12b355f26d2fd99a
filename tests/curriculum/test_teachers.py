"""Teachers: learning progress and mixtures by hand, draws inside the bounds, a teacher in front of a control method, resuming."""

import numpy as np
import pytest
from signposts import SIGNPOST, SMALL

import volvelle
from volvelle.control.methods.ppo import ppo
from volvelle.core.errors import UserError
from volvelle.core.state import fingerprint, load_state
from volvelle.core.trainer import checkpoints
from volvelle.curriculum.taught import Taught
from volvelle.curriculum.teachers import AlpGmm, Uniform, draw, fit_mixture, progress_probabilities

SQUARE = np.array([[0.0, 0.0], [1.0, 1.0]])
FAMILY = SIGNPOST.replace(worst=-2.0, best=0.0)


def test_absolute_progress_by_hand():
    teacher = AlpGmm().live(SQUARE, np.random.default_rng(0))
    tasks = [(.1, .1), (.9, .9), (.5, .5), (.2, .8), (.8, .2), (.4, .4), (.12, .1), (.85, .9), (.5, .45), (.13, .1)]
    for task, result in zip(tasks, [0, .1, .2, .3, .4, .5, .35, .05, .9, .6]):
        teacher.update(np.array(task), result)
    assert teacher.progress == pytest.approx([0] * 6 + [.35, .05, .7, .25])


def test_gaussians_are_chosen_by_their_progress():
    assert progress_probabilities(np.array([0, .3, .1])) == pytest.approx([0, .75, .25])
    assert progress_probabilities(np.zeros(4)).tolist() == [.25] * 4


def test_a_draw_is_joint_and_its_progress_dropped():
    """Context and progress fully correlated: the contexts drawn spread as the joint Gaussian says (4,000 draws, 5 standard errors), the silent Gaussian never."""
    means = np.array([[0.5, 0.4], [9.0, 0.0]])
    covariances = np.array([[[0.01, 0.01], [0.01, 0.01]], np.eye(2)])
    rng = np.random.default_rng(0)
    drawn = np.array([draw(means, covariances, rng, np.array([0.0]), np.array([10.0])) for _ in range(4000)])
    assert drawn.shape == (4000, 1) and drawn.max() < 2 and abs(drawn.mean() - 0.5) < 5 * 0.1 / 4000**0.5
    wide = np.array([draw(means, 100 * covariances, rng, np.array([0.0]), np.array([1.0])) for _ in range(200)])
    assert wide.min() == 0.0 and wide.max() == 1.0


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


@pytest.mark.parametrize("teacher", [Uniform(), AlpGmm(fit_every=50, components=3)])
def test_a_taught_run_draws_from_its_teacher_and_resumes_exactly(tmp_path, teacher):
    recipe = Taught(recipe=ppo.override(*SMALL), teacher=teacher)
    options = {"task": FAMILY, "checkpoint_every": 2, "steps": 4}
    volvelle.train(recipe, folder=tmp_path / "whole", strict=True, **options)

    def stop(step, steps, metrics):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        volvelle.train(recipe, folder=tmp_path / "broken", progress=stop, **options)
    volvelle.train(recipe, folder=tmp_path / "broken", resume=tmp_path / "broken", **options)
    one, other = (fingerprint(load_state(checkpoints(tmp_path / f)[-1])) for f in ("whole", "broken"))
    assert one == other
    saved = load_state(tmp_path / "whole" / "curriculum")
    assert len(saved["results"]) == 4 * 8 * 16 and 0 <= saved["results"].min() <= saved["results"].max() <= 1
    assert (tmp_path / "whole" / "curriculum" / "coverage.svg").is_file() and (tmp_path / "whole" / "policy").is_dir()


@pytest.mark.parametrize("task, recipe, words", [("CartPole-v1", ppo, "has no contexts"), (FAMILY, ppo(seeds=2), "seeds=1"), (SIGNPOST, ppo, "task.worst"), (FAMILY, None, "recipe part")])
def test_what_cannot_be_taught_is_refused(tmp_path, task, recipe, words):
    with pytest.raises(UserError, match=words):
        volvelle.train(Taught(recipe=recipe), task=task, folder=tmp_path / "run", steps=1)
