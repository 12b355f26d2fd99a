"""One self-contained page about a run or a comparison: `report.html`.

The page needs no network, runs no script and shows everything the policies wrote as text. The same data give the same
bytes (curve bands are bootstrapped from a fixed seed).
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import ArrayLike

from volvelle.core import plots
from volvelle.core.errors import UserError
from volvelle.core.files import to_yaml, write_text
from volvelle.core.plots import Curve, number, places, with_interval
from volvelle.core.statistics import Expectation, Interval, Outcome, combine, mean_interval, paired


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt; `correct` is None where nothing was judged."""

    prompt: str
    completion: str
    correct: bool | None = None
    reward: float | None = None


@dataclass(frozen=True)
class ArmData:
    """One arm (or the only run): what it was, what it reached, what it wrote.

    final: metric -> [S], in the order of `seeds`. curves: metric -> (steps [T], values [S, T]). config: nested plain
    values, as in `config.yaml`. Any of them may be empty.
    """

    name: str
    seeds: Sequence[int]
    final: Mapping[str, ArrayLike] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    config: Mapping[str, object] = field(default_factory=dict)


def write_report(path: str | os.PathLike, title: str, arms: Sequence[ArmData], **what) -> Path:
    """Write `render_report(title, arms, **what)` to `path`: under a temporary name, then renamed. Returns the path."""
    return write_text(path, render_report(title, arms, **what))


@dataclass(frozen=True)
class Section:
    """A part of a page: text above, charts (SVG from core.plots), tables (column names, rows whose first cell is the row's name), note below."""

    heading: str
    text: str = ""
    charts: Sequence[str] = ()
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[object]]]] = ()
    note: str = ""


def write_page(path: str | os.PathLike, title: str, sections: Sequence[Section], *, says: str | None = None, setting: Mapping[str, object] | None = None) -> Path:
    """A self-contained page of sections in the style of the reports, for studies that are no comparison of seeds. Returns the path."""
    return write_text(path, _template("page.html.j2").render(title=title, says=says, setting=setting or {}, sections=sections, arms=[title]))


def render_report(
    title: str,
    arms: Sequence[ArmData],
    *,
    setting: Mapping[str, object] | None = None,
    says: str | None = None,
    outcomes: Sequence[Outcome] = (),
    units: Mapping[str, str] | None = None,
    environment: Mapping[str, object] | None = None,
    x: str = "training step",
    prompts: int = 6,
    completions: int = 2,
) -> str:
    """The page as text. Differences are taken from the first arm, paired by seed.

    setting: what was compared, shown in order (task, model, steps); arms and seeds are added. says and outcomes: the
    claim and its verdicts. units: metric -> unit. environment: versions, seed, revision. At most `prompts` prompts with
    `completions` completions per arm are shown, and the page says how many there were. Raises UserError on no arms, two
    arms of one name, values that do not match the seeds, NaN, a config that is not plain values.
    """
    _check(arms)
    units = units or {}
    named = {m: f"{m} ({units[m]})" if m in units else m for a in arms for m in (*a.final, *a.curves)}
    final = {
        m: {a.name: np.asarray(a.final[m], np.float64) for a in arms if m in a.final}
        for m in _union(a.final for a in arms)
    }
    table, charts, notes = _table(arms, final, units)
    samples, samples_note = _samples(arms, prompts, completions)
    return _template().render(
        title=title,
        says=says,
        verdict=combine(outcomes) if outcomes else None,
        outcomes=[_outcome(o) for o in outcomes],
        arms=[a.name for a in arms],
        base=arms[0].name,
        compares=any(row["difference"] != "–" for _, rows in table for row in rows),
        spread=any(len(a.seeds) > 1 for a in arms),
        setting=[*(setting or {}).items(), *_who(arms)],
        curves=_curves(arms, units, x),
        curve_note=_curve_note(arms),
        table=[(named[m], rows) for m, rows in table],
        charts=charts,
        notes=notes,
        seeds=_union(a.seeds for a in arms),
        per_seed=[(named[m], _per_seed(arms, m, final[m])) for m in final],
        samples=samples,
        samples_note=samples_note,
        configs=[(a.name, _yaml(a)) for a in arms if a.config],
        differing=_differing(arms),
        environment=list(_flat(environment or {}).items()),
    )


# --- parts of the page ------------------------------------------------------------------------------------------------


def _template(name: str = "report.html.j2"):
    env = Environment(
        loader=PackageLoader("volvelle.core", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: v if isinstance(v, Markup) else _visible(str(v)),
    )
    env.filters["chart"] = Markup
    return env.get_template(name)


def _visible(text: str) -> str:
    """Characters that would hide, turn or break the text made visible: controls as ␀, lone surrogates as �."""
    return text.translate(_PICTURES)


_PICTURES = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {127: "␡"}
_PICTURES |= {c: f"[U+{c:04X}]" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # writing direction
_PICTURES |= dict.fromkeys(range(0xD800, 0xE000), "�") | dict.fromkeys(range(0x80, 0xA0), "�")


def _outcome(o: Outcome) -> dict[str, str]:
    e = Expectation.parse(o.expectation)
    decimals = places([o.interval.mean], [o.interval])
    if e.right is None:
        measured = f"{e.left} {with_interval(o.interval, decimals)}"
    else:
        measured = f"{e.left} minus {e.right}: {with_interval(o.interval, decimals, signed=True)}"
    against = f", held against {o.threshold:g}".replace("-", "−")
    return {
        "expectation": o.expectation,
        "verdict": o.verdict,
        "measured": f"{measured}{against}, {o.interval.n} seeds",
    }


def _who(arms: Sequence[ArmData]) -> list[tuple[str, str]]:
    rows = [("arms", ", ".join(a.name for a in arms))] if len(arms) > 1 else []
    groups: dict[str, list[str]] = {}
    for a in arms:
        groups.setdefault(_seeds(a.seeds), []).append(a.name)
    return [
        *rows,
        ("seeds", "; ".join(s if len(groups) == 1 else f"{s} for {', '.join(n)}" for s, n in groups.items())),
    ]


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} ({', '.join(map(str, seeds))})" if len(seeds) > 1 else str(seeds[0])


def _curves(arms: Sequence[ArmData], units: Mapping[str, str], x: str) -> list[tuple[str, Markup]]:
    out = []
    for metric in _union(a.curves for a in arms):
        curves = {a.name: a.curves[metric] for a in arms if metric in a.curves}
        rng = np.random.default_rng(0)
        out.append((metric, Markup(plots.learning_curves(curves, metric=metric, unit=units.get(metric), x=x, rng=rng))))
    return out


def _curve_note(arms: Sequence[ArmData]) -> str:
    if max(len(a.seeds) for a in arms) == 1:
        return "One seed: no interval can be drawn."
    return (
        "Line: mean over seeds. Band: pointwise 95 % percentile bootstrap over seeds, for the eye; with five seeds it "
        "covers about 83 %. The t intervals of the final values cover 95 %."
    )


def _table(arms: Sequence[ArmData], final: Mapping[str, Mapping[str, np.ndarray]], units: Mapping[str, str]):
    """Rows per metric, charts, and a note for every number that is missing."""
    table, charts, notes = [], [], []
    base = arms[0]
    for metric, values in final.items():
        intervals = {name: mean_interval(v) for name, v in values.items() if v.size > 1}
        gaps: dict[str, Interval] = {}
        for arm in arms[1:]:
            if base.name in values and arm.name in values and (order := _same_seeds(base, arm)) and len(order) > 1:
                gaps[arm.name] = paired(values[arm.name][order], values[base.name])
        decimals = places([float(v.mean()) for v in values.values()], [*intervals.values(), *gaps.values()])
        rows = []
        for arm in arms:
            one = values.get(arm.name)
            rows.append(
                {
                    "arm": arm.name,
                    "mean": "–" if one is None else number(float(one.mean()), decimals),
                    "interval": _bounds(intervals.get(arm.name), decimals),
                    "difference": number(gaps[arm.name].mean, decimals, signed=True) if arm.name in gaps else "–",
                    "difference_interval": _bounds(gaps.get(arm.name), decimals, signed=True),
                    "seeds": "–" if one is None else one.size,
                }
            )
        table.append((metric, rows))
        about = {"metric": metric, "unit": units.get(metric)}
        if intervals or len(arms) > 1:
            charts.append(Markup(plots.final_values(values, **about)))
        if gaps:
            charts.append(Markup(plots.differences(gaps, **about, base=base.name)))
    if any(len(a.seeds) == 1 for a in arms):
        notes.append("One seed gives no interval" + " and no paired difference" * (len(arms) > 1) + ".")
    for arm in arms[1:]:
        if _same_seeds(base, arm) is None:
            notes.append(f"{arm.name} and {base.name} ran on different seeds: no paired difference.")
    if any(len(a.seeds) > 1 for a in arms):
        notes.append(
            "Intervals: Student t over seeds."
            + " Differences are paired by seed." * (len(arms) > 1)
            + " In the charts pale dots are the seeds."
        )
    return table, charts, notes


def _bounds(i: Interval | None, decimals: int | None, signed: bool = False) -> str:
    return "–" if i is None else f"{number(i.low, decimals, signed)} to {number(i.high, decimals, signed)}"


def _same_seeds(base: ArmData, arm: ArmData) -> list[int] | None:
    """Where each seed of `base` stands in `arm`, if both ran on the same seeds."""
    if sorted(base.seeds) != sorted(arm.seeds):
        return None
    return [list(arm.seeds).index(s) for s in base.seeds]


def _per_seed(arms: Sequence[ArmData], metric: str, values: Mapping[str, np.ndarray]) -> list[tuple[str, list[str]]]:
    everything = np.concatenate(list(values.values()))
    decimals = places(everything.tolist(), [mean_interval(v) for v in values.values() if v.size > 1])
    seeds = _union(a.seeds for a in arms)
    rows = []
    for arm in arms:
        cells = dict(zip(arm.seeds, values.get(arm.name, ())))
        rows.append((arm.name, [number(float(cells.get(s, math.nan)), decimals) for s in seeds]))
    return rows


def _samples(arms: Sequence[ArmData], prompts: int, completions: int) -> tuple[list[dict], str]:
    by_prompt: dict[str, dict[str, list[Sample]]] = {}
    for arm in arms:
        for s in arm.samples:
            by_prompt.setdefault(s.prompt, {}).setdefault(arm.name, []).append(s)
    shown = sorted(by_prompt.items(), key=lambda item: -len(item[1]))[:prompts]
    note = f"{len(shown)} of {len(by_prompt)} prompts" + (
        ", those answered by most arms first." if len(arms) > 1 else "."
    )
    out = []
    for prompt, answers in shown:
        cells = []
        for arm in arms:
            mine = answers.get(arm.name, [])
            judged = [s.correct for s in mine if s.correct is not None]
            rest = "No completion of this prompt." if not mine else ""
            if len(mine) > completions:
                rest = f"{completions} of {len(mine)} completions shown"
                rest += f"; {sum(judged)} of {len(judged)} correct." if judged else "."
            cells.append({"arm": arm.name, "completions": [_completion(s) for s in mine[:completions]], "note": rest})
        out.append({"prompt": prompt, "cells": cells})
    return out, note


def _completion(s: Sample) -> dict[str, str]:
    kind = {True: "correct", False: "wrong", None: ""}[s.correct]
    mark = {True: "✓ correct", False: "✗ wrong", None: ""}[s.correct]
    reward = "" if s.reward is None else f"{', ' if mark else ''}reward {s.reward:.4g}".replace("-", "−")
    return {"kind": kind, "mark": mark, "reward": reward, "text": s.completion or "(empty)"}


# --- configuration ----------------------------------------------------------------------------------------------------


def _yaml(arm: ArmData) -> str:
    try:
        return to_yaml(dict(arm.config))
    except yaml.YAMLError as e:
        raise UserError(
            f"report: config of {arm.name} holds more than plain values: {' '.join(str(e).split())}"
        ) from None


def _differing(arms: Sequence[ArmData]) -> list[dict]:
    flat = [_flat(a.config) for a in arms]
    fields = [f for f in _union(flat) if len({repr(c.get(f, _ABSENT)) for c in flat}) > 1]
    return [{"field": f, "values": [c.get(f, "–") for c in flat]} for f in fields]


_ABSENT = object()


def _flat(tree: Mapping[str, object], at: str = "") -> dict[str, object]:
    """Dotted paths to leaves; lists count as leaves, an empty mapping as {}."""
    out: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{at}{key}.")
        else:
            out[f"{at}{key}"] = value
    return out


# --- checks -----------------------------------------------------------------------------------------------------------


def _union(groups: Iterable[Iterable]) -> list:
    return list(dict.fromkeys(x for group in groups for x in group))


def _check(arms: Sequence[ArmData]) -> None:
    if not arms:
        raise UserError("report: no arms; give at least one run")
    names = [a.name for a in arms]
    if len(set(names)) < len(names):
        raise UserError(f"report: two arms of one name in {', '.join(names)}; names must differ")
    for a in arms:
        if not a.seeds or len(set(a.seeds)) < len(a.seeds):
            raise UserError(f"report: {a.name} has seeds {list(a.seeds)}; accepted is at least one, all different")
        for metric, v in a.final.items():
            if np.shape(v) != (len(a.seeds),) or not np.isfinite(np.asarray(v, np.float64)).all():
                raise UserError(
                    f"report: {metric} of {a.name} is {np.asarray(v).tolist()}; accepted is one finite number per seed"
                )
        for metric, (_, v) in a.curves.items():
            if np.ndim(v) != 2 or len(v) != len(a.seeds):
                form = f"[{len(a.seeds)} seeds, T]"
                raise UserError(f"report: curve {metric} of {a.name} has shape {list(np.shape(v))}; accepted is {form}")
