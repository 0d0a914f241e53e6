"""What the attention kernels share: which tile a program works on, how tiles are loaded, and what fits on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tilebook.device import Device

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

# A value of DESCRIPTORS: sequences lie one after the other, and `batch` is a sequence's first row. See `load_tile`.
PACKED = tl.constexpr(2)
PACKED_ROWS = tl.constexpr(1 << 30)


@triton.jit
def place(program, n_blocks, n_pairs, HEADS: tl.constexpr):
    """(block, pair) of a program; `HEADS` heads at a time take turns, each with its blocks in order.

    One head at a time keeps its tensors in L2. Several spread the heavy blocks of a causal mask over the whole of a
    group, so that fewer programs are left waiting for the last heavy one.
    """
    group = program // (HEADS * n_blocks)
    first = group * HEADS
    some = tl.minimum(n_pairs - first, HEADS)
    within = program - first * n_blocks
    return within // some, first + within % some


@triton.jit
def offset(batch, head, stride_b, stride_h):
    """Of a head's first element; 64 bits wide, as tensors may hold more than 2³¹ elements."""
    return batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def load_tile(
    source,
    batch,
    head,
    row,
    stride_b,
    stride_h,
    stride_s,
    n_rows,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Rows `row` … `row + ROWS` of one head, [ROWS, D]; `MASKED` where some may lie past `n_rows`: those are zero.

    So are columns past `WIDTH`, the head dimension; D is the power of two above it. `source` is a tensor descriptor,
    whose hardware sees to what is out of range by itself, or a pointer.

    A packed descriptor's rows end at 2³⁰, and so are a sequence's made to, so that zeros follow them instead of the
    next sequence. What that is too many rows is taken off by an axis whose steps wrap around 64 bits, as in Triton's
    `ragged_tma`.
    """
    if DESCRIPTORS == PACKED:
        short = PACKED_ROWS - n_rows
        tile = source.load([short + n_rows, batch + n_rows, head, short + row, 0]).reshape(ROWS, D)
    elif DESCRIPTORS:
        tile = source.load([batch, head, row, 0]).reshape(ROWS, D)
    else:
        # The row goes into the 64-bit base, so that addresses inside a tile need 32 bits.
        base = source + offset(batch, head, stride_b, stride_h) + row.to(tl.int64) * stride_s
        rows = tl.arange(0, ROWS)
        inside = rows[:, None] * stride_s + tl.arange(0, D)[None, :]
        if MASKED and D == WIDTH:
            tile = tl.load(base + inside, mask=rows[:, None] < n_rows - row, other=0.0)
        elif MASKED:
            there = (rows[:, None] < n_rows - row) & (tl.arange(0, D) < WIDTH)[None, :]
            tile = tl.load(base + inside, mask=there, other=0.0)
        elif D != WIDTH:
            tile = tl.load(base + inside, mask=(tl.arange(0, D) < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(base + inside)
    return tile


@triton.jit
def store_tile(
    out,
    tile,
    batch,
    head,
    row,
    stride_b,
    stride_h,
    stride_s,
    n_rows,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes those rows of a [ROWS, D] tile that lie before `n_rows`, rounded to the dtype of `out`."""
    base = out + offset(batch, head, stride_b, stride_h) + row.to(tl.int64) * stride_s
    rows = tl.arange(0, ROWS)
    inside = rows[:, None] * stride_s + tl.arange(0, D)[None, :]
    there = rows[:, None] < n_rows - row
    if D != WIDTH:
        there &= (tl.arange(0, D) < WIDTH)[None, :]
    tl.store(base + inside, tile.to(out.dtype.element_ty), mask=there)


@triton.jit
def rounded(tile, TF32: tl.constexpr):
    """A factor of a product. Tensor cores cut off what tf32 has no room for: rounded to the nearest first, fp32 makes a
    quarter of that error, and none that adds up. NaN stays NaN."""
    if TF32 and tile.dtype == tl.float32:
        bits = tile.to(tl.uint32, bitcast=True)
        near = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        tile = tl.where(tile == tile, near, tile)
    return tile


def addressable(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if the kernels cannot address it: rows contiguous, and a tile's rows within 2³¹ elements."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 1 << 23 else x.contiguous()


def like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor with the shape and the order of axes of `x`, its last axis contiguous."""
    made = torch.empty_like(x)
    return made if made.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def describable(*tensors: torch.Tensor) -> bool:
    """Can tensor descriptors address them? The hardware wants 16-byte steps, and no axis of step 0."""
    return all(
        x.data_ptr() % 16 == 0 and all(step > 0 and step * x.itemsize % 16 == 0 for step in x.stride()[:-1])
        for x in tensors
    )


def describe(x: torch.Tensor, rows: int) -> Any:
    """A host-side descriptor whose blocks are `rows` rows of one head, as wide as the next power of two."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, triton.next_power_of_2(x.shape[-1])])


def asynchronous(device: Device) -> bool:
    """Do tensor cores read tiles from shared memory (wgmma, tcgen05)? Elsewhere tiles pass through registers."""
    return 90 <= device.capability < 120


def too_large(shared: int, device: Device) -> str | None:
    """Why a kernel that needs `shared` bytes of shared memory cannot run, or None."""
    if shared <= device.shared_per_block:
        return None
    return f"needs ~{shared >> 10} KiB shared memory, the GPU has {device.shared_per_block >> 10}"


def crowded(elements: int, warps: int, device: Device) -> str | None:
    """Why so many fp32 numbers do not fit into the registers of so many warps, or None."""
    threads = device.warp_size * warps
    # An eighth stays for addresses. NVIDIA's threads have 255 registers at most, AMD's 512.
    limit = min(256 if device.backend == "cuda" else 512, device.registers_per_sm // threads) * 7 // 8
    return (
        f"needs ~{elements // threads} registers a thread for its tiles alone" if elements > limit * threads else None
    )


def pointless(cap: int, elements: int, warps: int, shared: int, programs: int, device: Device) -> str | None:
    """Why a cap on registers a thread cannot let more programs onto an SM, or costs more than that is worth, or None.

    elements: fp32 numbers of a program's tiles; shared: its bytes of shared memory; programs: how many there are.
    Beside its tiles a kernel takes 30 registers a thread at least, and seldom more than as many again as for them.
    """
    if not cap:
        return None
    if device.backend != "cuda":
        return "only NVIDIA's compiler caps registers"
    threads = device.warp_size * warps
    most, capped = (device.registers_per_sm // (each * threads) for each in (256, cap))
    if capped <= most or capped * threads > device.threads_per_sm:
        return "such a cap on registers lets no other program onto an SM"
    if capped * (shared + 1024) > device.shared_per_sm:
        return "shared memory lets no more programs onto an SM, whatever the registers"
    if programs <= most * device.sm_count:
        return "every program has its place on an SM as it is"
    tiles = elements // threads
    if tiles + 30 > cap:
        return f"{cap} registers a thread are too few for its tiles"
    return "its tiles need fewer registers than that as it is" if 2 * tiles < cap else None


def capped(registers: int) -> dict[str, int]:
    """The launch option that caps registers a thread; none for 0."""
    return {"maxnreg": registers} if registers else {}


def oversized(block: int, length: int, smallest: int) -> bool:
    """Is a block more than the sequence needs, where a smaller one exists?"""
    return block > max(smallest, int(triton.next_power_of_2(length)))


def rows_and_tiles(
    n_rows: int, n_columns: int, rows: int, columns: int, before: int | None, after: int | None
) -> Sequence[tuple[int, int]]:
    """For each block of rows its first row and how many blocks of columns it visits, of those in the band."""
    found = []
    for row in range(0, n_rows, rows):
        first = 0 if before is None else max(row - before, 0) // columns
        last = n_columns if after is None else min(row + rows + after, n_columns)
        found.append((row, max(-(-last // columns) - first, 0)))
    return found
