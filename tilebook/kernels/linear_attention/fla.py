"""flash-linear-attention's chunked kernels (the package `fla-core`), brought to the signature of our ops."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch

from tilebook.device import Device, package_version
from tilebook.kernels.linear_attention.problem import LinearAttention
from tilebook.kernels.linear_attention.pytorch import LEAST

PACKAGE = "fla-core"

LEAST_NUMBERS = 1 << 22
"""Of q. A call costs the host a hundred microseconds: a GPU that is done sooner would wait for it."""


def available(device: Device) -> bool:
    return device.backend == "cuda" and device.capability >= 80 and _installed()


@functools.cache
def _installed() -> bool:
    return package_version(PACKAGE) != "unknown"


def supports(problem: LinearAttention) -> bool:
    """Its normalized form and features are made of other functions around these."""
    widths = problem.head_dim, problem.value_dim
    usual = all(width in (16, 32, 64, 128, 256) for width in widths) and problem.feature_map == "none"
    return usual and not problem.normalized and problem.tokens * problem.head_dim > LEAST_NUMBERS


def _turned(x: torch.Tensor | None) -> torch.Tensor | None:
    """(B, H, S, …) as (B, S, H, …), contiguous, as its kernels have it."""
    return None if x is None else x.transpose(1, 2).contiguous()


def _back(x: Any) -> torch.Tensor:
    return x.transpose(1, 2)  # type: ignore[no-any-return]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, state: torch.Tensor | None,
    scale: float, normalize: bool, eps: float, feature_map: str = "none",
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    chunk_simple_gla = import_module("fla.ops.simple_gla").chunk_simple_gla
    decays = None if g is None else _turned(g.clamp(min=LEAST))
    start = None if state is None else state.contiguous()
    with torch.no_grad():
        o, last = chunk_simple_gla(
            _turned(q), _turned(k), _turned(v), decays, scale=scale, initial_state=start, output_final_state=True
        )
    return _back(o), last, q.new_empty(0, dtype=torch.float32)


def backward(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    g: torch.Tensor | None, state: torch.Tensor | None, weight: torch.Tensor | None, scale: float, decayed: bool,
    feature_map: str = "none",
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    run = import_module("fla.ops.simple_gla.chunk").chunk_simple_gla_bwd
    chunk_local_cumsum = import_module("fla.ops.utils").chunk_local_cumsum
    log2e = import_module("fla.ops.utils.constant").RCP_LN2
    with torch.no_grad():
        sums = None
        if g is not None:
            sums = chunk_local_cumsum(_turned(g.clamp(min=LEAST)), chunk_size=64, scale=log2e)
        start, end = (None if x is None else x.contiguous() for x in (state, dstate))
        dq, dk, dv, dg, dstart = run(
            q=_turned(q), k=_turned(k), v=_turned(v), g=sums, g_gamma=None, initial_state=start, do=_turned(do),
            dht=end, scale=scale,
        )  # fmt: skip
        nothing = q.new_empty(0, dtype=torch.float32)
        if g is not None and decayed:
            dg = _back(chunk_local_cumsum(dg, chunk_size=64, reverse=True).float())
        else:
            dg = nothing
    dstart = nothing if state is None else dstart
    return *(_back(x).to(q.dtype) for x in (dq, dk, dv)), dg, dstart
