"""Public functions of ours, answered in C++ where a call like this one is known to be PyTorch's to serve (`gates.cpp`).

What `tilebook.left` finds out about a kind of call is told to the extension, which then makes PyTorch's call without
Python. The functions stay what they are; where there is no extension they are called as ever.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tilebook import dispatch, native

__all__ = ["Gates", "close", "open_for", "put"]

SUPPORTED = sys.version_info >= (3, 12)
"""Does the interpreter call a function by its entry, also from Python? Python 3.11 does from C alone."""


class Gates:
    """The gates of one dispatch: made once something is known, and told when that is no longer so."""

    def __init__(self, here: dispatch.Dispatch) -> None:
        self._here = here
        self._lock = threading.Lock()
        self._extension: Any = None
        self._closed = False

    def open(self, functions: Iterable[tuple[Callable[..., Any], str]]) -> Callable[..., Any] | None:
        """Opens them for functions and the names of their forms. What settles kinds of calls; None where none is made.

        Where the extension is not built it is, in the background, for the programs to come.
        """
        with self._lock:
            if self._closed:
                return None
            if self._extension is None:
                extension = native._serving.extension()
                if extension is None:
                    native.begin()
                    return None
                self._extension = extension
                self._here.watchers.append(self.told)
                extension.gates_ask(self._here.forced is not None)
                extension.open(torch.compiler, torch.nn.Parameter)
            for function, form in functions:
                self._extension.gate(function, form)
            return self._extension.settle  # type: ignore[no-any-return]

    def put(self, function: Callable[..., Any], form: str) -> None:
        """One more function, if they are open."""
        if self._extension is not None:
            self._extension.gate(function, form)

    def close(self) -> None:
        """From now on every call is the functions' own again, also where something is known later."""
        with self._lock:
            self._closed = True
            if self._extension is not None:
                self._count(self._extension.forget())
                self._extension.close()
                if self.told in self._here.watchers:
                    self._here.watchers.remove(self.told)

    def told(self, event: str) -> None:
        """Dispatch has forgotten what it read, is being forced, is no longer, or wants its calls counted."""
        if event == "counted":
            self._count(self._extension.gates_counted())
            return
        self._extension.gates_ask(self._here.forced is not None)
        self._count(self._extension.forget())

    @staticmethod
    def _count(found: Iterable[tuple[Any, int]]) -> None:
        for choice, calls in found:
            if choice is not None:
                choice.calls += calls


_gates = Gates(dispatch.here)
atexit.register(_gates.close)


def open_for(functions: Iterable[tuple[Callable[..., Any], str]]) -> Callable[..., Any] | None:
    """See `Gates.open`, of the program's own dispatch."""
    return _gates.open(functions) if SUPPORTED else None


put, close = _gates.put, _gates.close
