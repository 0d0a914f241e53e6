"""Kernels of other people that have no autotuner, launched with what their own Python chooses. Imported by name."""

import torch
import triton
import triton.language as tl


@triton.jit
def shift_kernel(x, y, n, by, BLOCK: tl.constexpr, UP: tl.constexpr = True):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    tl.store(y + at, value + by if UP else value - by, mask=at < n)


def shift(x, by=1.0):
    """Its grid is a function of the launch's arguments."""
    y = torch.empty_like(x)
    shift_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel(), by, BLOCK=16, num_warps=2)
    return y


def shift_by_tuple(x, by=1.0, grid=None):
    """Its grid is computed from the block that is passed, by position."""
    y = torch.empty_like(x)
    shift_kernel[grid or (triton.cdiv(x.numel(), 16),)](x, y, x.numel(), by, 16, num_warps=2)
    return y


@triton.heuristics({"EVEN": lambda args: args["cols"] % args["BLOCK"] == 0})
@triton.jit
def rows_kernel(x, y, cols, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Each program has a row, and a loop over it: the grid has nothing to do with the block."""
    row = tl.program_id(0) * cols
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if EVEN:
            tl.store(y + row + at, tl.load(x + row + at) * 2)
        else:
            tl.store(y + row + at, tl.load(x + row + at, mask=at < cols) * 2, mask=at < cols)


def rows(x):
    y = torch.empty_like(x)
    rows_kernel[(x.shape[0],)](x, y, x.shape[1], BLOCK=32)
    return y
