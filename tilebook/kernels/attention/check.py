"""What a call of `attention` must satisfy, and the form it asks for."""

from __future__ import annotations

import math
import operator
from typing import Any, Literal

import torch

from tilebook.call import constant
from tilebook.kernels.attention.form import Form, form, simplest

Causal = bool | Literal["top_left", "bottom_right"]


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, slopes: torch.Tensor | None
) -> None:
    """Raises ValueError for tensors that do not go together."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes tensors of shape (batch, heads, sequence, head dimension); {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; {shapes}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q, k and v must have the same batch size; {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must have the same head dimension; {shapes}")
    if (q.shape[1] % k.shape[1]) if k.shape[1] else q.shape[1]:
        raise ValueError(f"the heads of q must be a multiple of the heads of k and v; {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")
    for name, each in (("bias or attn_mask", bias), ("alibi_slopes", slopes)):
        if each is not None and each.device != q.device:
            raise ValueError(f"{name} must be on the device of q; got {each.device} and {q.device}")
    scores = (*q.shape[:3], k.shape[2])
    if bias is not None and (bias.ndim > 4 or any(n not in (1, m) for n, m in zip(bias.shape[::-1], scores[::-1]))):  # noqa: B905
        raise ValueError(f"bias and attn_mask must broadcast to {scores}; got {tuple(bias.shape)}")
    if slopes is not None and (slopes.dtype != torch.float32 or slopes.shape not in (q.shape[1:2], q.shape[:2])):
        kind = f"{slopes.dtype} {tuple(slopes.shape)}"
        raise ValueError(
            f"alibi_slopes must be fp32 of shape {tuple(q.shape[1:2])} or {tuple(q.shape[:2])}; got {kind}"
        )


def numbers(scale: Any, softcap: float = 0.0, dropout_p: float = 0.0) -> float | None:
    """The scale as a float. Raises TypeError or ValueError for numbers that are none, or out of range."""
    constant("scale", scale)
    constant("softcap", softcap)
    constant("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1); got {dropout_p}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must not be negative, infinite or NaN; got {softcap}")
    return None if scale is None else float(scale)


def multiplier(scale: Any, q: torch.Tensor) -> float:
    """What scores are multiplied by, as a float: kernels take no other type of number."""
    if scale is not None:
        return float(scale)
    return float(q.shape[-1] ** -0.5) if q.ndim and q.shape[-1] else 0.0


def sides(window: Any) -> tuple[int, int]:
    """Columns to the left and to the right of the diagonal that a window names, -1 without limit."""
    if window is None:
        return -1, -1
    try:
        left, right = (-1 if side is None else operator.index(side) for side in window)
    except (TypeError, ValueError):
        left = right = -2
    if left < -1 or right < -1:
        raise ValueError(f"window must be two numbers of columns, -1 or None for no limit; got {window!r}")
    return left, right


def checked_form(
    q: torch.Tensor, k: torch.Tensor, causal: Causal, window: Any, bias: torch.Tensor | None, **rest: Any
) -> Form:
    """The form of a call, in its simplest terms."""
    if causal not in (False, True, "top_left", "bottom_right"):
        raise ValueError(f"causal must be a bool, 'top_left' or 'bottom_right', not {causal!r}")
    left, right = sides(window)
    # Without a causal mask there is no alignment in use: FlashAttention's.
    corner = causal == "bottom_right" or not causal
    right = 0 if causal else right
    limited = left >= 0 or right >= 0
    if not limited:
        corner = False
    elif not torch.compiler.is_compiling() and q.ndim == k.ndim == 4 and (corner or left >= 0 or right > 0):
        # A trace may not know the lengths; the op simplifies when it runs.
        left, right, corner = simplest(q.shape[2], k.shape[2], left, right, corner)
    kind: Any = ""
    if bias is not None:
        kind = "mask" if bias.dtype == torch.bool else "dbias" if bias.requires_grad else "bias"
    return form(left=left, right=right, bottom_right=corner, bias=kind, **rest)


def together(bias: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    """One tensor that does what a bias and a mask do. Raises ValueError for dtypes that neither may have."""
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias must be floating point, not {bias.dtype}")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask must be boolean or floating point, not {mask.dtype}")
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
