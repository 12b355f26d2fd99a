"""The page of a study of large-sample evaluation: curves, gaps, coverage, accuracies, perplexities, one section each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from volvelle.core import plots
from volvelle.core.plots import number
from volvelle.core.report import Section, write_page
from volvelle.core.statistics import Interval

from .study import BINS, Outcomes, over_problems

WORDS = {"base": "base", "tuned": "trained by reinforcement learning", "distilled": "distilled"}


def powers(n: int) -> list[int]:
    """1, 2, 4, … up to n, and n."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def told(i: Interval, signed: bool = False) -> str:
    """`0.52 [0.48, 0.56]` with three decimals."""
    return plots.with_interval(i, 3, signed)


def write_study(path: Path, summary: dict, outcomes: Mapping[str, Outcomes], matched: Mapping[str, tuple[float, Outcomes]],
                perplexities: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    """report.html from what the study measured; `outcomes["base"]` is the base."""
    sections = [_curves(summary, outcomes), _gaps(summary, outcomes), _coverage(summary, outcomes), _accuracies(summary)]
    kinds = {row["kind"] for row in summary["models"].values()}
    if {"tuned", "distilled"} <= kinds:
        sections.append(_distilled(summary, outcomes))
    if perplexities:
        sections.append(_perplexities(perplexities))
    if summary.get("matched"):
        sections.append(_matched(summary, outcomes, matched))
    if summary.get("temperatures"):
        sections.append(_temperatures(summary))
    if len({row["steps"] for row in summary["models"].values() if row["kind"] == "tuned"}) > 1:
        sections.append(_steps(summary))
    setting = {"task": f"{summary['task']}, {summary['split']} split", "problems": summary["problems"], "samples to each": summary["n"],
               "temperature, top-p": f"{summary['temperature']:g}, {summary['top_p']:g}", "seeds": ", ".join(map(str, summary["seeds"]))}
    if summary["dropped"]:
        setting["dropped as guessable"] = f"{len(summary['dropped'])} problems"
    return write_page(path, "What training changed", sections, setting=setting,
                      says="Large-sample evaluation of a base model and of policies made from it, after arXiv 2504.13837.")


def _curves(summary, outcomes) -> Section:
    ks = powers(summary["n"])
    curves = {name: (ks, found.curve(ks)) for name, found in outcomes.items()}
    chart = plots.learning_curves(curves, metric="pass@k", x="k: samples to each problem", rng=np.random.default_rng(0), log2_x=True)
    rows = [[name, *(told(over_problems(values[:, i])) for i in range(len(ks)))] for name, (_, values) in curves.items()]
    return Section("pass@k", "The chance that at least one of k samples solves a problem, averaged over problems (unbiased from all n samples).", [chart],
                   [(["", *(f"k = {k}" for k in ks)], rows)],
                   "Bands and brackets: 95 % percentile bootstrap over problems. The last points rest on few independent sets of k samples.")


def _gaps(summary, outcomes) -> Section:
    rows, intervals = [], {}
    for name, row in summary["models"].items():
        if name == "base":
            continue
        intervals[name] = Interval(**row["gap"])
        cross = "none" if row["crossover"] is None else str(row["crossover"])
        rows.append([name, WORDS[row["kind"]], told(intervals[name]), cross])
    far = summary["gap_at"]
    chart = plots.differences(intervals, metric=f"pass@{far} of the base", base="pass@1 of each policy")
    return Section("Sampling-efficiency gap and crossover", f"How far a policy's first try is from what the base reaches in {far}, and the smallest k at which the "
                   "base is as good.", [chart], [(["", "kind", "gap", "crossover at k"], rows)], f"Crossover \"none\": the curves do not meet up to k = {summary['n']}.")


def _coverage(summary, outcomes) -> Section:
    rows = [[name, *(len(row["coverage"][c]) for c in ("both", "base", "tuned", "neither")), "–" if row["within_base"] is None else f"{row['within_base']:.0%}"]
            for name, row in summary["models"].items() if name != "base"]
    return Section("Coverage", f"Problems solved at least once in {summary['n']} samples.",
                   tables=[(["", "by both", "by the base only", "by this one only", "by neither", "of its solved, within the base's"], rows)])


def _accuracies(summary) -> Section:
    share = np.array([row["histogram"] for row in summary["models"].values()], float) / summary["problems"]
    chart = plots.heat_map(share, list(summary["models"]), list(BINS), value="share of problems", x="accuracy of a problem over its samples")
    return Section("Accuracy of single problems", "Sharpening moves problems towards 1 and towards 0 at once.", [chart])


def _distilled(summary, outcomes) -> Section:
    ks = powers(summary["n"])
    shown = sorted({ks[0], ks[len(ks) // 2], ks[-1]})
    rows = []
    for name, row in summary["models"].items():
        if name != "base":
            gain = outcomes[name].curve(shown) - outcomes["base"].curve(shown)
            rows.append([name, WORDS[row["kind"]], *(told(over_problems(gain[:, i]), True) for i in range(len(shown)))])
    return Section("Reinforcement learning and distillation", "Difference from the base, problem by problem: distillation can add to every k, where sharpening "
                   "adds at small k only.", tables=[(["", "kind", *(f"pass@{k} − base" for k in shown)], rows)])


def _perplexities(perplexities) -> Section:
    rows = []
    for source, under in perplexities.items():
        for name, values in under.items():
            low, first, middle, third, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
            rows.append([f"{source} under {name}", number(middle, None), f"{number(first, None)} to {number(third, None)}", f"{number(low, None)} to {number(high, None)}"])
    base = {source: np.log2(under["base"]) for source, under in perplexities.items()}
    every = np.concatenate(list(base.values()))
    edges = np.linspace(0.0, max(float(np.quantile(every, 0.99)), 0.1), 11)
    share = np.array([np.histogram(np.clip(v, 0, edges[-1]), edges)[0] / len(v) for v in base.values()])
    names = [f"{2**a:.2f}–{2**b:.2f}" for a, b in zip(edges, edges[1:])]
    chart = plots.heat_map(share, list(base), names, value="share of responses", x="perplexity under the base")
    return Section("Perplexity", "How likely each model's responses are under the base: what training prefers lies where the base is least surprised.", [chart],
                   [(["", "median", "middle half", "5 to 95 %"], rows)],
                   "exp of the mean negative log-probability of the response's tokens at temperature 1. The last column of the chart holds what lies beyond it, too.")


def _matched(summary, outcomes, matched) -> Section:
    ks, rng = powers(summary["n"]), np.random.default_rng(0)
    curves = {"base": (ks, outcomes["base"].curve(ks))} | {f"{name} at {t:.2f}": (ks, found.curve(ks)) for name, (t, found) in matched.items()}
    left = [name for name, found in summary["matched"].items() if found is None]
    charts = [plots.learning_curves(curves, metric="pass@k", x="k: samples to each problem", rng=rng, log2_x=True)] if matched else []
    text = f"Temperatures raised until the entropy per token is the base's ({summary['base_entropy']:.3f} at {summary['temperature']:g})."
    note = f"Not matched: {', '.join(left)} (as undecided as the base already, or more certain at any temperature up to 4)." if left else ""
    return Section("At equal entropy", text, charts, note=note)


def _temperatures(summary) -> Section:
    rows = [[f"{name} at {float(t):g}", *(f"{v:.3f}" for v in curve.values())] for name, row in summary["temperatures"].items() for t, curve in row.items()]
    ks = next(iter(next(iter(summary["temperatures"].values())).values()))
    return Section("Temperatures", tables=[(["", *(f"k = {k}" for k in ks)], rows)])


def _steps(summary) -> Section:
    tuned = sorted(((row["steps"], name, row) for name, row in summary["models"].items() if row["kind"] == "tuned"), key=lambda r: r[:2])
    far = summary["gap_at"]
    rows = [[name, steps, f"{row['curve'][0]:.3f}", f"{row['curve'][far - 1]:.3f}"] for steps, name, row in tuned]
    return Section("Along training", tables=[(["", "steps", "pass@1", f"pass@{far}"], rows)])
