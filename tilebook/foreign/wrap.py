"""`TILEBOOK_TRITON`: every autotuner of a program is recorded, or served, whoever has written its kernels."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tilebook.errors import UsageError
from tilebook.foreign.kernel import descriptors
from tilebook.foreign.record import Recording, folder, start
from tilebook.variables import SPACES


def install(asked: str) -> None:
    """Does what the variable says: record, record:FOLDER or serve. Raises ValueError for anything else.

    The kernels of `TILEBOOK_SPACES` have their spaces then; where that names no file of any, there is a warning."""
    what, _, place = asked.partition(":")
    if what == "record":
        _record(Path(place).absolute() if place else folder())
    elif what == "serve" and not place:
        _serve()
    else:
        raise ValueError(f"TILEBOOK_TRITON is record, record:FOLDER or serve, not {asked!r}")
    if file := os.environ.get(SPACES, ""):
        from tilebook.foreign.spaces import give_spaces

        try:
            give_spaces(Path(file))
        except UsageError as wrong:  # all others are recorded or served
            warnings.warn(f"tilebook: {wrong}", RuntimeWarning, stacklevel=2)


def _record(place: Path) -> None:
    recording = start(place)
    for kind in _kinds():
        kind.run = noted_by(recording, kind.run)


@contextlib.contextmanager
def noting(recording: Recording) -> Iterator[None]:
    """Inside the block calls of autotuned kernels are recorded."""
    runs = {kind: kind.run for kind in _kinds()}
    for kind, run in runs.items():
        kind.run = noted_by(recording, run)
    try:
        yield
    finally:
        for kind, run in runs.items():
            kind.run = run


def _kinds() -> tuple[Any, ...]:
    """What runs kernels by configs, each in a way of its own."""
    from triton.runtime.autotuner import Autotuner

    from tilebook.foreign.given import Given

    return Autotuner, Given


def noted_by(recording: Recording, run: Any) -> Any:
    """`Autotuner.run` that tells the recording of every call."""

    @functools.wraps(run)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = getattr(self, "configs_timings", None)
        done = run(self, *args, **kwargs)
        if len(self.configs) > 1:
            recording.note(self, args, kwargs, getattr(self, "configs_timings", None) is not before)
        return done

    return noting


def _serve() -> None:
    from triton.runtime.autotuner import Autotuner

    from tilebook.foreign.serving import FAILURES, Served, under_way

    descriptors()
    init, run = Autotuner.__init__, Autotuner.run

    @functools.wraps(init)
    def serving(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(getattr(self, "cache", None)) is dict:
            self.cache = Served(self, self.cache)

    @functools.wraps(run)
    def running(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self.cache) is not Served:
            return run(self, *args, **kwargs)
        under_way.call = self, args, kwargs
        try:
            return run(self, *args, **kwargs)
        except FAILURES:
            if not self.cache.withdraw():
                raise
        finally:
            under_way.call = None  # or it would keep the call's tensors
        return run(self, *args, **kwargs)

    Autotuner.__init__, Autotuner.run = serving, running
