"""What a program has asked of PyTorch about kernels that do not repeat their bits."""

from __future__ import annotations

import torch


def only_warns() -> bool:
    """Is it only to be warned of them? PyTorch's own kernels tell of themselves then, and run all the same."""
    return torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
