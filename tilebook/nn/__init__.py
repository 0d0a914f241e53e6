"""Modules on tilebook's functions, with the arguments, parameters and state dicts of PyTorch's.

They are of PyTorch's classes where it has them, so that checks by `isinstance` hold, and call tilebook's public
functions, which decide what serves. What these do not take runs PyTorch's own forward. `LinearAttention` is another
function than PyTorch's, and refuses what it does not take; `hybrid` gives it to layers of a model.
"""

from __future__ import annotations

from torch.nn import Linear

from tilebook.nn.attention import MultiheadAttention
from tilebook.nn.encoder import TransformerEncoderLayer
from tilebook.nn.hybrid import hybrid
from tilebook.nn.linear import LinearAttention
from tilebook.nn.mlp import MLP, SwiGLU
from tilebook.nn.norms import LayerNorm, RMSNorm

__all__ = [
    "MLP",
    "LayerNorm",
    "Linear",
    "LinearAttention",
    "MultiheadAttention",
    "RMSNorm",
    "SwiGLU",
    "TransformerEncoderLayer",
    "hybrid",
]
"""`Linear` is PyTorch's own: a product alone is cuBLAS's to serve."""
