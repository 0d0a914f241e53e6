import fcntl
import shutil

import pytest

from tilebook.native import place


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the extension of this test run is kept: built once for all test processes."""
    return tmp_path_factory.getbasetemp().parent / "tilebook-native"


@pytest.fixture(scope="session")
def library(folder):
    """The extension, compiled."""
    from tilebook.native import build

    if not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip("there is no C++ compiler")
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, open(folder / "lock", "w") as lock:
        patch.setenv("TILEBOOK_NATIVE", str(folder))
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert build.build() == place.built()
        return place.built()
