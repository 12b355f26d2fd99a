"""Tasks of the curriculum wing: families of environments, and families whose trainings are known already."""

from . import families, taught, teachers, transfer  # noqa: F401
