"""How the decode kernels are started."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tilebook import device as devices
from tilebook.kernels.attention.layout import describable, like
from tilebook.kernels.decode.kernels import Scores, Steps, Tile, decode_kernel, merge_kernel
from tilebook.kernels.decode.space import block_m, splits
from tilebook.launch import launch
from tilebook.op import Config


def _addressable(cache: torch.Tensor, keys: int) -> torch.Tensor:
    """The cache, copied only if the kernel cannot address it: axis `keys` must keep a tile within 2³¹ elements."""
    return cache if cache.stride(-1) == 1 and cache.stride(keys) < 1 << 23 else cache.contiguous()


def _describe(cache: torch.Tensor, block_n: int, paged: bool) -> Any:
    """A host-side descriptor whose blocks are `block_n` keys of one head."""
    block = [1, block_n, 1, cache.shape[3]] if paged else [1, 1, block_n, cache.shape[3]]
    return TensorDescriptor(cache, list(cache.shape), list(cache.stride()), block)


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_lens: torch.Tensor | None, block_table: torch.Tensor | None,
    causal: bool, scale: float, softcap: float, window: int | None, *, config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    paged = block_table is not None
    if seq_lens is not None:
        seq_lens = seq_lens.contiguous()
    if block_table is not None and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    q = q if q.stride(-1) == 1 else q.contiguous()
    batch, heads, n_q, width = q.shape
    # Strides of a cache: from block to block, from key to key, from head to head. Contiguous, a block is a sequence.
    axes = (0, 1, 2) if paged else (0, 2, 1)
    k, v = _addressable(k, axes[1]), _addressable(v, axes[1])
    heads_kv, block_size = k.shape[axes[2]], k.shape[axes[1]]
    n_k = block_table.shape[1] * block_size if block_table is not None else block_size
    group, block_d, block_n = heads // heads_kv, triton.next_power_of_2(width), config.number("BLOCK_N")
    rows, n_rows = block_m(group * n_q, block_d), batch * heads * n_q
    programs = triton.cdiv(group * n_q, rows) * heads_kv * batch
    # Interpreted, on the CPU: few programs, but several to a sequence.
    sms = 8 if q.is_cpu else devices.current(q.device.index or 0).sm_count
    n_splits = splits(programs, n_k, config, sms)
    descriptors = bool(config["DESCRIPTORS"]) and describable(k, v)

    o, lse = like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    part, part_lse = o, lse
    if n_splits > 1:
        part = torch.empty((n_splits, n_rows, width), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((n_splits, n_rows), dtype=torch.float32, device=q.device)
    constants = dict(
        CAUSAL=causal and n_q > 1, WINDOWED=window is not None, CAPPED=softcap > 0, SPLIT=n_splits > 1,
        PAGE=block_size if paged else 0, D=width, BLOCK_D=block_d, BLOCK_M=rows, BLOCK_N=block_n,
        DESCRIPTORS=descriptors,
    )  # fmt: skip
    launch(
        decode_kernel,
        (programs * n_splits,),
        q,
        *((_describe(k, block_n, paged), _describe(v, block_n, paged)) if descriptors else (k, v)),
        *(seq_lens, block_table, part, part_lse),
        Steps(*q.stride()[:3], *(x.stride(axis) for x in (k, v) for axis in axes), *o.stride()[:3]),
        block_table.stride(0) if block_table is not None else 0,
        *(heads_kv, group, n_q, n_k, n_rows, n_splits, Scores(scale, softcap), window or 0),
        Tile(**{name: tl.constexpr(value) for name, value in constants.items()}),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if n_splits > 1:
        launch(
            merge_kernel, (n_rows,), part, part_lse, o, lse, *o.stride()[:3], heads, n_q, n_rows, n_splits,
            D=width, BLOCK_D=block_d, MOST=triton.next_power_of_2(n_splits), num_warps=4,
        )  # fmt: skip
    return o, lse
