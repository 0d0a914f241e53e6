"""How mLSTM's kernel is started."""

from __future__ import annotations

import torch

from tilebook.kernels.attention.layout import addressable, like
from tilebook.kernels.linear_attention.launch import _NOWHERE, _Call, _given, _rows
from tilebook.kernels.linear_attention.layout import new_state
from tilebook.kernels.linear_attention.space import walks
from tilebook.kernels.mlstm.kernels import memory_kernel
from tilebook.launch import launch
from tilebook.op import Config


def mlstm_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, floor: torch.Tensor,
    state: torch.Tensor | None, scale: float, eps: float, *, config: Config,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v = addressable(q), addressable(k), addressable(v)
    call = _Call(q, v, g, True, "none", config)
    o, final = like(v), new_state(q, v, True)
    den = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    walk, long = walks(call.chunks, config)
    init, last, block_v = _given(state), _given(final), config.number("BLOCK_V")
    if walk < call.chunks:
        init, last = call.states(k, v, None, 1.0, init, last, walk, long), _NOWHERE
    launch(
        memory_kernel, call.grid(block_v, walk), _rows(q), _rows(k), _rows(v), call.g, floor.contiguous(), init,
        _rows(o), den, last, *call.sizes, walk, scale, eps, call.tile(block_v), ONE=walk == 1 and last is _NOWHERE,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return o, final, den
