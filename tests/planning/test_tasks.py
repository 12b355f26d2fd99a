import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.core.parts import coerce
from volvelle.core.tasks import Task
from volvelle.planning.mdp import backward_induction
from volvelle.planning.tasks import Lock, LotteryGrid, MdpFile, RandomTable, Sticky, TextGrid, ToyText, Trap, TwoResources


def test_names_and_prefixes_reach_the_tasks():
    assert coerce(Task, "table:CliffWalking-v1", "task") == ToyText(env="CliffWalking-v1")
    assert coerce(Task, "mdp:some/where.npz", "task") == MdpFile(path="some/where.npz")
    assert isinstance(coerce(Task, "lottery-grid", "task"), LotteryGrid)


def test_a_file_of_arrays_in_both_forms(tmp_path):
    rng = np.random.default_rng(0)
    P, r = rng.dirichlet(np.ones(3), size=(3, 2)), rng.normal(size=(3, 2))
    np.savez(tmp_path / "dense.npz", transition=P, reward=r, initial=[0, 1, 0])
    s, a, t = np.nonzero(P)
    np.savez(tmp_path / "flat.npz", state=s, action=a, next_state=t, probability=P[s, a, t], reward=r[s, a], initial=1)
    values = [backward_induction(MdpFile(path=str(tmp_path / f), horizon=4).mdp()).values for f in ("dense.npz", "flat.npz")]
    np.testing.assert_allclose(values[0], values[1])


def test_files_are_refused_by_name(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(UserError, match="text.npz: cannot be read"):
        MdpFile(path=str(tmp_path / "text.npz")).mdp()
    np.savez(tmp_path / "other.npz", prices=[1.0])
    with pytest.raises(UserError, match="other.npz: holds prices; accepted: transition, reward or state, action"):
        MdpFile(path=str(tmp_path / "other.npz")).mdp()
    np.savez(tmp_path / "short.npz", transition=np.full((2, 1, 2), 0.4), reward=np.zeros((2, 1)))
    with pytest.raises(UserError, match="state 0, action 0 sum to 0.8"):
        MdpFile(path=str(tmp_path / "short.npz")).mdp()
    np.savez(tmp_path / "object.npz", transition=np.array([None]), reward=np.zeros(1))
    with pytest.raises(UserError, match="object.npz: cannot be read"):  # pickled content is not opened
        MdpFile(path=str(tmp_path / "object.npz")).mdp()


def test_random_tasks_follow_the_seed_and_fixed_ones_do_not():
    grid = LotteryGrid()
    np.testing.assert_array_equal(grid.mdp(3).reward, grid.mdp(3).reward)
    assert len({grid.mdp(s).expected_reward.tobytes() for s in range(5)}) == 5
    assert Trap().mdp(0).reward.tolist() == Trap().mdp(9).reward.tolist()
    assert backward_induction(Lock(length=4).mdp(1)).values[0, 0] == 1


def test_two_resources_are_used_up_and_found():
    mdp = TwoResources(luck=1.0).mdp()
    np.testing.assert_allclose(mdp.expected_reward[0], [[2, -1], [-1, -1]])
    np.testing.assert_allclose(mdp.expected_reward[1], [[-1, 2], [-1, -1]])


def test_toy_text_with_sticky_actions():
    plain, glued = (ToyText(options={"is_slippery": False}, repeat=p).mdp() for p in (0.0, 0.25))
    assert backward_induction(plain).values[0] @ plain.initial == 1 > backward_induction(glued).values[0] @ glued.initial > 0.9


def test_minigrid_as_a_table():
    """Empty-5x5: 9 cells in 4 directions, the goal ends; 5 moves to it, so .99^4. DoorKey needs pickup and toggle. With all 7 actions nothing becomes better."""
    mdp = coerce(Task, "table:MiniGrid-Empty-5x5-v0", "task").replace(actions=(0, 1, 2), discount=0.99).mdp()
    assert mdp.states == 8 * 4 + 1 and mdp.deterministic and set(mdp.reward) == {0.0, 1.0}
    assert mdp.initial @ backward_induction(mdp).values[0] == pytest.approx(0.99**4)
    doors = [backward_induction(ToyText(env="MiniGrid-DoorKey-5x5-v0", horizon=40, discount=0.99, actions=a).mdp()) for a in ((0, 1, 2), (0, 1, 2, 3, 5), ())]
    values = [d.values[0][0] for d in doors]
    assert values[0] == 0 < values[1] == pytest.approx(values[2])
    one, two = (ToyText(env="MiniGrid-DoorKey-5x5-v0", horizon=40, actions=(0, 1, 2, 3, 5), layout=i).mdp() for i in (0, 3))
    assert one.states != two.states or (one.next_state != two.next_state).any()
    for task, says in ((ToyText(env="MiniGrid-Dynamic-Obstacles-5x5-v0"), "draws at random"), (ToyText(env="MiniGrid-Empty-5x5-v0", actions=(9,)), "0 to 6"),
                       (ToyText(env="MiniGrid-Nothing-v0"), "cannot be made"), (ToyText(actions=(0,)), "are for MiniGrid"),
                       (ToyText(env="MiniGrid-Empty-5x5-v0", options={"size": 5}), "take actions and layout")):
        with pytest.raises(UserError, match=says):
            task.mdp()


def test_sticky_random_and_drawn_tasks():
    glued, plain = Sticky(base=ToyText(options={"is_slippery": False})).mdp(), ToyText(options={"is_slippery": False}, repeat=0.25).mdp()
    np.testing.assert_array_equal(glued.probability, plain.probability)
    assert (RandomTable(instance=1).mdp(0).reward == RandomTable(instance=1).mdp(5).reward).all() and RandomTable(instance=2).mdp().states == 10
    assert TextGrid().mdp().states == 1 + 49 - 9 - 1 and backward_induction(TextGrid().mdp()).values[0, 0] == 1
    assert backward_induction(Lock(length=3, bait=0.4).mdp()).q[0, 0].max() == 1 and Lock(length=3, bait=0.4).mdp().expected_reward[0].max() == 0.4
    with pytest.raises(UserError, match="expected a tabular task"):
        Sticky(base="CartPole-v1")
