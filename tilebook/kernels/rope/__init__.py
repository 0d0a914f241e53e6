"""Rotary position embedding (Su et al., 2021): pairs of each head's numbers, turned by angles of the position."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from tilebook.call import recorded, way
from tilebook.kernels.rope.check import check
from tilebook.kernels.rope.entry import ROPE, addressed, registered
from tilebook.kernels.rope.pytorch import plain
from tilebook.left import ORDINARY, again, gated, recall
from tilebook.traced import ahead, described

__all__ = ["apply_rope"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@gated("apply_rope")
def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k after y = x · cos + turned(x) · sin, turned((a, b)) = (−b, a) (Su et al., 2021, eq. 34), in fp32 inside.

    Args:
        q: (B, H, S, D), floating point; any strides, fastest where the last axis is contiguous.
        k: (B, Hkv, S, D), likewise.
        cos: (S, R), (1, S, R) or (B, S, R), R ≤ D and even, in the dtype of q or in fp32: the cosine for each of the
            first R numbers of a head. The others pass unchanged.
        sin: as cos.
        interleaved: pairs are numbers 2i and 2i + 1, as GPT-J has them; otherwise i and i + R / 2, as Llama has them.
            cos and sin hold the angle of a pair at both of its places.

    Returns:
        Both in the dtype of q and k, and laid out in memory as those are.

    One kernel of ours rotates both for fp16, bf16 and fp32 on a GPU where a verdict has it ahead; under
    `torch.compile`, ahead of its own code. All else runs as plain PyTorch, in the order of operations of transformers'
    `apply_rotary_pos_emb`. Differentiable in q and k, for which cos and sin alone are kept; where cos or sin want
    gradients PyTorch's own functions run.

    Raises:
        ValueError: shapes or devices that do not go together, an odd R or one above D, or tensors that are not floating
            point.
    """
    given = q, k, cos, sin
    if has_torch_function(given):
        found: tuple[torch.Tensor, torch.Tensor] = handle_torch_function(
            apply_rope, given, *given, interleaved=interleaved
        )
        return found
    options = (bool(interleaved),)
    own = None
    if all(type(each) in ORDINARY for each in given):
        near = "rope", q.shape, k.shape, cos.shape, options
        if again(near, *given):
            return plain(given, options)
        own = near, q.stride(), k.stride(), sin.shape, *[each.dtype for each in given]
        if recall(own, near, *given):
            return plain(given, options)
    route = way(*given)
    if route == "pytorch" or torch.compiler.is_compiling() or not _takes(*given):
        check(*given)
        if route == "op" and _takes(*given) and _ahead(given, options):
            return _both(ROPE.through(addressed(given), options))
        return plain(given, options)
    outputs = ROPE.serve(
        route, registered()[0], addressed(given), options, lambda: check(*given), own=own, size=q.numel()
    )  # whatever its size: PyTorch starts ten kernels, which costs the host most
    return plain(given, options) if outputs is None else _both(outputs)


def _both(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = outputs
    return first, second


def _takes(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Is it a call of dtypes that our kernels have, with something to rotate and no gradient of the angles?"""
    if q.ndim != 4 or q.dtype not in _DTYPES or k.dtype != q.dtype or recorded((cos, sin)):
        return False
    angles = cos.dtype == sin.dtype and cos.dtype in (q.dtype, torch.float32)
    return angles and q.numel() > 0 and k.numel() > 0


def _ahead(given: tuple[Any, ...], options: tuple[bool]) -> bool:
    """Are our kernels ahead of what its compiler makes of a program that is being traced?"""
    call = described(*given, *options)
    names = ("rope_fwd", "rope_bwd") if recorded(given) else ("rope_fwd",)
    return call is not None and ahead("rope", names, call, given[0].device, flat=False)
