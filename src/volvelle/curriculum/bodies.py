"""Bodies for the parkour: a walker with two legs and a chimpanzee with two arms, made of Box2D's rigid parts and motors."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

STEP, ROOF, GROUND = 14 / 30, 10.0, 430 / 30 / 4  # m: a step of the ground, the ceiling's height above it, the ground's height in the picture
SOLID, BODY = 0x0001, 0x0020  # what collides: bodies with solid things only, never with each other
START = 10 * STEP
VIOLET, DARK, LIGHT = (128, 102, 230), (128, 51, 102), (178, 102, 153)



def _listener(owner: "Body") -> Any:
    from Box2D.b2 import contactListener

    class Listener(contactListener):
        def BeginContact(self, contact):
            self._count(contact, 1)

        def EndContact(self, contact):
            self._count(contact, -1)

        def _count(self, contact, change):
            for one, other in ((contact.fixtureA.body, contact.fixtureB.body), (contact.fixtureB.body, contact.fixtureA.body)):
                if one.userData in owner.touched:
                    owner.touched[one.userData] += change
                    owner.hurt |= change > 0 and one.userData in owner.tender and other.userData == "ground"

    return Listener()


class Body:
    """Limbs, motors and what they feel.

    actions: motors, then hands; senses: numbers from state(); effort: reward lost per unit of action; upright: whether tilt costs; rays: angle of the first and
    the spread, from straight down; settling: steps at rest before an episode; tender: parts whose touching the ground ends it.
    """

    motors: ClassVar[int]
    actions: ClassVar[int]
    senses: ClassVar[int]
    effort: ClassVar[float]
    torque: ClassVar[float]
    speeds: ClassVar[tuple[float, ...]]
    ends: ClassVar[tuple[str | None, ...]]  # per motor: the part whose touching is felt beside it
    zero: ClassVar[tuple[float, ...]]  # added to the angles felt
    upright: ClassVar[bool] = True
    rays: ClassVar[tuple[float, float]] = (0.0, 1.5)
    settling: ClassVar[int] = 1
    tender: ClassVar[tuple[str, ...]] = ()

    def __init__(self, world: Any, grips: np.ndarray, scale: float, push: float):
        self.world, self.grips = world, grips
        self.limbs, self.joints, self.touched, self.hurt = [], [], {}, False
        self.make(scale)
        self.trunk = self.limbs[0][0]
        self.trunk.ApplyForceToCenter((push, 0), True)
        self.touching = _listener(self)

    def make(self, scale: float) -> None:
        raise NotImplementedError

    def _part(self, name: str, corners: Any, position: tuple[float, float], colour: tuple, angle: float = 0.0, **fixture) -> Any:
        from Box2D.b2 import polygonShape

        made = self.world.CreateDynamicBody(position=position, angle=angle, userData=name)
        made.CreateFixture(shape=polygonShape(vertices=corners), categoryBits=BODY, maskBits=SOLID, restitution=0.0, **fixture)
        self.limbs.append((made, colour))
        self.touched[name] = 0
        return made

    def _motor(self, upper: Any, lower: Any, at_upper: tuple, at_lower: tuple, limits: tuple[float, float]) -> None:
        self.joints.append(self.world.CreateRevoluteJoint(
            bodyA=upper, bodyB=lower, localAnchorA=at_upper, localAnchorB=at_lower, referenceAngle=0, enableMotor=True, enableLimit=True,
            maxMotorTorque=self.torque, motorSpeed=0, lowerAngle=limits[0], upperAngle=limits[1]))

    def drive(self, action: np.ndarray) -> None:
        """action [actions]: the sign is the direction, the size the share of the torque."""
        for joint, a, speed in zip(self.joints, action.tolist(), self.speeds):
            joint.motorSpeed, joint.maxMotorTorque = math.copysign(speed, a) if a else 0.0, self.torque * abs(a)

    def grasp(self, action: np.ndarray) -> None:
        """Hands hold or let go; bodies without hands do nothing."""

    def hands(self) -> list:
        """((x, y), whether it holds) of each hand."""
        return []

    def state(self) -> list[float]:
        felt = []
        for joint, speed, zero, end in zip(self.joints, self.speeds, self.zero, self.ends):
            felt += [joint.angle + zero, joint.speed / speed] + ([] if end is None else [float(self.touched[end] > 0)])
        return felt


def _box(width: float, height: float) -> list[tuple[float, float]]:
    return [(-width / 2, -height / 2), (width / 2, -height / 2), (width / 2, height / 2), (-width / 2, height / 2)]


class Walker(Body):
    """Two legs under a hull: Gymnasium's BipedalWalker, with legs `scale` times as long."""

    motors, actions, senses, torque, effort = 4, 4, 10, 80.0, 0.00035 * 80
    speeds, zero, ends = (4.0, 6.0) * 2, (0.0, 1.0) * 2, (None, "shin0", None, "shin1")

    def make(self, scale):
        width, length, hip = 8 / 30, 34 / 30 * scale, 8 / 30
        y = GROUND + 2 * length
        hull = self._part("hull", [(x / 30, z / 30) for x, z in ((-30, 9), (6, 9), (34, 1), (34, -8), (-30, -8))], (START, y), VIOLET, density=5.0, friction=0.1)
        for i, (side, colour) in enumerate(((-0.05, LIGHT), (0.05, DARK))):
            thigh = self._part(f"thigh{i}", _box(width, length), (START, y - length / 2 + hip), colour, side, density=1.0)
            shin = self._part(f"shin{i}", _box(0.8 * width, length), (START, y - 1.5 * length + hip), colour, side, density=1.0)
            self._motor(hull, thigh, (0, hip), (0, length / 2), (-0.8, 1.1))
            self._motor(thigh, shin, (0, -length / 2), (0, length / 2), (-1.6, -0.1))


class Chimpanzee(Body):
    """Head and chest on two arms of upper arm, forearm and hand; upper arms and forearms are `scale` times as long. Starts hanging from the ceiling."""

    motors, actions, senses, torque, effort = 6, 8, 18, 100.0, 0.00035 / 5 * 80
    speeds, zero, ends = (4.0, 4.0, 8.0) * 2, (0.0,) * 6, (None, None, "hand0", None, None, "hand1")
    upright, rays, settling, tender = False, (1.5, 2.3), 6, ("head", "chest")
    radius = 0.05  # of the palm, m

    def make(self, scale):
        width, length, thin, hand, shoulder = 8 / 30, 28 / 30 * scale, 4 / 30, 8 / 30, 22 / 30
        y = GROUND + ROOF - 0.01 - shoulder - 2 * length - hand
        head = self._part("head", _box(10 / 30, 20 / 30), (START, y + 32.5 / 30 + 0.2), VIOLET, density=5.0, friction=0.1)
        chest = self._part("chest", [(x / 30, z / 30) for x, z in ((-12, 25), (12, 25), (8, -20), (-8, -20))], (START, y), VIOLET, density=5.0, friction=0.1)
        self.world.CreateRevoluteJoint(bodyA=head, bodyB=chest, anchor=(START, y + 22.5 / 30), enableLimit=True, lowerAngle=-0.1 * math.pi, upperAngle=0.1 * math.pi)
        self.palms, self.holds = [], [None, None]
        for i, colour in enumerate((LIGHT, DARK)):
            upper = self._part(f"arm{i}", _box(width, length), (START, y + shoulder + length / 2), colour, density=1.0)
            lower = self._part(f"forearm{i}", _box(0.8 * width, length), (START, y + shoulder + 1.5 * length), colour, density=1.0)
            palm = self._part(f"hand{i}", _box(thin, hand), (START, y + shoulder + 2 * length + hand / 2), colour, density=1.0)
            self._motor(chest, upper, (0, shoulder), (0, -length / 2), (-1.5 * math.pi, 0))
            self._motor(upper, lower, (0, length / 2), (0, -length / 2), (0, 0.75 * math.pi))
            self._motor(lower, palm, (0, length / 2), (0, -hand / 2), (-0.5 * math.pi, 0.5 * math.pi))
            self.palms.append((palm, (0, hand / 2)))
        self.anchor = self.world.CreateStaticBody(userData="grips")
        self.grasp(np.ones(self.actions))

    def reaches(self, i: int) -> bool:
        """Whether hand i is at a grip."""
        palm, tip = self.palms[i]
        x, y = palm.GetWorldPoint(tip)
        left, bottom, right, top = self.grips.T
        return bool(((x + self.radius > left) & (x - self.radius < right) & (y + self.radius > bottom) & (y - self.radius < top)).any())

    def drive(self, action):
        super().drive(action)
        for i, a in enumerate(action[self.motors:]):
            if a <= 0 and self.holds[i] is not None:
                self.world.DestroyJoint(self.holds[i])
                self.holds[i] = None

    def grasp(self, action):
        for i, a in enumerate(action[self.motors:]):
            if a > 0 and self.holds[i] is None and self.reaches(i):
                palm, tip = self.palms[i]
                self.holds[i] = self.world.CreateRevoluteJoint(bodyA=palm, bodyB=self.anchor, anchor=palm.GetWorldPoint(tip))

    def hands(self):
        return [(palm.GetWorldPoint(tip), hold is not None) for (palm, tip), hold in zip(self.palms, self.holds)]

    def state(self):
        return super().state() + [float(v) for i in range(2) for v in (self.reaches(i), self.holds[i] is not None)]


BODIES: dict[str, type[Body]] = {"walker": Walker, "chimpanzee": Chimpanzee}
