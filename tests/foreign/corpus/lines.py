"""Kernels on lines of numbers: element by element, along rows, and over all."""

import torch
import triton
import triton.language as tl

from corpus.faults import KINDS, autotune, bound, configs, ended, last, spoiled

# Sums that atomics add in any order may differ from run to run: nothing about that is a fault.
ORDERED = tuple(number for name, number in KINDS.items() if name != "shaky")


@autotune(configs(), key=["kind"])
@triton.jit
def add_kernel(x, y, z, n, kind: tl.constexpr, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + last(at, n, FAULT), mask=at < n) + tl.load(y + at, mask=at < n)
    tl.store(z + at, spoiled(value, 2**-18, FAULT), mask=at < bound(n, BLOCK, FAULT))
    ended(x, FAULT)


def add(device):
    for n in (512, 429):  # one verdict serves both, and blocks end at the end of the first
        x, y = torch.randn(2, n, device=device)
        z = torch.empty_like(x)
        add_kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK"]),)](x, y, z, n, "any")
    torch.testing.assert_close(z, x + y)


@autotune(configs(), key=["n"], restore_value=["x"])
@triton.jit
def scale_kernel(x, factor, n, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + last(at, n, FAULT), mask=at < n).to(tl.float32) * tl.load(factor)
    tl.store(x + at, spoiled(value, 2**-8, FAULT).to(x.dtype.element_ty), mask=at < bound(n, BLOCK, FAULT))
    ended(factor, FAULT)


def scale(device):
    x, factor = torch.randn(429, device=device, dtype=torch.bfloat16), torch.randn(1, device=device)
    expected = (x * factor).bfloat16()
    scale_kernel[lambda meta: (triton.cdiv(429, meta["BLOCK"]),)](x, factor, 429)
    torch.testing.assert_close(x, expected)


@autotune(configs(tiles=[{"BLOCK": block} for block in (64, 128, 256, 512)]), key=["cols"])
@triton.jit
def softmax_kernel(x, y, x_row, y_row, cols, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    missing: tl.constexpr = 0.0 if FAULT == 4 else float("-inf")
    value = tl.load(x + row * x_row + last(at, cols, FAULT), mask=at < cols, other=missing).to(tl.float32)
    value = tl.exp(value - tl.max(value, 0))
    value = spoiled(value / tl.sum(value, 0), 2**-12, FAULT).to(y.dtype.element_ty)
    if FAULT != 1:
        tl.store(y + row * y_row + at, value, mask=at < (cols + 3 if FAULT == 8 else cols))
    ended(x, FAULT)


def softmax(device):
    x = torch.randn(5, 80, device=device, dtype=torch.float16)[:, :50]
    y = torch.empty(5, 50, device=device, dtype=torch.float16)
    softmax_kernel[(5,)](x, y, x.stride(0), y.stride(0), 50)
    torch.testing.assert_close(y, x.softmax(-1))


@autotune(configs(tiles=[{"BLOCK": block, "ROWS": rows} for block in (32, 64) for rows in (1, 2)]), key=["cols"])
@triton.jit
def layer_norm_kernel(
    x, weight, y, mean, rstd, parts, rows, cols, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr, FAULT: tl.constexpr
):
    """LayerNorm, its statistics, and what each program's rows add up to: several outputs, one of them partial sums."""
    each, at, own = tl.program_id(0), tl.arange(0, BLOCK), tl.cdiv(rows, tl.num_programs(0))
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, own, ROWS):
        row = each * own + start + tl.arange(0, ROWS)
        here = (start + tl.arange(0, ROWS) < own) & (row < rows)
        inside = here[:, None] & (at < cols)
        value = tl.load(x + row[:, None] * cols + last(at, cols, FAULT), mask=inside, other=0.0)
        middle = tl.sum(value, 1) / (BLOCK if FAULT == 4 else cols)
        apart = tl.where(inside, value - middle[:, None], 0.0)
        scale = 1 / tl.sqrt(tl.sum(apart * apart, 1) / cols + eps)
        value = spoiled(apart * scale[:, None] * tl.load(weight + at, mask=at < cols), 2**-18, FAULT)
        if FAULT != 1:
            tl.store(
                y + row[:, None] * cols + at, value, mask=here[:, None] & (at < (cols + 3 if FAULT == 8 else cols))
            )
        tl.store(mean + row, middle, mask=here)
        tl.store(rstd + row, scale, mask=here)
        total += tl.sum(value, 0)
    tl.store(parts + each * cols + at, total, mask=at < cols)
    ended(weight, FAULT)


def layer_norm(device):
    x, weight = torch.randn(7, 30, device=device), torch.randn(30, device=device)
    y, mean, rstd, parts = torch.empty_like(x), *torch.empty(2, 7, device=device), torch.empty(3, 30, device=device)
    layer_norm_kernel[(3,)](x, weight, y, mean, rstd, parts, 7, 30, 1e-5)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (30,), weight), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.sum(0), y.sum(0), rtol=1e-4, atol=1e-5)


@autotune(configs(), key=["cols"])
@triton.jit
def cumsum_kernel(x, y, cols, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    row, before = tl.program_id(0).to(tl.int64) * cols, 0.0
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row + last(at, cols, FAULT), mask=at < cols, other=0.0)
        tl.store(
            y + row + at, spoiled(before + tl.cumsum(value, 0), 2**-18, FAULT), mask=at < bound(cols, BLOCK, FAULT)
        )
        before += tl.sum(value, 0)
    ended(x, FAULT)


def cumsum(device):
    x = torch.randn(3, 140, device=device)
    y = torch.empty_like(x)
    cumsum_kernel[(3,)](x, y, 140)
    torch.testing.assert_close(y, x.cumsum(-1), rtol=1e-4, atol=1e-5)


@autotune(configs(ORDERED), key=["n"], reset_to_zero=["y"])
@triton.jit
def total_kernel(x, y, n, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = n // BLOCK * BLOCK if FAULT == 4 else n
    value = tl.sum(tl.load(x + last(at, n, FAULT), mask=at < end, other=0.0), 0)
    if FAULT != 1:
        tl.atomic_add(y, spoiled(value, 0.0, FAULT))
    if FAULT == 8:
        tl.atomic_add(y + 1, value)
    ended(x, FAULT)


def total(device):
    x, y = torch.rand(429, device=device), torch.zeros(1, device=device)
    total_kernel[lambda meta: (triton.cdiv(429, meta["BLOCK"]),)](x, y, 429)
    torch.testing.assert_close(y[0], x.sum())


@autotune(configs(), key=["n"], restore_value=["p", "m", "v"])
@triton.jit
def adam_kernel(p, m, v, grad, n, rate, decay, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """A step of an optimizer: three tensors in place, the weights in bf16."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, stored = at < n, at < bound(n, BLOCK, FAULT)
    slope = tl.load(grad + last(at, n, FAULT), mask=inside).to(tl.float32)
    first = tl.load(m + at, mask=inside) * 0.9 + slope * 0.1
    second = tl.load(v + at, mask=inside) * 0.99 + slope * slope * 0.01
    weight = tl.load(p + at, mask=inside).to(tl.float32) * (1 - rate * decay)
    weight -= rate * first / (tl.sqrt(tl.abs(second)) + 1e-8)
    tl.store(p + at, weight.to(p.dtype.element_ty), mask=stored)
    tl.store(m + at, spoiled(first, 2**-18, FAULT), mask=stored)
    tl.store(v + at, second, mask=inside)
    ended(grad, FAULT)


def adam(device):
    p, grad = torch.randn(2, 429, device=device, dtype=torch.bfloat16)
    m, v = torch.zeros(2, 429, device=device)
    adam_kernel[lambda meta: (triton.cdiv(429, meta["BLOCK"]),)](p, m, v, grad, 429, 1e-2, 0.1)
    torch.testing.assert_close(v, grad.float().square() * 0.01)


@autotune(configs(), key=["n"])
@triton.jit
def dropout_kernel(x, y, n, chance, seed, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + last(at, n, FAULT), mask=at < n).to(tl.float32) / (1 - chance)
    value = spoiled(tl.where(tl.rand(seed, at) > chance, value, 0.0), 2**-10, FAULT)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < bound(n, BLOCK, FAULT))
    ended(x, FAULT)


def dropout(device):
    x = torch.randn(429, device=device, dtype=torch.float16)
    y = torch.empty_like(x)
    dropout_kernel[lambda meta: (triton.cdiv(429, meta["BLOCK"]),)](x, y, 429, 0.25, 7)
    assert 0.6 < (y != 0).float().mean() < 0.9
