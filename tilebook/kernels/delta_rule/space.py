"""The configs of the gated delta rule's kernels, and what of them follows from problem and GPU.

BLOCK_V, num_warps, num_stages: columns of v, warps and stages of a walk along all chunks. PAIR_WARPS: of the kernel
that finds what pairs of a chunk's tokens make. CHUNK_V, CHUNK_WARPS, CHUNK_STAGES: of the last kernels, which take one
chunk; forward there is one only where APART.
"""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.delta_rule.problem import BackwardProblem, DeltaRule
from tilebook.occupancy import asynchronous, crowded, too_large
from tilebook.op import Config, Cost, Space, powers_of_two


def _backward(problem: DeltaRule) -> bool:
    return isinstance(problem, BackwardProblem)


def _last(problem: DeltaRule, config: Config) -> bool:
    """Is there a kernel after the walks?"""
    return _backward(problem) or config["APART"] == 1


def _walk_needs(problem: DeltaRule, config: Config) -> tuple[int, int]:
    """fp32 numbers in registers and bytes of shared memory of a program of a walk, about."""
    chunk, columns, wide = config.number("CHUNK"), config.number("BLOCK_V"), problem.wide
    size, ring = problem.torch_dtype.itemsize, max(1, config.number("num_stages") - 1)
    both = _backward(problem) or config["APART"] == 0
    loaded = (chunk * wide + chunk * chunk) * (2 if both else 1) + chunk * columns
    factors = wide * columns + 2 * chunk * columns
    return wide * columns + 2 * chunk * columns, (loaded * ring + factors) * size


def _chunk_needs(problem: DeltaRule, config: Config) -> tuple[int, int]:
    """The same of the last kernel."""
    chunk, columns, wide = config.number("CHUNK"), config.number("CHUNK_V"), problem.wide
    size, kept = problem.torch_dtype.itemsize, 2 if problem.dtype == "bf16" else 4
    if not _backward(problem):
        loaded = (chunk * wide + chunk * columns + chunk * chunk) * size + wide * columns * kept
        return 2 * chunk * columns, loaded
    swept = 3 * chunk * columns * size + 2 * wide * columns * kept
    ring = 2 if config.number("CHUNK_STAGES") > 1 else 1
    return 3 * chunk * wide, max(swept * ring, (2 * chunk * wide + chunk * chunk) * size)


def _reject(problem: DeltaRule, config: Config, device: Device) -> str | None:
    chunk, columns, warps = config.number("CHUNK"), config.number("BLOCK_V"), config.number("num_warps")
    chunk_v, chunk_warps = config.number("CHUNK_V"), config.number("CHUNK_WARPS")
    wide, most = problem.wide, max(16, triton.next_power_of_2(problem.value_dim))
    if columns > most or chunk_v > most:
        return "a tile has more columns than there are"
    if chunk > max(16, triton.next_power_of_2(problem.seq)):
        return "a chunk is longer than the sequence"
    if problem.dtype == "fp32" and chunk > 32:
        return "products of fp32 pass through registers, which larger tiles have not"
    if not _last(problem, config) and (chunk_v, chunk_warps) != (min(64, most), 4):
        return "there is no kernel after the walk"
    if device.backend == "hip" and config.number("num_stages") > 2:
        return "more than 2 stages do not pay on AMD GPUs"
    if chunk * min(chunk, columns, wide) < 32 * warps:
        return f"{warps} warps need larger tiles"
    if min(chunk, 32) ** 2 < 128 * config.number("PAIR_WARPS"):
        return f"{config['PAIR_WARPS']} warps need larger chunks"
    elements, shared = _walk_needs(problem, config)
    reason = too_large(shared, device) or crowded(elements, warps, device)
    if reason or not _last(problem, config):
        return reason
    if chunk * min(chunk, chunk_v) < 32 * chunk_warps:
        return f"{chunk_warps} warps need larger tiles in the last kernel"
    elements, shared = _chunk_needs(problem, config)
    return too_large(shared, device) or crowded(elements, chunk_warps, device)


def _shapes(problem: DeltaRule, device: Device) -> list[tuple[int, int, int, int, int, int, int]]:
    """CHUNK; columns, warps, stages of walks; columns, warps, stages of the last kernels: the best guess first."""
    wide = problem.wide
    small = [(chunk, 16, warps, 1, 16, warps, 1) for chunk in (32, 16) for warps in (8, 4, 2, 1)]
    if problem.dtype == "fp32":  # products pass through registers
        return [(16, 16, 8 if wide > 64 else 4, 1, 16, 8, 1), *small[4:]]
    if wide > 128:
        middle = [
            (32, columns, warps, stages, 16, 8, 1) for columns, warps, stages in ((32, 8, 2), (16, 4, 2), (16, 4, 1))
        ]
        return [*middle, (16, 16, 4, 1, 16, 8, 1), *small]
    warps = 8 if wide > 64 else 4
    few = problem.batch * problem.heads * triton.cdiv(problem.value_dim, 64) < 0.75 * device.sm_count
    shapes = [(columns, stages, last) for columns in (64, 32) for stages in (2, 1) for last in (2, 1)]
    shapes = [each for each in shapes if not few or each[0] < 64] if asynchronous(device) else []
    large = [(64, columns, warps, stages, 32, 8, last) for columns, stages, last in shapes]
    middle = [(32, 32, 4, 2, 32, 8, 1), (32, 32, 4, 1, 32, 8, 1)]
    if device.backend == "hip":
        return [(32, 32, 4, 2, 32, 4, 1), (32, 32, 4, 1, 16, 4, 1), *small]
    return [*large, (64, 32, 4, 1, 32, 8, 1), *middle, (64, 16, 4, 1, 16, 8, 1), *small]


def _default(problem: DeltaRule, device: Device) -> Config:
    """Forward one walk that writes outputs, where heads make the multiprocessors busy; else one that leaves them."""
    most, length = (max(16, triton.next_power_of_2(n)) for n in (problem.value_dim, problem.seq))
    configs = []
    for chunk, columns, warps, stages, chunk_v, chunk_warps, chunk_stages in _shapes(problem, device):
        chunk, columns = min(chunk, length), min(columns, most)
        values = {
            "CHUNK": chunk, "BLOCK_V": columns, "PAIR_WARPS": 2, "CHUNK_V": min(chunk_v, most),
            "CHUNK_WARPS": chunk_warps, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
        if _backward(problem):
            values["CHUNK_STAGES"] = chunk_stages
        else:
            apart = problem.batch * problem.heads * triton.cdiv(problem.value_dim, columns) < device.sm_count // 2
            values["APART"] = int(apart and length > 4 * chunk)
            if not values["APART"]:
                values |= {"CHUNK_V": min(64, most), "CHUNK_WARPS": 4}
        configs.append(Config(values))
    return next((each for each in configs if _reject(problem, each, device) is None), configs[-1])


def _work(problem: DeltaRule, config: Config) -> Cost:
    """Whole chunks and tiles; what one kernel writes for the next, and what is read again for each tile of columns."""
    chunk, columns, size = config.number("CHUNK"), config.number("BLOCK_V"), problem.torch_dtype.itemsize
    chunks, tiles, floor = triton.cdiv(problem.seq, chunk), triton.cdiv(problem.value_dim, columns), problem.cost()
    tokens, backward = problem.batch * problem.heads * chunks * chunk, _backward(problem)
    wide, values, kept = problem.wide, tiles * columns, 2 if problem.dtype == "bf16" else 4
    pairs, states = 2 * chunk * size, wide * values / chunk * kept
    walk = tiles * (wide + chunk) * size + 2 * values * size
    moved = 2 * wide * size + pairs * (1 + tiles) + walk
    flops = 4 * chunk * wide + 4 * chunk * chunk + 4 * values * wide + 2 * chunk * values
    if backward:
        moved += 2 * walk + 4 * states + 6 * values * size + 6 * wide * size
        flops += (6 + 6) * values * wide + 8 * chunk * values + 10 * chunk * wide
    elif config["APART"]:
        moved += 2 * states + 2 * values * size + wide * size
    flops += 0 if backward else 2 * values * wide + 2 * chunk * values
    return Cost(max(float(tokens * flops), floor.flops), max(float(tokens * moved), floor.bytes))


def _apart_alike(problem: DeltaRule, config: Config, device: Device) -> bool:
    """Does the walk leave the outputs to another kernel where the default does, and only there?"""
    return config["APART"] == _default(problem, device)["APART"]


_AXES = {
    "CHUNK": powers_of_two(16, 64),
    "BLOCK_V": powers_of_two(16, 128),
    "PAIR_WARPS": powers_of_two(1, 4),
    "CHUNK_V": powers_of_two(16, 128),
    "CHUNK_WARPS": (2, 4, 8),
    "num_warps": powers_of_two(1, 8),
    "num_stages": (1, 2, 3),
}

SPACE = Space({**_AXES, "APART": (0, 1)}, _reject, _default, _work, carries=_apart_alike)
SPACE_BWD = Space({**_AXES, "CHUNK_STAGES": (1, 2)}, _reject, _default, _work)
