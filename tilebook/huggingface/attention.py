"""The attention function that transformers' models call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilebook.call import way
from tilebook.casting import factor_dtype
from tilebook.dispatch import forced
from tilebook.huggingface.masks import Lengths, Structure, capturing, noted
from tilebook.kernels.attention import attention, scaled_dot_product_attention
from tilebook.kernels.attention.check import Causal
from tilebook.kernels.attention.pytorch import BOUNDS
from tilebook.kernels.varlen.packs import flattened
from tilebook.notes import Notes

NAME = "tilebook"
_REFUSED = "indices", "block_indices", "sinks"
"""Keys that a model has picked for each row, and sinks of each row, by arguments that only some functions read."""

_packs: Notes[tuple[Lengths | None]] = Notes()
"""Of positions, which all layers share: the packed sequences that begin in them, None where there is but one."""


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers' models call.

    Args:
        module: the model's attention layer; its `is_causal` counts where the argument is None.
        query: (B, H, Sq, D).
        key: (B, Hkv, Sk, D). Hkv divides H.
        value: (B, Hkv, Sk, Dv).
        attention_mask: of `attention_mask`, or any mask that `torch.nn.functional.scaled_dot_product_attention` takes.
            With a mask nothing else is hidden, whatever `is_causal` and a `sliding_window` say.
        dropout: probability of dropping a weight.
        scaling: what the scores are multiplied by; D^-0.5 if None.
        is_causal: row i sees columns 0 … i. Only without a mask and for more than one row.
        softcap: scores s become softcap · tanh(s / softcap).
        position_bias: added to the scores, broadcast to (B, H, Sq, Sk). Differentiable.
        s_aux: (H,), a score of each head that no value belongs to (attention sinks). Differentiable.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, as FlashAttention takes them. Only
            where all four are given, or else where `position_ids` of a batch of one row begin anew.
        deterministic: only implementations that give the same bits every time.

    Returns:
        (o, None) with o (B, Sq, H, Dv), contiguous. There are no weights to return.

    Raises:
        ValueError: the model picks keys for each row (`indices`, `block_indices`), or gives each row `sinks`.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"'{NAME}' attention takes no {name}: this model needs another attn_implementation")
    if kwargs.get("output_attentions"):
        _warn_of_weights()
    mask, bias = attention_mask, position_bias
    lengths = _given(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    n_q, n_k = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # One row is the last one of a cache, which sees everything. Explicit branches: a trace has symbols for sizes.
    if causal and (mask is not None or n_q == 1):
        causal = False
    if causal and lengths is None and n_k > n_q:  # the rest of a static cache, which is empty yet
        key, value = key[:, :, :n_q], value[:, :, :n_q]
        bias = None if bias is None else bias[..., :n_q]
    call = _Call(scaling, float(softcap or 0.0), float(dropout), bool(deterministic))
    if lengths is None:
        lengths = _restarted(kwargs.get("position_ids"), mask, query, key)
    found = _structure(mask, causal, query, key, value)
    if found is not None and lengths is None and found.packs is not None:
        lengths = found.lengths()
    if found is not None and lengths is None and s_aux is None:
        o = call(query, key, value, causal=found.causal, window=found.window, mask=found.keys, bias=bias)
    elif found is not None and lengths is not None and found.keys is None and call.packs(query, value, bias, s_aux):
        o = call.packed(query, key, value, found, lengths)
    else:
        if lengths is not None:
            mask, causal = _and(mask, _blocks(query, key, lengths, causal)), False
        if s_aux is not None:
            if causal:
                mask, causal = query.new_ones((n_q, n_q), dtype=torch.bool).tril(), False
            key, value, mask, bias = _with_sinks(key, value, mask, bias, s_aux)
        o = call(query, key, value, causal=causal, mask=_hidden(mask), bias=bias)
    return o.transpose(1, 2).contiguous(), None


def _given(ends_q: Tensor | None, ends_k: Tensor | None, max_q: Any, max_k: Any) -> Lengths | None:
    """The packed sequences that a program has described, if it has."""
    if ends_q is None or ends_k is None or max_q is None or max_k is None:
        return None
    return Lengths(ends_q.to(torch.int32), ends_k.to(torch.int32), int(max_q), int(max_k))


def _restarted(positions: Any, mask: Tensor | None, query: Tensor, key: Tensor) -> Lengths | None:
    """The packed sequences of one row whose positions begin anew, as FlashAttention's integration finds them.

    Transformers' own masks tell packs apart only where there is no cache, and a model in training may have one. Where a
    mask may say more than causality and a window it is left as it is, and so is all that is traced.
    """
    n = query.shape[2]
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not isinstance(positions, Tensor):
        return None
    if positions.is_inference():
        return None
    if positions.shape != (1, n) or query.shape[0] != 1 or key.shape[2] != n or n < 2:
        return None
    if mask is not None and ((found := noted(mask)) is None or found.keys is not None or found.packs is not None):
        return None
    kept = _packs.of(positions)
    if kept is None:
        if capturing(positions):
            return None
        packs = (positions == positions.min()).cumsum(1)
        several = bool((packs[0, 0] == 1) & (packs[0, -1] > 1))
        kept = (Structure(False, None, None, packs).lengths() if several else None,)
        _packs.put(positions, kept)
    return kept[0]


def _structure(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor, value: Tensor) -> Structure | None:
    """What to compute instead of the mask, where our kernels take it; None where the mask itself serves.

    Who serves is chosen here. On the CPU PyTorch has a fused kernel for masks and none for structures, and in fp32 the
    same holds on a GPU; what is traced has masks without a note.
    """
    if mask is None:
        return Structure(causal, None, None, None)
    found = None if torch.compiler.is_compiling() else noted(mask)
    if found is None or mask.shape[-2:] != (query.shape[2], key.shape[2]):
        return None
    return found if _served(query, key, value, found) else None


def _served(query: Tensor, key: Tensor, value: Tensor, found: Structure) -> bool:
    """Have we kernels for windows, padded keys and packs of such tensors?

    A triangle of padded keys PyTorch has with a mask: that is less for the host, and so for all where sizes are small.
    """
    triangle = found.causal and found.keys is not None and found.window is None and found.packs is None
    if triangle and not forced() and query.numel() * key.shape[2] <= BOUNDS[torch.is_grad_enabled()]:
        return False
    width, dtype = query.shape[-1], factor_dtype(query)
    if value.shape[-1] != width or width % 8 or not 16 <= width <= 256 or dtype not in (torch.bfloat16, torch.float16):
        return False
    return way(query, key, value) != "pytorch"


@dataclass  # one that is frozen, PyTorch 2.11 does not trace
class _Call:
    """What a call asks for beside its tensors, and how they go together."""

    scale: float | None
    softcap: float
    dropout: float
    deterministic: bool

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: Causal,
        mask: Tensor | None,
        bias: Tensor | None,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """o (B, H, Sq, Dv)"""
        width, v_width = q.shape[-1], v.shape[-1]
        scale, some = self.scale, bias is not None or window is not None or self.softcap or self.deterministic
        if not (some or (causal and mask is not None) or causal == "bottom_right"):  # PyTorch's form, at the least cost
            grouped: Any = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
            return scaled_dot_product_attention(q, k, v, mask, self.dropout, bool(causal), scale=scale, **grouped)
        if width != v_width:
            scale = width**-0.5 if scale is None else scale
            q, k, v = (F.pad(x, (0, max(width, v_width) - x.shape[-1])) for x in (q, k, v))
        o = attention(
            q, k, v, causal=causal, window=window, scale=scale, softcap=self.softcap, bias=bias, attn_mask=mask,
            dropout_p=self.dropout, deterministic=self.deterministic,
        )  # fmt: skip
        return o[..., :v_width] if width != v_width else o

    def packs(self, q: Tensor, v: Tensor, bias: Tensor | None, s_aux: Tensor | None) -> bool:
        """Is it a call that `attention_varlen` takes?"""
        return bias is None and s_aux is None and not self.dropout and q.shape[-1] == v.shape[-1]

    def packed(self, q: Tensor, k: Tensor, v: Tensor, structure: Structure, lengths: Lengths) -> Tensor:
        """The same of packed sequences, by their ends in the flattened batch."""
        return flattened(
            q, k, v, structure, lengths, scale=self.scale, softcap=self.softcap, deterministic=self.deterministic
        )


def _blocks(query: Tensor, key: Tensor, lengths: Lengths, causal: bool) -> Tensor:
    """(B, 1, Sq, Sk) booleans: tokens of one sequence see each other, causal with the last row at the last column."""
    own_q, left_q = (x[..., None] for x in _places(lengths.cu_seqlens_q, query))
    own_k, left_k = (x[..., None, :] for x in _places(lengths.cu_seqlens_k, key))
    seen = (own_q == own_k) & (own_q < len(lengths.cu_seqlens_q) - 1)
    return seen & (left_k >= left_q) if causal else seen


def _places(ends: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of each token, and how many of that sequence follow it: both (B, 1, S)."""
    tokens = torch.arange(x.shape[0] * x.shape[2], device=x.device, dtype=torch.int32)
    own = torch.bucketize(tokens, ends[1:].contiguous(), right=True)
    left = F.pad(ends[1:], (0, 1))[own] - tokens
    return own.view(x.shape[0], 1, -1), left.view(x.shape[0], 1, -1)


def _and(mask: Tensor | None, seen: Tensor) -> Tensor:
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def _with_sinks(
    k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, s_aux: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Keys, values, mask and bias with a column more: a key of zeros whose score is the sink, and nothing for value."""
    column = (0, 0, 0, 1)
    shown = None if mask is None else F.pad(mask, (0, 1), value=True if mask.dtype == torch.bool else 0.0)
    sinks = F.pad(s_aux.to(k.dtype).view(1, -1, 1, 1), (k.shape[2], 0))
    scores = sinks if bias is None else F.pad(bias, (0, 1)) + sinks
    return F.pad(k, column), F.pad(v, column), shown, scores


def _hidden(mask: Tensor | None) -> Tensor | None:
    """Models hide pairs by the most negative number, too: of rows of nothing else kernels make wrong gradients."""
    if mask is None or not mask.is_floating_point():
        return mask
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)


def _warn_of_weights() -> None:
    from transformers.utils import logging

    logging.get_logger(__name__).warning_once(
        f"`{NAME}` attention does not support `output_attentions=True`. Please set your attention to `eager` for it."
    )
