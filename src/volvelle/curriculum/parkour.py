"""A family of parkours: walls with an opening at a chosen height and spacing, for a walker on the ground or a chimpanzee under the ceiling.

As a family: parkour, or family:volvelle/Parkour-v0?gap=2.5..7.5&spacing=0..6 with task.worst=-150 task.best=350. The body belongs to the learner, not to the
context: task.base.kwargs.body=chimpanzee task.base.kwargs.scale=0.7. Sizes, motors and rewards follow Meta-ACL's walker-climber (arXiv 2011.08463).
"""

from __future__ import annotations

import functools
import importlib.util
import math

import gymnasium as gym
import numpy as np

from volvelle.control.tasks import Gym
from volvelle.core.errors import UserError
from volvelle.core.parts import preset

from .bodies import BODIES, GROUND, ROOF, SOLID, STEP
from .families import Family

ID = "volvelle/Parkour-v0"
FPS, OPENING, BAND, WIDTH, FIRST, END, RAYS, REACH = 50, 5.0, 0.5, 0.8 * STEP, 8.0, 190 * STEP, 10, 160 / 30
VIEW, PIXELS = (600, 430), 30  # of the picture, and its pixels per metre
SKY, GRASS, ROCK, GRIPS, WALL = (222, 228, 250), (102, 153, 76), (128, 128, 128), (134, 178, 122), (242, 242, 242)


class Parkour(gym.Env):
    """Get as far to the right as you can between ground and ceiling (10 m above it).

    Context, read at every reset: gap (height of the middle of the openings, m; they are 5 m high, with some noise) and spacing (m from wall to wall, rounded up to
    steps of .47 m). body: walker (two legs) or chimpanzee (two arms, hangs from the ceiling); scale: length of the limbs, 1 being the usual. Grips: half a metre under
    the ceiling, and around the walls that hang from it; a hand there holds on as long as its action is above 0.

    Action: motors, -1 to 1 (walker 4: hip, knee, twice; chimpanzee 6: shoulder, elbow, wrist, twice), then per hand whether it grasps. Observation: angle, spin and speed of
    the trunk (the chimpanzee's head); per motor angle and speed, at a limb's end whether it touches; per hand whether there is a grip and whether it holds; ten distances ahead
    (1: nothing within 5.3 m). Reward: 130/30 per metre, minus the effort, minus the walker's tilt. The chimpanzee's chest or head touching ground or a wall from below,
    and leaving at the left, cost 100 and end the episode; so does, without cost, the far end at 88.7 m. The walker may fall and go on. UserError for what it cannot be made of.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(self, render_mode: str | None = None, body: str = "walker", scale: float = 1.0):
        if importlib.util.find_spec("Box2D") is None:
            raise UserError(f"task {ID} needs the package Box2D; pip install 'gymnasium[box2d]'")
        if body not in BODIES:
            raise UserError(f"task.base.kwargs.body={body}: accepted: {', '.join(BODIES)}")
        if not 0.2 <= scale <= 2:
            raise UserError(f"task.base.kwargs.scale={scale}: accepted: 0.2 to 2")
        self.render_mode, self.gap, self.spacing, self._kind, self._scale = render_mode, 2.5, 6.0, BODIES[body], scale
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self._kind.actions,), np.float32)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4 + self._kind.senses + RAYS,), np.float32)

    def reset(self, *, seed=None, options=None):
        from Box2D.b2 import world

        super().reset(seed=seed)
        if not OPENING / 2 <= self.gap <= ROOF or self.spacing < 0:
            raise UserError(f"task {ID}: gap={self.gap:g}, spacing={self.spacing:g}; expected gap from {OPENING / 2:g} to {ROOF:g}, spacing at least 0")
        self.world = world(gravity=(0, -10))  # a new one, so that a seed repeats an episode to the last bit
        self._build()
        self.body = self._kind(self.world, self.grips, self._scale, self.np_random.uniform(-5, 5))
        self.world.contactListener = self.body.touching
        self._shaping = None
        rest = np.zeros(self._kind.actions)
        rest[self._kind.motors:] = 1.0  # hands hold on
        for _ in range(self._kind.settling):
            observation = self.step(rest)[0]
        return observation, {}

    def _build(self) -> None:
        """Ground, ceiling and walls. `floor`, `hanging` [n, 4]: the lower and upper parts of the walls; `grips` [n, 4]; rectangles are left, bottom, right, top."""
        from Box2D.b2 import edgeShape, polygonShape

        pitch = max(1, math.ceil(self.spacing / STEP - 1e-9)) * STEP
        left = np.arange(math.ceil(FIRST / STEP) * STEP, 199 * STEP, pitch)
        low = np.maximum(0.05, self.np_random.normal(self.gap - OPENING / 2, 0.05, len(left)))
        high = np.maximum(0.05, self.np_random.normal(max(0.0, ROOF - OPENING / 2 - self.gap), 0.2, len(left)))
        right, base, roof = left + WIDTH, np.full(len(left), GROUND), np.full(len(left), GROUND + ROOF)
        self.floor, self.hanging = np.stack([left, base, right, base + low], 1), np.stack([left, roof - high, right, roof], 1)
        around = np.stack([left - WIDTH, roof - high - WIDTH, right + WIDTH, roof], 1)
        self.grips = np.concatenate([[[0, GROUND + ROOF - BAND, 200 * STEP, GROUND + ROOF]], around])
        far, block = 200 * STEP, polygonShape()
        for name, edge, walls in (("ground", GROUND, self.floor), ("ceiling", GROUND + ROOF, self.hanging)):
            solid = self.world.CreateStaticBody(userData=name)
            solid.CreateFixture(shape=edgeShape(vertices=[(-far, edge), (2 * far, edge)]), friction=2.5, categoryBits=SOLID)
            for a, b, c, d in walls.tolist():
                block.vertices = [(a, b), (c, b), (c, d), (a, d)]  # (CreatePolygonFixture would leak a little each time)
                solid.CreateFixture(shape=block, friction=2.5, categoryBits=SOLID)

    def step(self, action):
        action = np.clip(np.asarray(action, float), -1, 1)
        self.body.drive(action)
        self.world.Step(1 / FPS, 180, 60)
        self.body.grasp(action)
        trunk = self.body.trunk
        shaping = 130 * trunk.position.x / 30 - (5 * abs(trunk.angle) if self._kind.upright else 0.0)
        reward = (0.0 if self._shaping is None else shaping - self._shaping) - self._kind.effort * float(np.abs(action).sum())
        self._shaping = shaping
        lost = self.body.hurt or trunk.position.x < 0
        done = lost or trunk.position.x > END
        return self._seen(), -100.0 if lost else float(reward), done, False, {}

    def _seen(self) -> np.ndarray:
        trunk, speed = self.body.trunk, self.body.trunk.linearVelocity
        own = [trunk.angle, 2 * trunk.angularVelocity / FPS, 0.3 * speed.x * 20 / FPS, 0.3 * speed.y * (430 / 30) / FPS]
        return np.array([*own, *self.body.state(), *self._distances()], np.float32)

    def _distances(self) -> list[float]:
        first, spread = self._kind.rays
        at, found, ray = self.body.trunk.position, [], _ray()()
        for i in range(RAYS):
            angle = first + spread * i / RAYS
            ray.fraction = 1.0
            self.world.RayCast(ray, at, (at.x + math.sin(angle) * REACH, at.y - math.cos(angle) * REACH))
            found.append(ray.fraction)
        return found

    def render(self):
        if self.render_mode is None:
            return None
        import pygame

        screen, scroll = pygame.Surface(VIEW), self.body.trunk.position.x - VIEW[0] / PIXELS / 5

        def polygon(points, colour):
            pygame.draw.polygon(screen, colour, [((x - scroll) * PIXELS, VIEW[1] - y * PIXELS) for x, y in points])

        def box(a, b, c, d, colour):
            polygon([(a, b), (c, b), (c, d), (a, d)], colour)

        screen.fill(SKY)
        box(-10, -1, 200, GROUND, GRASS)
        box(-10, GROUND + ROOF, 200, 30, ROCK)
        for rectangles, colour in ((self.grips, GRIPS), (self.floor, WALL), (self.hanging, WALL)):
            for rectangle in rectangles:
                if rectangle[2] > scroll and rectangle[0] < scroll + VIEW[0] / PIXELS:
                    box(*rectangle, colour)
        for limb, colour in self.body.limbs:
            for fixture in limb.fixtures:
                polygon([limb.transform * v for v in fixture.shape.vertices], colour)
        for (x, y), held in self.body.hands():
            pygame.draw.circle(screen, (240, 200, 0) if held else (200, 0, 0), ((x - scroll) * PIXELS, VIEW[1] - y * PIXELS), 4)
        return np.transpose(pygame.surfarray.array3d(screen), (1, 0, 2))


@functools.cache
def _ray() -> type:
    from Box2D.b2 import rayCastCallback

    class Ray(rayCastCallback):
        """Keeps the nearest solid thing on a ray."""

        fraction = 1.0

        def ReportFixture(self, fixture, point, normal, fraction):
            if fixture.filterData.categoryBits != SOLID:
                return -1  # go on as if it were not there
            self.fraction = fraction
            return fraction

    return Ray


if ID not in gym.registry:
    gym.register(ID, entry_point="volvelle.curriculum.parkour:Parkour", max_episode_steps=2000)

parkour = preset("parkour", Family(base=Gym(id=ID), ranges={"gap": (2.5, 7.5), "spacing": (0.0, 6.0)}, points=6, worst=-150.0, best=350.0))
