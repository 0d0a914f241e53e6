"""The Triton kernel that multiplies gradients by a number that only the GPU knows."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def scale_kernel(x, factor, out, count, BLOCK: tl.constexpr, SAME: tl.constexpr):
    """out = x · factor; nothing is read where out is x and the factor 1."""
    by = tl.load(factor)
    end = count.to(tl.int64)
    if SAME:
        end = tl.where(by == 1.0, 0, end)
    full = end // BLOCK * BLOCK  # of whole blocks vectors are loaded
    program, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    for at in range(program * BLOCK, full, tl.num_programs(0) * BLOCK):
        found = tl.load(x + at + c).to(tl.float32) * by
        tl.store(out + at + c, found.to(out.dtype.element_ty))
    if program == 0:
        inside = full + c < end
        found = tl.load(x + full + c, mask=inside, other=0.0).to(tl.float32) * by
        tl.store(out + full + c, found.to(out.dtype.element_ty), mask=inside)
