"""Occupancy by CUDA's own arithmetic, and the reasons that spaces give with it."""

import pytest

from tilebook import occupancy
from tilebook.device import find


# Expected values: CUDA Occupancy Calculator, and for MI300X its 512 registers per lane on each of four SIMDs.
@pytest.mark.parametrize(
    ("gpu", "warps", "registers", "shared", "blocks"),
    [
        ("A100", 4, 32, 0, 16),  # 2048 threads
        ("A100", 1, 16, 0, 32),  # 32 blocks at most
        ("A100", 8, 128, 0, 2),  # 65536 registers
        ("A100", 4, 255, 0, 2),  # 255 are handed out as 256
        ("A100", 4, 33, 0, 12),  # 33 as 40: 51 warps, in fours 48
        ("A100", 4, 32, 40_000, 4),  # 164 KiB, 1 KiB of it reserved per block
        ("A100", 4, 32, 166_912, 1),
        ("H200", 12, 168, 0, 1),  # FlashAttention-3's three warpgroups
        ("H200", 4, 64, 98_304, 2),
        ("H200", 8, 255, 232_448, 1),
        ("H200", 16, 255, 0, 0),
        ("L4", 1, 16, 0, 24),  # 24 blocks and 1536 threads at most
        ("L4", 8, 32, 0, 6),
        ("MI300X", 4, 128, 0, 4),
        ("MI300X", 4, 64, 65_536, 1),
    ],
)
def test_an_sm_holds_as_many_programs_as_its_scarcest_resource_allows(gpu, warps, registers, shared, blocks):
    assert occupancy.programs_per_sm(warps, registers, shared, find(gpu)) == blocks


def test_what_cannot_run_is_said_with_what_it_needs_and_what_there_is():
    gpu = find("H200")
    assert occupancy.too_large(gpu.shared_per_block, gpu) is None
    assert "needs ~228 KiB shared memory, the GPU has 227" in (occupancy.too_large(228 << 10, gpu) or "")
    assert occupancy.crowded(128 * 128, 4, gpu) is None
    assert "512 registers a thread" in (occupancy.crowded(256 * 256, 4, gpu) or "")


@pytest.mark.parametrize(
    ("cap", "elements", "shared", "programs", "says"),
    [
        (0, 64 * 128, 48 << 10, 5000, None),
        (168, 64 * 128, 48 << 10, 5000, "fewer registers than that"),
        (168, 128 * 128, 48 << 10, 5000, None),
        (168, 160 * 128, 48 << 10, 5000, "too few for its tiles"),
        (168, 128 * 128, 48 << 10, 200, "its place on an SM"),
        (168, 128 * 128, 100 << 10, 5000, "shared memory lets no more"),
        (256, 128 * 128, 48 << 10, 5000, "lets no other program"),
    ],
)
def test_a_cap_on_registers_is_for_kernels_that_let_more_programs_in_by_it(cap, elements, shared, programs, says):
    found = occupancy.pointless(cap, elements, 4, shared, programs, find("H200"))
    assert found is None if says is None else says in (found or "")
    assert "only NVIDIA" in (occupancy.pointless(96, elements, 4, shared, programs, find("MI300X")) or "")
