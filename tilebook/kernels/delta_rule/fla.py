"""flash-linear-attention's chunked kernels (the package `fla-core`), brought to the signature of our ops."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from tilebook.kernels.delta_rule.problem import DeltaRule
from tilebook.kernels.linear_attention.fla import LEAST_NUMBERS, PACKAGE, available
from tilebook.kernels.linear_attention.pytorch import LEAST

__all__ = ["PACKAGE", "available", "backward", "forward", "supports"]


def supports(problem: DeltaRule) -> bool:
    """Widths that its kernels take, and calls that the GPU is not done with before the host has made the next one."""
    usual = all(width in (16, 32, 64, 128, 256) for width in (problem.head_dim, problem.value_dim))
    return usual and problem.dtype != "fp32" and problem.tokens * problem.head_dim > LEAST_NUMBERS


def _turned(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, …) as (B, S, H, …), contiguous, as its kernels have it."""
    return x.transpose(1, 2).contiguous()


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor,
    state: torch.Tensor | None, scale: float, normalize: bool,
) -> Any:  # fmt: skip
    run = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    decays = torch.zeros_like(beta) if g is None else g.clamp(min=LEAST)
    o, last = run(
        _turned(q), _turned(k), _turned(v), _turned(decays), _turned(beta), scale=scale,
        initial_state=None if state is None else state.contiguous(), output_final_state=True,
        use_qk_l2norm_in_kernel=normalize,
    )  # fmt: skip
    return o.transpose(1, 2), last


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor,
    state: torch.Tensor | None, scale: float, normalize: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    with torch.no_grad():
        o, last = _run(q, k, v, g, beta, state, scale, normalize)
    return o, last


def backward(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    g: torch.Tensor | None, beta: torch.Tensor, state: torch.Tensor | None, scale: float, normalize: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Its backward pass, and of its forward pass the inverses, which that keeps and ours does not."""
    run = import_module("fla.ops.gated_delta_rule.chunk").chunk_gated_delta_rule_bwd
    pairs = import_module("fla.ops.gated_delta_rule.chunk_fwd").chunk_gated_delta_rule_fwd_intra
    chunk_local_cumsum = import_module("fla.ops.utils").chunk_local_cumsum
    norms = import_module("fla.modules.norm.l2norm")
    log2e = import_module("fla.ops.utils.constant").RCP_LN2
    do, q, k, v, beta = (_turned(x) for x in (do, q, k, v, beta))
    decays = torch.zeros_like(beta) if g is None else _turned(g.clamp(min=LEAST))
    start, end = (None if x is None else x.contiguous() for x in (state, dstate))
    with torch.no_grad():
        lengths = [None, None]
        if normalize:
            (q, lengths[0]), (k, lengths[1]) = norms.l2norm_fwd(q), norms.l2norm_fwd(k)
        sums = chunk_local_cumsum(decays, chunk_size=64, scale=log2e)
        _, _, inverse = pairs(k=k, v=v, g=sums, beta=beta)
        dq, dk, dv, dbeta, dg, dstart, *_ = run(
            q=q, k=k, v=v, g=sums, beta=beta, A=inverse, scale=scale, initial_state=start, do=do, dht=end
        )
        if normalize:
            dq, dk = norms.l2norm_bwd(q, lengths[0], dq), norms.l2norm_bwd(k, lengths[1], dk)
    nothing = beta.new_empty(0)
    made = [x.transpose(1, 2) for x in (dq.to(q), dk.to(k), dv.to(v), dg.float(), dbeta.float())]
    return *made[:3], nothing if g is None else made[3], made[4], nothing if state is None else dstart
