"""The op of decoding, with its reference, and what computes it."""

from __future__ import annotations

from typing import Any

import torch

from tilebook.kernels.attention.form import PLAIN
from tilebook.kernels.attention.native import cudnn_first
from tilebook.kernels.attention.peers import cudnn_available, cudnn_forward, torch_forward
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


@define("attention_decode", DecodeProblem, fused=_fused, native=_native)
def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor | None,
    block_table: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    window: int | None,
) -> Outputs:
    """→ o (B, H, S, D), lse (B, H, S) in fp32, natural log; 0 and -infinity for rows that see no key."""
    return eager.decode(q, k, v, seq_lens, block_table, causal, scale, softcap, window)


def _supports(problem: DecodeProblem) -> bool:
    return (
        problem.dtype in ("bf16", "fp16")
        and 1 <= problem.seq_q <= 16
        and 16 <= problem.head_dim <= 256
        and problem.head_dim % 8 == 0
    )


decode.implementation("triton", space=SPACE, supports=_supports)(launch.decode)


@decode.implementation("torch")
def _torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor | None,
    block_table: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    window: int | None,
) -> Outputs:
    if simple(q, seq_lens, block_table, softcap, window) and q.is_cuda:
        return torch_forward(q, k, v, PLAIN, scale)
    return eager.decode(q, k, v, seq_lens, block_table, causal, scale, softcap, window)


def _plain(problem: DecodeProblem) -> bool:
    """Nothing but full, contiguous sequences, as the kernels inside PyTorch take them."""
    return (
        _supports(problem)
        and problem.cache == "contiguous"
        and not (problem.ragged or problem.capped)
        and problem.window == problem.seq_k
    )


@decode.implementation("flash", available=lambda device: device.capability >= 80, supports=_plain)
def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: None,
    block_table: None,
    causal: bool,
    scale: float,
    softcap: float,
    window: None,
) -> Outputs:
    """PyTorch's FlashAttention-2: its own split-K, and called directly a causal mask aligned at the bottom right."""
    o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return o, lse.view(q.shape[:-1])


@decode.implementation(
    "cudnn",
    available=cudnn_available,
    supports=lambda problem: _plain(problem) and problem.seq_q == 1 and problem.head_dim <= 128,
)
def _cudnn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: None,
    block_table: None,
    causal: bool,
    scale: float,
    softcap: float,
    window: None,
) -> Outputs:
    return cudnn_forward(q, k, v, PLAIN, scale)  # its causal mask is aligned at the other corner
