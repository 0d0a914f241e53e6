"""PyTorch's FlexAttention, compiled by Inductor for each form and shape, as our forward.

Its backward is out of reach: PyTorch offers it as the derivative of a compiled forward alone, which would run again.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import torch

from tilebook.device import Device
from tilebook.inductor import alone, unwatched
from tilebook.kernels.attention.form import Form, extras, limits
from tilebook.kernels.attention.ops import attention_fwd
from tilebook.kernels.attention.problem import ForwardProblem

LEAST_FLOPS = 5e10
"""Guards and wrappers of a compiled call cost the host tens of microseconds: a GPU done sooner would wait for it."""

MOST_SHAPES = 64
"""So many shapes of a form are compiled at most, for seconds each: a call with one more raises, and is served else."""

_BLOCK = 128


def available(device: Device) -> bool:
    """PyTorch 2.9 was the first whose log-sum-exp is asked for as it is here."""
    recent = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
    return recent and device.backend == "cuda" and device.capability >= 80


def supports(problem: ForwardProblem) -> bool:
    """All but dropout, whose random bits it does not have."""
    if problem.dropout or problem.dtype not in ("bf16", "fp16") or problem.head_dim % 8:
        return False
    return problem.cost().flops >= LEAST_FLOPS


def modification(form: Form, bias: Any, slopes: Any, shift: int) -> Callable[..., Any] | None:
    """What the form does to a score beside masks of rows and columns; `bias` and `slopes` are of full size."""
    if not (form.softcap or form.bias or form.alibi):
        return None

    def modified(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if form.softcap:
            score = form.softcap * torch.tanh(score / form.softcap)
        if form.alibi:
            score = score - slopes[b, h] * (i + shift - j).abs()
        if form.bias == "mask":
            score = torch.where(bias[b, h, i, j], score, -torch.inf)
        elif form.bias:
            score = score + bias[b, h, i, j]
        return score

    return modified


def block_mask(form: Form, n_q: int, n_k: int, device: torch.device) -> Any:
    """Which blocks of rows and columns the band of the form touches, and which it covers; None without limits.

    Made from the limits, where `create_block_mask` would look at every pair.
    """
    from torch.nn.attention.flex_attention import BlockMask

    before, after = limits(form, n_q, n_k)
    if before is None and after is None:
        return None
    first_row = torch.arange(0, n_q, _BLOCK, device=device)[:, None]
    first = torch.arange(0, n_k, _BLOCK, device=device)
    last_row, last = (first_row + _BLOCK - 1).clamp(max=n_q - 1), (first + _BLOCK - 1).clamp(max=n_k - 1)
    # Blocks past the ends are no full ones: they are not checked.
    touched = torch.ones(len(first_row), len(first), dtype=torch.bool, device=device)
    whole = (first_row + _BLOCK <= n_q) & (first + _BLOCK <= n_k)
    if before is not None:
        touched, whole = touched & (last >= first_row - before), whole & (first >= last_row - before)
    if after is not None:
        touched, whole = touched & (first <= last_row + after), whole & (last <= first_row + after)

    def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many in each row of blocks, and which: those first."""
        indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None].contiguous()

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        if before is None:
            return j <= i + after
        return j >= i - before if after is None else (j >= i - before) & (j <= i + after)

    return BlockMask.from_kv_blocks(
        *ordered(touched & ~whole), *ordered(whole), BLOCK_SIZE=_BLOCK, mask_mod=seen, seq_lengths=(n_q, n_k)
    )


def _attend(form: Form, n_q: int, n_k: int, device: torch.device) -> Callable[..., Any]:
    """FlexAttention with that form and those lengths, not yet compiled."""
    from torch.nn.attention import flex_attention as flex

    mask = block_mask(form, n_q, n_k, device)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: Any, slopes: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        changed = modification(form, bias, slopes, n_k - n_q)
        o, aux = flex.flex_attention(
            q, k, v, changed, mask, scale=scale, enable_gqa=True, return_aux=flex.AuxRequest(lse=True),
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # its decoding kernel, below 128 rows, lacks configs
        )  # fmt: skip
        return o, aux.lse

    return attend


_shapes: collections.Counter[Any] = collections.Counter()


@functools.cache
def _compiled(device: torch.device, form: Form, description: tuple[Any, ...]) -> Callable[..., Any]:
    """A function of its own for each form and description of the tensors, so that none is compiled twice.

    Raises RuntimeError where this form, head dimension and dtype were compiled for `MOST_SHAPES` shapes already.
    """
    ((_, _, n_q, width), _, dtype), ((_, _, n_k, _), _, _) = description[:2]
    kind = device, form, width, dtype
    if _shapes[kind] >= MOST_SHAPES:
        raise RuntimeError(f"FlexAttention was compiled for {MOST_SHAPES} shapes of this form already")
    _shapes[kind] += 1
    return alone(_attend(form, n_q, n_k, device))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *tensors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compiles at the first call of each form and description of tensors, for seconds: before a graph is captured."""
    bias, slopes, _ = extras(form, tensors)
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
    if slopes is not None:
        slopes = slopes.expand(q.shape[:2])
    given = (q, k, v, *(x for x in (bias, slopes) if x is not None))
    description = tuple((tuple(x.shape), x.stride(), x.dtype) for x in given)
    with torch.no_grad(), unwatched(), torch.cuda.device_of(q):
        o, lse = _compiled(q.device, form, (*description, scale))(q, k, v, scale, bias, slopes)
    return o, lse


attention_fwd.implementation("flex_attention", available=available, supports=supports)(forward)
