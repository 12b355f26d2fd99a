"""A family of traffic lights: one intersection simulated by SUMO, whose demand, speed limits and signal times vary.

As a family: family:volvelle/TrafficSignal-v0?demand=0.3..1.5 with task.worst=0 task.best=120, or traffic-signals. Your own: task.base.kwargs.net and .routes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import weakref
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym

from volvelle.control.tasks import Gym
from volvelle.core.errors import UserError
from volvelle.core.parts import preset

from .families import Family

ID = "volvelle/TrafficSignal-v0"
REWARDS = ("average-speed", "diff-waiting-time", "pressure", "queue")


class TrafficSignal(gym.Env):
    """Every `interval` seconds the action says which green phase comes next. Signal, observation and rewards are sumo_rl's, the simulator is SUMO.

    Observation [phases + 1 + 2 lanes], 0 to 1: the phase now (one-hot), whether it may end, and how full and how queued each incoming lane is.
    Context, read at every reset: demand (number of vehicles relative to the routes file, SUMO's --scale), speed (limits relative to the net's), green
    and yellow (shortest green, yellow; seconds, rounded to whole ones). net, routes: SUMO's .net.xml with one signal and .rou.xml; without both, two crossing
    one-way roads. reward: average-speed (mean over the waiting and coming vehicles, 0 to 1 of what is allowed; 1 on empty lanes), diff-waiting-time, pressure
    or queue. The process of SUMO is started once and serves all episodes. UserError for missing packages, files SUMO cannot load, impossible times.
    """

    def __init__(self, render_mode: str | None = None, net: str | None = None, routes: str | None = None, reward: str = "average-speed", interval: int = 5):
        for package in ("sumo", "sumo_rl"):
            if (spec := importlib.util.find_spec(package)) is None or spec.origin is None:  # no origin: a folder of that name, not a package
                raise UserError(f"task {ID} needs the package {package}; pip install volvelle[traffic]")
        import sumo  # sets SUMO_HOME, which sumo_rl asks for
        sample = Path(spec.origin).parent / "nets" / "single-intersection" / "single-intersection"
        self._net, self._routes = net or f"{sample}.net.xml", routes or f"{sample}.rou.xml"
        both = (net is None) == (routes is None)
        for name, value, good, accepted in (
                ("reward", reward, reward in REWARDS, ", ".join(REWARDS)),
                ("interval", interval, type(interval) is int and interval > 1, "whole seconds, at least 2"),
                ("net", net, both and Path(self._net).is_file(), "a file, together with routes"),
                ("routes", routes, both and Path(self._routes).is_file(), "a file, together with net"),
                ("render_mode", render_mode, render_mode is None, "none; traffic cannot be watched or recorded")):
            if not good:
                raise UserError(f"task.base.kwargs.{name}={value}: accepted: {accepted}")
        self.demand, self.speed, self.green, self.yellow = 1.0, 1.0, 5.0, 2.0
        self._reward, self._interval, self._sumo, self._program = reward, interval, None, str(Path(sumo.SUMO_HOME) / "bin" / "sumo")
        self._load(0)
        self.observation_space, self.action_space = self._signal.observation_space, self._signal.action_space

    def _load(self, seed: int) -> None:
        """Empty roads and a signal that shows its first green."""
        import traci
        from sumo_rl.environment.observations import DefaultObservationFunction
        from sumo_rl.environment.traffic_signal import TrafficSignal as Signal
        from sumolib.miscutils import getFreeSocketPort

        green, yellow = round(self.green), round(self.yellow)
        if self.demand < 0 or self.speed <= 0 or green < 0 or not 0 < yellow < self._interval:
            raise UserError(f"task {ID}: demand={self.demand:g}, speed={self.speed:g}, green={green}, yellow={yellow}; expected demand >= 0, speed > 0, "
                            f"green >= 0, and yellow from 1 to {self._interval - 1} (below interval={self._interval})")
        options = ["-n", self._net, "-r", self._routes]
        options += f"--seed {seed} --scale {self.demand} --time-to-teleport -1 --waiting-time-memory 1000 --no-warnings --no-step-log".split()
        try:
            if self._sumo is None:
                process = subprocess.Popen([self._program, *options, "--remote-port", str(port := getFreeSocketPort())], stdout=subprocess.DEVNULL)
                with contextlib.redirect_stdout(io.StringIO()):  # it prints every attempt
                    self._sumo = traci.connect(port, 600, proc=process, waitBetweenRetries=0.05)
                self._end = weakref.finalize(self, lambda: (process.kill(), process.wait()))  # at the end of the program at the latest
            else:
                self._sumo.load(options)
            signals = self._sumo.trafficlight.getIDList()
        except (traci.TraCIException, traci.FatalTraCIError) as error:
            raise UserError(f"task {ID}: SUMO cannot load {self._net} with {self._routes}: {error} (its own words stand above)") from None
        if len(signals) != 1:
            raise UserError(f"task.base.kwargs.net={self._net}: has {len(signals)} traffic signals; expected one")
        for lane in self._sumo.lane.getIDList() if self.speed != 1 else ():
            self._sumo.lane.setMaxSpeed(lane, self.speed * self._sumo.lane.getMaxSpeed(lane))
        self._world = SimpleNamespace(fixed_ts=False, observation_class=DefaultObservationFunction, vehicles={}, sim_step=0)  # what a signal asks for
        self._signal = Signal(self._world, signals[0], self._interval, yellow, green, 0, 0, self._reward, self._sumo)

    def _seen(self):
        vehicles, queue = self._sumo.vehicle.getIDCount(), self._signal.get_total_queued()
        return self._signal.compute_observation(), {"seconds": self._world.sim_step, "queue": queue, "vehicles": vehicles}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._load(int(self.np_random.integers(2**31 - 1)))
        return self._seen()

    def step(self, action):
        self._signal.set_next_phase(action)
        for _ in range(self._interval):
            self._sumo.simulationStep()
            self._world.sim_step += 1
            self._signal.update()
        observation, info = self._seen()
        return observation, float(self._signal.compute_reward()), False, False, info

    def close(self):
        if self._sumo is not None:
            with contextlib.suppress(Exception):  # SUMO may have ended by itself
                self._sumo.close(False)
            self._end()
            self._sumo = None


if ID not in gym.registry:
    gym.register(ID, entry_point="volvelle.curriculum.traffic:TrafficSignal", max_episode_steps=120)

traffic_signals = preset("traffic-signals", Family(base=Gym(id=ID), ranges={"demand": (0.3, 1.5)}, points=6, worst=0.0, best=120.0))
