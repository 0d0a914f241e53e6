"""What PyTorch calls at the end of `import torch`: turns tilebook on where `TILEBOOK` asks for it, and only there.

`TILEBOOK_TRITON` asks for the kernels of others, see `tilebook.foreign`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from tilebook.variables import ASKED, PROFILED, TRITON, value

_PATCH = "patch"


def load() -> None:
    """The entry point of the group `torch.backends`. Whatever goes wrong here must not break `import torch`.

    `torch.nn.attention.activate_flash_attention_impl("tilebook")`, from PyTorch 2.11 on, turns it on as well.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl

        register_flash_attention_impl("tilebook", register_fn=_activate)
    except Exception:  # an older PyTorch has no such register
        pass
    if os.environ.get(TRITON, "").strip() or os.environ.get(PROFILED, "") or value(ASKED):
        _guarded("not turned on", _asked)


def _asked() -> None:
    """What the environment asks for, or once a module of ours has been imported of which `import torch` is a line."""
    from tilebook.imported import after_import, importing

    ours = next((name for name in list(sys.modules) if name.startswith("tilebook.") and importing(name)), "")
    if ours:
        after_import(ours, _asked, failed=True)
        return
    if os.environ.get(TRITON, "").strip():
        _guarded("kernels of others are neither recorded nor served", _others)
    if os.environ.get(PROFILED, ""):
        _guarded("not profiled", _profile)
    asked = value(ASKED)
    if asked:
        _guarded("not turned on", lambda: _enable(asked))


def _guarded(what: str, action: Callable[[], None]) -> None:
    """Whatever goes wrong is a warning."""
    try:
        action()
    except Exception as broken:
        import warnings

        warnings.warn(f"tilebook: {what}: {type(broken).__name__}: {broken}", RuntimeWarning, stacklevel=3)


def _enable(asked: str) -> None:
    if asked not in ("yes", _PATCH):
        raise ValueError(f"{ASKED} is 1 or {_PATCH}, or 0, not {asked!r}")
    from tilebook.enabling import enable

    enable(patch=asked == _PATCH)


def _others() -> None:
    from tilebook.foreign.wrap import install

    install(os.environ[TRITON].strip())


def _profile() -> None:
    from tilebook.profiling import begin

    begin(os.environ[PROFILED])


def _activate() -> Any:
    """A block of `tilebook.enabled()` that ends with the handle's `remove`."""
    from tilebook.enabling import Handle

    return Handle()
