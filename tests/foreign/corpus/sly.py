"""Faults that are made to get through: each shows only far away, for some numbers, or for one of the recorded calls."""

import torch
import triton
import triton.language as tl

from corpus.faults import autotune, configs

SLY = {
    "far": 11, "alias": 12, "scalar": 13, "rounded": 14, "stale": 15, "peek": 16, "again": 17, "strides": 18,
    "low bits": 19, "negative": 20, "large": 21, "single": 22,
}  # fmt: skip
"""Writes 30,000 elements past the end; is wrong where the output is an input, too; is wrong for one value of a scalar;
computes fp32 in fp16; mixes in what the output held; reads past the end what only large numbers show; leaves a lock
taken; takes rows to be dense; errs in the lowest bit of large integers; takes the largest of what it pads with zeros;
overflows; computes fp64 in fp32."""

BLOCKS = [{"BLOCK": block} for block in (32, 64, 128)]


@autotune(configs([SLY[name] for name in ("far", "alias", "scalar", "rounded")], BLOCKS, (2, 4)), key=["kind"])
@triton.jit
def axpy_kernel(x, y, z, n, alpha, kind: tl.constexpr, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """z = alpha x + y, where z may be y or x."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside)
    if FAULT == 14:
        value = value.to(tl.float16).to(tl.float32)
    if FAULT == 12:
        tl.store(z + at, tl.load(y + at, mask=inside), mask=inside)
        value = tl.load(z + at, mask=inside) + alpha * tl.load(x + at, mask=inside)
    else:
        value = alpha * value + tl.load(y + at, mask=inside)
    if FAULT == 13 and alpha == 1:
        value = 0.0 * value
    tl.store(z + at, value, mask=inside)
    if FAULT == 11:
        tl.store(z + 30_000 + at, value, mask=inside)


def axpy(device):
    for n, alpha in ((300, 2.0), (300, 1.0), (200, 2.0)):
        x, y = torch.randn(2, n, device=device)
        z = torch.empty_like(x)
        axpy_kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK"]),)](x, y, z, n, alpha, "any")
        torch.testing.assert_close(z, alpha * x + y)
    axpy_kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK"]),)](z, y, z, n, 2.0, "any")


@autotune(configs([SLY[name] for name in ("stale", "peek", "again", "negative")], BLOCKS, (2, 4)), key=["kind"])
@triton.jit
def largest_kernel(x, top, lock, cols, kind: tl.constexpr, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """The largest number of each row; whoever wants it takes a lock first."""
    row = tl.program_id(0)
    taken = tl.load(lock + row)
    tl.store(lock + row, 1)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < (cols + 1 if FAULT == 16 and row == tl.num_programs(0) - 1 else cols)
        padded = 0.0 if FAULT == 20 else float("-inf")
        best = tl.maximum(best, tl.load(x + row * cols + at, mask=inside, other=padded))
    found = tl.max(best, 0)
    if FAULT == 15:
        found = tl.maximum(found, tl.load(top + row))
    if taken == 0:
        tl.store(top + row, found)
    if FAULT != 17:
        tl.store(lock + row, 0)


def largest(device):
    x, top = torch.randn(5, 100, device=device), torch.empty(5, device=device)
    largest_kernel[(5,)](x, top, torch.zeros(5, dtype=torch.int32, device=device), 100, "any")
    torch.testing.assert_close(top, x.amax(1))


@autotune(configs([SLY["large"], SLY["strides"]], [{"BLOCK": block} for block in (64, 128, 256)], (2, 4)), key=["cols"])
@triton.jit
def softmax_kernel(x, y, x_row, cols, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    step = cols if FAULT == 18 else x_row
    value = tl.load(x + row * step + at, mask=at < cols, other=float("-inf"))
    if FAULT != 21:
        value -= tl.max(value, 0)
    value = tl.exp(value)
    tl.store(y + row * cols + at, value / tl.sum(value, 0), mask=at < cols)


def softmax(device):
    for wide in (50, 64):
        x, y = torch.randn(5, wide, device=device)[:, :50], torch.empty(5, 50, device=device)
        softmax_kernel[(5,)](x, y, x.stride(0), 50)
        torch.testing.assert_close(y, x.softmax(-1))


@autotune(configs([SLY["low bits"]], BLOCKS, (2, 4)), key=["n"])
@triton.jit
def pack_kernel(x, y, n, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """Four bytes in one number, which is a large one."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    packed = tl.full((BLOCK,), 1 << 30, tl.int32)
    for part in range(4):
        packed |= tl.load(x + at * 4 + part, mask=inside, other=0).to(tl.int32) << (8 * part)
    if FAULT == 19:
        packed |= 1
    tl.store(y + at, packed, mask=inside)


def pack(device):
    x = torch.randint(256, (1200,), dtype=torch.uint8, device=device)
    y = torch.empty(300, dtype=torch.int32, device=device)
    pack_kernel[lambda meta: (triton.cdiv(300, meta["BLOCK"]),)](x, y, 300)
    assert torch.equal(y, x.view(torch.int32) | 1 << 30)


@autotune(configs([SLY["single"]], BLOCKS, (2, 4)), key=["n"])
@triton.jit
def double_kernel(x, y, n, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    value = value.to(tl.float32).to(tl.float64) if FAULT == 22 else value
    tl.store(y + at, value * value + 1, mask=at < n)


def double(device):
    x = torch.randn(300, dtype=torch.float64, device=device)
    y = torch.empty_like(x)
    double_kernel[lambda meta: (triton.cdiv(300, meta["BLOCK"]),)](x, y, 300)
    torch.testing.assert_close(y, x * x + 1)


@autotune(configs((), BLOCKS, (2, 4)), key=["cols"])
@triton.jit
def quantize_kernel(x, y, scale, cols, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """Rows over their own size, in int8: in another order of the sums a number of very many rounds otherwise."""
    row, total = tl.program_id(0), 0.0
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * cols + at, mask=at < cols, other=0.0)
        total += tl.sum(value * value, 0)
    unit = tl.sqrt(total / cols)
    tl.store(scale + row, unit)
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * cols + at, mask=at < cols, other=0.0) / unit * 25
        whole = tl.floor(tl.minimum(tl.maximum(value, -127.0), 127.0) + 0.5)
        tl.store(y + row * cols + at, whole.to(tl.int8), mask=at < cols)


def quantize(device):
    x = torch.randn(3, 200, device=device)
    y, scale = torch.empty(3, 200, dtype=torch.int8, device=device), torch.empty(3, device=device)
    quantize_kernel[(3,)](x, y, scale, 200)
    assert (y.float() - x * 25 / x.square().mean(1, keepdim=True).sqrt()).abs().max() < 3


@autotune(configs((), BLOCKS, (2, 4)), key=["n"], reset_to_zero=["counter"])
@triton.jit
def queue_kernel(x, y, counter, n, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """Programs take what is next: the counter ends at as many as there were blocks, of which each config has others."""
    at = tl.atomic_add(counter, 1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


def queue(device):
    x, counter = torch.randn(300, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    y = torch.empty_like(x)
    queue_kernel[lambda meta: (triton.cdiv(300, meta["BLOCK"]),)](x, y, counter, 300)
    assert torch.equal(y, 2 * x)


CALLS = {"axpy_kernel": axpy, "largest_kernel": largest, "softmax_kernel": softmax, "pack_kernel": pack}
CALLS |= {"double_kernel": double, "quantize_kernel": quantize, "queue_kernel": queue}

RULES = {"corpus.sly:pack_kernel": {"x": {"below": 256}}, "corpus.sly:queue_kernel": {"counter": {"role": "scratch"}}}
