import pytest

from tilebook import dispatch


@pytest.fixture
def forced():
    """Calls are taken as if their tensors were on a GPU."""
    with dispatch.use("torch"):
        yield
