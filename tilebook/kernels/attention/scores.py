"""Optional parts of attention inside the kernels: bands, masks, soft-cap, ALiBi, bias, dropout.

What a call lacks is None, and Triton compiles it away: a plain call's kernels are as if there were none of this.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tilebook.kernels.attention.form import Form, banded, extras, limits
from tilebook.kernels.attention.tiles import LOG2E

# The fewest rounds of Philox that pass the usual tests of randomness (Salmon et al. 2011); FlashAttention's number too.
PHILOX_ROUNDS = tl.constexpr(7)


def options(form: Form, tensors: tuple[torch.Tensor, ...], q: torch.Tensor, k: torch.Tensor) -> dict[str, Any]:
    """The kernels' optional arguments and the constexprs that go with them, for one call of an op."""
    bias, slopes, seed = extras(form, tensors)
    limited = banded(form)
    before, after = limits(form, q.shape[2], k.shape[2]) if limited else (None, None)
    steps: tuple[int | None, ...] = (None,) * 4
    if bias is not None:
        steps = tuple(step if size > 1 else 0 for size, step in zip(bias.shape, bias.stride(), strict=True))
    slope_steps: tuple[int | None, ...] = (None, None)
    if slopes is not None:
        slope_steps = (slopes.stride(0) if slopes.ndim == 2 and slopes.shape[0] > 1 else 0, slopes.stride(-1))
    mask, exact = form.bias == "mask", q.dtype == torch.float32
    # In powers of two a score costs one instruction less, and a rounding more than fp32 has to spare.
    scored = exact or bool(form.softcap or form.alibi) or form.bias in ("bias", "dbias")
    return {
        "before": before,
        "after": after,
        "mask": bias if mask else None,
        "bias": None if mask else bias,
        **dict(zip(("stride_bb", "stride_bh", "stride_bm", "stride_bn"), steps, strict=True)),
        "slopes": slopes,
        **dict(zip(("stride_ab", "stride_ah"), slope_steps, strict=True)),
        "softcap": form.softcap or None,
        "seed": seed,
        "dropout": form.dropout or None,
        "CAUSAL": form.causal and not limited,
        "BANDED": limited,
        "SCORED": scored,
        "GAPS": bool(limited or form.bias),
        # The other dtypes are multiplied as they are; an interpreter multiplies fp32 in full, whatever is allowed.
        "TF32": not exact or (form.tf32 and not q.is_cpu),
        "D": triton.next_power_of_2(q.shape[3]),
        "WIDTH": q.shape[3],
    }


@triton.jit
def rows_seen(column, width, n_q, before, after):
    """[first, clear, whole, last): rows that see any of `width` columns; from `clear` to `whole` all of them."""
    first = 0
    clear = 0
    last = n_q
    whole = n_q
    if after is not None:
        first = tl.minimum(tl.maximum(column - after, 0), n_q)
        clear = tl.maximum(column + width - 1 - after, 0)
    if before is not None:
        last = tl.maximum(tl.minimum(column + width + before, n_q), first)
        whole = tl.maximum(tl.minimum(column + before + 1, n_q), 0)
    return first, clear, whole, last


@triton.jit
def columns_seen(row, height, n_k, before, after):
    """[first, clear, whole, last): columns that any of `height` rows sees; from `clear` to `whole` all do."""
    first = 0
    clear = 0
    last = n_k
    whole = n_k
    if before is not None:
        first = tl.minimum(tl.maximum(row - before, 0), n_k)
        clear = tl.maximum(row + height - 1 - before, 0)
    if after is not None:
        last = tl.maximum(tl.minimum(row + height + after, n_k), first)
        whole = tl.maximum(tl.minimum(row + after + 1, n_k), 0)
    return first, clear, whole, last


@triton.jit
def within(rows, columns, before, after):
    """Which (row, column) pairs lie in the band; `rows` and `columns` broadcast against each other."""
    if before is None:
        keep = columns <= rows + after
    elif after is None:
        keep = columns >= rows - before
    else:
        keep = (columns >= rows - before) & (columns <= rows + after)
    return keep


@triton.jit
def looked_up(table, row, column, rows, columns, stride_bm, stride_bn, n_q, n_k):
    """A tile of a bias or mask, 0 past the ends; `rows` and `columns` start at `row` and `column`."""
    at = table + row.to(tl.int64) * stride_bm + column.to(tl.int64) * stride_bn
    inside = (rows < n_q) & (columns < n_k)
    return tl.load(at + (rows - row) * stride_bm + (columns - column) * stride_bn, mask=inside, other=0)


@triton.jit
def scored(s, row, column, rows, columns, n_q, n_k, scale, extras):
    """The scores in natural units after soft-cap, ALiBi and bias, and tanh(s / softcap) for their derivative."""
    _, _, _, bias, base, stride_bm, stride_bn, slope, softcap, _, _ = extras
    s = s * scale
    bent = s
    if softcap is not None:
        # exp2 may be infinite or 0: then this is exactly ±1.
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * LOG2E / softcap)))
        s = bent * softcap
    if slope is not None:
        s -= slope * tl.abs(rows + (n_k - n_q) - columns).to(tl.float32)
    if bias is not None:
        s += looked_up(bias + base, row, column, rows, columns, stride_bm, stride_bn, n_q, n_k).to(tl.float32)
    return s, bent


@triton.jit
def survives(rows, columns, pair, seed, dropout):
    """Which weights dropout keeps: by (batch · head, row, column) alone, so that tiles do not matter."""
    bits, _, _, _ = tl.philox(seed, columns, rows, pair, 0, PHILOX_ROUNDS)
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 >= dropout  # 24 bits, times 2⁻²⁴
