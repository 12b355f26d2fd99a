"""Payoff files and games of nashpy and OpenSpiel."""

import json

import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.planning.game_files import from_nashpy, from_openspiel, load_game
from volvelle.planning.games import random_game, solve_zero_sum

STAG = np.array([[4.0, 0], [3, 3]])


def test_the_three_formats_hold_the_same_game(tmp_path):
    both = np.stack([STAG, STAG.T])
    (tmp_path / "a.csv").write_text("4,0\n3,3\n\n4,3\n0,3\n")
    (tmp_path / "b.csv").write_text("4, 0\n3, 3\n")
    (tmp_path / "c.json").write_text(json.dumps({"payoffs": both.tolist()}))
    (tmp_path / "d.json").write_text(json.dumps({"symmetric": STAG.tolist()}))
    np.savez(tmp_path / "e.npz", payoffs=both)
    for name, kind in (("a.csv", None), ("b.csv", "symmetric"), ("c.json", None), ("d.json", None), ("d.json", "symmetric"), ("e.npz", None)):
        np.testing.assert_array_equal(load_game(tmp_path / name, kind).payoffs, both)
    np.testing.assert_array_equal(load_game(tmp_path / "b.csv", "zero-sum").payoffs, [STAG, -STAG])
    three = random_game((2, 3, 2), np.random.default_rng(0)).payoffs
    np.savez(tmp_path / "f.npz", payoffs=three)
    np.testing.assert_array_equal(load_game(tmp_path / "f.npz").payoffs, three)


@pytest.mark.parametrize("name, content, text", [
    ("a.csv", "1,2\n3\n", r"a.csv, line 2: 1 numbers; expected 2"),
    ("a.csv", "1,2\n3,x\n", r"a.csv, line 2: '3,x' is not a row of numbers"),
    ("a.csv", "1,2\n3,4\n", r"one table of shape \(2, 2\); pass kind="),
    ("a.csv", "1,2\n\n3,4\n5,6\n", r"row player's table is \(1, 2\), the column player's \(2, 2\)"),
    ("a.csv", "1\n\n2\n\n3\n", "holds 3 tables; expected two"),
    ("a.csv", "\n", "holds no payoffs"),
    ("a.csv", "1,nan\n\n1,2\n", "must be finite"),
    ("a.json", "{", "not JSON"),
    ("a.json", '{"payoffs": [[1, 2], [3, 4]]}', r"a.json: payoffs of shape \(2, 2\)"),
    ("a.json", '{"symmetric": [[1, 2]]}', r"a.json: a symmetric game needs a square"),
    ("a.json", '{"symmetric": [[1, 2], [3]]}', "must be a full rectangle"),
    ("a.json", '{"zero-sum": [1, 2]}', "expected one matrix"),
    ("a.json", '{"payoff": 1}', "expected exactly one of the keys payoffs, zero-sum, symmetric"),
    ("a.json", "[1]", "holds list"),
    ("a.txt", "1", "unknown ending '.txt'"),
    ("a.npz", "no zip", "not a readable NPZ")])
def test_a_wrong_file_is_refused_by_name(tmp_path, name, content, text):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=text) as caught:
        load_game(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_further_refusals(tmp_path):
    with pytest.raises(UserError, match="no such payoff file"):
        load_game(tmp_path / "none.csv")
    (tmp_path / "a.json").write_text('{"symmetric": [[1]]}')
    with pytest.raises(UserError, match="kind symmetric, not zero-sum"):
        load_game(tmp_path / "a.json", "zero-sum")
    with pytest.raises(UserError, match="kind of game"):
        load_game(tmp_path / "a.json", "cooperative")
    np.savez(tmp_path / "o.npz", payoffs=np.array([{"a": 1}], dtype=object))  # a pickle inside
    with pytest.raises(UserError, match="o.npz"):
        load_game(tmp_path / "o.npz")


def test_nashpy():
    nashpy = pytest.importorskip("nashpy")
    np.testing.assert_array_equal(from_nashpy(nashpy.Game(STAG, STAG.T)).payoffs, [STAG, STAG.T])
    np.testing.assert_array_equal(from_nashpy(nashpy.Game(STAG)).payoffs, [STAG, -STAG])


def test_openspiel():
    pyspiel = pytest.importorskip("pyspiel")
    np.testing.assert_array_equal(from_openspiel("matrix_sh").payoffs[0], [[2, 0], [1, 1]])
    kuhn = from_openspiel(pyspiel.load_game("kuhn_poker"))
    assert kuhn.sizes == (64, 64)
    assert solve_zero_sum(kuhn.payoffs[0])[2] == pytest.approx(-1 / 18, abs=1e-8)  # Kuhn, 1950
    blotto = from_openspiel("blotto(coins=4)")
    assert blotto.sizes == (15, 15) and blotto.zero_sum
    three = pyspiel.create_tensor_game([[1.0] * 8, [2.0] * 8, list(range(8))], [2, 2, 2])
    assert from_openspiel(three).payoffs[2, 1, 0, 1] == 5
    for name, text in (("kuhn_poker(players=3)", "sequential two-player"), ("leduc_poker", "pure strategies; the table may hold"), ("nope", "unknown OpenSpiel game")):
        with pytest.raises(UserError, match=text):
            from_openspiel(name)
