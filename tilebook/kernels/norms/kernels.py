"""The norms' Triton kernels. A program takes ROWS rows at a time, BLOCK columns of them at a time."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(row, first, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column numbers of a block, and which of them exist."""
    r = row + tl.arange(0, ROWS)
    c = first + tl.arange(0, BLOCK)
    return r.to(tl.int64)[:, None], c[None, :], (r < rows)[:, None] & (c < width)[None, :]


@triton.jit
def _load(pointer, r, c, stride, inside):
    return tl.load(pointer + r * stride + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def fwd_kernel(
    x, weight, y, rstd, rows, width, stride_x, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    row = tl.program_id(0) * ROWS
    if WHOLE:
        r, c, inside = _place(row, 0, rows, width, ROWS, BLOCK)
        values = _load(x, r, c, stride_x, inside)
        scale = tl.rsqrt(tl.sum(values * values, 1) / width + eps)[:, None]
        gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
        tl.store(y + r * width + c, (values * scale * gain).to(y.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, width, BLOCK):
            r, c, inside = _place(row, first, rows, width, ROWS, BLOCK)
            values = _load(x, r, c, stride_x, inside)
            squares += values * values
        scale = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
        for first in range(0, width, BLOCK):
            r, c, inside = _place(row, first, rows, width, ROWS, BLOCK)
            values = _load(x, r, c, stride_x, inside)
            gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
            tl.store(y + r * width + c, (values * scale * gain).to(y.dtype.element_ty), mask=inside)
    own, _, _ = _place(row, 0, rows, width, ROWS, 1)
    tl.store(rstd + own, scale, mask=own < rows)


@triton.jit(do_not_specialize=["rows"])
def bwd_kernel(
    dy, x, weight, rstd, dx, partial, rows, width, stride_dy, stride_x,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dx, and in partial (programs, width) each program's share of dweight. Rows go round the programs in turn."""
    mine = tl.program_id(0)
    step = tl.num_programs(0) * ROWS
    if WHOLE:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        columns = tl.arange(0, BLOCK)[None, :]
        for row in range(mine * ROWS, rows, step):
            r, c, inside = _place(row, 0, rows, width, ROWS, BLOCK)
            scale = tl.load(rstd + r, mask=r < rows, other=0.0)
            normal = _load(x, r, c, stride_x, inside) * scale
            upper = _load(dy, r, c, stride_dy, inside)
            total += upper * normal
            # Here and not above: it waits in the L1 cache, and registers are what is short.
            upper *= tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
            mean = (tl.sum(upper * normal, 1) / width)[:, None]
            tl.store(dx + r * width + c, (scale * (upper - normal * mean)).to(dx.dtype.element_ty), mask=inside)
        share = partial + mine.to(tl.int64) * width + tl.arange(0, BLOCK)
        tl.store(share, tl.sum(total, 0), mask=tl.arange(0, BLOCK) < width)
    else:
        for row in range(mine * ROWS, rows, step):
            products = tl.zeros((ROWS, BLOCK), tl.float32)
            for first in range(0, width, BLOCK):
                r, c, inside = _place(row, first, rows, width, ROWS, BLOCK)
                gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
                products += _load(dy, r, c, stride_dy, inside) * gain * _load(x, r, c, stride_x, inside)
            own, _, _ = _place(row, 0, rows, width, ROWS, 1)
            scale = tl.load(rstd + own, mask=own < rows, other=0.0)
            mean = tl.sum(products, 1)[:, None] * scale / width
            known = tl.where(row == mine * ROWS, 0, width)  # in the first turn there are no shares to add to
            for first in range(0, width, BLOCK):
                r, c, inside = _place(row, first, rows, width, ROWS, BLOCK)
                gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
                normal = _load(x, r, c, stride_x, inside) * scale
                upper = _load(dy, r, c, stride_dy, inside)
                # The share of dweight waits in the L2 cache: registers hold a BLOCK of it only.
                columns = first + tl.arange(0, BLOCK)
                share = partial + mine.to(tl.int64) * width + columns
                so_far = tl.load(share, mask=columns < known, other=0.0)
                tl.store(share, so_far + tl.sum(upper * normal, 0), mask=columns < width)
                upper *= gain
                tl.store(dx + r * width + c, (scale * (upper - normal * mean)).to(dx.dtype.element_ty), mask=inside)
            tl.debug_barrier()  # other threads may read these shares in the next turn


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(partial, dweight, programs, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dweight = the sum of all programs' shares, in one fixed order."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for row in range(0, programs, ROWS):
        r, c, inside = _place(row, tl.program_id(0) * BLOCK, programs, width, ROWS, BLOCK)
        total += _load(partial, r, c, width, inside)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dweight + columns, tl.sum(total, 0).to(dweight.dtype.element_ty), mask=columns < width)
