"""The layer of an encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tilebook.hooks import usual
from tilebook.nn.attention import MultiheadAttention, in_one_op
from tilebook.nn.mlp import fused
from tilebook.nn.norms import LayerNorm, added


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on tilebook: same arguments, parameters, first weights and numbers.

    Its attention is `tilebook.nn.MultiheadAttention`, its norms are `tilebook.nn.LayerNorm`, in one pass with the sums
    before them where they have one dtype. The MLP is `tilebook.mlp` where nothing drops between its layers: in
    evaluation, or with dropout=0. `torch.nn.TransformerEncoder` takes it as one of PyTorch's. Nested tensors, which it
    may make of padded batches in evaluation, and small calls in evaluation run PyTorch's own forward, in one op.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Another class for what is made already: its weights are drawn once, in PyTorch's order.
        for name, ours in (("self_attn", MultiheadAttention), ("norm1", LayerNorm), ("norm2", LayerNorm)):
            getattr(self, name).__class__ = ours

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As PyTorch's, by the same arguments."""
        if src.is_nested or in_one_op(self, src):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            attended = self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            y, h = added(self.norm2, attended, src)
            return h + self._ff_block(y)
        x, _ = added(self.norm1, self._sa_block(src, src_mask, src_key_padding_mask, is_causal), src)
        return added(self.norm2, self._ff_block(x), x)[0]

    def _ff_block(self, x: Tensor) -> Tensor:
        kept = usual(self.dropout, of=nn.Dropout) and not (self.training and self.dropout.p > 0)
        found = fused(x, self.linear1, self.activation, self.linear2) if kept else None
        return super()._ff_block(x) if found is None else self.dropout2(found)
