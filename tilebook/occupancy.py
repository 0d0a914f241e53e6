"""How many programs of a kernel an SM holds at a time, by what one of them takes: warps, registers, shared memory.

The granularities are those of the CUDA occupancy calculator for sm_80 and later. Of AMD's compute units the model knows
sizes and wavefront alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tilebook.device import Device

RESERVED = 1024
"""Bytes of shared memory that CUDA keeps for itself in every program."""

_SHARED_UNIT = 128
_REGISTERS_UNIT = 8  # registers a thread are handed out to a warp so many at a time
_WARPS_UNIT = 4  # warps are spread evenly over four register files
_THREADS_A_SLOT = 64  # 32 programs on an SM that holds 2048 threads, 24 on one that holds 1536
_ADDRESSES = 30  # registers a thread that a kernel takes at least beside its tiles


def most_registers(device: Device) -> int:
    """Registers that a thread can have."""
    return 256 if device.backend == "cuda" else 512


def program_registers(registers: int, warps: int, device: Device) -> int:
    """Registers that one program takes, with so many a thread."""
    return -(-registers // _REGISTERS_UNIT) * _REGISTERS_UNIT * device.warp_size * warps


def shared_taken(shared: int, device: Device) -> int:
    """Bytes of shared memory that one program takes, if it asks for `shared`."""
    return -(-shared // _SHARED_UNIT) * _SHARED_UNIT + (RESERVED if device.backend == "cuda" else 0)


def by_threads(warps: int, device: Device) -> int:
    """Programs that an SM has threads for."""
    return device.threads_per_sm // (warps * device.warp_size)


def by_registers(registers: int, warps: int, device: Device) -> int:
    """Programs that an SM has registers for, with so many a thread."""
    a_warp = max(1, program_registers(registers, 1, device))
    return device.registers_per_sm // a_warp // _WARPS_UNIT * _WARPS_UNIT // warps


def by_shared(shared: int, device: Device) -> int:
    """Programs that an SM has shared memory for; as many as it has slots where they need none."""
    taken = shared_taken(shared, device)
    return device.shared_per_sm // taken if taken else device.threads_per_sm // _THREADS_A_SLOT


def programs_per_sm(warps: int, registers: int, shared: int, device: Device) -> int:
    """Programs that an SM holds at a time, 0 where not even one fits. registers: a thread; shared: bytes a program."""
    slots = device.threads_per_sm // _THREADS_A_SLOT
    return min(slots, by_threads(warps, device), by_registers(registers, warps, device), by_shared(shared, device))


def asynchronous(device: Device) -> bool:
    """Do tensor cores read tiles from shared memory (wgmma, tcgen05)? Elsewhere tiles pass through registers."""
    return 90 <= device.capability < 120


# Reasons for a space to reject a config, by what its tiles are known to take before anything is compiled


def too_large(shared: int, device: Device) -> str | None:
    """Why a kernel that needs `shared` bytes of shared memory cannot run, or None."""
    if shared <= device.shared_per_block:
        return None
    return f"needs ~{shared >> 10} KiB shared memory, the GPU has {device.shared_per_block >> 10}"


def crowded(elements: int, warps: int, device: Device) -> str | None:
    """Why so many fp32 numbers do not fit into the registers of so many warps, or None."""
    threads = device.warp_size * warps
    # An eighth stays for addresses.
    limit = min(most_registers(device), device.registers_per_sm // threads) * 7 // 8
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
    most, capped = (by_registers(each, warps, device) for each in (most_registers(device), cap))
    if capped <= most or capped > by_threads(warps, device):
        return "such a cap on registers lets no other program onto an SM"
    if capped > by_shared(shared, device):
        return "shared memory lets no more programs onto an SM, whatever the registers"
    if programs <= most * device.sm_count:
        return "every program has its place on an SM as it is"
    tiles = elements // (device.warp_size * warps)
    if tiles + _ADDRESSES > cap:
        return f"{cap} registers a thread are too few for its tiles"
    return "its tiles need fewer registers than that as it is" if 2 * tiles < cap else None


def oversized(block: int, length: int, smallest: int) -> bool:
    """Is a block more than the sequence needs, where a smaller one exists?"""
    return block > max(smallest, 1 << (length - 1).bit_length())


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


def walks_alike(
    default: Callable[[Any, Device], Mapping[str, Any]], problem: Any, config: Mapping[str, Any], device: Device
) -> bool:
    """Is a sequence cut into pieces, and a walk along it, where the default cuts them, which knows how many SMs wait?

    SPAN and WALK are steps of a piece and of a walk, 0 for all of them.
    """
    usual = default(problem, device)
    return all((usual.get(axis, 1) == 0) == (config.get(axis, 1) == 0) for axis in ("SPAN", "WALK"))
