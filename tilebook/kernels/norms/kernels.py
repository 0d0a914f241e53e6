"""The norms' Triton kernels. A program takes ROWS rows at a time, BLOCK columns of them at a time.

A tensor that is None is not there: without `mean` rows are not centred, without `weight` or `bias` not scaled or
shifted, without `residual` and `dtotal` nothing is added to x and to its gradient.

With a UNIT, x lies transposed: (B, S, N) of which the rows of a batch are side by side in memory, S = stride_x · UNIT
apart from column to column. Such a program's rows are of one batch; all other tensors have contiguous rows.
"""

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
def _turned(x, tile, length, width, ROWS: tl.constexpr):
    """A tile's first row, the row behind the last of its batch, and that of which row r, column c is at r + c · S."""
    tiles = (length + ROWS - 1) // ROWS
    batch = tile // tiles
    return batch * length + tile % tiles * ROWS, (batch + 1) * length, x + batch.to(tl.int64) * length * (width - 1)


@triton.jit
def _load(pointer, r, c, stride, inside, TURNED: tl.constexpr = False):
    if TURNED:
        r, c = c, r
    return tl.load(pointer + r * stride + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _added(values, x, residual, r, c, stride, inside):
    """x + residual, rounded as x is."""
    return (values + _load(residual, r, c, stride, inside)).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _gain(weight, c, width):
    """The weight of each column, 1 where there is none."""
    gain = 1.0 if weight is None else tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
    return gain


@triton.jit
def _normal(x, mean, r, c, stride, inside, scale, rows, TURNED: tl.constexpr):
    """x̂ = (x − mean) · scale. What is not inside may be any number where there is a mean."""
    values = _load(x, r, c, stride, inside, TURNED)
    if mean is not None:
        values -= tl.load(mean + r, mask=r < rows, other=0.0)
    return values * scale


@triton.jit
def _write(y, values, scale, weight, bias, r, c, width, inside):
    """y = x̂ · weight + bias, for values that are centred already."""
    gain = _gain(weight, c, width)
    if bias is None:
        tl.store(y + r * width + c, (values * scale * gain).to(y.dtype.element_ty), mask=inside)
    else:
        shift = tl.load(bias + c, mask=c < width, other=0.0).to(tl.float32)
        tl.store(y + r * width + c, (values * scale * gain + shift).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _moments(
    x, residual, row, rows, width, stride, stride_residual,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Mean of each row and sum of squares around it, block by block (Chan, Golub & LeVeque, 1979)."""
    center = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, BLOCK):
        r, c, inside = _place(row, first, rows, width, ROWS, BLOCK)
        values = _load(x, r, c, stride, inside, TURNED)
        if residual is not None:
            values = _added(values, x, residual, r, c, stride_residual, inside)
        count = tl.minimum(width - first, BLOCK)
        here = tl.sum(values, 1) / count
        around = tl.where(inside, values - here[:, None], 0.0)
        apart, share = here - center, count / (first + count)
        center += apart * share
        squares += tl.sum(around * around, 1) + apart * apart * (first * share)
    return center, squares


@triton.jit(do_not_specialize=["rows"])
def fwd_kernel(
    x, residual, weight, bias, y, total, mean, rstd, rows, width, stride_x, stride_residual, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    if UNIT:
        stride_x *= UNIT
        row, rows, x = _turned(x, tl.program_id(0), stride_x, width, ROWS)
    if WHOLE:
        r, c, inside = _place(row, 0, rows, width, ROWS, BLOCK)
        values = _load(x, r, c, stride_x, inside, UNIT > 0)
        if residual is not None:
            values = _added(values, x, residual, r, c, stride_residual, inside)
            tl.store(total + r * width + c, values.to(total.dtype.element_ty), mask=inside)
        if mean is not None:
            center = (tl.sum(values, 1) / width)[:, None]
            values = tl.where(inside, values - center, 0.0)
        scale = tl.rsqrt(tl.sum(values * values, 1) / width + eps)[:, None]
        _write(y, values, scale, weight, bias, r, c, width, inside)
    else:
        if mean is not None:
            center, power = _moments(x, residual, row, rows, width, stride_x, stride_residual, ROWS, BLOCK, UNIT > 0)
            center = center[:, None]
        else:
            squares = tl.zeros((ROWS, BLOCK), tl.float32)
            for first in range(0, width, BLOCK):
                r, c, inside = _place(row, first, rows, width, ROWS, BLOCK)
                values = _load(x, r, c, stride_x, inside, UNIT > 0)
                if residual is not None:
                    values = _added(values, x, residual, r, c, stride_residual, inside)
                squares += values * values
            power = tl.sum(squares, 1)
        scale = tl.rsqrt(power / width + eps)[:, None]
        for first in range(0, width, BLOCK):
            r, c, inside = _place(row, first, rows, width, ROWS, BLOCK)
            values = _load(x, r, c, stride_x, inside, UNIT > 0)
            if residual is not None:
                values = _added(values, x, residual, r, c, stride_residual, inside)
                tl.store(total + r * width + c, values.to(total.dtype.element_ty), mask=inside)
            if mean is not None:
                values -= center
            _write(y, values, scale, weight, bias, r, c, width, inside)
    own, _, _ = _place(row, 0, rows, width, ROWS, 1)
    tl.store(rstd + own, scale, mask=own < rows)
    if mean is not None:
        tl.store(mean + own, center, mask=own < rows)


@triton.jit
def _add_share(partial, mine, values, columns, known, width):
    """Adds the sums over a block's rows to a program's share, which waits in the L2 cache, up to column `known`."""
    share = partial + mine.to(tl.int64) * width + columns
    so_far = tl.load(share, mask=columns < known, other=0.0)
    tl.store(share, so_far + tl.sum(values, 0), mask=columns < width)


@triton.jit(do_not_specialize=["rows"])
def bwd_kernel(
    dy, dtotal, x, weight, mean, rstd, dx, partial, partial_bias, rows, width, stride_dy, stride_dtotal, stride_x,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dx, and in partial (programs, width) each program's share of dweight, in partial_bias of dbias.

    Rows go round the programs in turn.
    """
    mine = tl.program_id(0)
    step = tl.num_programs(0) * ROWS
    turns = rows
    if UNIT:
        stride_x *= UNIT
        turns = rows // stride_x * ((stride_x + ROWS - 1) // ROWS) * ROWS
    if WHOLE:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        if partial_bias is not None:
            total_bias = tl.zeros((ROWS, BLOCK), tl.float32)
        columns = tl.arange(0, BLOCK)[None, :]
        for turn in range(mine * ROWS, turns, step):
            row, end, there = turn, rows, x
            if UNIT:
                row, end, there = _turned(x, turn // ROWS, stride_x, width, ROWS)
            r, c, inside = _place(row, 0, end, width, ROWS, BLOCK)
            scale = tl.load(rstd + r, mask=r < end, other=0.0)
            normal = _normal(there, mean, r, c, stride_x, inside, scale, end, UNIT > 0)
            upper = _load(dy, r, c, stride_dy, inside)
            if partial is not None:
                total += upper * normal
            if partial_bias is not None:
                total_bias += upper
            # Here and not above: it waits in the L1 cache, and registers are what is short.
            upper *= _gain(weight, columns, width)
            slope = (tl.sum(upper * normal, 1) / width)[:, None]
            if mean is not None:
                upper -= (tl.sum(upper, 1) / width)[:, None]
            into = dx + r * width + c
            slopes = scale * (upper - normal * slope)
            if dtotal is not None:
                slopes += _load(dtotal, r, c, stride_dtotal, inside)
            tl.store(into, slopes.to(dx.dtype.element_ty), mask=inside)
        if partial is not None:
            share = partial + mine.to(tl.int64) * width + tl.arange(0, BLOCK)
            tl.store(share, tl.sum(total, 0), mask=tl.arange(0, BLOCK) < width)
        if partial_bias is not None:
            share = partial_bias + mine.to(tl.int64) * width + tl.arange(0, BLOCK)
            tl.store(share, tl.sum(total_bias, 0), mask=tl.arange(0, BLOCK) < width)
    else:
        for turn in range(mine * ROWS, turns, step):
            row, end, there = turn, rows, x
            if UNIT:
                row, end, there = _turned(x, turn // ROWS, stride_x, width, ROWS)
            products = tl.zeros((ROWS, BLOCK), tl.float32)
            if mean is not None:
                level = tl.zeros((ROWS, BLOCK), tl.float32)
            for first in range(0, width, BLOCK):
                r, c, inside = _place(row, first, end, width, ROWS, BLOCK)
                gain = _gain(weight, c, width)
                upper = _load(dy, r, c, stride_dy, inside) * gain
                products += upper * _normal(there, mean, r, c, stride_x, inside, 1.0, end, UNIT > 0)
                if mean is not None:
                    level += upper
            own, _, _ = _place(row, 0, end, width, ROWS, 1)
            scale = tl.load(rstd + own, mask=own < end, other=0.0)
            slope = tl.sum(products, 1)[:, None] * scale / width
            known = tl.where(turn == mine * ROWS, 0, width)  # in the first turn there are no shares to add to
            for first in range(0, width, BLOCK):
                r, c, inside = _place(row, first, end, width, ROWS, BLOCK)
                gain = _gain(weight, c, width)
                normal = _normal(there, mean, r, c, stride_x, inside, scale, end, UNIT > 0)
                upper = _load(dy, r, c, stride_dy, inside)
                columns = first + tl.arange(0, BLOCK)  # registers hold a BLOCK of a share only
                if partial is not None:
                    _add_share(partial, mine, upper * normal, columns, known, width)
                if partial_bias is not None:
                    _add_share(partial_bias, mine, upper, columns, known, width)
                upper *= gain
                if mean is not None:
                    upper -= tl.sum(level, 1)[:, None] / width
                into = dx + r * width + c
                slopes = scale * (upper - normal * slope)
                if dtotal is not None:
                    slopes += _load(dtotal, r, c, stride_dtotal, inside)
                tl.store(into, slopes.to(dx.dtype.element_ty), mask=inside)
            tl.debug_barrier()  # other threads may read these shares in the next turn


@triton.jit
def _sum(partial, out, programs, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for row in range(0, programs, ROWS):
        r, c, inside = _place(row, tl.program_id(0) * BLOCK, programs, width, ROWS, BLOCK)
        total += _load(partial, r, c, width, inside)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < width)


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(partial, partial_bias, dweight, dbias, programs, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dweight and dbias = the sums of all programs' shares, in one fixed order."""
    _sum(partial, dweight, programs, width, ROWS, BLOCK)
    if partial_bias is not None:
        _sum(partial_bias, dbias, programs, width, ROWS, BLOCK)
