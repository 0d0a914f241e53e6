"""What is known of tensors beside their numbers, for as long as they live and nobody writes to them.

A note is kept beside the tensor, not on it: whoever copies, sends or saves a tensor copies, sends and saves no note.
"""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

import torch

Note = TypeVar("Note")


def state(x: torch.Tensor) -> tuple[int, int]:
    """What is another after x has been written to, or been given other memory.

    Not after writes through `x.data`, NumPy or DLPack, which PyTorch does not count either.
    """
    placed = type(x) is torch.Tensor and torch._C._has_storage(x)
    return x._version, x.data_ptr() if placed else 0


class Notes(Generic[Note]):
    """Notes of one kind, by tensor.

    held: `id` of a tensor → (the tensor, its `state` when it was noted, the note). `native/notes.cpp` looks whether
          there is one; only `of` tells whether it still holds.
    """

    def __init__(self) -> None:
        self.held: dict[int, tuple[weakref.ref[torch.Tensor], tuple[int, int], Note]] = {}

    def put(self, x: torch.Tensor, note: Note) -> None:
        """Notes it, unless it is an inference tensor: nobody could tell whether that has been written to."""
        if x.is_inference():
            return
        key, held = id(x), self.held

        def gone(there: weakref.ref[torch.Tensor]) -> None:
            found = held.get(key)
            if found is not None and found[0] is there:
                held.pop(key, None)

        held[key] = weakref.ref(x, gone), state(x), note

    def of(self, x: torch.Tensor) -> Note | None:
        """The note on a tensor that nobody has written to since; a view or a copy has none."""
        found = self.held.get(id(x))
        if found is None or found[0]() is not x:
            return None
        return found[2] if not x.is_inference() and state(x) == found[1] else None

    def drop(self, x: torch.Tensor) -> None:
        """Takes its note away."""
        self.held.pop(id(x), None)
