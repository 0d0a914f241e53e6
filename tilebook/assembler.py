"""Which ptxas compiles a kernel of ours that nobody has verified.

ptxas 12.8, which Triton 3.6 brings along, makes wrong code of some of Hopper's products (wgmma): what tells them where
in shared memory their factors lie is read from registers that nothing has set, or that hold something else by then. So
numbers are wrong, or the GPU's context ends, with configs that nothing distinguishes from others. ptxas 12.9, which the
same Triton has for Blackwell, does not. A verdict's config was verified as 12.8 compiles it, and stays that code; every
other config is compiled by the newer of the two.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_SOUND = (12, 9)
_HOPPER = 90
_OPTIONS = {"ptx_options": "-O3"}
"""What ptxas does anyway; but Triton keeps code by its options, and so this code apart from the other's."""


class _Thread(threading.local):
    unverified = False


_thread = _Thread()
_lock = threading.Lock()
_using = 0


@contextmanager
def unverified() -> Iterator[None]:
    """Inside the block, what this thread starts has been verified by nobody."""
    before, _thread.unverified = _thread.unverified, True
    try:
        yield
    finally:
        _thread.unverified = before


def wanted() -> bool:
    """Is a kernel that this thread starts now to be compiled by another ptxas than Triton's own?"""
    return _thread.unverified and _newer() is not None and _on_hopper()


@contextmanager
def newer() -> Iterator[Mapping[str, Any]]:
    """Inside the block, Triton compiles by that one, in all threads; gives the options of launches in it."""
    from triton import knobs

    global _using
    with _lock:
        _using += 1
        vars(knobs.nvidia)["ptxas"] = _newer()  # and no setting of the environment's, which a child would inherit
    try:
        yield _OPTIONS
    finally:
        with _lock:
            _using -= 1
            if not _using:
                vars(knobs.nvidia).pop("ptxas", None)


@functools.cache
def _newer() -> str | None:
    """Where the ptxas is that Triton has for Blackwell, if its other is not sound and nobody has chosen one."""
    from triton import knobs

    nvidia = knobs.nvidia
    if "TRITON_PTXAS_PATH" in os.environ or "ptxas" in vars(nvidia) or not hasattr(nvidia, "ptxas_blackwell"):
        return None
    try:
        usual, other = nvidia.ptxas, nvidia.ptxas_blackwell
    except RuntimeError:  # neither is there: Triton will say so
        return None
    return str(other.path) if _version(usual) < _SOUND <= _version(other) else None


def _version(tool: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in str(tool.version).split("."))


def _on_hopper() -> bool:
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        return False
    target = driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch == _HOPPER)
