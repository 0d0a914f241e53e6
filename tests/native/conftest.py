import contextlib
import ctypes
import fcntl
import hashlib
import operator
import os
import shutil
from pathlib import Path

import pytest
import torch

import tilebook
from tilebook import device as devices
from tilebook import dispatch, enabling, left, native
from tilebook.dispatch import Choice, Dispatch
from tilebook.native import gates, place

LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)  # fmt: skip
REPLACE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


@pytest.fixture(scope="session")
def folder(pytestconfig):
    """Where the extension is kept: built once for all test processes, and anew where it or how it is built changes."""
    how = hashlib.sha256(Path(native.__file__).with_name("build.py").read_bytes()).hexdigest()
    kind = "plain" if pytestconfig.getoption("--sample") else "native"
    return pytestconfig.cache.mkdir(f"{kind}-{how[:16]}")


def _plain(compiler, folder):
    """A compiler that does as this one but leaves code as it is written, in two thirds of the time."""
    script = folder / "plain"
    script.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" -O0\n')
    script.chmod(0o700)
    return str(script)


@pytest.fixture(scope="session")
def library(folder, pytestconfig):
    """The extension, compiled; in a sample, without its code being optimized."""
    from tilebook.native import build

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("there is no C++ compiler")
    with pytest.MonkeyPatch.context() as patch, open(folder / "lock", "w") as lock:
        patch.setenv("TILEBOOK_NATIVE", str(folder))
        fcntl.flock(lock, fcntl.LOCK_EX)  # nobody writes a script that another process runs
        if pytestconfig.getoption("--sample"):
            patch.setenv("CXX", _plain(compiler, folder))
        assert build.build() == place.built()
        return place.built()


class Served:
    """The extension at work, with the answers of a test; `machine` launches."""

    def __init__(self, extension, machine):
        self.extension, self.machine, self.asked, self.answers = extension, machine, [], {}

    def answer(self, name, args):
        self.asked.append((name, args))
        found = self.answers.get(name, (None, False, "left"))
        return found(args) if callable(found) else found

    @property
    def launched(self):
        return len(self.machine.launches)


_loaded, _installed = [], set()
_OF_ROWS = {each.name for each in enabling._STANDINGS if each.of_rows}


@pytest.fixture
def extension(library, folder, monkeypatch):
    """Makes a `Served` of a machine, which has `launch`, `launches` and perhaps `replace`, and of ops."""
    monkeypatch.setenv("TILEBOOK_NATIVE", str(folder))

    def served(machine, ops):
        if not _loaded:
            _loaded.append(native._loaded())
        (it,) = _loaded
        for name in sorted(set(ops) - _installed):
            it.install(name, name in _OF_ROWS)
            _installed.add(name)
        callbacks = LAUNCH(machine.launch), REPLACE(getattr(machine, "replace", lambda place, address: 1))
        it.pretend(*[ctypes.cast(each, ctypes.c_void_p).value for each in callbacks])
        assert it.able()
        it.clear()
        made = Served(it, machine)
        it.start(made.answer)
        yield made
        it.stop()
        it.ask(False)
        it.clear()
        it.pretend(0)

    return served


class NoLaunch:
    def launch(self, *given):
        raise AssertionError("nothing is to be launched")


@pytest.fixture
def it(extension):
    """The extension, on."""
    for served in extension(NoLaunch(), ()):
        yield served.extension


@pytest.fixture
def both(it):
    """What a program gives with it off and on, the same bits, or as close as is said."""

    def run(program, *args, within=0.0):
        it.stop()
        plain = program(*args)
        it.start(lambda name, given: (None, False, None))
        ours = program(*args)
        torch.testing.assert_close(ours, plain, rtol=within, atol=within, equal_nan=True)
        return ours

    return run


class Theirs(Dispatch):
    """Leaves every call to PyTorch, as if its tensors were on a GPU where nothing is ahead of it."""

    def choose(self, op, problem, device):
        return Choice(op.implementations["torch"], None, "exact", problem, devices.find("H200"))

    def _settled(self, choice):
        return True


class Gated:
    """The gates of one dispatch, open."""

    def __init__(self, extension, here, gates):
        self.extension, self.here, self.gates = extension, here, gates

    def __call__(self, function, *args, **options):
        """As Python calls it from 3.12 on; before, only calls from C are met."""
        return operator.call(function, *args, **options)

    def known(self, function, *args, **options):
        """Makes calls until one like them would be answered without Python."""
        for _ in range(3):
            self(function, *args, **options)
        self.here._tell("counted")

    def answered(self, function, *args, **options):
        """Is a call answered without Python? With its result."""
        self.here._tell("counted")
        result = self(function, *args, **options)
        return sum(calls for _, calls in self.extension.gates_counted()) == 1, result

    def looked_at(self, function, *args, **options):
        """Is it the function that is called? Whatever comes of it: here is no GPU for what it runs."""
        self.here._tell("counted")
        with contextlib.suppress(Exception):
            self(function, *args, **options)
        return not self.extension.gates_counted()


@pytest.fixture
def gated(it, monkeypatch):
    """Public functions with gates, of a dispatch that leaves everything to PyTorch."""
    here = Theirs()
    for name in ("run", "lookup", "known", "choose", "backward_of"):
        monkeypatch.setattr(dispatch, name, getattr(here, name))
    monkeypatch.setattr(dispatch, "here", here)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(devices, "current", lambda index=0: devices.find("H200"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(left, "_here", here)
    monkeypatch.setattr(left, "_capturing", lambda: False)
    monkeypatch.setattr(native._serving, "_extension", it)
    for name in tilebook.__all__:
        getattr(tilebook, name)  # families are imported before they are gated
    made = gates.Gates(here)
    mine = left._Gated()
    mine.begun, mine.settle = True, made.open(left._gated.functions)
    monkeypatch.setattr(left, "_gated", mine)
    yield Gated(it, here, made)
    made.close()
