"""Without a GPU, kernels run in Triton's interpreter; the variable must stand before any kernel is decorated.

Test processes side by side have a core each: with more threads than that, small products wait for one another.
A shell starts what it runs in the background deaf to Ctrl-C, and so would be the tests that send it.
"""

import atexit
import gc
import importlib.util
import os
import signal
import subprocess
import sys
from collections import Counter

if "PYTEST_XDIST_WORKER" in os.environ:
    # A process of tests that has ended is not taken apart first: with all that it has loaded, that takes seconds.
    _worker = os.getpid()
    atexit.register(lambda: os._exit(0) if os.getpid() == _worker else None)  # the first is the last to be called
    # before anything that reads them is loaded
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # others would be processes, which load PyTorch
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # what the processor says is not tried by compiling for it

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import drawing
import forked as forking
import pytest
import torch
from interpreter import mended

signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["TILEBOOK_NATIVE"] = "0"  # the user's own build stays out of what is tested


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample", action="store_true", help="without what is marked long, and of sampled tests a few cases"
    )


def _in_memory() -> None:
    """Has tests' files in memory, where it has room for them: databases wait for a disk at each commit."""
    place = Path("/dev/shm")
    with suppress(OSError):
        about = os.statvfs(place)
        room = about.f_bavail * about.f_frsize > 2 << 30 and not about.f_flag & os.ST_NOEXEC
        if room and os.access(place, os.W_OK):
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(place))


def pytest_configure(config: pytest.Config) -> None:
    _in_memory()
    if config.getoption("--sample"):
        drawing.sample()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """In a sample, tests for GPUs are not met where there is none: to skip thousands takes a minute of two cores."""
    sample = config.getoption("--sample") and not torch.cuda.is_available()
    return True if sample and collection_path == Path(__file__).with_name("gpu") else None


def _sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves what `make test` runs: no test marked long, and of `sampled(n)` a case in n, spread over all of them."""
    met: Counter[tuple[str, str]] = Counter()
    kept, left = [], []
    for item in items:
        mark = item.get_closest_marker("sampled")
        here = item.get_closest_marker("long") is None
        if mark is not None:
            of, by = mark.args[0], mark.kwargs.get("by")
            group = item.nodeid.partition("[")[0], str(item.callspec.params[by]) if by else ""  # type: ignore[attr-defined]
            # Steps of the golden ratio, which no product of parameters repeats.
            here = here and met[group] * 0.6180339887498949 % 1 < 1 / of
            met[group] += 1
        (kept if here else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def _early(items: list[pytest.Item]) -> None:
    """Puts what compiles at the front of either half, so that of two processes none waits for the other at the end."""
    slow = [item for item in items if item.path.stem.endswith("compile")]
    rest = [item for item in items if not item.path.stem.endswith("compile")]
    half = len(slow) // 2
    cut = max(0, len(items) // 2 - half)
    items[:] = [*slow[:half], *rest[:cut], *slow[half:], *rest[cut:]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--sample"):
        _sample(config, items)
    _early(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU in this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _mended():
    """What runs in Triton's interpreter runs as on a GPU."""
    with mended() if importlib.util.find_spec("triton") else nullcontext():
        yield


@contextmanager
def _forking(config: pytest.Config) -> Iterator[None]:
    """In a sample, Python processes need not load PyTorch: they are copies of one that has."""
    with pytest.MonkeyPatch.context() as patch:
        if config.getoption("--sample") and sys.platform == "linux" and not torch.cuda.is_available():
            patch.setattr(subprocess, "Popen", forking.Popen)
        yield


@pytest.fixture
def forked(pytestconfig: pytest.Config) -> Iterator[None]:
    """For a test whose processes may begin so: how a process begins is not what it asks."""
    with _forking(pytestconfig):
        yield


@pytest.fixture(scope="module")
def forked_here(pytestconfig: pytest.Config) -> Iterator[None]:
    """The same for what starts processes for all tests of a file."""
    with _forking(pytestconfig):
        yield


@pytest.fixture(autouse=True, scope="module")
def _settled():
    """What a file's tests find, modules above all, is not looked through by all their collections of garbage."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
