"""flash-linear-attention's kernels of GLA (the package `fla-core`), brought to the signature of our ops."""

from __future__ import annotations

from importlib import import_module

import torch

from tilebook.kernels.channel_decay.problem import ChannelDecay
from tilebook.kernels.linear_attention.fla import LEAST_NUMBERS, PACKAGE, available
from tilebook.kernels.linear_attention.pytorch import LEAST

__all__ = ["PACKAGE", "available", "backward", "forward", "supports"]

_CHUNK = 64


def supports(problem: ChannelDecay) -> bool:
    """Widths that its kernels take, and calls that the GPU is not done with before the host has made the next one."""
    usual = all(width in (16, 32, 64, 128, 256) for width in (problem.head_dim, problem.value_dim))
    long = problem.seq >= _CHUNK and problem.tokens * problem.head_dim > LEAST_NUMBERS
    return usual and long and problem.dtype != "fp32"


def _turned(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, …) as (B, S, H, …), contiguous, as its kernels have it."""
    return x.transpose(1, 2).contiguous()


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, ...]:
    run = import_module("fla.ops.gla").chunk_gla
    start = None if state is None else state.contiguous()
    with torch.no_grad():
        o, last = run(
            _turned(q), _turned(k), _turned(v), _turned(g.clamp(min=LEAST)), scale=scale, initial_state=start,
            output_final_state=True,
        )  # fmt: skip
    return o.transpose(1, 2), last


def backward(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
    state: torch.Tensor | None, scale: float, decayed: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Its backward pass, and of its forward pass the weights of pairs, which that keeps and ours does not."""
    chunks = import_module("fla.ops.gla.chunk")
    do, q, k, v, decays = (_turned(x) for x in (do, q, k, v, g.clamp(min=LEAST)))
    start, end = (None if x is None else x.contiguous() for x in (state, dstate))
    log2e = import_module("fla.ops.utils.constant").RCP_LN2
    with torch.no_grad():
        sums = import_module("fla.ops.utils").chunk_local_cumsum(decays, _CHUNK, scale=log2e)
        weights = chunks.chunk_gla_fwd_intra_gk(q=q, k=k, g=sums, scale=scale, chunk_size=_CHUNK)
        dq, dk, dv, dg, dstart = chunks.chunk_gla_bwd(
            q=q, k=k, v=v, g=decays, g_cumsum=sums, scale=scale, initial_state=start, h=None, A=weights, do=do,
            dht=end, chunk_size=_CHUNK,
        )  # fmt: skip
    nothing = q.new_empty(0, dtype=torch.float32)
    made = [x.transpose(1, 2) for x in (dq.to(q), dk.to(k), dv.to(v), dg.float())]
    return *made[:3], made[3] if decayed else nothing, nothing if state is None else dstart
