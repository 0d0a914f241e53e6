"""The two ops of packed sequences, with their references, and what computes them."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tilebook.kernels.attention import eager as attention
from tilebook.kernels.attention import peers
from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.forward_space import supports
from tilebook.kernels.attention.tiles import PACKED, describable, like
from tilebook.kernels.varlen import eager, flash
from tilebook.kernels.varlen.blocks import addressable, describe, n_blocks
from tilebook.kernels.varlen.kernels import varlen_bwd_dkdv, varlen_bwd_dq, varlen_fwd
from tilebook.kernels.varlen.problem import BackwardProblem, ForwardProblem
from tilebook.kernels.varlen.space import SPACE, SPACE_BWD
from tilebook.launch import launch
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


def _meta(form: Form, q: torch.Tensor) -> dict[str, Any]:
    """What the kernels are told of a form and the head dimension."""
    exact = q.dtype == torch.float32
    return {
        "left": form.left if form.left >= 0 else None,
        "right": form.right if form.right >= 0 else None,
        "softcap": form.softcap or None,
        "BOTTOM_RIGHT": form.bottom_right,
        "LIMITED": form.left >= 0 or form.right >= 0,
        # In powers of two a score costs one instruction less, and a rounding more than fp32 has to spare.
        "SCORED": exact or form.softcap > 0,
        "TF32": not exact or (form.tf32 and not q.is_cpu),  # an interpreter multiplies fp32 in full
        "D": triton.next_power_of_2(q.shape[2]),
        "WIDTH": q.shape[2],
    }


def _steps(*tensors: torch.Tensor) -> list[int]:
    """From row to row and from head to head, of each."""
    return [step for x in tensors for step in x.stride()[:2]]


def _supports(problem: ForwardProblem) -> bool:
    return supports(problem.even)


def _proven(problem: ForwardProblem) -> bool:
    """Seen right on an H200 in any form: 16 bits, these widths."""
    return problem.dtype in ("bf16", "fp16") and problem.head_dim in (32, 64, 128)


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
    q, k, v, cu_q, cu_k = addressable(q), addressable(k), addressable(v), cu_q.contiguous(), cu_k.contiguous()
    (total_q, heads, _), (total_k, heads_kv, _), n_sequences = q.shape, k.shape, len(cu_q) - 1
    o, lse = like(q), torch.empty((heads, total_q), dtype=torch.float32, device=q.device)
    rows, columns = config.number("BLOCK_M"), config.number("BLOCK_N")
    descriptors = bool(config["DESCRIPTORS"]) and describable(q, k, v)
    launch(
        varlen_fwd,
        (n_blocks(total_q, n_sequences, rows) * heads,),
        *((describe(q, rows), describe(k, columns), describe(v, columns)) if descriptors else (q, k, v)),
        o,
        lse,
        cu_q,
        cu_k,
        *_steps(q, k, v, o),
        n_sequences,
        heads,
        heads // heads_kv,
        total_q,
        total_k,
        scale,
        **_meta(form, q),
        BLOCK_M=rows,
        BLOCK_N=columns,
        HEADS=config["HEADS"],
        DESCRIPTORS=PACKED.value if descriptors else False,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return o, lse


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
    lse, cu_q, cu_k = lse.contiguous(), cu_q.contiguous(), cu_k.contiguous()
    (total_q, heads, _), (total_k, heads_kv, _), n_sequences = q.shape, k.shape, len(cu_q) - 1
    dq, dk, dv, delta = like(q), like(k), like(v), torch.empty_like(lse)
    descriptors = bool(config["DESCRIPTORS"]) and describable(do, q, k, v)

    def start(kernel: Any, axis: str, held: str, total: int, n_heads: int, *args: Any) -> None:
        """Starts one of the two kernels, whose axes end with `axis`; each program holds a block of `held`."""
        block = config.number(f"{held}{axis}")
        launch(
            kernel,
            (n_blocks(total, n_sequences, block) * n_heads,),
            *args,
            n_sequences,
            n_heads,
            heads // heads_kv,
            total_q,
            total_k,
            scale,
            **_meta(form, q),
            BLOCK_M=config[f"BLOCK_M{axis}"],
            BLOCK_N=config[f"BLOCK_N{axis}"],
            HEADS=config["HEADS"],
            DESCRIPTORS=PACKED.value if descriptors else False,
            num_warps=config[f"num_warps{axis}"],
            num_stages=config[f"num_stages{axis}"],
        )

    def loaded(axis: str) -> tuple[Any, ...]:
        """q, k, v and do as that kernel loads them."""
        if not descriptors:
            return q, k, v, do
        rows, columns = config.number(f"BLOCK_M{axis}"), config.number(f"BLOCK_N{axis}")
        return describe(q, rows), describe(k, columns), describe(v, columns), describe(do, rows)

    # dq first: that kernel also makes the delta that the other one reads.
    start(
        varlen_bwd_dq, "2", "BLOCK_M", total_q, heads,
        *loaded("2"), o, lse, delta, dq, cu_q, cu_k,
        *_steps(q, k, v, do, o, dq),
    )  # fmt: skip
    start(
        varlen_bwd_dkdv, "1", "BLOCK_N", total_k, heads_kv,
        *loaded("1"), lse, delta, dk, dv, cu_q, cu_k,
        *_steps(q, k, v, do, dk, dv),
    )  # fmt: skip
    return dq, dk, dv


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
    return eager.forward(peers.torch_forward, q, k, v, cu_q, cu_k, form, scale)


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
    return eager.backward(peers.torch_backward, do, q, k, v, o, lse, cu_q, cu_k, form, scale)


attention_varlen_fwd.implementation("flash_attention_2", available=flash.available, supports=flash.supports)(
    flash.forward
)
attention_varlen_bwd.implementation(
    "flash_attention_2", available=flash.available, supports=flash.supports, deterministic=False
)(flash.backward)
attention_varlen_fwd.backward = attention_varlen_bwd
