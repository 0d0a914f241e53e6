"""Kernels of other people, with and without faults, each in configs of which some are bad. Imported by name in workers.

A config's `FAULT` is what is wrong with it; 0 is nothing.
"""

import functools
import random
import time

import torch
import triton
import triton.language as tl

import tilebook

SILENT, RACE, OUTSIDE, RAGGED, DAMAGE, HANG = 1, 2, 3, 4, 5, 6


def configs(*faults, blocks=(16, 32, 64)):
    """Right ones first, as many as there are blocks; then one for each fault."""
    right = [triton.Config({"BLOCK": block, "FAULT": 0}, num_warps=4) for block in blocks]
    return [*right, *(triton.Config({"BLOCK": 32, "FAULT": fault}, num_warps=4, pre_hook=_before) for fault in faults)]


def _before(arguments):
    if arguments["FAULT"] == HANG:
        time.sleep(600)


def noise():
    """A race, which an interpreter that runs one program after the other cannot have."""
    return float(random.random() < 0.3)


def unmeasured(call, quantiles):
    """In the interpreter nothing can be timed: the first config wins."""
    return [1.0, 1.0, 1.0]


autotune = functools.partial(triton.autotune, do_bench=unmeasured)
FAULTS = (SILENT, RACE, OUTSIDE, RAGGED, DAMAGE, HANG)


@autotune(configs(*FAULTS), key=["n"])
@triton.jit
def scale_kernel(x, y, n, factor, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    if FAULT == 1:
        return
    if FAULT == 2:
        tl.store(y + at, value * factor + noise(), mask=at < n)
    elif FAULT == 3:
        tl.store(y + at, value * factor, mask=at < n + 1)
    elif FAULT == 4:
        tl.store(y + at, value * factor, mask=at < n // BLOCK * BLOCK)
    else:
        tl.store(y + at, value * factor, mask=at < n)
    if FAULT == 5:
        tl.store(x + at, value + 1, mask=at < n)


def scaled(kernel, x, factor=3.0):
    y = torch.empty_like(x)
    kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel(), factor)
    return y


first_is_wrong = autotune(configs(RAGGED)[-1:] + configs(), key=["n"])(scale_kernel.fn)
half_are_wrong = autotune(configs(RAGGED, blocks=(16,)), key=["n"])(scale_kernel.fn)


def tripled(x):
    return 3 * x


wrong_but_told = tilebook.autotune(
    [*configs(RAGGED, RAGGED, blocks=())[:1], *configs(RAGGED, blocks=(16,))[::-1]], key=["n"], reference=tripled
)(scale_kernel.fn)


@autotune(configs(RAGGED), key=["cols"])
@triton.jit
def columns_kernel(x, y, rows, cols, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """Twice x, of any number of rows: one verdict serves them all."""
    row, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    last = rows // BLOCK * BLOCK if FAULT == 4 else rows
    value = tl.load(x + row * cols + column, mask=row < rows, other=0.0)
    tl.store(y + row * cols + column, value * 2, mask=row < last)


def columns(x):
    y = torch.empty_like(x)
    columns_kernel[lambda meta: (triton.cdiv(x.shape[0], meta["BLOCK"]), x.shape[1])](x, y, *x.shape)
    return y


@autotune(configs=configs(), key=["rows", "cols"], restore_value=["y"])
@triton.heuristics({"EVEN": lambda args: args["cols"] % args["BLOCK"] == 0})
@triton.jit
def add_kernel(x, y, top, rows, cols, x_row, y_row, BLOCK: tl.constexpr, EVEN: tl.constexpr, FAULT: tl.constexpr):
    """y += x, and the sum of each row: in place, and several outputs."""
    row, total = tl.program_id(0), 0.0
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < cols
        value = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(y + row * y_row + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * y_row + at, value.to(y.dtype.element_ty), mask=inside)
        total += tl.sum(value)
    tl.store(top + row, total)


def add_(x, y):
    top = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    add_kernel[(x.shape[0],)](x, y, top, *x.shape, x.stride(0), y.stride(0))
    return top


@autotune(configs=configs(), key=["n"], reset_to_zero=["y"])
@triton.jit
def total_kernel(x, y, n, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y, tl.sum(tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)))


def total(x):
    y = torch.zeros(1, dtype=torch.float32, device=x.device)
    total_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel())
    return y


@autotune(configs=configs(), key=["rest"])
@triton.jit
def some_kernel(x, length, y, rest: tl.constexpr, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(length)
    tl.store(y + at, tl.load(x + at, mask=inside) + 1, mask=inside)


def some(x, length):
    y = torch.zeros_like(x)
    some_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, length, y, 0)
    return y


@autotune(configs=configs(), key=["n"])
@triton.jit
def pick_kernel(x, index, y, n, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + tl.load(index + at, mask=at < n, other=0), mask=at < n), mask=at < n)


def pick(x, index):
    y = torch.empty(index.shape, dtype=x.dtype, device=x.device)
    pick_kernel[lambda meta: (triton.cdiv(index.numel(), meta["BLOCK"]),)](x, index, y, index.numel())
    return y


@triton.jit
def ending_kernel(x, y, n, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)
    if FAULT == 7:
        tl.store(y + (1 << 44), 0.0)


hangs_second = autotune(configs(blocks=(16,)) + configs(HANG, blocks=(32, 64))[::-1], key=["n"])(ending_kernel)
ends_second = autotune(configs(blocks=(16,)) + configs(7, blocks=(32, 64))[::-1], key=["n"])(ending_kernel)


def doubled(kernel, x):
    y = torch.empty_like(x)
    kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel())
    return y
