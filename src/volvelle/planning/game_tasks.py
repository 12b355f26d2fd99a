"""Games as tasks, solution concepts as parts, and the two recipes that all game methods share: solve a game, or grow populations on one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.files import write_json
from volvelle.core.parts import Part, Recipe, part
from volvelle.core.tasks import Task, task_reader

from .game_files import from_openspiel, load_game
from .games import Game, Profile, expected_payoffs, exploitability, judge, nash, quantal_response, random_game, risk_dominance
from .markov_games import MarkovArena, merge, stag_hunt, walkers
from .psro import MatrixArena, Psro, latest, uniform

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Kind = Literal["step", "episode", "opponent"]


# ---------------------------------------------------------------------------------------------------------------- tasks

class GameTask(Task):
    """A game to find a profile for. `arena(seed, risk, kind)`: where policies meet; tasks drawn at random draw with the run's seed."""

    wing: ClassVar[str] = "planning"
    metric: ClassVar[str] = "mean"

    def arena(self, seed: int, risk: float = 0.0, kind: Kind = "episode", repeat: bool = False) -> Any:
        raise NotImplementedError


class MatrixTask(GameTask):
    """A game in normal form."""

    def game(self, seed: int = 0) -> Game:
        raise NotImplementedError

    def arena(self, seed, risk=0.0, kind="episode", repeat=False):
        return MatrixArena(self.game(seed), risk, repeat)


@part("game-file")
class GameFile(MatrixTask):
    """A payoff file: CSV, JSON or NPZ (see planning.game_files.load_game). `kind` says what a CSV with one table means."""

    path: str
    kind: Literal["zero-sum", "symmetric"] | None = None

    def game(self, seed=0):
        return load_game(self.path, self.kind)

    def label(self):
        return f"game-{self.path.rpartition('/')[2].partition('.')[0]}"


@task_reader("game")
def _game_file(path: str) -> GameFile:
    """A matrix game of your own: game:mine.csv, game:mine.json, game:mine.npz."""
    return GameFile(path=path)


@part("openspiel")
class OpenSpielGame(MatrixTask):
    """An OpenSpiel game in normal form, by its name there: a one-shot game, or a small sequential one of two players."""

    name: str = "matrix_sh"

    def game(self, seed=0):
        return from_openspiel(self.name)

    def label(self):
        return self.name.partition("(")[0].replace("_", "-")


@task_reader("spiel")
def _openspiel(name: str) -> OpenSpielGame:
    """A game of OpenSpiel: spiel:matrix_sh, spiel:kuhn_poker, spiel:blotto."""
    return OpenSpielGame(name=name)


@part("random-game")
class RandomGame(MatrixTask):
    """Payoffs uniform in [0, 10]; `crashes` joint actions pay everybody `crash` instead; another game for every seed."""

    sizes: tuple[Count, ...] = (5, 5)
    crashes: Annotated[int, Field(ge=0)] = 3
    crash: float = -100.0

    def game(self, seed=0):
        return random_game(self.sizes, np.random.default_rng(seed), self.crashes, self.crash)


@part("stag-hunt")
class StagHunt(GameTask):
    """Two hunters on a grid: the stag pays five each if taken together, costs three alone; a hare pays two. The populations
    start with a stag hunter and two hare hunters. See markov_games.stag_hunt."""

    size: Annotated[int, Field(ge=3, le=9)] = 5
    slip: Probability = 0.1

    def arena(self, seed, risk=0.0, kind="episode", repeat=False):
        return MarkovArena(stag_hunt(self.size, self.slip), [walkers(self.size, player) for player in (0, 1)], risk, kind, starting=3)


@part("merge")
class Merge(GameTask):
    """Two cars whose lanes merge: arriving pays ten, a step costs one, passing the point together costs fifty. See markov_games.merge."""

    length: Annotated[int, Field(ge=1, le=10)] = 4
    slip: Probability = 0.1

    def arena(self, seed, risk=0.0, kind="episode", repeat=False):
        game, rng = merge(self.length, self.slip), np.random.default_rng(seed)
        starters = [[rng.dirichlet(np.full(3, 0.3), game.states) for _ in range(6)] for _ in (0, 1)]
        return MarkovArena(game, starters, risk, kind, starting=3)


# ---------------------------------------------------------------------------------------------------------------- solution concepts

class Concept(Part):
    """What counts as a solution of a game. `solve` gives one; `improve` is one iteration towards it (default: all at once); `finish` what an
    iterate stands for; `floor_in` the least probability that the concept itself gives every action."""

    slot: ClassVar[str] = "concept"
    repeat: ClassVar[bool] = False
    only_meta: ClassVar[bool] = False

    def solve(self, game: Game, generator: np.random.Generator) -> Profile:
        raise NotImplementedError

    def improve(self, game: Game, profile: Profile, t: int, generator: np.random.Generator) -> Profile:
        return self.solve(game, generator) if t == 0 else profile

    def finish(self, game: Game, profile: Profile) -> Profile:
        return profile

    def floor_in(self, game: Game) -> float:
        return 0.0


@part("nash")
class Nash(Concept):
    """A Nash equilibrium of two players: the first found, or the one of the largest (scaled) sum of payoffs."""

    select: Literal["first", "welfare"] = "first"

    def solve(self, game, generator):
        return nash(game, self.select)


@part("logit")
class Logit(Concept):
    """The logit quantal response equilibrium; rationality times the range of the payoffs is the largest log-odds of two actions."""

    rationality: NonNegative = 10.0

    def solve(self, game, generator):
        return quantal_response(game, self.rationality / max(float(np.ptp(game.payoffs)), 1e-9))


@part("uniform")
class Uniform(Concept):
    """Every action alike. Over populations: fictitious self-play."""

    repeat: ClassVar[bool] = True

    def solve(self, game, generator):
        return uniform(game)


@part("latest")
class Latest(Concept):
    """The newest policy only: plain self-play. Has a meaning over populations alone."""

    repeat: ClassVar[bool] = True
    only_meta: ClassVar[bool] = True

    def solve(self, game, generator):
        return latest(game)


# ---------------------------------------------------------------------------------------------------------------- recipes

class Written:
    """A result that is saved as one JSON file of plain numbers."""

    def __init__(self, name: str, data: dict):
        self.name, self.data = name, data

    def save(self, folder) -> None:
        write_json(folder / f"{self.name}.json", self.data)


@part("solve")
class Solve(Recipe):
    """Solve a matrix game. `tremble`: in the evaluation every other player acts uniformly at random with this probability."""

    wing: ClassVar[str] = "planning"
    concept: Concept = Nash()
    tremble: Probability = 0.05

    def validate(self, task=None):
        super().validate(task)
        if not isinstance(task, MatrixTask):
            raise UserError(f"task {task.label() if task else None}: has no payoff table; accepted: game:FILE, spiel:NAME, random-game")
        if self.concept.only_meta:
            raise UserError(f"concept={self.concept.part_name}: has a meaning over populations alone; use it with psro")

    def start(self, run):
        return _Solver(self, run)


class _Solver:
    def __init__(self, recipe, run):
        self.recipe, self.concept = recipe, run.start("concept", recipe.concept)
        self.game, self.generator = run.config.task.game(run.seed), run.rng("solve")
        self.profile, self.t = self.game.uniform(), 0

    def step(self):
        before = self.profile
        self.profile = self.concept.improve(self.game, before, self.t, self.generator)
        self.t += 1
        return {"change": max(np.abs(a - b).max() for a, b in zip(before, self.profile, strict=True)),
                "exploitability": exploitability(self.game, self.profile)}

    def solution(self):
        return self.concept.finish(self.game, self.profile)

    def evaluate(self):
        profile = self.solution()
        return judge(self.game, intended(profile, self.concept.floor_in(self.game)), self.recipe.tremble) | {
            "exploitability": exploitability(self.game, profile)}

    def product(self):
        data = {"game": self.game.name, "profile": [p.tolist() for p in self.solution()], "metrics": {k: float(v) for k, v in self.evaluate().items()}}
        if self.game.players == 2:
            data["risk_dominance"] = [{"equilibrium": list(map(int, a)), "dominates": [list(map(int, b)) for b in beaten]}
                                      for a, beaten in risk_dominance(self.game).items()]
        return {"equilibrium": Written("equilibrium", data)}

    def state_dict(self):
        return {"profile": list(self.profile), "t": self.t}

    def load_state_dict(self, state):
        self.profile, self.t = list(state["profile"]), state["t"]


def intended(profile: Profile, floor: float) -> Profile:
    """The profile without the tremble that is part of it."""
    return [(p - floor) / (1 - floor * len(p)) if floor * len(p) < 1 else p for p in profile]


@part("populations")
class Populations(Recipe):
    """Policy-space response oracles: one policy per player and step. concept: what is solved over the populations; risk: how strongly a new
    policy avoids variance, of the `kind` that planning.markov_games explains; tremble: as in Solve, over the policies."""

    wing: ClassVar[str] = "planning"
    concept: Concept = Nash("welfare")
    risk: NonNegative = 0.0
    kind: Kind = "episode"
    tremble: Probability = 0.05

    def validate(self, task=None):
        super().validate(task)
        if not isinstance(task, GameTask):
            raise UserError(f"task {task.label() if task else None}: is no game; accepted: stag-hunt, merge, game:FILE, spiel:NAME, random-game")

    def start(self, run):
        return _Populations(self, run)


class _Populations:
    def __init__(self, recipe, run):
        self.recipe, self.concept = recipe, run.start("concept", recipe.concept)
        self.generator = run.rng("populations")
        arena = run.config.task.arena(run.seed, recipe.risk, recipe.kind, recipe.concept.repeat)
        self.psro = Psro(arena, functools.partial(self.concept.solve, generator=self.generator), self.generator)
        self.grown = True
        most = max(map(len, self.psro.populations)) + run.config.steps
        if (floor := recipe.concept.floor_in(self.psro.game)) * most > 1:
            raise UserError(f"concept.floor={floor}: {run.config.steps} steps can make {most} policies per player; the floor may be at most "
                            f"{1 / most:.3g}, or take fewer steps")
        self.mix = self.psro.mix()

    @property
    def finished(self):
        return not self.grown

    def step(self):
        self.grown = self.psro.step(self.mix)
        self.mix = self.psro.mix()
        return {"policies": sum(map(len, self.psro.populations)), "value": float(expected_payoffs(self.psro.game, self.mix).mean())}

    def evaluate(self):
        mix = intended(self.mix, self.concept.floor_in(self.psro.game))
        return self.psro.arena.measure(self.psro.populations, self.psro.game, mix, self.recipe.tremble)

    def product(self):
        data = {"payoffs": self.psro.payoffs.tolist(), "mix": [p.tolist() for p in self.mix],
                "populations": [[policy.tolist() for policy in population] for population in self.psro.populations]}
        return {"populations": Written("populations", data)}

    def state_dict(self):
        return {"populations": [list(p) for p in self.psro.populations], "payoffs": self.psro.payoffs, "grown": self.grown, "mix": list(self.mix)}

    def load_state_dict(self, state):
        self.psro.populations, self.psro.payoffs = [list(p) for p in state["populations"]], state["payoffs"]
        self.grown, self.mix = state["grown"], list(state["mix"])


def risk_picture(game: Game, gammas: Sequence[float], profiles: Sequence[Profile], mistakes: float = 0.05) -> str:
    """SVG of what profiles pay along rising `gammas` (see rae.path): mean and standard deviation against others who err, players' average."""
    from volvelle.core.plots import learning_curves

    found = [judge(game, profile, mistakes) for profile in profiles]
    curves = {"mean": [[f["mean"] for f in found]], "standard deviation": [[f["variance"] ** 0.5 for f in found]]}
    return learning_curves({name: (gammas, values) for name, values in curves.items()}, metric="payoff", x="gamma", rng=np.random.default_rng(0))
