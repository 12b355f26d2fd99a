"""Games from elsewhere: payoff files (CSV, JSON, NPZ), nashpy and OpenSpiel."""

from __future__ import annotations

import csv
import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from volvelle.core.errors import UserError, unknown

from .games import Game, symmetric, zero_sum

KINDS = ("payoffs", "zero-sum", "symmetric")
MAX_CELLS = 10_000_000


def load_game(path: str | Path, kind: str | None = None) -> Game:
    """Read a payoff file. UserError names the file and the table that is wrong.

    CSV: two tables of numbers with a blank line between (row player's, column player's), or one table with `kind` "zero-sum" or
    "symmetric". JSON object and NPZ: one key out of "payoffs" ([n, A_1, ..., A_n]), "zero-sum", "symmetric".
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such payoff file")
    if kind not in (None, "zero-sum", "symmetric"):
        raise unknown("kind of game", str(kind), KINDS[1:], f" for {path}")
    if path.suffix == ".csv":
        tables = _csv_tables(path)
        if len(tables) == 1 and kind is None:
            raise UserError(f'{path}: holds one table of shape {tables[0].shape}; pass kind="zero-sum" or kind="symmetric", '
                            "or add the column player's table after a blank line")
        if len(tables) == 2 and kind is None and tables[0].shape != tables[1].shape:
            raise UserError(f"{path}: the row player's table is {tables[0].shape}, the column player's {tables[1].shape}; "
                            "expected the same shape")
        if len(tables) != (2 if kind is None else 1):
            raise UserError(f"{path}: holds {len(tables)} tables; expected {'two' if kind is None else f'one for kind {kind}'}")
        return _make(kind or "payoffs", tables if kind is None else tables[0], str(path))
    if path.suffix == ".json":
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error})") from None
    elif path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                data = {key: file[key] for key in file.files}
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: not a readable NPZ of numbers ({error})") from None
    else:
        raise UserError(f"{path}: unknown ending {path.suffix!r}; accepted: .csv, .json, .npz")
    if not isinstance(data, dict) or len(data) != 1 or next(iter(data)) not in KINDS:
        keys = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise UserError(f"{path}: holds {keys}; expected exactly one of the keys {', '.join(KINDS)}")
    (found, value), = data.items()
    if kind not in (None, found):
        raise UserError(f"{path}: holds a game of kind {found}, not {kind}")
    return _make(found, value, str(path))


def _make(kind: str, value: Any, name: str) -> Game:
    try:
        value = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name}: {kind} must be a full rectangle of numbers") from None
    if kind != "payoffs" and value.ndim != 2:
        raise UserError(f"{name}: {kind} of shape {value.shape}; expected one matrix")
    return {"payoffs": Game, "zero-sum": zero_sum, "symmetric": symmetric}[kind](value, name)


def _csv_tables(path: Path) -> list[np.ndarray]:
    blocks: list[list[list[float]]] = [[]]
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not any(cell.strip() for cell in row):
                blocks.append([])
                continue
            try:
                blocks[-1].append([float(cell) for cell in row])
            except ValueError:
                raise UserError(f"{path}, line {number}: {','.join(row)!r} is not a row of numbers") from None
            if len(row) != len(blocks[-1][0]):
                raise UserError(f"{path}, line {number}: {len(row)} numbers; expected {len(blocks[-1][0])} as in the rows above")
    tables = [np.array(block) for block in blocks if block]
    if not tables:
        raise UserError(f"{path}: holds no payoffs")
    return tables


def from_nashpy(game: Any) -> Game:
    """A `nashpy.Game` as a Game."""
    return Game(np.stack(game.payoff_matrices), "nashpy")


def from_openspiel(game: Any) -> Game:
    """An OpenSpiel game (or its name, such as "matrix_sh" or "kuhn_poker") in normal form; sequential ones are expanded to their
    pure strategies, two players only. UserError if OpenSpiel is missing or the table would exceed 10 million cells."""
    try:
        import pyspiel
    except ImportError:
        raise UserError("OpenSpiel games need the package open_spiel: pip install 'volvelle[planning]'") from None
    if isinstance(game, str):
        if game.partition("(")[0] not in pyspiel.registered_names():
            raise unknown("OpenSpiel game", game, pyspiel.registered_names())
        game = pyspiel.load_game(game)
    name, kind = str(game), game.get_type()
    if isinstance(game, pyspiel.MatrixGame):
        return Game(np.stack([game.row_utilities(), game.col_utilities()]), name)
    if isinstance(game, pyspiel.TensorGame):
        return Game(np.stack([np.reshape(game.player_utilities(i), game.shape()) for i in range(game.num_players())]), name)
    if kind.dynamics == pyspiel.GameType.Dynamics.SIMULTANEOUS and game.max_game_length() == 1:
        return _one_shot(game, name)
    if kind.dynamics != pyspiel.GameType.Dynamics.SEQUENTIAL or game.num_players() != 2:
        raise UserError(f"{name}: only one-shot games and sequential two-player games have a normal form here")
    sizes = _pure_strategies(game)
    if prod(sizes) > MAX_CELLS:
        raise UserError(f"{name}: {sizes[0]:.2g} x {sizes[1]:.2g} pure strategies; the table may hold {MAX_CELLS} cells")
    table = pyspiel.extensive_to_matrix_game(game)
    return Game(np.stack([table.row_utilities(), table.col_utilities()]), name)


def _one_shot(game: Any, name: str) -> Game:
    root = game.new_initial_state()
    sizes = [len(root.legal_actions(i)) for i in range(game.num_players())]
    if prod(sizes) > MAX_CELLS:
        raise UserError(f"{name}: {' x '.join(map(str, sizes))} joint actions; the table may hold {MAX_CELLS} cells")
    payoffs = np.empty((len(sizes), *sizes))
    actions = [root.legal_actions(i) for i in range(len(sizes))]
    for cell in np.ndindex(*sizes):
        state = root.clone()
        state.apply_actions([actions[i][c] for i, c in enumerate(cell)])
        payoffs[(slice(None), *cell)] = state.returns()
    return Game(payoffs, name)


def _pure_strategies(game: Any) -> list[int]:
    """The number of pure strategies of each player: the product of legal actions over information states."""
    choices: list[dict[str, int]] = [{} for _ in range(game.num_players())]
    stack, seen = [game.new_initial_state()], 0
    while stack:
        state = stack.pop()
        seen += 1
        if seen > 1_000_000:
            raise UserError(f"{game}: more than a million states; too large for a normal form")
        if not state.is_terminal():
            if not state.is_chance_node():
                choices[state.current_player()][state.information_state_string()] = len(state.legal_actions())
            stack += [state.child(a) for a in state.legal_actions()]
    return [prod(c.values()) for c in choices]
