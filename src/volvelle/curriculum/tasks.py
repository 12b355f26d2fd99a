"""Tasks of the curriculum wing: families of environments, families whose trainings are known already, and grid worlds."""

from . import families, gridtasks, transfer  # noqa: F401
