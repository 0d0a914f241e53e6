"""What fits on a GPU, as spaces judge it: shared memory and registers of a program, and programs of an SM."""

from __future__ import annotations

from collections.abc import Sequence

import triton

from tilebook.device import Device


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
