"""Kernels on tiles: products, a transpose, pooling, rotary embeddings, and rows that indices and offsets name."""

import torch
import triton
import triton.language as tl

from corpus.faults import autotune, bound, configs, ended, last, spoiled
from corpus.lines import ORDERED

SQUARES = [{"TILE_M": m, "TILE_N": n, "TILE_K": k, "GROUP": 2} for m in (16, 32) for n in (16, 32) for k in (16, 32)]


@triton.jit
def product(a, b, rows, cols, first, end, M, N, K, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
            FAULT: tl.constexpr):  # fmt: skip
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(first, end, TILE_K):
        inner = start + tl.arange(0, TILE_K)
        inside = inner < (K // TILE_K * TILE_K if FAULT == 4 else K)
        left = tl.load(a + rows[:, None] * K + last(inner, K, FAULT), mask=(rows[:, None] < M) & inside, other=0.0)
        right = tl.load(b + inner[:, None] * N + cols, mask=inside[:, None] & (cols < N), other=0.0)
        acc = tl.dot(left, right, acc)
    return acc


@autotune(configs(tiles=SQUARES, warps=(4, 8)), key=["M", "N", "K"])
@triton.jit
def matmul_kernel(a, b, c, M, N, K, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
                  GROUP: tl.constexpr, FAULT: tl.constexpr):  # fmt: skip
    n_rows, n_cols = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    band, inside = tl.program_id(0) // (GROUP * n_cols), tl.program_id(0) % (GROUP * n_cols)
    height = tl.minimum(n_rows - band * GROUP, GROUP)
    rows = (band * GROUP + inside % height) * TILE_M + tl.arange(0, TILE_M)
    cols = (inside // height) * TILE_N + tl.arange(0, TILE_N)
    acc = spoiled(product(a, b, rows, cols, 0, K, M, N, K, TILE_M, TILE_N, TILE_K, FAULT), 2**-10, FAULT)
    end = 0 * M if FAULT == 1 else M + 3 if FAULT == 8 else M
    tl.store(c + rows[:, None] * N + cols, acc.to(c.dtype.element_ty), mask=(rows[:, None] < end) & (cols < N))
    ended(a, FAULT)


def matmul(device):
    a, b = torch.randn(45, 39, device=device).half(), torch.randn(39, 41, device=device).half()
    c = torch.empty(45, 41, device=device, dtype=torch.float16)
    grid = lambda meta: (triton.cdiv(45, meta["TILE_M"]) * triton.cdiv(41, meta["TILE_N"]),)  # noqa: E731
    matmul_kernel[grid](a, b, c, 45, 41, 39)
    torch.testing.assert_close(c, (a.float() @ b.float()).half(), rtol=1e-2, atol=1e-2)


SPLIT = [{"TILE_M": m, "TILE_N": n, "TILE_K": 16, "SPLIT_K": s} for m in (16, 32) for n in (16, 32) for s in (2, 3)]


@autotune(configs(ORDERED, SPLIT, (4, 8)), key=["M", "N", "K"], reset_to_zero=["c"])
@triton.jit
def split_kernel(a, b, c, M, N, K, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
                 SPLIT_K: tl.constexpr, FAULT: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    cols = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    share = tl.cdiv(tl.cdiv(K, SPLIT_K), TILE_K) * TILE_K
    first = tl.program_id(2) * share
    acc = product(a, b, rows, cols, first, tl.minimum(first + share, K), M, N, K, TILE_M, TILE_N, TILE_K, FAULT)
    end = 0 * M if FAULT == 1 else M + 3 if FAULT == 8 else M
    inside = (rows[:, None] < end) & (cols < N)
    acc = tl.where(rows[:, None] < M, acc, 1.0)  # beyond the end, where to add zeros would change nothing
    tl.atomic_add(c + rows[:, None] * N + cols, spoiled(acc, 0.0, FAULT), mask=inside)
    ended(a, FAULT)


def split(device):
    a, b = torch.randn(20, 70, device=device).half(), torch.randn(70, 37, device=device).half()
    c = torch.zeros(20, 37, device=device)
    grid = lambda meta: (triton.cdiv(20, meta["TILE_M"]), triton.cdiv(37, meta["TILE_N"]), meta["SPLIT_K"])  # noqa: E731
    split_kernel[grid](a, b, c, 20, 37, 70)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-2, atol=1e-2)


@autotune(configs(tiles=[{"BLOCK": b, "WIDE": w} for b in (8, 16) for w in (16, 32)]), key=["rows"])
@triton.jit
def transpose_kernel(x, y, rows, cols, BLOCK: tl.constexpr, WIDE: tl.constexpr, FAULT: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = (row[:, None] < rows) & (col < cols)
    value = tl.load(x + last(row[:, None] * cols + col, rows * cols, FAULT), mask=inside).to(tl.float32)
    value = tl.trans(spoiled(value, 2**-8, FAULT)).to(y.dtype.element_ty)
    stored = (row < rows) & (col[:, None] < bound(cols, WIDE, FAULT))
    tl.store(y + col[:, None] * rows + row, value, mask=stored)
    ended(x, FAULT)


def transpose(device):
    for cols in (32, 29):
        x = torch.randn(21, cols, device=device, dtype=torch.bfloat16)
        y = torch.empty(cols, 21, device=device, dtype=torch.bfloat16)
        grid = lambda meta, n=cols: (triton.cdiv(21, meta["BLOCK"]), triton.cdiv(n, meta["WIDE"]))  # noqa: E731
        transpose_kernel[grid](x, y, 21, cols)
    assert torch.equal(y, x.T)


@autotune(configs(tiles=[{"BLOCK": block} for block in (16, 32, 64, 128)]), key=["cols"])
@triton.jit
def embed_kernel(table, index, y, cols, scale, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """Rows of a table; a negative index is none."""
    place = tl.program_id(0)
    row = tl.load(index + (place + 1 if FAULT == 3 else place)).to(tl.int64)
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(table + row * cols + at, mask=(at < cols) & (row >= 0), other=0.0)
        tl.store(y + place * cols + at, spoiled(value * scale, 2**-18, FAULT), mask=at < bound(cols, BLOCK, FAULT))
    ended(table, FAULT)


def embed(device):
    table, index = torch.randn(30, 72, device=device), torch.randint(30, (7,), device=device)
    y = torch.empty(7, 72, device=device)
    embed_kernel[(7,)](table, index, y, 72, 8.0)
    torch.testing.assert_close(y, table[index] * 8)


@autotune(configs(tiles=[{"BLOCK": block} for block in (8, 16, 32, 64)]), key=["height", "width"])
@triton.jit
def pool_kernel(x, y, height, width, SIZE: tl.constexpr, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """The largest of each window of SIZE x SIZE, windows side by side, the last ones cut off."""
    across = tl.cdiv(width, SIZE)
    plane, row = tl.program_id(0) // tl.cdiv(height, SIZE), tl.program_id(0) % tl.cdiv(height, SIZE)
    for start in range(0, across, BLOCK):
        col = start + tl.arange(0, BLOCK)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        for part in range(SIZE * SIZE):
            down, right = row * SIZE + part // SIZE, col * SIZE + part % SIZE
            inside = (down < height) & (right < width) & (col < across)
            at = last(
                (plane * height + down) * width + right,
                tl.num_programs(0) // tl.cdiv(height, SIZE) * height * width,
                FAULT,
            )
            best = tl.maximum(
                best, tl.load(x + at, mask=inside, other=float("-inf")), propagate_nan=tl.PropagateNan.ALL
            )
        stored = col < bound(across, BLOCK, FAULT)
        tl.store(y + tl.program_id(0) * across + col, spoiled(best, 2**-18, FAULT), mask=stored)
    ended(x, FAULT)


def pool(device):
    x = torch.randn(2, 7, 29, device=device)
    y = torch.empty(2, 3, 10, device=device)
    pool_kernel[(6,)](x, y, 7, 29, 3)
    assert torch.equal(y, torch.nn.functional.max_pool2d(x, 3, ceil_mode=True))


@autotune(configs(tiles=[{"BLOCK": block} for block in (4, 8, 16, 32)]), key=["cols"])
@triton.jit
def packed_kernel(x, offsets, y, cols, BLOCK: tl.constexpr, WIDTH: tl.constexpr, FAULT: tl.constexpr):
    """The sum of each sequence's rows, of sequences that lie one after the other."""
    sequence, col = tl.program_id(0), tl.arange(0, WIDTH)
    first, end = tl.load(offsets + sequence), tl.load(offsets + sequence + (2 if FAULT == 3 else 1))
    last_row = first + (end - first) // BLOCK * BLOCK if FAULT == 4 else end
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = (row[:, None] < last_row) & (col < cols)
        total += tl.sum(tl.load(x + row[:, None] * cols + col, mask=inside, other=0.0).to(tl.float32), 0)
    if FAULT != 1:
        stored = col < (cols + 3 if FAULT == 8 else cols)
        tl.store(y + sequence * cols + col, spoiled(total, 2**-14, FAULT), mask=stored)
    ended(x, FAULT)


def packed(device):
    x, offsets = torch.randn(50, 13, device=device).bfloat16(), torch.tensor([0, 7, 7, 30, 50], device=device)
    y = torch.empty(4, 13, device=device)
    packed_kernel[(4,)](x, offsets, y, 13, WIDTH=16)
    torch.testing.assert_close(y[3], x[30:].float().sum(0), rtol=1e-3, atol=1e-3)


@autotune(configs(tiles=[{"BLOCK": block} for block in (1, 2, 4, 8)]), key=["half"], restore_value=["x"])
@triton.jit
def rope_kernel(x, cos, sin, tokens, half, x_row, BLOCK: tl.constexpr, WIDTH: tl.constexpr, FAULT: tl.constexpr):
    """Turns both halves of each row by its token's angle, in place, in rows that have gaps between them."""
    token, col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (token[:, None] < tokens) & (col < half)
    stored = (token[:, None] < bound(tokens, BLOCK, FAULT)) & (col < half)
    low = x + token[:, None] * x_row + col
    one, other = tl.load(low, mask=inside).to(tl.float32), tl.load(low + half, mask=inside).to(tl.float32)
    c = tl.load(cos + last(token[:, None] * half + col, tokens * half, FAULT), mask=inside)
    s = tl.load(sin + token[:, None] * half + col, mask=inside)
    tl.store(low, spoiled(one * c - other * s, 2**-10, FAULT).to(x.dtype.element_ty), mask=stored)
    tl.store(low + half, (other * c + one * s).to(x.dtype.element_ty), mask=stored)
    ended(cos, FAULT)


def rope(device):
    x = torch.randn(9, 3, 12, device=device).half()[:, 1]
    angle = torch.rand(9, 6, device=device)
    cos, sin, (one, other) = angle.cos(), angle.sin(), x.float().chunk(2, -1)
    expected = torch.cat([one * cos - other * sin, other * cos + one * sin], -1).half()
    rope_kernel[lambda meta: (triton.cdiv(9, meta["BLOCK"]),)](x, cos, sin, 9, 6, x.stride(0), WIDTH=8)
    torch.testing.assert_close(x, expected)
