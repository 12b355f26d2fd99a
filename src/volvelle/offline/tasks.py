"""Tasks of the offline wing: a dataset, and the environment in which what was learnt from it is tried."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

import gymnasium as gym
import numpy as np
from pydantic import Field

from volvelle.control.slots import ControlTask
from volvelle.control.tasks import Gym
from volvelle.core.errors import UserError
from volvelle.core.files import cache_folder
from volvelle.core.parts import from_config, part, preset
from volvelle.core.tasks import Task, task_reader

from .behaviours import Behaviour, CartPoleBalance, PendulumSwing, Walker
from .commands import GoalTask, Maze, OGBench
from .data.collect import collect
from .data.dataset import Dataset
from .data.files import open_dataset
from .data.mapped import write as write_mapped


class OfflineTask(ControlTask):
    """A dataset to learn from. `dataset()` gives it, checked; `world()` the environment to act in afterwards, or None where nobody knows it."""

    wing: ClassVar[str] = "offline"

    def __post_init__(self):
        super().__post_init__()
        env = getattr(self, "env", None)
        if env is not None and (not isinstance(env, ControlTask) or isinstance(env, OfflineTask)):
            raise UserError(f"task.env={env.label()}: belongs to the {env.wing} wing; expected an environment, for example Pendulum-v1 or maze:medium")

    def dataset(self, report=lambda line: None) -> Dataset:
        raise NotImplementedError

    def world(self) -> ControlTask | None:
        return getattr(self, "env", None)

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "success" if isinstance(self.world(), GoalTask) else "return"

    def make(self, render=None, training=False):
        world = self.world()
        if world is None:
            raise UserError(f"task {self.label()}: its dataset does not say in which environment it was recorded; give one, for example task.env=Pendulum-v1")
        return world.make(render, training)


@functools.lru_cache(maxsize=4)
def _opened(path: str, modified: float) -> Dataset:
    return open_dataset(path)


def _from_disk(path: str, report=lambda line: None) -> Dataset:
    """A dataset by path; the last few stay in memory, so that the runs of a comparison read a file once."""
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"dataset {path!r}: not there")
    return _opened(str(place), place.stat().st_mtime)


@part("recorded")
class Recorded(OfflineTask):
    """A dataset on disk: offline:PATH (Minari's folder, D4RL's .hdf5, OGBench's .npz, or mapped).

    env: the environment for evaluation; None: the one that the dataset names, if it does.
    """

    path: str
    env: Task | None = None

    def label(self):
        name = Path(self.path)
        return (name.parent if name.name == "data" else name).stem

    def dataset(self, report=lambda line: None):
        return _from_disk(self.path, report)

    def world(self):
        return self.env if self.env is not None else world_of(self.dataset().meta, self.label())


def world_of(meta: dict[str, Any], label: str) -> ControlTask | None:
    """The environment that a dataset's metadata name: one of our tasks, or a Gymnasium specification."""
    if "env" in meta:
        return from_config(Task, meta["env"], "env")
    if "env_spec" in meta:
        spec = json.loads(meta["env_spec"])
        known = spec["id"] in gym.registry
        return Gym(id=spec["id"], kwargs={k: v for k, v in spec.get("kwargs", {}).items() if k != "render_mode"}, time_limit=spec.get("max_episode_steps")) if known else None
    return None


@task_reader("offline")
def read_offline(path: str) -> Recorded:
    """A dataset on disk, in Minari's, D4RL's or OGBench's layout: offline:data/pendulum"""
    made = Recorded(path=path)
    made.dataset()
    return made


@part("generated")
class Generated(OfflineTask):
    """A small dataset that is collected on first use, always the same one, and kept in the cache.

    env, behaviour, quality, steps, seed, length, noise: as `volvelle data collect` takes them.
    """

    env: Task = Gym(id="Pendulum-v1")
    behaviour: Behaviour = PendulumSwing()
    quality: str = "medium-replay"
    steps: Annotated[int, Field(gt=0)] = 10_000
    seed: Annotated[int, Field(ge=0)] = 0
    length: Annotated[int, Field(gt=0)] | None = None
    noise: Annotated[float, Field(ge=0)] | None = None

    def label(self):
        world = self.env.label().removesuffix("-v0").removesuffix("-v1").lower()
        return f"{world}-{self.quality.replace(':', '').replace('+', '-')}"

    def dataset(self, report=lambda line: None):
        folder = cache_folder() / "datasets" / f"{self.label()}-{self.digest}"
        if not folder.is_dir():
            report(f"note: collecting {self.steps} steps of {self.label()} into {folder}")
            data = collect(self.env, self.behaviour, self.quality, self.steps, self.seed, self.length, self.noise)
            data.meta["dataset_id"] = f"volvelle/{self.label()}-v0"
            if not isinstance(self.env, GoalTask):
                data.meta |= references(self.env, self.behaviour, self.seed)
            write_mapped(data, folder)
        return _loaded(str(folder))


@functools.lru_cache(maxsize=4)
def _loaded(folder: str) -> Dataset:
    """A small dataset of the cache, wholly in memory."""
    data = open_dataset(folder)
    return Dataset({k: np.array(v) for k, v in data.fields.items()}, data.lengths, data.spec, data.states, data.observation_space, data.action_space, data.meta)


def references(env: ControlTask, behaviour: Behaviour, seed: int, episodes: int = 20) -> dict[str, float]:
    """Mean returns of random actions and of the behaviour: 0 and 100 of the normalised score."""
    from volvelle.control.envs import open_env

    from .data.collect import Setting, play

    opened, spec = open_env(env)
    rng = np.random.default_rng([seed, *b"references"])
    low, high = (float(play(env, opened, spec, behaviour, lambda: Setting(share), None, rng, episodes).returns().mean()) for share in (1.0, 0.0))
    return {"ref_min_score": round(low, 4), "ref_max_score": round(high, 4)}


# ---------------------------------------------------------------------------------------------- the reference datasets

for _quality in ("random", "medium", "medium-replay", "expert", "medium-expert"):
    preset(f"pendulum-{_quality}", Generated(quality=_quality))
    preset(f"cartpole-{_quality}", Generated(env=Gym(id="CartPole-v1"), behaviour=CartPoleBalance(), quality=_quality))
for _maze in ("small", "medium", "large", "corridor"):
    for _quality in ("navigate", "stitch", "explore"):
        preset(f"maze-{_maze}-{_quality}", Generated(env=Maze(maze=_maze), behaviour=Walker(), quality=_quality, steps=50_000))
for _maze in ("medium", "large"):
    for _quality in ("navigate", "stitch"):
        preset(f"pointmaze-{_maze}-{_quality}", Generated(env=OGBench(id=f"pointmaze-{_maze}-v0"), behaviour=Walker(), quality=_quality, steps=100_000,
                                                          length=1000 if _quality == "navigate" else 200))
