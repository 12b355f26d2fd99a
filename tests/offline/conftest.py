import pytest
from offline_data import counting


@pytest.fixture
def data():
    return counting()
