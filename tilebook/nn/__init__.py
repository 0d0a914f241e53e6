"""Modules on tilebook's functions, with the arguments, parameters and state dicts of PyTorch's.

They are of PyTorch's classes where it has them, so that checks by `isinstance` hold, and call tilebook's public
functions, which decide what serves. What these do not take runs PyTorch's own forward.
"""

from __future__ import annotations

from torch.nn import Linear

from tilebook.nn.attention import MultiheadAttention
from tilebook.nn.encoder import TransformerEncoderLayer
from tilebook.nn.mlp import MLP, SwiGLU
from tilebook.nn.norms import LayerNorm, RMSNorm

__all__ = ["MLP", "LayerNorm", "Linear", "MultiheadAttention", "RMSNorm", "SwiGLU", "TransformerEncoderLayer"]
"""`Linear` is PyTorch's own: a product alone is cuBLAS's to serve."""
