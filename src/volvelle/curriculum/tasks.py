"""Tasks of the curriculum wing: families of environments, families whose trainings are known already, simulated students, walkers, and grid worlds."""

from . import families, gridtasks, regions, students, taught, transfer, walkers  # noqa: F401
