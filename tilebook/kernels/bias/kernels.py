"""The Triton kernels that sum rows up: parts of them side by side, then the parts, in a fixed order."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "share"])
def part_kernel(dy, parts, rows, share, width, stride, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """parts (splits, N): sums of `share` rows each of dy (M, N)."""
    across = tl.cdiv(width, BLOCK)
    split = tl.program_id(0) // across
    c = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    first = split * share
    last = tl.minimum(first + share, rows)
    inside = (c < width)[None, :]
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for r0 in tl.range(first, last, ROWS, num_stages=2):
        r = r0 + tl.arange(0, ROWS)
        from_ = dy + r[:, None].to(tl.int64) * stride + c[None, :]
        acc += tl.load(from_, mask=(r < last)[:, None] & inside, other=0.0).to(tl.float32)
    tl.store(parts + split.to(tl.int64) * width + c, tl.sum(acc, 0), mask=c < width)


@triton.jit
def total_kernel(parts, out, splits, width, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """out (N,) = Σ parts (splits, N)."""
    c, s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, SPLITS)
    there = (s < splits)[:, None] & (c < width)[None, :]
    values = tl.load(parts + s[:, None] * width + c[None, :], mask=there, other=0.0)
    tl.store(out + c, tl.sum(values, 0), mask=c < width)
