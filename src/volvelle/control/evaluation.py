"""Evaluating an actor: fresh environments, its best actions, rewards as they are; and recording videos."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.files import directory
from volvelle.core.parts import Part, part
from volvelle.core.statistics import mean_interval, tail

from .encoding import Vocabulary
from .envs import UNKNOWN_LIMIT, Envs, each, numbers_for, open_env, time_limit
from .policy import Policy, to_environment
from .slots import ControlTask


@part("evaluation")
class Evaluation(Part):
    """episodes per evaluation and seed; explore: act as while training instead of greedily; record: videos kept per evaluation.

    tail: report also the median return, its `tail`-quantile (return_var) and the mean of the returns at or below it (return_cvar).
    Evaluations also report `training_return`: the mean return of the episodes that training finished in the last `training_share` of the run.
    """

    slot: ClassVar[str] = "evaluation"
    episodes: Annotated[int, Field(gt=0)] = 10
    explore: bool = False
    record: Annotated[int, Field(ge=0)] = 0
    training_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    tail: Annotated[float, Field(gt=0, lt=1)] | None = None


class Evaluator:
    """Plays episodes. Every environment copy plays the same number of them, so that short episodes do not count more often."""

    def __init__(self, task: ControlTask, seeds: int, episodes: int, vocabulary: Vocabulary | None = None, report=lambda line: None, copies: int | None = None):
        copies = min(episodes, 10) if copies is None else copies
        self.rounds = math.ceil(episodes / copies)
        self.seeds, self.report, self.tail = seeds, report, None
        self.envs = Envs(task, seeds, copies, keys=task.info, vocabulary=vocabulary.copy() if vocabulary is not None else None)

    @property
    def vocabulary(self) -> Vocabulary:
        return self.envs.vocabulary

    def __call__(self, actor: Any, seed: int, step: int = 0, explore: bool = False) -> dict[str, float]:
        """Return and length, means over seeds and episodes; `return@k` of seed k when there are several.

        The environments are seeded by `seed` alone: every evaluation of a run meets the same episodes.
        """
        envs, seeds = self.envs, self.seeds
        obs = envs.reset([n for s in range(seeds) for n in numbers_for(seed + s, 0, envs.count, "evaluation")])
        left = np.full(envs.rows, self.rounds)
        envs.rest()
        envs.finished.clear()
        memory, cut, ends = None, 0, []
        while left.any():
            made = actor.act(each(lambda x: x.reshape(seeds, envs.count, *x.shape[1:]), obs), memory, explore)
            memory = made.memory
            done = len(envs.finished)
            obs, *_ = envs.step(to_environment(made.actions))
            ended = [row for row, _, _ in envs.finished[done:]]
            ends += [(row // envs.count, [envs.infos[k][row] for k in envs.keys]) for row in ended if envs.keys]
            for row in np.flatnonzero((envs.lengths >= UNKNOWN_LIMIT) & (left > 0)) if envs.limit is None else ():
                envs.finished.append((int(row), float(envs.returns[row]), int(envs.lengths[row])))
                left[row], cut = 1, cut + 1  # a policy that never ends its episode has no use for another
                ended.append(int(row))
            for row in ended:
                left[row] -= 1
                envs.rest(left == 0)
                if memory is not None and hasattr(actor, "forget"):
                    memory = actor.forget(memory, row)
        if cut:
            self.report(f"note: {cut} evaluation episodes of {envs.task.label()} did not end in {UNKNOWN_LIMIT} steps and were cut there; set task.time_limit")
        found: dict[str, float] = {}
        per_seed = [np.array([(r, n) for row, r, n in envs.finished if row // envs.count == s], float) for s in range(seeds)]
        found["return"] = float(np.mean([p[:, 0].mean() for p in per_seed]))
        if seeds == 1 and len(per_seed[0]) > 1:
            interval = mean_interval(per_seed[0][:, 0])
            found |= {"return_low": interval.low, "return_high": interval.high}
        if self.tail is not None:
            for name, values in zip(("median", "var", "cvar"), np.array([[np.median(p[:, 0]), *tail(p[:, 0], self.tail)] for p in per_seed]).T):
                found |= {f"return_{name}": float(values.mean())} | ({f"return_{name}@{s}": float(v) for s, v in enumerate(values)} if seeds > 1 else {})
        found["length"] = float(np.mean([p[:, 1].mean() for p in per_seed]))
        if seeds > 1:
            found |= {f"return@{s}": float(p[:, 0].mean()) for s, p in enumerate(per_seed)} | {f"length@{s}": float(p[:, 1].mean()) for s, p in enumerate(per_seed)}
        if envs.keys:
            gathered = [np.array([numbers for seed, numbers in ends if seed == s], float).reshape(-1, len(envs.keys)).T for s in range(seeds)]
            made = [envs.task.measure(dict(zip(envs.keys, numbers))) for numbers in gathered]
            for k in made[0]:
                found |= {k: float(np.mean([m[k] for m in made]))} | ({f"{k}@{s}": float(m[k]) for s, m in enumerate(made)} if seeds > 1 else {})
        return found


def play(policy: Policy, task: ControlTask, *, episodes: int = 1, seed: int = 0, member: int = 0, render: str = "human", explore: bool = False, frame=None) -> list[float]:
    """Play episodes in one rendered environment and return their returns; `frame` is called with every picture of an "rgb_array" one.

    member: which of the seeds trained side by side acts.
    """
    if not 0 <= member < policy.seeds:
        raise UserError(f"member={member}: the policy holds {policy.seeds} seeds; accepted: 0 to {policy.seeds - 1}")
    env, spec = open_env(task, render, vocabulary=policy.vocabulary.copy())
    spec.require(policy.spec, "the policy", task.label())
    limit, returns, memory = time_limit(env), [], None
    try:
        for number in numbers_for(seed, 0, episodes, "watching"):
            obs, _ = env.reset(seed=number)
            total, length, over = 0.0, 0, False
            while not over:
                if frame is not None:
                    frame(env.render())
                rows = each(lambda x: np.repeat(np.asarray(x, np.float32 if np.asarray(x).dtype.kind == "f" else None)[None, None], policy.seeds, 0), obs)
                made = policy.act(rows, memory, explore)
                memory, action = made.memory, made.actions[member, 0].cpu().numpy()
                if spec.actions.low:
                    d = spec.actions.continuous
                    action = np.concatenate([np.clip(action[:d], spec.actions.low, spec.actions.high), action[d:]]).astype(np.float32)
                obs, reward, terminated, truncated, _ = env.step(action if action.ndim else int(action))
                total, length = total + float(reward), length + 1
                over = terminated or truncated or (limit is None and length >= UNKNOWN_LIMIT)
            memory = None
            if frame is not None:
                frame(env.render())
            returns.append(total)
    finally:
        env.close()
    return returns


def record(policy: Policy, task: ControlTask, path: str | Path, *, fps: int | None = None, **options) -> list[float]:
    """Film episodes into an .mp4 or .gif file; returns their returns. Needs imageio (pip install 'volvelle[control]')."""
    path = Path(path)
    if path.suffix not in (".mp4", ".gif"):
        raise UserError(f"video {str(path)!r}: accepted: a name ending in .mp4 or .gif")
    try:
        import imageio.v2 as imageio
    except ImportError:
        raise UserError("recording needs the package imageio; pip install 'volvelle[control]'") from None
    frames: list[np.ndarray] = []
    returns = play(policy, task, render="rgb_array", frame=frames.append, **options)
    if any(f is None for f in frames):
        raise UserError(f"task {task.label()}: its environment draws no pictures (render returned None)")
    path.parent.mkdir(parents=True, exist_ok=True)
    speed = fps or task.make().metadata.get("render_fps") or 30
    with directory(path.parent / f".{path.name}.making") as folder:
        extra = {"macro_block_size": 2} if path.suffix == ".mp4" else {"loop": 0}
        timing = {"fps": speed} if path.suffix == ".mp4" else {"duration": 1000 / speed}
        imageio.mimsave(folder / path.name, frames, **timing, **extra)
        (folder / path.name).replace(path)
    (path.parent / f".{path.name}.making").rmdir()
    return returns
