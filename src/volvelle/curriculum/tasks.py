"""Tasks of the curriculum wing: families of environments, families whose trainings are known already, simulated students, walkers, parkours, traffic lights, and grid worlds."""

from . import families, gridtasks, parkour, regions, students, taught, traffic, transfer, walkers  # noqa: F401
