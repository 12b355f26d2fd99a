"""Charts as SVG text: learning curves, final values, paired differences, heat maps.

Every function returns one `<svg>` element, 700 user units wide, that stands alone in a file or inside a page. The same
data give the same bytes: fixed id salt, no date, bundled font for the layout. Text stays text, so a page's own font
shows. Colours are Okabe and Ito's, which colour-blind readers can tell apart, darkest first; yellow is left out, as it
vanishes on white. No pyplot, so no global figure state.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

from volvelle.core.errors import UserError
from volvelle.core.statistics import Interval, curve_band, mean_interval

WIDTH = 700
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("solid", (0, (4, 2)), (0, (1, 1.5)))
_INK, _SOFT, _FAINT = "#222222", "#666666", "#e3e3e3"
_FONTS = "'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": _INK,
    "axes.labelsize": 12,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titlecolor": _INK,
    "axes.titlepad": 12,
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "grid.color": _FAINT,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "volvelle",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}

Curve = tuple[ArrayLike, ArrayLike]  # steps [T], values [S, T]


# --- charts -----------------------------------------------------------------------------------------------------------


def learning_curves(
    curves: Mapping[str, Curve],
    *,
    metric: str,
    rng: np.random.Generator,
    unit: str | None = None,
    x: str = "training step",
    log2_x: bool = False,
    title: str | None = None,
) -> str:
    """One line per arm, the mean over its seeds, with a 95 % `curve_band` where there are two seeds or more.

    curves[arm] = (steps [T], values [S, T]). Arms are labelled at the end of their line, or in a legend where names are
    long. `log2_x` is for pass@k. Raises UserError on no arms, unequal lengths, steps that do not increase, NaN.
    """
    curves = {arm: _curve(arm, metric, c, log2_x) for arm, c in _some("learning curves", curves).items()}
    legend = max(map(len, curves)) > 26
    with _figure(360 + 18 * len(curves) * legend, title) as (figure, axes, svg):
        ends = {}
        for i, (arm, (steps, values)) in enumerate(curves.items()):
            colour, dash = _look(i)
            if len(values) > 1:
                mean, low, high = curve_band(values, rng)
                axes.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
            else:
                mean = values[0]
            marker = {"marker": "o", "markersize": 4} if log2_x or len(steps) == 1 else {}
            axes.plot(steps, mean, color=colour, linestyle=dash, **marker)
            ends[arm] = float(mean[-1])
        axes.grid(axis="y")
        axes.set_title(_label(metric, unit))  # upright above the axis: read without turning the head
        axes.set_xlabel(x)
        axes.margins(x=0.01)
        if log2_x:
            ticks = sorted({float(s) for steps, _ in curves.values() for s in steps})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(_ticks(7, integer=all((s == s.round()).all() for s, _ in curves.values())))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
        _name_lines(figure, axes, ends, legend)
    return svg(f"Learning curves of {metric}: {', '.join(curves)}")


def final_values(
    values: Mapping[str, ArrayLike], *, metric: str, unit: str | None = None, title: str | None = None
) -> str:
    """One row per arm: every seed as a pale dot, the mean with its 95 % t interval (two seeds or more), and in figures.

    values[arm] [S]. Raises UserError on no arms or NaN.
    """
    rows = {}
    for arm, v in _some("final values", values).items():
        v = np.asarray(v, np.float64)
        if v.ndim != 1 or not v.size or not np.isfinite(v).all():
            raise UserError(f"final values of {arm}: {v.tolist()}; accepted is one finite number per seed")
        rows[arm] = (mean_interval(v) if v.size > 1 else Interval(float(v[0]), math.nan, math.nan, 1), v)
    return _rows(rows, _label(metric, unit), None, title, f"Final {metric} per arm")


def differences(
    intervals: Mapping[str, Interval],
    *,
    metric: str,
    base: str,
    unit: str | None = None,
    threshold: float = 0.0,
    title: str | None = None,
) -> str:
    """Forest plot of paired differences from the arm `base`, with a line at `threshold`."""
    rows = {arm: (i, np.empty(0)) for arm, i in _some("differences", intervals).items()}
    label = f"difference in {_label(metric, unit)} from {base}"
    return _rows(rows, label, threshold, title, f"Paired differences in {metric} from {base}")


def heat_map(
    matrix: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    value: str,
    y: str | None = None,
    x: str | None = None,
    centre: float | None = None,
    title: str | None = None,
) -> str:
    """Heat map of matrix [R, C], first row on top; NaN cells stay white with a dash ("no value").

    With `centre` the colours part at that value (orange below, purple above). Numbers are written into the cells of
    maps up to 12 x 12. Raises UserError if names and shape disagree or no value is finite.
    """
    m = np.asarray(matrix, np.float64)
    if m.shape != (len(rows), len(columns)):
        raise UserError(
            f"heat map of {value}: shape {list(m.shape)} with {len(rows)} row and {len(columns)} column names"
        )
    if not np.isfinite(m).any() or np.isinf(m).any():
        raise UserError(f"heat map of {value}: accepted are finite numbers (NaN for no value), at least one of them")
    low, high = float(np.nanmin(m)), float(np.nanmax(m))
    if centre is not None:
        reach = max(high - centre, centre - low) or 1.0
        norm = TwoSlopeNorm(centre, centre - reach, centre + reach)
    else:
        norm = Normalize(low, high if high > low else low + 1)
    cell = float(np.clip(460 / len(columns), 4, 64))
    height = float(np.clip(len(rows) * min(cell, 40), 60, 560)) + 110
    with _figure(height, title) as (figure, axes, svg):
        colours = mpl.colormaps["PuOr" if centre is not None else "cividis"]
        mesh = axes.pcolormesh(np.ma.masked_invalid(m), cmap=colours, norm=norm, rasterized=m.size > 2500)
        axes.set(xlabel=x, ylabel=y, ylim=(len(rows), 0))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        step = [max(1, math.ceil(n * 14 / room)) for n, room in ((len(columns), 460), (len(rows), height - 110))]
        turned = max(map(len, columns)) * 7.5 > 460 / len(columns) * step[0]
        axes.set_xticks(np.arange(0, len(columns), step[0]) + 0.5, columns[:: step[0]], rotation=90 if turned else 0)
        axes.set_yticks(np.arange(0, len(rows), step[1]) + 0.5, rows[:: step[1]])
        if max(m.shape) <= 12:
            decimals = places(m[np.isfinite(m)].tolist())
            for (r, c), v in np.ndenumerate(m):
                text = "–" if np.isnan(v) else number(v, decimals)
                dark = not np.isnan(v) and _luminance(colours(norm(v))) < 0.49
                place = {"ha": "center", "va": "center", "color": "white" if dark else _INK, "size": 11}
                axes.text(c + 0.5, r + 0.5, text, **place)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=max(8, (height - 110) / 14), label=value)
        bar.outline.set_visible(False)
    return svg(f"Heat map of {value}")


# --- numbers in text --------------------------------------------------------------------------------------------------


def number(value: float, decimals: int | None, signed: bool = False) -> str:
    """`value` with fixed decimals (None: three significant figures) and a true minus sign; NaN is an en dash."""
    if math.isnan(value):
        return "–"
    text = f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"
    text = re.sub(r"e([+-])0*", r"e\1", re.sub(r"^-(?=[0.]*$)", "", text)).replace("e+", "e")
    return ("+" if signed and re.match(r"[0.]*[1-9]", text) else "") + text.replace("-", "−")


def places(values: Sequence[float], intervals: Sequence[Interval] = ()) -> int | None:
    """Decimals that show two figures of the median half-width of the intervals, else three figures of the values.

    None where fixed decimals would read badly (very small or very large numbers).
    """
    size = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    widths = sorted((i.high - i.low) / 2 for i in intervals if i.high > i.low)
    if size and not 1e-3 <= size < 1e7:
        return None
    scale = widths[(len(widths) - 1) // 2] * 10 if widths else size
    return int(np.clip(2 - math.floor(math.log10(scale)), 0, 4)) if scale else 2


def with_interval(i: Interval, decimals: int | None, signed: bool = False) -> str:
    """`0.52 [0.48, 0.56]`; the mean alone where there is no interval."""
    mean, low, high = (number(v, decimals, signed) for v in (i.mean, i.low, i.high))
    return mean if math.isnan(i.low) else f"{mean} [{low}, {high}]"


# --- drawing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _figure(height: float, title: str | None) -> Iterator[tuple]:
    """A figure of WIDTH x height pixels in our style, drawn when the block ends; `svg(description)` then gives it."""
    out = io.StringIO()

    def svg(description: str) -> str:
        text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.S)
        text = text[text.index("<svg") :]
        text = re.sub(r'<g id="[^"]*"', "<g", text)  # unused, and twice in a page with two charts
        text = re.sub(r'(<svg[^>]*?) width="([\d.]+)pt"', r'\1 width="\2"', text)
        text = re.sub(r'(<svg[^>]*?) height="([\d.]+)pt"', r'\1 height="\2"', text)
        text = text.replace("'DejaVu Sans'", _FONTS)
        return text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)

    with mpl.rc_context():
        mpl.rcdefaults()  # a user's own matplotlibrc must not change a report
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=6 / 72, h_pad=6 / 72)
        axes = figure.add_subplot()
        if title:
            figure.suptitle(title, x=6 / WIDTH, ha="left", fontsize=13, fontweight="bold")
        yield figure, axes, svg
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})


def _rows(
    rows: Mapping[str, tuple[Interval, np.ndarray]], label: str, line: float | None, title: str | None, says: str
) -> str:
    """One row per name: dots, interval, mean, and the numbers at the right."""
    decimals = places([i.mean for i, _ in rows.values()], [i for i, _ in rows.values()])
    with _figure(62 + 32 * len(rows) + (24 if title else 0), title) as (_, axes, svg):
        if line is not None:
            axes.axvline(line, color=_SOFT, linewidth=1, linestyle=(0, (3, 2)))
        for y, (i, seeds) in enumerate(rows.values()):
            colour = _look(y)[0] if line is None else COLOURS[0]
            axes.plot(
                seeds, np.full(seeds.size, y + 0.27), "o", color=colour, alpha=0.45, markersize=5, markeredgewidth=0
            )
            if not math.isnan(i.low):
                axes.plot([i.low, i.high], [y, y], color=colour)
            axes.plot(i.mean, y, "o", color=colour, markersize=8, markeredgecolor="white", markeredgewidth=1.2)
            axes.annotate(
                with_interval(i, decimals, signed=line is not None),
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color=_INK,
                annotation_clip=False,
            )
        axes.set_yticks(range(len(rows)), [_broken(name) for name in rows], color=_INK)
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=label)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(_ticks(6))
        axes.grid(axis="x")
    return svg(says)


def _name_lines(figure: Figure, axes: Axes, ends: Mapping[str, float], legend: bool) -> None:
    """Name each line at its end, names pushed apart where they would touch, or in a legend above."""
    if len(ends) == 1:
        return
    if legend:
        handles = [Line2D([], [], color=_look(i)[0], linestyle=_look(i)[1]) for i in range(len(ends))]
        figure.legend(handles, list(ends), loc="outside upper left")
        return
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    gap = 16 / axes.bbox.height
    order = sorted(range(len(ends)), key=lambda i: list(ends.values())[i])
    spots = _apart([(list(ends.values())[i] - low) / (high - low) for i in order], gap)
    for i, y in zip(order, spots):
        colour, dash = _look(i)
        swatch = Line2D([1.015, 1.05], [y, y], color=colour, linestyle=dash, transform=axes.transAxes, clip_on=False)
        axes.add_line(swatch)
        axes.annotate(list(ends)[i], (1.06, y), xycoords="axes fraction", va="center", annotation_clip=False)


def _apart(sorted_spots: Sequence[float], gap: float) -> list[float]:
    """Move increasing spots as little as a group mean allows so that neighbours are at least `gap` apart."""
    groups: list[list[float]] = []
    for spot in sorted_spots:
        groups.append([spot])
        while len(groups) > 1 and _span(groups[-2], gap)[1] + gap > _span(groups[-1], gap)[0]:
            last = groups.pop()
            groups[-1] += last
    return [_span(g, gap)[0] + k * gap for g in groups for k in range(len(g))]


def _span(group: Sequence[float], gap: float) -> tuple[float, float]:
    middle, half = sum(group) / len(group), gap * (len(group) - 1) / 2
    return middle - half, middle + half


def _look(i: int) -> tuple:
    return COLOURS[i % len(COLOURS)], _DASHES[i // len(COLOURS) % len(_DASHES)]


def _broken(name: str, width: int = 28) -> str:
    return "\n".join(name[i : i + width] for i in range(0, len(name), width))


def _label(metric: str, unit: str | None) -> str:
    return f"{metric} ({unit})" if unit else metric


def _short(v: float) -> str:
    for least, size, letter in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(v) >= least:
            return f"{v / size:g}{letter}".replace("-", "−")
    return f"{v:g}".replace("-", "−")


def _ticks(count: int, integer: bool = False) -> MaxNLocator:
    return MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=integer)


def _luminance(rgba: Sequence[float]) -> float:
    return float(np.dot(rgba[:3], (0.2126, 0.7152, 0.0722)))


def _some(what: str, named: Mapping) -> Mapping:
    if not named:
        raise UserError(f"{what}: nothing to draw; give at least one arm")
    return named


def _curve(arm: str, metric: str, curve: Curve, positive: bool) -> tuple[np.ndarray, np.ndarray]:
    steps, values = (np.asarray(v, np.float64) for v in curve)
    what = f"learning curve of {metric}, {arm}"
    if steps.ndim != 1 or values.ndim != 2 or values.shape[1] != steps.size or not values.size:
        raise UserError(
            f"{what}: steps {list(steps.shape)}, values {list(values.shape)}; accepted is [T] and [seeds, T]"
        )
    if not (np.isfinite(values).all() and np.isfinite(steps).all()):
        raise UserError(f"{what}: not all numbers are finite; leave out steps without a value")
    if (np.diff(steps) <= 0).any() or (positive and steps[0] <= 0):
        raise UserError(
            f"{what}: steps {steps.tolist()[:6]} ...; accepted are increasing{' positive' * positive} steps"
        )
    return steps, values
