"""The two ops of packed sequences, with their references, and what computes them."""

from __future__ import annotations

from typing import Any

import torch

from tilebook.kernels.attention import eager as attention
from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.layout import addressable
from tilebook.kernels.attention.peers import torch as pytorch
from tilebook.kernels.attention.triton import launch
from tilebook.kernels.attention.triton.forward_space import supports
from tilebook.kernels.varlen import eager, flash
from tilebook.kernels.varlen.limits import WIDTHS
from tilebook.kernels.varlen.problem import BackwardProblem, ForwardProblem
from tilebook.kernels.varlen.space import SPACE, SPACE_BWD
from tilebook.op import Config, define

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@define("attention_varlen_fwd", ForwardProblem)
def attention_varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    form: Form,
    scale: float,
) -> Pair:
    """q (T, H, D), k and v (Tk, Hkv, D) → o (T, H, D), lse (H, T) in fp32, natural log. scale > 0.

    A row that sees nothing is 0, and its lse -inf; so are rows behind the last sequence.
    """
    return eager.forward(attention.forward, q, k, v, cu_q, cu_k, form, scale)


@define("attention_varlen_bwd", BackwardProblem, direction="bwd")
def attention_varlen_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    form: Form,
    scale: float,
) -> Triple:
    """Gradients of `attention_varlen_fwd`: dq like q, dk and dv like k and v, 0 behind the last sequence."""

    def attend(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
        return attention.backward(do, q, k, v, *rest[2:])  # without what a forward pass rounded

    return eager.backward(attend, do, q, k, v, o, lse, cu_q, cu_k, form, scale)


def _supports(problem: ForwardProblem) -> bool:
    return supports(problem.even)


def _proven(problem: ForwardProblem) -> bool:
    return problem.dtype in ("bf16", "fp16") and problem.head_dim in WIDTHS


@attention_varlen_fwd.implementation("triton", space=SPACE, supports=_supports, proven=_proven)
def _triton_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    form: Form,
    scale: float,
    *,
    config: Config,
) -> Pair:
    q, k, v = addressable(q), addressable(k), addressable(v)
    return launch.start_forward(q, k, v, launch.asked_of_packs(q, k, cu_q, cu_k, form, scale), config)


@attention_varlen_bwd.implementation("triton", space=SPACE_BWD, supports=_supports, proven=_proven)
def _triton_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    form: Form,
    scale: float,
    *,
    config: Config,
) -> Triple:
    do, q, k, v, o = (addressable(x) for x in (do, q, k, v, o))
    call = launch.asked_of_packs(q, k, cu_q, cu_k, form, scale)
    return launch.start_backward(do, q, k, v, o, lse.contiguous(), call, config)


@attention_varlen_fwd.implementation("torch")
def torch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    form: Form,
    scale: float,
) -> Pair:
    return eager.forward(pytorch.forward, q, k, v, cu_q, cu_k, form, scale)


@attention_varlen_bwd.implementation("torch", deterministic=False)
def torch_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    form: Form,
    scale: float,
) -> Triple:
    return eager.backward(pytorch.backward, do, q, k, v, o, lse, cu_q, cu_k, form, scale)


attention_varlen_fwd.implementation("flash_attention_2", available=flash.available, supports=flash.supports)(
    flash.forward
)
attention_varlen_bwd.implementation(
    "flash_attention_2", available=flash.available, supports=flash.supports, deterministic=False
)(flash.backward)
attention_varlen_fwd.backward = attention_varlen_bwd
for each in (attention_varlen_fwd, attention_varlen_bwd):
    each.captured = "flash_attention_2"  # PyTorch's own way goes sequence by sequence, and so has to read their lengths
