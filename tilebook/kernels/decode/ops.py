"""The op of decoding, with its reference, and what computes it."""

from __future__ import annotations

from typing import Any

import torch

from tilebook.kernels.attention.form import PLAIN
from tilebook.kernels.attention.native import cudnn_first
from tilebook.kernels.attention.peers import cudnn
from tilebook.kernels.attention.peers import torch as pytorch
from tilebook.kernels.decode import eager, launch
from tilebook.kernels.decode.problem import DecodeProblem
from tilebook.kernels.decode.pytorch import simple
from tilebook.kernels.decode.space import SPACE
from tilebook.op import define

Outputs = tuple[torch.Tensor, torch.Tensor]


def _fused(problem: DecodeProblem) -> bool:
    """One row each against full, contiguous sequences: PyTorch's own function is what anybody would call."""
    return _plain(problem) and problem.seq_q == 1


def _native(name: str, problem: DecodeProblem, device: Any) -> bool:
    """Does PyTorch's function run this by itself?"""
    return name == "torch" or (name == "cudnn" and cudnn_first(device.arch) and _fused(problem))


def _supports(problem: DecodeProblem) -> bool:
    return (
        problem.dtype in ("bf16", "fp16")
        and 1 <= problem.seq_q <= 16
        and 16 <= problem.head_dim <= 256
        and problem.head_dim % 8 == 0
    )


def _plain(problem: DecodeProblem) -> bool:
    """Nothing but full, contiguous sequences, as the kernels inside PyTorch take them."""
    return (
        _supports(problem)
        and problem.cache == "contiguous"
        and not (problem.ragged or problem.capped)
        and problem.window == problem.seq_k
    )


def _torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Outputs:
    seq_lens, block_table, _, scale, softcap, window = rest
    if simple(q, seq_lens, block_table, softcap, window) and q.is_cuda:
        return pytorch.forward(q, k, v, PLAIN, scale)
    return eager.decode(q, k, v, *rest)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Outputs:
    """PyTorch's FlashAttention-2: its own split-K, and called directly a causal mask aligned at the bottom right."""
    _, _, causal, scale, _, _ = rest
    o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return o, lse.view(q.shape[:-1])


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Outputs:
    return cudnn.forward(q, k, v, PLAIN, rest[3])  # its causal mask is aligned at the other corner


decode = define("attention_decode", DecodeProblem, fused=_fused, native=_native)(eager.decode)
decode.implementation("triton", space=SPACE, supports=_supports)(launch.decode)
decode.implementation("torch")(_torch)
decode.implementation("flash", available=lambda device: device.capability >= 80, supports=_plain)(_flash)
decode.implementation(
    "cudnn",
    available=cudnn.available,
    supports=lambda problem: _plain(problem) and problem.seq_q == 1 and problem.head_dim <= 128,
)(_cudnn)
