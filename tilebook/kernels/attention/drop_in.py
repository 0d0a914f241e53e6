"""`torch.nn.functional.scaled_dot_product_attention`, with our kernels where they can serve it."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import has_torch_function

from tilebook import dispatch
from tilebook.call import way
from tilebook.kernels.attention.pytorch import scaled_dot_product_attention as plain_sdpa

_Tensor = torch.Tensor
_here = dispatch.here
_compiling, _capturing = torch.compiler.is_compiling, torch.cuda.is_current_stream_capturing
_batched: Any = torch._C._functorch.peek_interpreter_stack

_HOST_BOUND, _HOST_BOUND_TRAINING = 1 << 27, 3 << 27
"""Elements of q times keys up to which the GPU is done with an eager call before the host has made the next.

About 15 µs of an H200 forward, 100 µs forward and backward: PyTorch's function costs the host 20 µs and 115 µs.
"""


def bounded_by_the_host(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Is this an eager call so small that it takes as long as the host takes, which PyTorch's function costs least?

    Only for tensors of one shape, whose arguments need no other check than PyTorch's. A graph that is captured is
    replayed without the host.
    """
    if (
        not type(q) is type(k) is type(v) is _Tensor
        or _compiling()
        or _here.forced is not None
        or _batched() is not None
    ):
        return False
    if not q.get_device() == k.get_device() == v.get_device() >= 0 or not q.dtype == k.dtype == v.dtype:
        return False
    shape = q.shape
    if len(shape) != 4 or shape != k.shape or shape != v.shape:
        return False
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not 0 < q.numel() * shape[2] <= (_HOST_BOUND_TRAINING if training else _HOST_BOUND):
        return False
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15:  # cuDNN does not look before it loads
        return False
    return not (_capturing() or torch.are_deterministic_algorithms_enabled())


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Drop-in for `torch.nn.functional.scaled_dot_product_attention`: same arguments, same meaning, same errors.

    Args:
        query: (…, H, L, E), with any number of batch dimensions or none.
        key: (…, H, S, E); fewer heads with `enable_gqa`.
        value: (…, H, S, Ev).
        attn_mask: boolean, True where a pair takes part, or added to the scores; broadcasts to (…, H, L, S).
        dropout_p: probability of dropping a weight; applied always, as in PyTorch, whatever a module's mode.
        is_causal: row i sees columns 0 … i, aligned at the top left.
        scale: what the scores are multiplied by; E^-0.5 if None.
        enable_gqa: key and value have fewer heads, each for several of query's in a row.

    Returns:
        (…, H, L, Ev) in the dtype of query. A row that sees nothing is 0, and so are its gradients.

    Raises:
        RuntimeError, ValueError: what PyTorch does not take either.

    What `tilebook.attention` has no kernel for (E ≠ Ev, batch dimensions to broadcast, nested tensors) is PyTorch's,
    and so is what overrides PyTorch's function: tensor subclasses, modes, `torch.nn.attention.bias.CausalBias`.
    """
    if attn_mask is None and not dropout_p and (scale is None or scale > 0) and bounded_by_the_host(query, key, value):
        return plain_sdpa(query, key, value, None, 0.0, is_causal, scale=scale)  # type: ignore[no-any-return]
    overridden = has_torch_function((query, key, value, attn_mask))
    if overridden or not _fits(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
        if not overridden:
            _refuse(query, key, value, dropout_p)
        given: Any = {"enable_gqa": True} if enable_gqa else {}
        return plain_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **given)  # type: ignore[no-any-return]
    from tilebook.kernels.attention import attention  # the package imports this module

    lead = query.shape[:-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]) if x.ndim > 2 else x[None, None] for x in (query, key, value))
    mask = attn_mask
    if mask is not None and mask.ndim > 3 and query.ndim > 4:
        mask = mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)
    o: torch.Tensor = attention(q, k, v, causal=is_causal, scale=scale, attn_mask=mask, dropout_p=dropout_p)
    return o.reshape(query.shape)


def _fits(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
) -> bool:
    """Is this a call that `attention` takes, and not PyTorch's own to serve or to refuse?"""
    if not all(isinstance(x, torch.Tensor) and not x.is_nested for x in (query, key, value)):
        return False
    if way(query, key, value, optional=(mask,)) == "pytorch":
        return False
    if not (2 <= query.ndim == key.ndim == value.ndim) or not (query.numel() and key.numel()):
        return False
    heads = query.ndim < 3 or query.shape[-3] == key.shape[-3] or (enable_gqa and query.shape[-3] % key.shape[-3] == 0)
    return (
        query.shape[:-3] == key.shape[:-3]
        and key.shape == value.shape
        and query.shape[-1] == key.shape[-1]
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and heads
        and (scale is None or isinstance(scale, int | float))
        and 0 <= dropout_p < 1
        and not (is_causal and mask is not None)
        and (mask is None or _takes(mask, query, key))
    )


def _refuse(query: Any, key: Any, value: Any, dropout_p: float) -> None:
    """Raises RuntimeError, as PyTorch does, for what cuDNN refuses: asked again, its path ends the process."""
    tensors = query, key, value
    if not all(isinstance(x, torch.Tensor) and x.is_cuda and not x.is_nested and x.ndim > 1 for x in tensors):
        return
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise RuntimeError(f"query, key and value do not go together: {shapes}")
    if not 0 <= dropout_p < 1:
        raise RuntimeError(f"dropout_p must lie in [0, 1), not {dropout_p}")


def _takes(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Does PyTorch take this mask beside this query?"""
    known = mask.dtype in (torch.bool, torch.float32, query.dtype)
    scores = (*query.shape[:-1], key.shape[-2])
    broadcasts = mask.ndim <= len(scores) and all(
        n in (1, m) for n, m in zip(mask.shape[::-1], scores[::-1], strict=False)
    )
    return known and broadcasts and mask.device == query.device
