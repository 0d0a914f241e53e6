"""The configs of the decode kernel, and what of them follows from problem and GPU."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.decode.problem import DecodeProblem
from tilebook.launch import HOST_DESCRIPTORS_S
from tilebook.occupancy import asynchronous, crowded, oversized, too_large
from tilebook.op import Config, Cost, Space, powers_of_two

MOST_SPLITS = 128
"""Shares of a sequence that the merger takes at a time."""

NARROWEST = 16
"""Keys of a tile that a matrix product takes at least."""


def block_m(rows: int, block_d: int) -> int:
    """Rows of a tile of queries: all that share a head, padded to the 16 that a matrix product takes at least."""
    return min(max(16, int(triton.next_power_of_2(rows))), 128 if block_d <= 128 else 64)


def splits(programs: int, seq_k: int, config: Config, sm_count: int) -> int:
    """Shares of each sequence's keys, so that at most PER_SM programs an SM are started at a time.

    A last, partial round of programs would leave SMs idle, hence rounded down. Lengths are in the GPU's memory, so what
    counts is the longest that a sequence may have.
    """
    wanted = config.number("PER_SM") * sm_count // programs
    tiles: int = triton.cdiv(seq_k, config.number("BLOCK_N"))
    return max(1, min(wanted, tiles, MOST_SPLITS))


def _tile(problem: DecodeProblem) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_D)"""
    width = int(triton.next_power_of_2(problem.head_dim))
    return block_m(problem.rows, width), width


def _warpgroups(rows: int, config: Config, device: Device) -> bool:
    """Do products read both operands from shared memory? Smaller ones pass them through registers."""
    return asynchronous(device) and rows >= 64 and config.number("num_warps") >= 4


def _shared(problem: DecodeProblem, config: Config, device: Device) -> int:
    """Bytes of shared memory, as compiled kernels report them or a little more: a ring of key and value tiles, q, p."""
    (rows, width), columns, itemsize = _tile(problem), config.number("BLOCK_N"), problem.torch_dtype.itemsize
    stages, tile = config.number("num_stages"), columns * width * itemsize
    barriers = 1024 if config["DESCRIPTORS"] or device.capability >= 100 else 0
    if _warpgroups(rows, config, device):
        return (2 * stages if stages > 1 else 1) * tile + rows * width * itemsize + barriers
    # The tile in use is in registers: its place in the ring is free.
    return (2 * (stages - 1) if stages > 1 else 1) * tile + rows * (width + columns) * itemsize + barriers


def _elements(problem: DecodeProblem, config: Config, device: Device) -> int:
    """Numbers in registers: accumulators and scores, and, two to a register, the operands that pass through them."""
    (rows, width), columns = _tile(problem), config.number("BLOCK_N")
    operands = 0 if _warpgroups(rows, config, device) else (rows + columns) * width // 2
    return rows * (width + columns) + operands


def _reject(problem: DecodeProblem, config: Config, device: Device) -> str | None:
    (rows, width), columns, warps = _tile(problem), config.number("BLOCK_N"), config.number("num_warps")
    if config["DESCRIPTORS"]:
        if device.capability < 90:
            return "tensor descriptors need sm_90 or later"
        if problem.head_dim != width:
            return "tensor descriptors are made for a head dimension that is a power of two"
        if problem.block_size % columns:
            return "a tile of keys lies in several blocks of the cache"
        if problem.floor_s(device) < HOST_DESCRIPTORS_S:
            return "the GPU would wait for the host to make its tensor descriptors"
    if device.backend == "hip" and config.number("num_stages") > 2:
        return "more than 2 stages do not pay on AMD GPUs"
    if oversized(columns, problem.keys, NARROWEST):
        return "a block is larger than the sequence"
    if config.number("PER_SM") * warps * device.warp_size > device.threads_per_sm:
        return "more programs than an SM can hold at once"
    if rows < 64 and min(columns, width) < 8 * warps:
        return f"{warps} warps need tiles of at least {8 * warps} columns"
    return too_large(_shared(problem, config, device), device) or crowded(
        _elements(problem, config, device), warps, device
    )


def _default(problem: DecodeProblem, device: Device) -> Config:
    """The first that fits of a few good shapes, with as many programs as an SM's shared memory holds at a time."""
    rows = _tile(problem)[0]
    shapes = [(64, 4, 3), (64, 4, 2), (32, 4, 3), (32, 4, 2), (32, 2, 2), (16, 2, 2), (16, 2, 1), (16, 1, 1)]
    if rows > 16:
        shapes = [(64, 4, 3), (64, 8, 3), (64, 8, 2), (32, 8, 2), (16, 8, 2), (16, 8, 1), *shapes]
    configs = [
        Config(BLOCK_N=columns, PER_SM=1, num_warps=warps, num_stages=stages, DESCRIPTORS=0)
        for columns, warps, stages in shapes
    ]
    config = next((each for each in configs if _reject(problem, each, device) is None), configs[-1])
    fit = device.shared_per_sm // _shared(problem, config, device)
    larger = [config.replace(PER_SM=n) for n in reversed(SPACE.axes["PER_SM"]) if int(n) <= min(fit, 4)]
    return next((each for each in larger if _reject(problem, each, device) is None), config)


def _work(problem: DecodeProblem, config: Config) -> Cost:
    """Whole tiles of rows and keys; every block of rows reads the keys and values anew, from L2."""
    (rows, width), columns = _tile(problem), config.number("BLOCK_N")
    keys = triton.cdiv(problem.keys, columns) * columns
    tiles = problem.batch * problem.heads_kv * triton.cdiv(problem.rows, rows)
    floor, itemsize = problem.cost(), problem.torch_dtype.itemsize
    again = 2 * (tiles - problem.batch * problem.heads_kv) * keys * problem.head_dim * itemsize
    return Cost(4.0 * tiles * rows * keys * width, floor.bytes + again)


SPACE = Space(
    axes={
        "BLOCK_N": powers_of_two(NARROWEST, 256),
        # Programs started for each SM, by splitting sequences.
        "PER_SM": (1, 2, 3, 4, 6, 8, 12, 16),
        "num_warps": powers_of_two(1, 8),
        "num_stages": (1, 2, 3, 4, 5, 6),
        "DESCRIPTORS": (0, 1),
    },
    reject=_reject,
    default=_default,
    work=_work,
)
