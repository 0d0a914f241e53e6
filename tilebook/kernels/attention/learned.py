"""A bias that learns, by PyTorch's memory-efficient kernels, without looking for rows that it hides altogether.

Of such a row their forward pass makes 0, and of its log-sum-exp, which is -inf, their backward pass makes NaN, in the
gradients of all columns. With +inf in its place all that the row has to do with anything is 0. To find such rows in the
bias would be to read and write it once more, and its gradient. `native/learned.cpp` does the same without Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilebook.frames import as_it_is
from tilebook.layout import aligned

_EFFICIENT = 2  # of `torch.nn.attention.SDPBackend`
_forward: Any = torch.ops.aten._scaled_dot_product_efficient_attention.default
_backward: Any = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
_chosen: Any = torch.ops.aten._fused_sdp_choice.default


def efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float | None) -> bool:
    """Would PyTorch's own call run these kernels, here and now, and is nobody to see which ops it makes?"""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or type(bias) not in (torch.Tensor, torch.nn.Parameter):
        return False
    same = q.shape[:2] == k.shape[:2] and torch.is_grad_enabled()
    return same and _chosen(q, k, v, bias, 0.0, False, scale=scale) == _EFFICIENT  # type: ignore[no-any-return]


class _Loaded(torch.autograd.Function):
    @staticmethod
    @as_it_is
    def forward(  # type: ignore[override]
        ctx: Any, bias: torch.Tensor, make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        return make()

    @staticmethod
    @as_it_is
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


def loaded(bias: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` copies of a bias for kernels to load, with a gradient for each of its numbers.

    Numbers that are one in memory have their own gradients all the same: autograd adds up those of what was expanded.
    """
    found: torch.Tensor = _Loaded.apply(bias, make)  # type: ignore[no-untyped-call]
    return found


class _Learned(torch.autograd.Function):
    @staticmethod
    @as_it_is
    def forward(  # type: ignore[override]
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        o, *rest = _forward(q, k, v, bias, True, 0.0, False, scale=scale)
        ctx.save_for_backward(q, k, v, bias, o, *rest)
        ctx.scale = scale
        return o  # type: ignore[no-any-return]

    @staticmethod
    @as_it_is
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        # Where autograd records this, PyTorch's op refuses to be differentiated, whatever it is that came.
        q, k, v, bias, o, lse, *seed = ctx.saved_tensors
        known = lse.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=torch.inf)  # one kernel, which `where` is not
        wanted = list(ctx.needs_input_grad[:4])
        do = aligned(do) if torch._C._has_storage(do) else do.contiguous()  # a batch of gradients has no address
        found = _backward(do, q, k, v, bias, o, known, *seed, 0.0, wanted, False, scale=ctx.scale)
        return *(each if wants else None for each, wants in zip(found, wanted, strict=True)), None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """o (B, H, Sq, D) of q (B, H, Sq, D), k and v (B, H, Sk, D) and a bias (B, H, Sq, Sk), perhaps expanded, that
    lies as PyTorch's kernels load it."""
    found: torch.Tensor = _Learned.apply(q, k, v, bias, scale)  # type: ignore[no-untyped-call]
    return found
