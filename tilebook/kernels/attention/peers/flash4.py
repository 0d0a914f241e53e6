"""FlashAttention-4, the package `flash-attn-4` (CuTe DSL, Hopper and newer), brought to the signature of our ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tilebook.device import Device, package_version
from tilebook.kernels.attention.form import Form, sides
from tilebook.kernels.attention.layout import like
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.problem import BackwardProblem, ForwardProblem
from tilebook.layout import aligned
from tilebook.op import Config, Space

PACKAGE = "flash-attn-4"

LEAST_FLOPS = 5e10
"""A call costs the host 50 µs, backward 110–230 (measured): a GPU that is done sooner would wait for it."""


def available(device: Device) -> bool:
    """Is it installed, for a GPU it is made for? On later and earlier architectures it has a subset of its features."""
    return device.backend == "cuda" and 90 <= device.capability < 120 and _installed()


@functools.cache
def _installed() -> bool:
    """Asked of the installed distributions: importing takes seconds, and FlashAttention-2 has an older `cute` too."""
    return package_version(PACKAGE) != "unknown"


def supports(problem: ForwardProblem | BackwardProblem) -> bool:
    """Masks and windows, as long as every row sees something. Its soft-cap uses an approximate tanh."""
    if problem.bias or problem.softcap or problem.alibi or problem.dropout or problem.dtype not in ("bf16", "fp16"):
        return False
    if problem.cost().flops < LEAST_FLOPS:
        return False
    left, right = sides(problem.form, problem.seq_q, problem.seq_k)
    seen = (left is None or left >= 0) and (right is None or right >= problem.seq_q - problem.seq_k)
    # Head dimensions seen right on an H200; at 72 dq was wrong. Against a single key its atomics leave noise in dq.
    return seen and problem.seq_k > 1 and problem.head_dim in (16, 32, 64, 128, 256)


def _reject(problem: ForwardProblem, config: Config, device: Device) -> str | None:
    """What its forward on Hopper can be told, and its own rules for that: see its `sm90_config_search`."""
    tile_m, tile_n, in_shared, overlap = (
        config.number(axis) for axis in ("TILE_M", "TILE_N", "P_IN_SHARED", "OVERLAP")
    )
    if not tile_m and not tile_n:
        return None if (in_shared, overlap) == (0, 1) else "what differs from its own choice names its tile"
    if not tile_m or not tile_n:
        return "a tile is its own choice, or none of it is"
    if device.capability // 10 != 9:
        return "only on Hopper it takes tiles of ours"
    if in_shared and not overlap:
        return "P in shared memory and no overlap: one at a time"
    width = -(-problem.head_dim // 32) * 32
    # Per thread: scores and output, and P where the next scores are computed meanwhile.
    registers, limit = tile_n // 2 + width // 2, {128: 216, 192: 128}[tile_m]
    if registers > limit:
        return f"{registers} registers > {limit}"
    fits = registers + tile_n // 4 <= limit
    if fits != bool(overlap):
        return "no registers for the overlap" if overlap else "registers for the overlap are left"
    shared = 2 * (tile_m * width + 4 * tile_n * width + in_shared * tile_m * tile_n)  # k and v in two stages
    return f"shared memory {shared} B > {_SHARED} B" if shared > _SHARED else None


_SHARED = 224 * 1024  # what it counts on for tiles

FORWARD_SPACE = Space(
    axes={
        "TILE_M": (0, 128, 192),
        "TILE_N": (0, 64, 96, 112, 128, 144, 160, 176, 192),
        "P_IN_SHARED": (0, 1),
        "OVERLAP": (0, 1),
    },
    reject=_reject,
    default=lambda problem, device: Config(TILE_M=0, TILE_N=0, P_IN_SHARED=0, OVERLAP=1),
)
"""Rows and columns of a tile (0: its own choice), where the probabilities P wait for their product, and whether a
warp group's softmax overlaps its next product. Each config costs it seconds of compiling. Its backward takes such
parameters too, but on Hopper reads them from a table of its own."""


def _told(config: Config | None) -> dict[str, Any]:
    if config is None or not config["TILE_M"]:
        return {}
    return {
        "tile_mn": (config.number("TILE_M"), config.number("TILE_N")),
        "mma_pv_is_rs": not config["P_IN_SHARED"],
        "intra_wg_overlap": bool(config["OVERLAP"]),
    }


@functools.cache
def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its forward and its backward, imported when the first call needs them."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


def _masked(form: Form, q: torch.Tensor, k: torch.Tensor, scale: float) -> dict[str, Any]:
    """What both functions take beside tensors."""
    left, right = sides(form, q.shape[2], k.shape[2])
    if left is None and right == 0:  # has kernels of its own
        return {"softmax_scale": scale, "causal": True}
    return {"softmax_scale": scale, "causal": False, "window_size_left": left, "window_size_right": right}


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors go there as views (B, S, H, D), copied where they do not begin and step by 16 bytes: it does not look."""
    run, _ = _functions()
    o, lse = like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):  # it runs on the current GPU
        views, how = [aligned(x).transpose(1, 2) for x in (q, k, v)], {**_masked(form, q, k, scale), **_told(config)}
        run(*views, **how, out=o.transpose(1, 2), lse=lse)
    return o, lse


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adds up dq, and what query heads share of dk and dv, by atomics in fp32, unless the form demands otherwise."""
    _, run = _functions()
    dq, dk, dv = like(q), like(k), like(v)
    with torch.cuda.device_of(q):
        run(
            *(aligned(x).transpose(1, 2) for x in (q, k, v, o, do)),
            lse,
            **_masked(form, q, k, scale),
            deterministic=form.deterministic,
            dq=dq.transpose(1, 2),
            dk=dk.transpose(1, 2),
            dv=dv.transpose(1, 2),
        )
    return dq, dk, dv


attention_fwd.implementation(
    "flash_attention_4",
    space=FORWARD_SPACE,
    external=PACKAGE,
    available=available,
    supports=supports,
)(forward)
attention_bwd.implementation("flash_attention_4", available=available, supports=supports, deterministic=False)(backward)
