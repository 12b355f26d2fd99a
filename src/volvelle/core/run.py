"""A run: its configuration, its folder, and everything in it that changes.

Parts ask the run for what they may not own: random numbers (`rng`, `torch_rng`), models (`model`, `lagged`, `reference`), sub-runs
(`child`). The run knows what to checkpoint because everything that changes was obtained from it or started through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from .errors import RunStopped, UserError, unknown
from .files import read_lines, read_yaml, write_json, write_text, write_yaml
from .parts import Call, Part, Recipe, annotations_of, from_config, permitted, to_config, walk
from .processes import processes
from .registry import registry
from .state import encode_rng, own_numbers, restore_rng
from .tasks import Model, Task
from .trainable import Lagged, Optimiser, Trainable

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, eq=False)
class RunConfig(Part):
    """Everything that decides a run. `config.yaml` is this, written out; it alone rebuilds the run.

    steps: learner steps; evaluate_every / checkpoint_every: in steps, 0 = only at the end (evaluation: start and end);
    threads: intra-op threads, None = chosen by the learner's size; strict: check that evaluation changes no state.
    """

    recipe: Recipe = None  # type: ignore[assignment]
    task: Task | None = None
    model: Model | None = None
    method: str = ""
    steps: Count = 100
    seed: Count = 0
    evaluate_every: Count = 0
    checkpoint_every: Count = 50
    threads: Annotated[int, Field(gt=0)] | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    strict: bool = False

    def label(self) -> str:
        task = self.task.label() if self.task else ""
        return "-".join(w for w in (self.method or self.recipe.part_name, task) if w).replace("/", "-").replace(":", "-")


def read_config(path: str | Path, allow_code: tuple[str, ...] = (), look: bool = False) -> RunConfig:
    """The configuration of a run folder (or of a YAML file).

    A configuration that names code outside volvelle and its entry points is refused unless its module is in `allow_code`:
    reading it would import that code. The modules in `allow_code` are imported first, so that the parts they register are known.
    look: only to be looked at (a report, a comparison of configurations); no function is imported, so none is refused, and none can be called.
    """
    path = Path(path)
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no config.yaml there; expected the folder of a run")
    data = read_yaml(file)
    if not isinstance(data, dict) or "recipe" not in data:
        raise UserError(f"{file}: not a run configuration (no 'recipe')")
    registry.load()
    for module in allow_code:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(f"allow_code={module}: no module named {error.name!r}") from error

    def guard(module: str, target: str) -> None:
        if module.split(".")[0] not in registry.trusted and module not in allow_code:
            raise UserError(f"{file}: names the function {target!r}; pass --allow-code {module} to let it be imported")

    hints = annotations_of(RunConfig)
    if strange := set(data) - set(hints):
        raise unknown("field", sorted(strange)[0], hints, f" in {file}")
    token = permitted.set(None if look else guard)
    try:
        return RunConfig(**{k: from_config(hints[k], v, k) for k, v in data.items()})
    finally:
        permitted.reset(token)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device(f"cuda:{processes().local_rank}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} cannot be used here ({str(error).splitlines()[0]}); accepted: auto, cpu, cuda, cuda:N") from None
    return device


class Run:
    """One training run in the making. `step` counts finished learner steps."""

    def __init__(self, config: RunConfig, folder: Path):
        self.config, self.folder, self.seed = config, Path(folder), config.seed
        self.processes = processes()
        self.device = pick_device(config.device)
        self.step = 0
        self.live: dict[str, Any] = {}
        self.models: dict[str, Trainable | Lagged] = {}
        self.policy: Any = None
        self.reporter: Callable[[str], None] = lambda line: None
        self.compiles = False  # whether compile=true has changed anything
        self._rngs: dict[str, Any] = {}
        self._path = ""
        self._reference: Any = None
        self._pending_samples: list[dict] = []

    # ---- what parts ask for

    def start(self, path: str, description: Part | None) -> Any:
        """Start a part under `path` (below the part that is starting it) and remember the live object."""
        if description is None:
            return None
        outer, self._path = self._path, f"{self._path}.{path}".lstrip(".")
        try:
            live = description.start(self)
            self.live[self._path] = live
        finally:
            self._path = outer
        return live

    def _seed_for(self, name: str, seed: int | None) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed if seed is None else seed}/{name}".encode()).digest()[:8], "little") >> 1

    def rng(self, name: str, seed: int | None = None) -> np.random.Generator:
        """The NumPy generator of that name: same seed and name, same numbers; its state is checkpointed.

        `seed` (None: the run's) serves runs that train several seeds as one model: each seed keeps the numbers it would have alone.
        """
        key = f"numpy/{name}" if seed is None else f"numpy/{name}@{seed}"
        return self._rngs.setdefault(key, np.random.default_rng(self._seed_for(name, seed)))

    def torch_rng(self, name: str, seed: int | None = None) -> torch.Generator:
        """The torch generator (on the CPU) of that name; `seed` as for `rng`."""
        key = f"torch/{name}" if seed is None else f"torch/{name}@{seed}"
        if key not in self._rngs:
            self._rngs[key] = torch.Generator().manual_seed(self._seed_for(name, seed))
        return self._rngs[key]

    def own_numbers(self):
        """Context: in each of several processes the generators give numbers of that process's own; afterwards they agree again."""
        return own_numbers(self._rngs, self.processes.rank, self.processes.count)

    def _model_path(self, name: str) -> str:
        path = f"{self._path}.{name}".lstrip(".")
        if path in self.models:
            raise RuntimeError(f"model {path!r} is made twice in one run")
        return path

    def model(self, name: str, module: torch.nn.Module, optimiser: Optimiser | None = None) -> Trainable:
        """Place a module; with an optimiser it learns, without it is frozen. Checkpointed under the starting part's path."""
        path = self._model_path(name)
        self.models[path] = made = Trainable(path, module, optimiser, self.device)
        return made

    def register(self, name: str, trainable: Any) -> Any:
        """Take in a Trainable of another make (boosted trees): anything with backward, step, state_dict, load_state_dict."""
        self.models[self._model_path(name)] = trainable
        return trainable

    def lagged(self, source: Trainable, every: int | None = None, tau: float | None = None,
               module: torch.nn.Module | None = None, name: str = "lagged") -> Lagged:
        """A frozen copy (`module`, or one made here) that follows `source`; see Lagged."""
        path = self._model_path(name)
        self.models[path] = made = Lagged(source, every, tau, module)
        return made

    def reference(self) -> Any:
        """The policy as it was when the run started, frozen; made on first request, shared by all who ask."""
        if self._reference is None:
            if self.step:
                raise RuntimeError("reference() must be asked for in start(), before the policy moves")
            self._reference = self.policy.frozen_copy()
        return self._reference

    def set_reference(self, policy: Any) -> None:
        """Let a part provide the reference (one that is reset or lags); whoever asks later gets it."""
        self._reference = policy

    def child(self, name: str, config: RunConfig) -> dict:
        """Train a sub-run under this run's folder and return its result; finished ones are read back, broken ones resumed."""
        from .trainer import train_config

        folder = self.folder / "children" / name
        if (folder / "result.json").is_file():
            return json.loads((folder / "result.json").read_text())
        return train_config(config, folder, resume=(folder / "config.yaml").is_file()).result

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        live = {path: part.state_dict() for path, part in self.live.items() if hasattr(part, "state_dict")}
        return {"step": self.step, "live": {k: v for k, v in live.items() if v},
                "models": {k: m.state_dict() for k, m in self.models.items()},
                "rng": {k: encode_rng(g) for k, g in self._rngs.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for path, saved in state["live"].items():
            if not hasattr(self.live.get(path), "load_state_dict"):
                raise RunStopped(f"the checkpoint holds state of {path!r}, which this recipe does not have")
            self.live[path].load_state_dict(saved)
        for path, model in self.models.items():
            if path not in state["models"]:
                raise RunStopped(f"the checkpoint has no weights of {path!r}; it was made by another recipe")
            model.load_state_dict(state["models"][path])
        for key, saved in state["rng"].items():
            kind, _, name = key.partition("/")
            restore_rng(self.rng(name) if kind == "numpy" else self.torch_rng(name), saved)
        self.step = state["step"]

    # ---- files

    def sample(self, rows: list[dict]) -> None:
        """Rows for samples.jsonl: what the policy actually wrote. They are written with the number of the step once it has ended."""
        self._pending_samples += rows

    def flush_samples(self, step: int) -> None:
        if self._pending_samples and self.processes.first:
            append(self.folder / "samples.jsonl", [{"step": step, **row} for row in self._pending_samples])
        self._pending_samples.clear()

    def begin(self) -> None:
        """Make the folder. Called only when everything could be started, and in the first process."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._describe()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from error
        self._forget(-1)
        write_json(self.folder / "environment.json", environment(self))

    def resume(self) -> None:
        """Forget rows written after the checkpoint that has been loaded; the configuration may have become longer."""
        self._forget(self.step)
        self._describe()

    def _describe(self) -> None:
        write_yaml(self.folder / "config.yaml", config_data(self.config))

    def _forget(self, after: int) -> None:
        for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
            if path.exists():
                write_text(path, "".join(json.dumps(r) + "\n" for r in read_lines(path) if r["step"] <= after))


def config_data(config: RunConfig) -> dict:
    """The configuration as plain data, in the order of its fields."""
    data = to_config(config)
    data.pop("part")
    return data


def unportable(config: RunConfig) -> list[str]:
    """Names of functions in the configuration that exist only inside the running program."""
    return [p.name for _, p in walk(config) if isinstance(p, Call) and not p.portable]


def append(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:  # lone surrogates become JSON escapes
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def environment(run: Run) -> dict:
    """Versions, seed, threads and code revision, for environment.json."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("volvelle", "torch", "transformers", "numpy", "gymnasium", "reasoning-gym"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    here = Path(__file__).parent
    found = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"versions": versions, "seed": run.seed, "threads": torch.get_num_threads(), "processes": run.processes.count, "device": str(run.device),
            "platform": platform.platform(), "revision": found.stdout.strip() if found.returncode == 0 else None}
