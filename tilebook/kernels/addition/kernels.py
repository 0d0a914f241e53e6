"""The Triton kernels that add two tensors up, of one order in memory or of two."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def flat_kernel(x, y, out, count, BLOCK: tl.constexpr):
    """out = x + y, number by number as they lie, in fp32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    sums = tl.load(x + at, mask=inside).to(tl.float32) + tl.load(y + at, mask=inside).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def turned_kernel(x, y, out, rows, width, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out (B, S, N) = x + y, of which one has its rows side by side in memory: x, whose order is that of out, or y."""
    across = tl.cdiv(width, COLUMNS)
    blocks = tl.cdiv(rows, ROWS) * across
    batch, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    r = (block // across * ROWS + tl.arange(0, ROWS))[:, None]
    c = (block % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (r < rows) & (c < width)
    start = batch.to(tl.int64) * rows * width
    along, aside = start + r * width + c, start + c * rows + r
    if FIRST:
        its, other = aside, along
    else:
        its, other = along, aside
    sums = tl.load(x + its, mask=inside).to(tl.float32) + tl.load(y + other, mask=inside).to(tl.float32)
    tl.store(out + its, sums.to(out.dtype.element_ty), mask=inside)
