"""Multi-head attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilebook.kernels.attention import scaled_dot_product_attention
from tilebook.kernels.attention.pytorch import BOUNDS
from tilebook.trial import served


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` by `tilebook.scaled_dot_product_attention`: same arguments, parameters and numbers.

    Heads are views of the products, and are not copied in between. PyTorch's own forward runs, and raises, with
    need_weights, which is its default, with kdim or vdim of other widths, bias_k and bias_v, add_zero_attn, without a
    batch, for nested tensors, where masks do not fit, and for small calls in evaluation, which are one op there.
    Dropout is PyTorch's, and drops the same weights. A row all of whose keys are hidden gives what the function gives
    for it.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As PyTorch's, by the same arguments; (output, None) without need_weights."""
        one_op = self.batch_first and query is key and key is value and in_one_op(self, query)
        if one_op or need_weights or not self._ours(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = self._heads(query, key, value)
        causal = is_causal and key_padding_mask is None
        mask = None if causal else self._mask(q.shape[0], key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        o = scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        return F.linear(self._rows(o), self.out_proj.weight, self.out_proj.bias), None

    def _ours(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool
    ) -> bool:
        """Is it a call in the usual form, that PyTorch would not refuse either?"""
        if not of_one_width(self):
            return False
        if not q.dim() == k.dim() == v.dim() == 3 or q.is_nested or k.is_nested or v.is_nested:
            return False
        tokens = 1 if self.batch_first else 0
        batch, n_q, n_k = q.shape[1 - tokens], q.shape[tokens], k.shape[tokens]
        if k.shape != v.shape or k.shape[1 - tokens] != batch or not q.shape[2] == k.shape[2] == self.embed_dim:
            return False
        if mask is None:
            return not is_causal and (padding is None or (_hides(padding) and padding.shape == (batch, n_k)))
        if not _hides(mask) or mask.shape not in ((n_q, n_k), (batch * self.num_heads, n_q, n_k)):
            return False
        return padding is None or (padding.dtype == mask.dtype and padding.shape == (batch, n_k))

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v (B, H, S, D), views of their products."""
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        return [x.permute(order) for x in self._projected(query, key, value)]

    def _rows(self, o: Tensor) -> Tensor:
        """Outputs (B, H, S, D) with their heads side by side, as inputs lie."""
        return o.permute((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)).flatten(-2)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v, each with its heads in an axis of their own: one product of what is one tensor."""
        groups = [(query, 1), (key, 1), (value, 1)]
        if key is value:
            groups = [(query, 3)] if query is key else [(query, 1), (key, 2)]
        sizes = [count * self.embed_dim for _, count in groups]
        weights = torch.split(self.in_proj_weight, sizes)
        biases = [None] * len(groups) if self.in_proj_bias is None else torch.split(self.in_proj_bias, sizes)
        found: list[Tensor] = []
        for (x, count), weight, bias in zip(groups, weights, biases, strict=True):
            made = F.linear(x, weight, bias)
            found += torch.unflatten(made, -1, (count, self.num_heads, self.head_dim)).unbind(-3)
        return found

    def _mask(self, batch: int, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Both masks as one of `scaled_dot_product_attention`, whose booleans say what is seen, not what is hidden."""
        parts = []
        if mask is not None:
            parts.append(mask if mask.dim() == 2 else torch.unflatten(mask, 0, (batch, self.num_heads)))
        if padding is not None:
            parts.append(padding[:, None, None])
        if not parts:
            return None
        if parts[0].dtype != torch.bool:
            return parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return ~(parts[0] if len(parts) == 1 else parts[0] | parts[1])


def of_one_width(module: nn.MultiheadAttention) -> bool:
    """Has it one width, and neither bias_k and bias_v nor add_zero_attn?"""
    return module.in_proj_weight is not None and module.bias_k is module.bias_v is None and not module.add_zero_attn


def in_one_op(module: nn.Module, x: Tensor) -> bool:
    """Is it a call in evaluation for which PyTorch has one op, and so small that the host's time is all there is?"""
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dim() != 3:
        return False
    return not served(x) or x.numel() * max(x.shape[:2]) <= BOUNDS[0]


def _hides(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or mask.is_floating_point()
