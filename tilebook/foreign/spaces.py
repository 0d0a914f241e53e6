"""`tilebook.give_space`: a space from outside for a kernel that has no autotuner, by whomever it is launched."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilebook.errors import UsageError
from tilebook.foreign.autotune import combined
from tilebook.foreign.given import Given
from tilebook.foreign.kernel import autotuner, found
from tilebook.foreign.ops import RECORDED
from tilebook.foreign.spacefile import read
from tilebook.imported import after_import, importing


def give_space(
    kernel: Any,
    space: Mapping[str, Sequence[Any]],
    *,
    key: Sequence[str] = (),
    grid: str | Sequence[str | int] | None = None,
) -> None:
    """Gives a `@triton.jit` kernel without an autotuner a space, without a change to the code that launches it.

    From then on its launches are recorded and tuned as those of an autotuned kernel. A call that a verdict covers runs
    the verdict's config in the place of what the program passes for the space's axes. Any other call runs as ever.

    Args:
        kernel: the kernel, or "package.module:kernel", whose module may be imported later.
        space: axes such as {"BLOCK": (64, 128), "num_warps": (4, 8)}: constexprs of the kernel, and num_warps,
            num_stages, num_ctas. Every combination is a config. What the program passes must be among the values.
        key: the arguments whose values tell problems apart, as in `triton.autotune`. Constexprs always do, and so does
            what the program passes for the axes.
        grid: how the grid follows a constexpr that is an axis. "same": it does not depend on them. Else its
            dimensions, as texts of arithmetic on the kernel's arguments: ["cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)"]. It
            must be the program's own where that passes its own values. By default a grid follows where it is a
            function that asks for a constexpr of the launch; any other leaves these as the program passes them.

    Raises:
        UsageError: the kernel has an autotuner of its own or is none, or it has not the axes, the key or the arguments
            of the grid; a space of none or of more than 10,000 configs. Where the module is imported later, this is a
            warning then.
    """
    if not isinstance(kernel, str):
        _give(kernel, space, key, grid)
        return
    module, _, name = kernel.partition(":")
    if not name:
        raise UsageError(f"{kernel!r} is not package.module:kernel")

    def give() -> None:
        _give(found(module, name), space, key, grid)

    if module in sys.modules and not importing(module):
        give()
    else:
        after_import(module, give)


def _give(kernel: Any, space: Mapping[str, Sequence[Any]], key: Sequence[str], grid: Any) -> None:
    from triton.runtime.jit import KernelInterface

    if not isinstance(kernel, KernelInterface):
        raise UsageError(f"{kernel!r} is no Triton kernel")
    vars(kernel).pop("run", None)  # another space that it had
    if autotuner(kernel) is not None:
        raise UsageError(f"{kernel!r} has an autotuner of its own")
    if not space:
        raise UsageError("a space has one axis or more")
    configs = combined(space)
    for axis, value in ((axis, value) for axis, values in space.items() for value in values):
        if not isinstance(value, bool | int | str):
            raise UsageError(f"{axis}={value!r} is neither an integer, a flag nor a text")
    if not isinstance(key, Sequence):
        raise UsageError(f"a key is names of arguments, not {key!r}")
    if RECORDED not in os.environ:  # a process of a tune runs what it is told to
        kernel.run = Given(kernel, configs, key, grid).called


def give_spaces(file: Path) -> None:
    """Those of a JSON file: kernel → space, key, grid. Raises UsageError."""
    for kernel, each in read(file).items():
        give_space(kernel, each["space"], key=each.get("key", ()), grid=each.get("grid"))
