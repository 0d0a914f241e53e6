"""Windows over images: of a convolution's kernel, and of pooling."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

Problem = TypeVar("Problem", bound=Any)

PATTERN = r"k\d{1,3}x\d{1,3}s\d{1,2}x\d{1,2}p\d{1,3}x\d{1,3}"
"""How a form is written: kernel, stride, padding."""


class Form(NamedTuple):
    """Kernel, stride and padding, rows before columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def __str__(self) -> str:
        return "".join(f"{letter}{a}x{b}" for letter, (a, b) in zip("ksp", self, strict=True))

    @classmethod
    @functools.cache
    def read(cls, text: str) -> Form:
        """The form that is written so; one number and a stride of one where nothing is."""
        numbers = [int(each) for each in re.findall(r"\d+", text)] or [1, 1, 1, 1, 0, 0]
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        return cls(*pairs)

    @classmethod
    def of(cls, *numbers: Sequence[int]) -> Form:
        """Of kernel, stride and padding as PyTorch takes them, where one number stands for both axes."""
        return cls(*((each[0], each[-1]) for each in numbers))

    def made(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of places that the windows have in an image."""
        steps = zip((height, width), *self, strict=True)
        rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in steps)
        return rows, columns


def neighbours(problem: Problem) -> list[Problem]:
    """Of a problem of images: few that no block fits, and one image."""
    ragged = dataclasses.replace(problem, batch=3, height=problem.height + 1, width=problem.width + 3)
    one = dataclasses.replace(problem, batch=1)
    return [each for each in (ragged, one) if each != problem and min(each.made) > 0]
