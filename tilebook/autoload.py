"""What PyTorch calls at the end of `import torch`: turns tilebook on where `TILEBOOK` asks for it, and only there."""

from __future__ import annotations

import os
from typing import Any

from tilebook.variables import ASKED, PROFILED, value

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
    if folder := os.environ.get(PROFILED, ""):
        try:
            from tilebook.profiling import begin

            begin(folder)
        except Exception as broken:
            _warn("not profiled", broken)
    asked = value(ASKED)
    if asked not in ("yes", _PATCH):
        return
    try:
        from tilebook.enabling import enable

        enable(patch=asked == _PATCH)
    except Exception as broken:
        _warn("not turned on", broken)


def _warn(what: str, broken: Exception) -> None:
    import warnings

    warnings.warn(f"tilebook: {what}: {type(broken).__name__}: {broken}", RuntimeWarning, stacklevel=3)


def _activate() -> Any:
    """A block of `tilebook.enabled()` that ends with the handle's `remove`."""
    from tilebook.enabling import Handle

    return Handle()
