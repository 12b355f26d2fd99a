"""Hierarchical implicit Q-learning: two policies, one value, for goals that are far away.

Problem: far from the goal the value of neighbouring states differs by less than its error, so a flat policy cannot tell good actions from bad.
Idea: split the question. The high policy names the state `sampler.steps` ahead that brings most value, far enough that the difference stands out; the low
policy goes to that near state. Both imitate the data weighted by the same V(s, g) (gcivl's), and subgoals are named by the representation phi([s; g]) that V learns.
Pick it for long mazes and locomotion; for short tasks gciql is simpler. On very long ways the high policy itself meets a flat value: ota.
Source: arXiv 2307.11949, form and defaults of 2410.20092. sampler.steps: 25 mazes, 100 humanoid, 10 manipulation; temperatures 10 for exploratory data.
"""

from __future__ import annotations

from volvelle.core.parts import method, part

from ..hierarchy import Hierarchical, HierarchicalAgent


@part("two-levels")
class HIQL(Hierarchical):
    """The recipe of two levels; see volvelle.offline.hierarchy."""

    def agent(self, run, spec, data):
        return HierarchicalAgent(run, self, spec)


hiql = method("hiql", HIQL(), title="hierarchical implicit Q-learning", source="arXiv 2307.11949")
