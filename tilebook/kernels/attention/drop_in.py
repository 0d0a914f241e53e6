"""`torch.nn.functional.scaled_dot_product_attention`, with our kernels where they can serve it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilebook import dispatch


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
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

    What `tilebook.attention` has no kernel for (E ≠ Ev, batch dimensions to broadcast, nested tensors) is PyTorch's.
    """
    from tilebook.kernels.attention import attention  # the package imports this module

    options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if not _fits(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        return F.scaled_dot_product_attention(query, key, value, **options, enable_gqa=enable_gqa)
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
    enable_gqa: bool,
) -> bool:
    """Is this a call that `attention` takes, and not PyTorch's own to serve or to refuse?"""
    if not dispatch.may_serve(query) or any(x.is_nested for x in (query, key, value)):
        return False
    heads = query.ndim < 3 or query.shape[-3] == key.shape[-3] or (enable_gqa and query.shape[-3] % key.shape[-3] == 0)
    whole = mask is None or mask.dtype == torch.bool or mask.is_floating_point()
    return (
        2 <= query.ndim == key.ndim == value.ndim
        and query.shape[:-3] == key.shape[:-3]
        and key.shape == value.shape
        and query.shape[-1] == key.shape[-1]
        and query.dtype == key.dtype == value.dtype
        and heads
        and whole
        and 0 <= dropout_p < 1
        and not (is_causal and mask is not None)
        and (mask is None or (mask.ndim <= query.ndim and mask.device == query.device))
    )
