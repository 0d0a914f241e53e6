"""What the inputs of problems are made of: dtypes by their names, and random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

__all__ = ["DTYPES", "dtype_name", "generator", "normal"]

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name a dtype has in keys and on the command line; dtypes that no kernel knows keep PyTorch's."""
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def generator(device: torch.device | str, seed: int) -> torch.Generator | None:
    """The source of a problem's random inputs; None on the meta device, which has shapes but no numbers."""
    return None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)


def normal(
    shape: Sequence[int],
    source: torch.Generator | None,
    device: torch.device | str,
    dtype: torch.dtype,
    scale: float = 1.0,
) -> torch.Tensor:
    """Normal random numbers times `scale`; on the meta device none.

    There PyTorch would load its compiler, for seconds, to draw or to multiply, and candidates would wait for it.
    """
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    drawn = torch.randn(shape, generator=source, device=device, dtype=dtype)
    return drawn if scale == 1.0 else drawn * scale
