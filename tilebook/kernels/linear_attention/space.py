"""The configs of linear attention's kernels, and what of them follows from problem and GPU.

SPAN: chunks that a program of the last kernel takes, one after the other; 0 is all of them, which needs no other kernel
forward. What each begins with is found before by walks of WALK chunks, 0 for one walk along all; several are joined by a
scan.
"""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.linear_attention.problem import LinearAttention
from tilebook.occupancy import crowded, too_large
from tilebook.op import Config, Cost, Space, powers_of_two


def walks(chunks: int, config: Config) -> tuple[int, int]:
    """Chunks of a program of the last kernel, and of a walk that finds states."""
    span, walk = config.number("SPAN"), config.number("WALK")
    return min(span or chunks, chunks), min(walk or chunks, chunks)


def _needs(problem: LinearAttention, config: Config, backward: bool) -> tuple[int, int]:
    """fp32 numbers in registers and bytes of shared memory of a program of the last kernel, about."""
    chunk, columns, wide = config.number("CHUNK"), config.number("BLOCK_V"), problem.wide
    stages, size = config.number("num_stages"), problem.torch_dtype.itemsize
    loaded = chunk * ((2 * wide + 2 * columns) if backward else (2 * wide + columns)) * size
    state = wide * columns * size
    shared = loaded * max(1, stages - 1) + (2 if backward else 1) * state + chunk * max(chunk, columns) * size
    held = wide * columns + chunk * (chunk + columns)
    return (held + chunk * (chunk + wide) if backward else held), shared


def _reject(problem: LinearAttention, config: Config, device: Device, backward: bool) -> str | None:
    chunk, columns, wide, warps = (
        config.number("CHUNK"), config.number("BLOCK_V"), problem.wide, config.number("num_warps"),
    )  # fmt: skip
    span, walk, state_v = config.number("SPAN"), config.number("WALK"), config.number("STATE_V")
    most = max(16, triton.next_power_of_2(problem.value_dim))
    if columns > most or state_v > most:
        return "a tile has more columns than there are"
    if chunk > max(16, triton.next_power_of_2(problem.seq)):
        return "a chunk is longer than the sequence"
    if not span and not backward and (walk, state_v, config.number("STATE_WARPS")) != (0, min(64, most), 4):
        return "one walk along all finds no states before"
    chunks = triton.cdiv(problem.seq, chunk)
    if span >= chunks or walk >= chunks > 1:
        return "a walk along all is 0"
    if span > 1 and walk % span and walk:
        return "walks that do not end where others begin"
    if walk and not span and not backward:
        return "one walk along all finds no states before"
    if walk and chunks > 1024 * walk:
        return "a scan over too many walks"
    if device.backend == "hip" and config.number("num_stages") > 2:
        return "more than 2 stages do not pay on AMD GPUs"
    if wide * state_v > 8192 * config.number("STATE_WARPS") // 2:
        return "more warps hold such a state"
    if min(chunk, wide) * columns < 128 * warps or chunk * wide < 128 * warps:
        return f"{warps} warps need larger tiles"
    elements, shared = _needs(problem, config, backward)
    state_shared = (2 * chunk * (wide + state_v) + wide * state_v) * problem.torch_dtype.itemsize
    return (
        too_large(shared, device)
        or too_large(state_shared, device)
        or crowded(elements, warps, device)
        or crowded(wide * state_v, config.number("STATE_WARPS"), device)
    )


def _default(problem: LinearAttention, device: Device, backward: bool) -> Config:
    """Walks of eight chunks of 64, along all of a sequence of few; the largest tiles that fit."""
    most, length = (max(16, triton.next_power_of_2(n)) for n in (problem.value_dim, problem.seq))
    wide = problem.wide
    shapes = [(64, 128, 8), (64, 64, 8), (64, 64, 4), (64, 32, 4), (32, 64, 4), (32, 32, 4), (16, 32, 4), (16, 16, 4)]
    if wide <= 64:
        shapes = [(64, 64, 4), *shapes[3:]]
    shapes += [(chunk, columns, warps) for chunk in (32, 16) for columns in (32, 16) for warps in (2, 1)]
    state_v = min(64, most)
    warps = 4 if wide * state_v <= 16384 else 8
    configs = []
    for chunk, columns, threads in shapes:
        chunk, columns = min(chunk, length), min(columns, most)
        chunks = triton.cdiv(problem.seq, chunk)
        span = (1 if backward else 4) if chunks > 16 else 0
        walk = 0 if chunks <= 256 else 64
        free = bool(span or backward)
        found = Config(
            CHUNK=chunk, BLOCK_V=columns, SPAN=span, WALK=walk if free else 0, STATE_V=state_v,
            STATE_WARPS=warps if free else 4, num_warps=threads, num_stages=2 if chunk > 32 else 1,
        )  # fmt: skip
        configs += [found, found.replace(num_stages=1)]
    return next((each for each in configs if _reject(problem, each, device, backward) is None), configs[-1])


def _work(problem: LinearAttention, config: Config, backward: bool) -> Cost:
    """Whole chunks and tiles; what walks read and write of states, and read again of keys and values."""
    chunk, columns = config.number("CHUNK"), config.number("BLOCK_V")
    chunks, floor, wide, size = triton.cdiv(problem.seq, chunk), problem.cost(), problem.wide, problem.torch_dtype.itemsize
    span, walk = walks(chunks, config)
    pairs, tiles = problem.batch * problem.heads, triton.cdiv(problem.value_dim, columns)
    tokens, state = pairs * chunks * chunk, problem.states
    each = tiles * (chunk * (wide + columns) + 2 * wide * columns)
    found = (2 if span < chunks else 1, 4 if walk < chunks else 1)  # sides, passes
    again = float(pairs * problem.seq * (problem.head_dim + problem.value_dim) * size)
    more = 0.0
    if span < chunks or backward:
        more += again * found[1] + 4.0 * state * (2 * triton.cdiv(chunks, 1 if backward else span))
    if span < chunks and backward:
        more += again * found[1] + 4.0 * state * 2 * triton.cdiv(chunks, span)
    flops = 2.0 * tokens * each * (2.5 if backward else 1.0) + 2.0 * tokens * wide * problem.value_dim
    return Cost(max(flops, floor.flops), floor.bytes * (1 + (tiles - 1) / 2) + more)


def _space(backward: bool) -> Space:
    return Space(
        axes={
            "CHUNK": powers_of_two(16, 128),
            "BLOCK_V": powers_of_two(16, 128),
            "SPAN": (0, 1, 2, 4, 8, 16, 32),
            "WALK": (0, 8, 16, 32, 64, 128),
            "STATE_V": powers_of_two(16, 128),
            "STATE_WARPS": (4, 8),
            "num_warps": powers_of_two(1, 8),
            "num_stages": (1, 2, 3, 4),
        },
        reject=lambda problem, config, device: _reject(problem, config, device, backward),
        default=lambda problem, device: _default(problem, device, backward),
        work=lambda problem, config: _work(problem, config, backward),
    )


SPACE, SPACE_BWD = _space(backward=False), _space(backward=True)
