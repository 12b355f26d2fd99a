"""What every test shares: no network, one thread, and a model cache that does not outlive the session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("volvelle", derandomize=True, database=None, deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
settings.load_profile("volvelle")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Tiny models made by a test are kept for the session, and nothing of the user's cache is touched."""
    old = os.environ.get("VOLVELLE_CACHE")
    os.environ["VOLVELLE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if old is None:
        del os.environ["VOLVELLE_CACHE"]
    else:
        os.environ["VOLVELLE_CACHE"] = old
