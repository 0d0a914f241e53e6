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
_MARK = "-O3"
"""What ptxas does anyway; but Triton keeps code by its options, and so this code apart from the other's."""


class _Thread(threading.local):
    unverified = False
    tool: Any = None


_thread = _Thread()


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
    """Inside the block, Triton compiles by that one what this thread starts; gives the options of launches in it.

    No knob is turned: other threads, a child that is forked meanwhile and what the user sets go on as they are.
    """
    from triton import knobs
    from triton.backends.nvidia import compiler

    _ask_here()
    compiler.get_ptxas_version(_HOPPER)  # Triton's own, which Triton asks once and notes in the key of all code
    options = "--opt-level 0" if knobs.nvidia.disable_ptxas_opt else _MARK, compiler.CUDAOptions.ptx_options
    before, _thread.tool = _thread.tool, _newer()
    try:
        with _at_once():
            yield {"ptx_options": " ".join(each for each in options if each)}
    finally:
        _thread.tool = before


@functools.cache
def _ask_here() -> None:
    """Has Triton ask this thread first which ptxas is to compile for Hopper."""
    from triton.backends.nvidia import compiler

    usual = compiler.get_ptxas

    @functools.wraps(usual)
    def get_ptxas(arch: int) -> Any:
        return usual(arch) if _thread.tool is None or arch != _HOPPER else _thread.tool

    compiler.get_ptxas = get_ptxas


@contextmanager
def _at_once() -> Iterator[None]:
    """Inside the block Triton compiles in the thread that asks, also where it was told to use a pool."""
    from triton.runtime import jit

    mode = getattr(getattr(jit, "_async_compile", None), "active_mode", None)
    if mode is None or mode.get() is None:
        yield
        return
    token = mode.set(None)
    try:
        yield
    finally:
        mode.reset(token)


def _newer() -> Any:
    """The ptxas that Triton has for Blackwell, if its other is not sound; None where the user has chosen one."""
    from triton import knobs

    chosen = vars(knobs.nvidia).get("ptxas", os.environ.get("TRITON_PTXAS_PATH"))
    return None if chosen is not None and _runs(chosen) else _shipped()


def _runs(path: str) -> bool:
    """Does Triton compile by this one? It passes over one that is not there, or that is no ptxas."""
    from triton import knobs

    try:
        return knobs.NvidiaTool.from_path(path) is not None
    except OSError:  # which is raised to whoever compiles
        return True


@functools.cache
def _shipped() -> Any:
    try:
        from triton import knobs
        from triton.backends.nvidia import compiler

        usual, other = compiler.get_ptxas(_HOPPER), knobs.nvidia.ptxas_blackwell
    except (ImportError, AttributeError, RuntimeError, OSError):  # no such Triton, or none that it can run: it says so
        return None
    return other if _version(usual) < _SOUND <= _version(other) else None


def _version(tool: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in str(tool.version).split("."))


def _on_hopper() -> bool:
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        return False
    target = driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch == _HOPPER)
