"""A family of walkers: Gymnasium's BipedalWalker on ground whose stumps have a chosen height and spacing, on legs of a chosen length.

As a family: family:volvelle/StumpWalker-v0?height=0..3&spacing=0..6 with task.worst=-150 task.best=350. Legs belong to the learner, not to the context:
task.base.kwargs.legs=0.7.
"""

from __future__ import annotations

import importlib.util
import types
from typing import Any

import gymnasium as gym
import numpy as np

from volvelle.control.tasks import Gym
from volvelle.core.errors import UserError
from volvelle.core.parts import preset

from .families import Family

ID = "volvelle/StumpWalker-v0"


def make_walker(render_mode: str | None = None, legs: float = 1.0) -> gym.Env:
    """legs: length and width of the limbs, 1 being Gymnasium's."""
    if importlib.util.find_spec("Box2D") is None:
        raise UserError("task volvelle/StumpWalker-v0 needs the package Box2D; pip install 'gymnasium[box2d]'")
    if not 0.2 <= legs <= 2:
        raise UserError(f"task.base.kwargs.legs={legs}: accepted: 0.2 to 2")
    return _walker(legs)(render_mode)


def _walker(legs: float) -> type:
    from gymnasium.envs.box2d import bipedal_walker as original

    # Gymnasium keeps the limbs' size in constants of its module, which reset() reads: this class's reset reads them, scaled, from a namespace of its own
    scaled = dict(vars(original))
    width, height = legs * original.LEG_W, legs * original.LEG_H
    scaled |= {"LEG_W": width, "LEG_H": height, "LEG_DOWN": legs * original.LEG_DOWN, "LEG_FD": _limb(width, height), "LOWER_FD": _limb(0.8 * width, height)}

    class StumpWalker(original.BipedalWalker):
        """height: of the stumps, in the length of a terrain step (about .47 m); spacing: flat ground between them, in the same unit."""

        def __init__(self, render_mode=None):
            super().__init__(render_mode)
            self.height, self.spacing = 0.0, 6.0

        def _generate_terrain(self, hardcore):
            step, start, ground = original.TERRAIN_STEP, original.TERRAIN_STARTPAD, original.TERRAIN_HEIGHT
            self.terrain, self.terrain_poly = [], []
            self.terrain_x = [i * step for i in range(original.TERRAIN_LENGTH)]
            y, velocity, self.terrain_y = ground, 0.0, []
            for i in range(original.TERRAIN_LENGTH):  # gentle hills, as on Gymnasium's grass
                velocity = 0.8 * velocity + 0.01 * np.sign(ground - y) + (self.np_random.uniform(-1, 1) / original.SCALE if i > start else 0.0)
                y += velocity
                self.terrain_y.append(y)
            place, end = start * step, (original.TERRAIN_LENGTH - original.TERRAIN_GRASS) * step
            while self.height > 0 and place < end:
                foot = float(np.interp(place, self.terrain_x, self.terrain_y))
                top = foot + self.height * step
                self._block([(place, foot), (place + step, foot), (place + step, top), (place, top)])
                place += (1 + max(self.spacing, 0.5)) * step
            for i in range(original.TERRAIN_LENGTH - 1):
                edge = [(self.terrain_x[i], self.terrain_y[i]), (self.terrain_x[i + 1], self.terrain_y[i + 1])]
                self.fd_edge.shape.vertices = edge
                body = self.world.CreateStaticBody(fixtures=self.fd_edge)
                body.color1 = body.color2 = (76, 255 if i % 2 == 0 else 204, 76)
                self.terrain.append(body)
                self.terrain_poly.append(([*edge, (edge[1][0], 0), (edge[0][0], 0)], (102, 153, 76)))
            self.terrain.reverse()

        def _block(self, corners):
            self.fd_polygon.shape.vertices = corners
            body = self.world.CreateStaticBody(fixtures=self.fd_polygon)
            body.color1, body.color2 = (255, 255, 255), (153, 153, 153)
            self.terrain.append(body)

    inherited = original.BipedalWalker.reset
    reset = types.FunctionType(inherited.__code__, scaled, "reset", inherited.__defaults__, inherited.__closure__)
    reset.__kwdefaults__ = inherited.__kwdefaults__
    StumpWalker.reset = reset
    return StumpWalker


def _limb(width: float, height: float) -> Any:
    from Box2D.b2 import fixtureDef, polygonShape

    return fixtureDef(shape=polygonShape(box=(width / 2, height / 2)), density=1.0, restitution=0.0, categoryBits=0x0020, maskBits=0x001)


if ID not in gym.registry:
    gym.register(ID, entry_point="volvelle.curriculum.walkers:make_walker", max_episode_steps=2000)

stump_walkers = preset("stump-walkers", Family(base=Gym(id=ID), ranges={"height": (0.0, 3.0), "spacing": (0.0, 6.0)}, points=6, worst=-150.0, best=350.0))
