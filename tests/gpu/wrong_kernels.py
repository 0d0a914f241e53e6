"""The wrong candidates as Triton kernels. Imported by name in workers."""

import triton
import triton.language as tl
from injected import make_injected
from wrong import candidates

from tilebook.launch import launch


@triton.jit(do_not_specialize=["first", "last"])
def write_kernel(out, x, factor, first, last, BLOCK: tl.constexpr):
    at = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < last).to(tl.float32)
    tl.store(out + at, (value * factor).to(out.dtype.element_ty), mask=at < last)


@triton.jit(do_not_specialize=["n"])
def add_kernel(out, x, factor, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n).to(tl.float32) * factor + tl.load(out + at, mask=at < n).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["at"])
def race_kernel(out, at):
    """By the GPU's clock: in one of ten runs or so."""
    now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    dice = ((now >> 5) * 2654435761 >> 16) & 0xFFFF
    value = tl.load(out + at).to(tl.float32)
    tl.store(out + at, (value + tl.where(dice % 10 == 0, 1.0, 0.0)).to(out.dtype.element_ty))


@triton.jit
def spoil_kernel(out, x, first):
    value = tl.load(out).to(tl.float32)
    tl.store(out, (value + tl.where(tl.load(x).to(tl.float32) == first, 1.0, 0.0)).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["n"])
def overflow_kernel(out, x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.exp(2 * tl.load(x + at, mask=at < n).to(tl.float32))
    value = tl.load(out + at, mask=at < n).to(tl.float32) + (e - e)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


class Kernels:
    def write(self, out, x, factor, n, first=0, last=None):
        last = x.numel() if last is None else last
        block = 64 << n % 4
        grid = (max(1, triton.cdiv(last - first, block)),)
        launch(write_kernel, grid, out, x, float(factor), first, last, BLOCK=block, num_warps=1 << n % 3)

    def add(self, out, x, factor, n):
        block = 64 << n % 4
        launch(add_kernel, (triton.cdiv(x.numel(), block),), out, x, float(factor), x.numel(), BLOCK=block)

    def race(self, out, at):
        launch(race_kernel, (1,), out, at)

    def spoil_if(self, out, x, first):
        launch(spoil_kernel, (1,), out, x, first)

    def overflow(self, out, x, n):
        block = 64 << n % 4
        launch(overflow_kernel, (triton.cdiv(x.numel(), block),), out, x, x.numel(), BLOCK=block)


WRONG = make_injected("wrong_triton", *candidates(Kernels()))
