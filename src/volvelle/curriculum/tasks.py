"""Tasks of the curriculum wing: families of environments, families whose trainings are known already, simulated students, and walkers."""

from . import families, regions, students, taught, transfer, walkers  # noqa: F401
