"""Multi-head attention of linear cost."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilebook.call import way
from tilebook.kernels import bidirectional
from tilebook.kernels.bidirectional import features
from tilebook.kernels.bidirectional.form import PERFORMER
from tilebook.kernels.linear_attention import linear_attention, performed
from tilebook.nn.attention import MultiheadAttention, of_one_width


class LinearAttention(MultiheadAttention):
    """Multi-head `tilebook.linear_attention`: arguments, parameters and state dict of `torch.nn.MultiheadAttention`.

    It is another function than softmax attention, and nothing falls back to that.

    Args:
        embed_dim, num_heads, bias, batch_first, device, dtype: as PyTorch's.
        dropout: in training, of the heads' outputs, as there are no weights of pairs to drop.
        feature_map: φ, as in `tilebook.linear_attention`: "elu+1", "relu", "softmax", "performer" or a function.
        causal: token i sees the tokens j ≤ i only, in every call.
        eps: what is added to the sum of the weights. A row all of whose keys are hidden is 0.

    Raises:
        ValueError: kdim or vdim of other widths, add_bias_kv, add_zero_attn; a feature_map that is none.
    """

    def __init__(
        self, *args: Any, feature_map: Any = "elu+1", causal: bool = False, eps: float = 1e-6, **kwargs: Any
    ) -> None:
        features.check_map(feature_map)
        super().__init__(*args, **kwargs)
        if not of_one_width(self):
            raise ValueError("linear attention takes no kdim or vdim of other widths, add_bias_kv or add_zero_attn")
        self._become(feature_map, causal, eps)

    def _become(self, feature_map: Any, causal: bool, eps: float) -> None:
        """Sets what it has beside what PyTorch's has."""
        self.feature_map, self.causal, self.eps = feature_map, causal, eps
        # PyTorch's encoders ask for it before they run exact attention in one op of these parameters.
        self._qkv_same_embed_dim = False

    def _reset_parameters(self) -> None:
        before, self._qkv_same_embed_dim = self._qkv_same_embed_dim, self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = before

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """(output, None), by the arguments of PyTorch's, but for need_weights, which is False without a word.

        key_padding_mask: (B, Sk) booleans, True for keys that count as nothing; or numbers m, by e^m of which a key
        weighs more or less, as under softmax. PyTorch's encoders make such of booleans. attn_mask: only with is_causal,
        which says that it is the causal one.

        Raises:
            ValueError: any other attn_mask, need_weights, inputs without a batch, nested tensors.
        """
        if need_weights:
            raise ValueError("linear attention has no weights of pairs: call it with need_weights=False")
        if attn_mask is not None and not is_causal:
            raise ValueError("linear attention takes no attn_mask but a causal one, with is_causal=True")
        if any(x.is_nested or x.dim() != 3 for x in (query, key, value)):
            raise ValueError("linear attention takes tensors of three axes that are not nested")
        q, k, v = self._heads(query, key, value)
        causal = self.causal or is_causal
        o = attend(q, k, v, key_padding_mask, feature_map=self.feature_map, causal=causal, eps=self.eps)
        o = F.dropout(self._rows(o), self.dropout, self.training)
        return F.linear(o, self.out_proj.weight, self.out_proj.bias), None


def attend(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, *, feature_map: Any, causal: bool, eps: float
) -> Tensor:
    """`tilebook.linear_attention` under a key_padding_mask (B, Sk). Raises ValueError."""
    if padding is None:
        return linear_attention(q, k, v, feature_map=feature_map, causal=causal, eps=eps)  # type: ignore[no-any-return]
    numbers = padding.is_floating_point()
    if not (numbers or padding.dtype == torch.bool) or padding.shape != (k.shape[0], k.shape[2]):
        got = f"{tuple(padding.shape)} {padding.dtype} for {k.shape[0]} × {k.shape[2]}"
        raise ValueError(f"linear attention takes a key_padding_mask (batch, keys) of booleans or floats, not {got}")
    hidden = padding <= torch.finfo(padding.dtype).min if numbers else padding
    if not causal and bidirectional.named(feature_map):
        mask = padding.float().masked_fill(hidden, -torch.inf) if numbers else padding
        return bidirectional.attend(way(q, k, v, optional=(mask,)), q, k, v, mask, feature_map, eps)
    if causal and feature_map == PERFORMER and q.numel():
        weights = (padding if numbers else torch.zeros_like(padding)).float().masked_fill(hidden, -torch.inf)[:, None]
        k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))
        return performed(way(q, k, v, optional=(weights,)), q, k, v, True, eps, weights=weights)[0]
    if causal and not numbers and feature_map in ("elu+1", "relu"):  # which make nothing of −infinity
        k, v = (x.masked_fill(hidden[:, None, :, None], fill) for x, fill in ((k, -torch.inf), (v, 0.0)))
        return linear_attention(q, k, v, feature_map=feature_map, causal=True, eps=eps)  # type: ignore[no-any-return]
    if k.shape[2]:  # a feature map may look at all keys: those that are hidden become copies of one that is seen
        first = hidden.to(torch.uint8).argmin(-1)[:, None, None, None].expand(-1, k.shape[1], -1, k.shape[3])
        k = torch.where(hidden[:, None, :, None], k.gather(2, first), k)
    padding, v = padding[:, None, :, None], v.masked_fill(hidden[:, None, :, None], 0)
    q, k = features.mapped(q, k, feature_map)
    k = k * padding.exp().to(k.dtype) if numbers else k.masked_fill(padding, 0)
    return linear_attention(q, k, v, feature_map=None, causal=causal, eps=eps)  # type: ignore[no-any-return]
