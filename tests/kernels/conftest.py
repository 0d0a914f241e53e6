import pytest
from interpreter import mended


@pytest.fixture(autouse=True, scope="session")
def _mended():
    with mended():
        yield
