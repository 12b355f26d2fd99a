"""Tasks of the curriculum wing: families of environments, and families whose trainings are known already."""

from . import families, transfer  # noqa: F401
