"""The op of decoding, with its reference, and what computes it."""

from __future__ import annotations

import torch

from tilebook.kernels.attention.form import PLAIN
from tilebook.kernels.attention.peers import cudnn_available, cudnn_forward
from tilebook.kernels.decode import eager, launch
from tilebook.kernels.decode.problem import DecodeProblem
from tilebook.kernels.decode.space import SPACE
from tilebook.op import define

Outputs = tuple[torch.Tensor, torch.Tensor]


@define("attention_decode", DecodeProblem)
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
decode.implementation("torch")(decode.reference)


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
