"""Attention that rotates its heads by a function of its file, on `tilebook.apply_rope`: in one model alone.

The code of a class's `forward` runs with other globals, among which the rotation is ours. So no other model is touched.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from tilebook.casting import autocast_dtype
from tilebook.kernels.rope import apply_rope
from tilebook.kernels.rope.pytorch import plain as plain_rope
from tilebook.substitution import called, calls, rebuilt
from tilebook.trial import Forward, Function, Left, alike, drawn, result, served_with

_ROTATES = "apply_rotary_pos_emb"
_ROWS, _WIDTH = 5, 8


def rotary(module: nn.Module) -> tuple[str, Function] | None:
    """What attention that rotates its heads calls from now on; None for what is none. Raises Left."""
    forward = type(module).forward
    if not _rotates(forward):
        return None
    if "forward" in module.__dict__:
        raise Left("its forward was changed already")
    if _with_ours(forward, _theirs(forward)) is None:
        raise Left("rotates heads otherwise than tilebook.apply_rope")
    return "attention with tilebook.apply_rope", Forward(_forward, module)


def _rotates(forward: Any) -> bool:
    """Does its code, whatever is wrapped around it, call a rotation by its name?"""
    return calls(forward, _ROTATES)


def _theirs(forward: Any) -> Any:
    """The rotation that the code calls now."""
    return called(forward, _ROTATES)


@functools.cache
def _with_ours(forward: Any, theirs: Any) -> Function | None:
    """A function's code with our rotation in the place of `theirs`, if they compute the same; else None."""
    ours = rotation(theirs) if callable(theirs) and _rotates(forward) else None
    return None if ours is None else rebuilt(forward, {_ROTATES: ours})


def rotation(theirs: Function) -> Function | None:
    """Ours in the place of a rotation of heads, (q, k, cos, sin) → (q, k), if they compute the same; else None."""
    widths = {}
    for width in (_WIDTH, _WIDTH // 2):
        forms = [form for form in (False, True) if _same_rotation(theirs, width, form)]
        if forms:
            widths[width] = forms[0]
    if _WIDTH not in widths or len(set(widths.values())) > 1:
        return None

    def ours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Angles in fp32 make narrower heads fp32, which autocast casts back for what comes next.
        dtypes = q.dtype == k.dtype and (cos.dtype == q.dtype or autocast_dtype(q) == q.dtype)
        parts = cos.shape[-1] == q.shape[-1] or len(widths) > 1
        parts = parts and k.shape[2] == q.shape[2] == cos.shape[-2] and cos.shape[0] in (1, q.shape[0])
        if args or kwargs or q.ndim != 4 or cos.ndim != 3 or not dtypes or not parts:
            return theirs(q, k, cos, sin, *args, **kwargs)
        return apply_rope(q, k, cos, sin, interleaved=widths[_WIDTH])

    return ours


def _same_rotation(theirs: Function, width: int, interleaved: bool) -> bool:
    """Does it rotate the first `width` numbers of heads as ours does?"""
    draw = drawn()
    q, k = (draw(2, heads, _ROWS, _WIDTH) for heads in (4, 2))
    half = draw(1, _ROWS, width // 2)
    angles = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
    tensors = q, k, angles.cos(), angles.sin()
    try:
        found = result(theirs, *tensors)
    except Left:
        return False
    both = isinstance(found, tuple) and len(found) == 2
    return both and all(map(alike, found, plain_rope(tensors, (interleaved,))))


def _forward(module: Any, /, *args: Any, **kwargs: Any) -> Any:
    forward = type(module).forward
    # A compiler fuses the rotation with what is around it.
    if not torch.compiler.is_compiling() and served_with(args, kwargs):
        forward = _with_ours(forward, _theirs(forward)) or forward
    return forward(module, *args, **kwargs)
