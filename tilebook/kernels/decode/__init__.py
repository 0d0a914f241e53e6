"""Attention of few query rows against a long cache of keys and values, split-K (Flash-Decoding, Dao et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tilebook import device as devices
from tilebook import dispatch
from tilebook.kernels.attention.form import PLAIN
from tilebook.kernels.attention.layout import describable, like
from tilebook.kernels.attention.peers import cudnn_available, cudnn_forward
from tilebook.kernels.decode import eager
from tilebook.kernels.decode.check import check
from tilebook.kernels.decode.kernels import decode_kernel, merge_kernel
from tilebook.kernels.decode.problem import DecodeProblem
from tilebook.kernels.decode.space import SPACE, block_m, splits
from tilebook.launch import launch
from tilebook.op import Config, define

__all__ = ["attention_decode"]

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


def _addressable(cache: torch.Tensor, keys: int) -> torch.Tensor:
    """The cache, copied only if the kernel cannot address it: axis `keys` must keep a tile within 2³¹ elements."""
    return cache if cache.stride(-1) == 1 and cache.stride(keys) < 1 << 23 else cache.contiguous()


def _describe(cache: torch.Tensor, block_n: int, paged: bool) -> Any:
    """A host-side descriptor whose blocks are `block_n` keys of one head."""
    block = [1, block_n, 1, cache.shape[3]] if paged else [1, 1, block_n, cache.shape[3]]
    return TensorDescriptor(cache, list(cache.shape), list(cache.stride()), block)


@decode.implementation("triton", space=SPACE, supports=_supports)
def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor | None,
    block_table: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    window: int | None,
    *,
    config: Config,
) -> Outputs:
    paged = block_table is not None
    if seq_lens is not None:
        seq_lens = seq_lens.contiguous()
    if block_table is not None and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
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
    launch(
        decode_kernel,
        (programs * n_splits,),
        q,
        *((_describe(k, block_n, paged), _describe(v, block_n, paged)) if descriptors else (k, v)),
        seq_lens,
        block_table,
        part,
        part_lse,
        *q.stride()[:3],
        *(x.stride(axis) for x in (k, v) for axis in axes),
        *o.stride()[:3],
        block_table.stride(0) if block_table is not None else 0,
        heads_kv,
        group,
        n_q,
        n_k,
        n_rows,
        n_splits,
        scale,
        softcap,
        window or 0,
        CAUSAL=causal and n_q > 1,
        WINDOWED=window is not None,
        CAPPED=softcap > 0,
        SPLIT=n_splits > 1,
        PAGE=block_size if paged else 0,
        D=width,
        BLOCK_D=block_d,
        BLOCK_M=rows,
        BLOCK_N=block_n,
        DESCRIPTORS=descriptors,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if n_splits > 1:
        launch(
            merge_kernel,
            (n_rows,),
            part,
            part_lse,
            o,
            lse,
            *o.stride()[:3],
            heads,
            n_q,
            n_rows,
            n_splits,
            D=width,
            BLOCK_D=block_d,
            MOST=triton.next_power_of_2(n_splits),
            num_warps=4,
        )
    return o, lse


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


def attention_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale · q kᵀ) v for the last few queries of each sequence, with keys and values from a cache.

    Args:
        q: queries (B, H, S, D), of the last S positions of each sequence. Any strides.
        k: cached keys (B, Hkv, Sk, D), or, with a block table, (blocks, block size, Hkv, D). Any strides, but a cache
            whose last axis is not contiguous is copied. Hkv divides H; query head h reads head h // (H / Hkv).
        v: cached values, in the shape of k.
        seq_lens: (B,) int32, the keys of each sequence, those of the queries included; Sk if None. What the caches
            hold beyond is never used, whatever it is. Lengths are taken to lie in 0 … Sk, and stay on the GPU.
        block_table: (B, blocks of a sequence) int32, the blocks that hold each sequence's keys, in order; entries
            past the end of a sequence may be anything. Needs `seq_lens`.
        causal: row i of S sees the keys up to its own position, seq_lens − S + i: aligned at the bottom right, which
            is what decoding means and `attention` does not do. Otherwise each row sees all keys.
        scale: what the scores are multiplied by; D^-0.5 if None.
        softcap: c > 0 turns scores s into c · tanh(s / c), after scaling; 0 does not.
        window: each row sees no keys but the last `window` up to its own position, and what lies after it if not
            causal; all if None.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        o (B, H, S, D), in the dtype of q and with its order of axes in memory; with `return_lse` also lse (B, H, S) in
        fp32, natural log. A row that sees no key, as in an empty sequence, has o = 0 and lse = -infinity.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not go together; inputs that require gradients while
            they are recorded, for there is no backward: use `torch.no_grad()`, or `attention`.

    Kernels serve bf16 and fp16 on a GPU with S ≤ 16 and D a multiple of 8 from 16 to 256, sums in fp32; everything
    else is eager PyTorch, which keeps all scores. Fast where D is a multiple of 16. Calls are never held up: nothing
    is read back from the GPU.

    The algorithm is Flash-Decoding (Dao, Haziza, Massa, Sizov 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
    """
    factor = scale
    if factor is None:
        factor = q.shape[-1] ** -0.5 if q.ndim and q.shape[-1] else 0.0
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("attention_decode has no backward: call it under torch.no_grad(), or use attention")
    choice = dispatch.known(decode, q, k, v, seq_lens, block_table, causal, factor, softcap, window)
    if choice is None or choice.source == "fallback":
        check(q, k, v, seq_lens, block_table, softcap, window)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        args = q, k, v, seq_lens, block_table, causal, factor, softcap, window
        choice = dispatch.find(decode, *args) if q.numel() and k.numel() else None
        if choice is None:
            o, lse = eager.decode(*args)
            return (o, lse) if return_lse else o
    o, lse = choice(q, k, v, seq_lens, block_table, causal, factor, softcap, window)
    return (o, lse) if return_lse else o
