"""Grid worlds: dynamics step by step, exact optimal returns, distributions of levels, refusals."""

import pytest
import torch

from volvelle.core.errors import UserError
from volvelle.core.parts import coerce
from volvelle.core.registry import registry
from volvelle.core.tasks import Task
from volvelle.curriculum.gridtasks import HandmadeGrids, RandomGrids
from volvelle.curriculum.gridworlds import Levels, Worlds, optimal_returns
from volvelle.curriculum.tabular import returns

UP, DOWN, LEFT, RIGHT, STAY = range(5)


def level(side=3, walls=(), start=0, place=(2,), reward=(1.0,), ends=(0.0,), back=(0.5,), limit=5, lifetime=10, cells=None):
    blocked = torch.zeros(1, cells or side**2, dtype=torch.bool)
    blocked[0, list(walls)] = True
    return Levels(torch.tensor([side]), blocked, torch.tensor([start]), torch.tensor([place]), torch.ones(1, len(place), dtype=torch.bool), torch.tensor([reward]),
                  torch.tensor([ends]), torch.tensor([back]), torch.tensor([limit]), torch.tensor([lifetime]))


def go(worlds, action, *uniform):
    O = worlds.levels.objects
    numbers = torch.tensor(uniform or (0.999,) * (O + 1)).view(1, 1, O + 1)
    reward, done = worlds.step(torch.tensor([[action]]), numbers)
    return float(reward), bool(done), int(worlds.cell), worlds.there[0, 0].tolist()


def test_moves_stop_at_walls_and_edges():
    moves = level(walls=(1,)).moves()[0]
    assert moves[0].tolist() == [0, 3, 0, 0, 0] and moves[4].tolist() == [4, 7, 3, 5, 4] and moves[8].tolist() == [5, 8, 7, 8, 8]
    small = level(cells=16).moves()[0]
    assert (small[9:] == torch.arange(9, 16)[:, None]).all() and small[:9].max() == 8


def test_one_step_in_its_order():
    """Collected once, absent on the next step whatever the draw, back at its own probability, collected on a cell where one stands."""
    w = Worlds(level(limit=50), 1)
    assert int(w.states()) == 9  # cell 0, object there: 0 + 9 * 1
    assert go(w, RIGHT) == (0.0, False, 1, [True])
    assert go(w, RIGHT, 0.0, 0.9) == (1.0, False, 2, [False])          # its comeback was drawn, yet it has just been taken
    assert int(w.states()) == 2
    assert go(w, STAY, 0.49, 0.9) == (0.0, False, 2, [True])           # it comes back, and was not there before the step
    assert go(w, STAY, 0.51, 0.9) == (1.0, False, 2, [False])
    assert go(w, STAY, 0.51, 0.9) == (0.0, False, 2, [False])


def test_an_episode_ends_by_an_object_or_by_time_and_begins_again_within_the_step():
    w = Worlds(level(ends=(0.3,), limit=3), 1)
    go(w, RIGHT)
    assert go(w, RIGHT, 0.9, 0.29) == (1.0, True, 0, [True]) and int(w.time) == 0
    go(w, RIGHT)
    assert go(w, RIGHT, 0.9, 0.31)[1] is False
    assert go(w, STAY)[1:] == (True, 0, [True])


def test_the_optimum_by_hand():
    assert float(optimal_returns(level(ends=(0.0,)))) == pytest.approx(1.75)
    assert float(optimal_returns(level(ends=(1.0,)))) == pytest.approx(1.0)
    assert float(optimal_returns(level(walls=(1, 3), ends=(0.0,)))) == 0.0  # shut in
    assert float(optimal_returns(level(reward=(-1.0,)))) == 0.0


def test_the_optimal_policy_earns_what_was_promised():
    """Played 4000 times on 24 random levels. Each level's mean is within 5 standard errors: a false alarm in about 1e-5 of the runs."""
    levels = RandomGrids(size=(3, 5), walls=3, objects=(1, 3), ends=(0.1, 1.0), returns=(0.05, 0.5), limit=(4, 14)).draw(24, torch.Generator().manual_seed(0))
    promised, policy = optimal_returns(levels, actions=True)
    generator = torch.Generator().manual_seed(1)
    rounds = torch.stack([returns(levels, lambda states, times, step: policy[times, torch.arange(24)[:, None], states].long(), 400, generator) for _ in range(10)])
    error = rounds.std(0) / 10**0.5
    assert (promised > 0.3).sum() > 12
    assert ((rounds.mean(0) - promised).abs() <= 9 * error + 1e-6).all()  # 9 of the t distribution with 9 degrees of freedom


def test_levels_are_valid_and_the_seed_decides_them():
    source = registry_levels("all")
    levels, again = (source.draw(500, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(levels.tensors().values(), again.tensors().values()))
    spots = torch.cat([levels.start[:, None], levels.place], 1)
    assert (spots < levels.size[:, None] ** 2).all() and not levels.walls.gather(1, spots).any()
    assert all(len(set(row)) == 6 for row in spots.tolist())
    assert set(levels.size.tolist()) == set(range(4, 11)) and set(levels.owned.sum(1).tolist()) == {1, 2, 3, 4, 5}
    assert levels.limit.min() >= 20 and levels.limit.max() <= 750 and (levels.reward[:, 0] >= 0).all() and (levels.reward[:, 1:] < 0).any()
    full = levels[levels.size == 10]
    assert (full.walls.sum(1) == 15).all() and levels.states == 100 * 32
    assert (levels.ends >= 0.01).all() and (levels.returns <= 0.1).all()


def registry_levels(name):
    from volvelle.curriculum.gridtasks import LevelSource

    registry.load()
    return registry.table(LevelSource)[name]


def test_hand_made_worlds_can_be_played():
    levels = HandmadeGrids().draw(10, torch.Generator().manual_seed(0))
    assert levels.size.tolist() == [11, 13, 11, 9, 11] * 2 and levels.limit[1] == 50 and levels.owned.sum(1)[:5].tolist() == [4, 2, 4, 5, 4]
    assert levels.walls.sum(1)[:5].tolist() == [0, 0, 0, 7, 9 + 9 - 1]
    some = levels[torch.tensor([1, 6])]
    assert (optimal_returns(some) == 1.0).all()  # sparse: one good object, reached in time
    assert coerce(Task, "grids:long-dense", "task").levels.kinds == ("long-dense",)


def test_the_held_out_levels_are_the_tasks_own():
    task = coerce(Task, "grids:tiny", "task")
    assert task.label() == "grids-tiny" and (task.held_out().start == task.held_out().start).all()
    assert (task.held_out().start != task.replace(seed=1).held_out().start).any()


@pytest.mark.parametrize("make, words", [
    (lambda: RandomGrids(size=(5, 4)), "levels.size=[5, 4]"), (lambda: RandomGrids(ends=(0.1, 1.5)), "levels.ends=[0.1, 1.5]"),
    (lambda: RandomGrids(size=(2, 2), objects=(1, 4), walls=0), "4 objects, a start and 0 walls do not fit"), (lambda: RandomGrids(reward=(-1.0, 0.0)), "nothing to gain"),
    (lambda: HandmadeGrids(kinds=("dens",)), "did you mean dense"), (lambda: coerce(Task, "grids:huge", "task"), "'huge'"),
])
def test_levels_that_make_no_sense_are_refused(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert words in str(caught.value) and "\n" not in str(caught.value)
