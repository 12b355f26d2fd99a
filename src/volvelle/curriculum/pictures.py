"""What a curriculum has covered and what came of it, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volvelle.core.files import write_text
from volvelle.core.plots import heat_map, learning_curves
from volvelle.core.state import save_state

from .choosers import MIXTURE, History


def coverage_map(contexts: np.ndarray, bounds: np.ndarray, names: Sequence[str], cells: int = 12) -> str:
    """How often training met each part of the space: contexts [n, d], bounds [2, d] (the first two parameters are shown; one: over thirds of the run)."""
    low, high = bounds
    edges = [np.linspace(low[i], high[i], cells + 1) for i in range(min(2, len(low)))]
    middles = [[f"{m:.3g}" for m in (e[:-1] + e[1:]) / 2] for e in edges]
    if len(low) == 1:
        parts = np.array_split(contexts[:, 0], 3)
        counts = np.stack([np.histogram(p, edges[0])[0] for p in parts])
        return heat_map(counts, ["first third", "second third", "last third"], middles[0], value="episodes", x=names[0], title="Contexts trained on")
    counts = np.histogram2d(contexts[:, 0], contexts[:, 1], bins=edges)[0]
    return heat_map(counts, middles[0], middles[1], value="episodes", y=names[0], x=names[1], title="Contexts trained on")


def zero_shot_picture(contexts: np.ndarray, names: Sequence[str], lines: dict[str, np.ndarray], title: str) -> str:
    """Scores [N] per line over the contexts [N, d]: curves for one parameter, a heat map of the last line for two or more (others averaged)."""
    if contexts.shape[1] == 1:
        rng = np.random.default_rng(0)
        return learning_curves({k: (contexts[:, 0], v[None]) for k, v in lines.items()}, metric="score", x=names[0], rng=rng, title=title)
    values = list(lines.values())[-1]
    rows, columns = (np.unique(contexts[:, i], return_inverse=True) for i in (0, 1))
    total, count = np.zeros((len(rows[0]), len(columns[0]))), np.zeros((len(rows[0]), len(columns[0])))
    np.add.at(total, (rows[1], columns[1]), values)
    np.add.at(count, (rows[1], columns[1]), 1)
    return heat_map(total / count, [f"{r:.3g}" for r in rows[0]], [f"{c:.3g}" for c in columns[0]], value="score", y=names[0], x=names[1], title=title)


@dataclass
class Trainings:
    """What was trained and how it did; saved with its pictures. The policies themselves lie in the run's children/context-INDEX/policy."""

    source: Any
    history: History
    curve: list[float]

    def save(self, folder) -> None:
        history, contexts, names = self.history, self.source.contexts, self.source.names
        save_state(folder, {"names": list(names), "contexts": contexts, "trained": list(history.trained), "rows": np.array(history.rows), "curve": list(self.curve)})
        if not history.rows:
            return
        lines = {f"after {k}": np.max(history.rows[:k], 0) for k in sorted({1, (len(history.rows) + 1) // 2, len(history.rows)})}
        write_text(folder / "zero-shot.svg", zero_shot_picture(contexts, names, lines, "Zero-shot score over the contexts"))
        trained = ["mixture" if i == MIXTURE else ", ".join(f"{c:.3g}" for c in contexts[i]) for i in history.trained]
        columns = [", ".join(f"{v:.3g}" for v in c) for c in contexts]
        write_text(folder / "transfer.svg", heat_map(np.array(history.rows), trained, columns, value="score", y="trained in", x="tested in"))
