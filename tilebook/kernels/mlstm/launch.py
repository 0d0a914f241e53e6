"""How mLSTM's kernels are started."""

from __future__ import annotations

import torch
import triton

from tilebook.kernels.attention.layout import addressable, like
from tilebook.kernels.linear_attention.kernels import Gradients
from tilebook.kernels.linear_attention.launch import _NOWHERE, _SUMMED, _Call, _given, _rows
from tilebook.kernels.linear_attention.layout import new_state
from tilebook.kernels.linear_attention.space import walks
from tilebook.kernels.mlstm.kernels import back_kernel, memory_kernel, sums_kernel
from tilebook.launch import launch
from tilebook.op import Config


def _sum_decays(call: _Call, log_input: torch.Tensor) -> None:
    """In each chunk, for the kernels that find states, to which what tokens write is one decay more behind them."""
    sums, rests = (torch.empty(call.q.shape[:3], dtype=torch.float32, device=call.q.device) for _ in range(2))
    each = _SUMMED // call.chunk
    launch(
        sums_kernel, (call.batch * call.heads, triton.cdiv(call.chunks, each)), call.g, log_input, sums, rests,
        *call.sizes, CHUNK=call.chunk, CHUNKS=each, num_warps=4,
    )  # fmt: skip
    call.g, call.rests = sums, rests


def mlstm_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, log_input: torch.Tensor, floor: torch.Tensor,
    state: torch.Tensor | None, scale: float, eps: float, *, config: Config,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v, log_input = addressable(q), addressable(k), addressable(v), log_input.contiguous()
    call = _Call(q, v, g, True, "none", config)
    o, final = like(v), new_state(q, v, True)
    den = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    walk, long = walks(call.chunks, config)
    init, last, block_v = _given(state), _given(final), config.number("BLOCK_V")
    if walk < call.chunks:
        _sum_decays(call, log_input)
        init, last = call.states(k, v, None, 1.0, init, last, walk, long), _NOWHERE
        call.g = g
    launch(
        memory_kernel, call.grid(block_v, walk), _rows(q), _rows(k), _rows(v), g, log_input, floor.contiguous(), init,
        _rows(o), den, last, *call.sizes, walk, scale, eps, call.tile(block_v), ONE=walk == 1 and last is _NOWHERE,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return o, final, den


def mlstm_bwd(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
    log_input: torch.Tensor, state: torch.Tensor | None, weight: torch.Tensor, scale: float, *, config: Config,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    do, q, k, v = addressable(do), addressable(q), addressable(k), addressable(v)
    log_input, weight = log_input.contiguous(), weight.contiguous()
    call = _Call(q, v, g, True, "none", config)
    _sum_decays(call, log_input)
    dq, dk, dv = like(q), like(k), like(v)
    dg, dlog_input = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    made = Gradients(_rows(dq), _rows(dk), _rows(dv))
    dinit = new_state(q, v, True) if state is not None else torch.empty(0, dtype=torch.float32, device=q.device)
    walk, end = walks(call.chunks, config)[1], _NOWHERE if state is None else _given(dinit)
    states = call.states(k, v, None, 1.0, _given(state), _NOWHERE, 1, walk)
    grads = call.states(q, do, weight, scale, _given(dstate), end, 1, walk, reverse=True)
    launch(
        back_kernel, (call.batch * call.heads, call.chunks), _rows(do), _rows(q), _rows(k), _rows(v), weight, call.g,
        call.rests, log_input, states, grads, made, dg, dlog_input, *call.sizes, scale,
        call.tile(config.number("BLOCK_V")), num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return dq, dk, dv, dg, dlog_input, dinit
