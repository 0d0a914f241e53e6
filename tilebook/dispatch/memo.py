"""The choices of calls made before, and what a call is known by."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tilebook.dispatch.choice import Choice
from tilebook.frames import as_it_is
from tilebook.op import Op

Key = tuple[Any, ...]


@as_it_is
def key(op: Op[Any], args: Sequence[Any]) -> Key:
    """All that a choice and its plan depend on: whose call, and what every argument is like and where it lies."""
    parts: list[Any] = [op]
    for each in args:
        if isinstance(each, torch.Tensor):
            parts += (each.shape, each.stride(), each.dtype, each.data_ptr() & 15, each.get_device())
        else:
            parts.append(each)
    return tuple(parts)


class Memo(dict[Key, Choice]):
    """Choices by their calls' keys; `of` is `get` of the key."""

    MOST = 10_000
    """A program whose shapes never repeat must not grow for ever."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._key: Callable[[Op[Any], Sequence[Any]], Key] = key
        self._moves = False

    def of(self, op: Op[Any], args: Sequence[Any]) -> Choice | None:
        """The choice of a call like one made before."""
        known = self._key(op, args)
        found = self.get(known)
        return self._moved(known, key(op, args)) if found is None and self._moves else found

    def keep(self, op: Op[Any], args: Sequence[Any], choice: Choice) -> None:
        with self._lock:
            while len(self) >= self.MOST:
                del self[next(iter(self))]
            self[self._key(op, args)] = choice

    def _moved(self, known: Key, before: Key) -> Choice | None:
        """The choice that is still kept by the key of before, from now on by the one of today."""
        with self._lock:
            if (found := self.pop(before, None)) is not None:
                self[known] = found
            return found

    def keyed_by(self, made: Callable[[Op[Any], Sequence[Any]], Key]) -> None:
        """Calls are known by other keys from now on, which tell apart what `key` does. Those that are here move."""
        self._key, self._moves = made, True
