"""The configs of the kernels of decays by channel, and what of them follows from problem and GPU.

SLICE, PAIR_WARPS: channels at once and warps of the kernel that finds what pairs of a chunk's tokens count for. SPAN,
WALK, STATE_V, STATE_WARPS as in `linear_attention.space`; backward the latter two are of dv too. BLOCK_V, num_warps,
num_stages: of the last kernel, which backward has SLICE channels of its gradients.
"""

from __future__ import annotations

from functools import partial

import triton

from tilebook.device import Device
from tilebook.kernels.channel_decay.problem import BackwardProblem, ChannelDecay
from tilebook.kernels.linear_attention.space import walks
from tilebook.occupancy import asynchronous, crowded, too_large, walks_alike
from tilebook.op import Config, Cost, Space, powers_of_two

_MOST_WALKS = 1024


def _backward(problem: ChannelDecay) -> bool:
    return isinstance(problem, BackwardProblem)


def _whole(config: Config) -> bool:
    """Does the last kernel go along all, with no states from before?"""
    return config.get("SPAN", 1) == 0


def _last_needs(problem: ChannelDecay, config: Config) -> tuple[int, int]:
    """fp32 numbers in registers and bytes of shared memory of a program of the last kernel, about."""
    chunk, columns, wide = config.number("CHUNK"), config.number("BLOCK_V"), problem.wide
    size, ring = problem.torch_dtype.itemsize, max(1, config.number("num_stages") - 1)
    if _backward(problem):
        channels = config.number("SLICE")
        kept = 2 if problem.dtype == "bf16" else 4
        swept = 2 * chunk * columns * size + 2 * channels * columns * kept
        made = 2 * chunk * channels * size + chunk * channels * 4
        return 2 * chunk * chunk + 5 * chunk * channels, max(swept * ring, made)
    loaded = (2 * chunk * wide + chunk * columns + chunk * chunk) * size
    return wide * columns + chunk * columns, loaded * ring + wide * columns * size


def _state_needs(problem: ChannelDecay, config: Config) -> tuple[int, int]:
    """The same of a walk that finds states."""
    chunk, columns, wide = config.number("CHUNK"), config.number("STATE_V"), problem.wide
    return 2 * wide * columns, (chunk * (wide + columns) + wide * columns) * problem.torch_dtype.itemsize


def _reject(problem: ChannelDecay, config: Config, device: Device) -> str | None:
    chunk, columns, warps = config.number("CHUNK"), config.number("BLOCK_V"), config.number("num_warps")
    walk, state_v, state_warps = config.number("WALK"), config.number("STATE_V"), config.number("STATE_WARPS")
    wide, most = problem.wide, max(16, triton.next_power_of_2(problem.value_dim))
    chunks, span, pair_warps = triton.cdiv(problem.seq, chunk), int(config.get("SPAN", 1)), config.number("PAIR_WARPS")
    channels = config.number("SLICE")
    if columns > most or state_v > most:
        return "a tile has more columns than there are"
    if channels > wide:
        return "a slice has more channels than there are"
    if chunk > max(16, triton.next_power_of_2(problem.seq)):
        return "a chunk is longer than the sequence"
    if problem.dtype == "fp32" and chunk > 32:
        return "products of fp32 pass through registers, which larger tiles have not"
    if _whole(config) and (walk, state_v, state_warps) != (0, min(64, most), 4):
        return "one walk along all finds no states before"
    if (span > 1 and span >= chunks) or (walk and walk >= chunks):
        return "a walk along all is 0"
    if span and walk % span:
        return "walks that do not end where others begin"
    if walk and chunks > _MOST_WALKS * walk:
        return "a scan over too many walks"
    if device.backend == "hip" and config.number("num_stages") > 2:
        return "more than 2 stages do not pay on AMD GPUs"
    if chunk * min(chunk, columns, channels if _backward(problem) else wide) < 32 * warps:
        return f"{warps} warps need larger tiles"
    if chunk * min(chunk, channels) < 64 * pair_warps:
        return f"{pair_warps} warps need larger chunks"
    pairs = chunk * chunk + 4 * chunk * channels
    elements, shared = _last_needs(problem, config)
    reason = too_large(shared, device) or crowded(elements, warps, device) or crowded(pairs, pair_warps, device)
    if reason or _whole(config):
        return reason
    elements, shared = _state_needs(problem, config)
    return too_large(shared, device) or crowded(elements, state_warps, device)


def _shapes(problem: ChannelDecay, device: Device) -> list[tuple[int, int, int, int, int, int]]:
    """CHUNK, PAIR_WARPS; columns, warps, stages of the last kernel; channels of it: the best guess first."""
    wide, backward = problem.wide, _backward(problem)
    small = [(chunk, pair, 16, warps, 1, 16) for chunk in (32, 16) for pair in (4, 2, 1) for warps in (8, 4, 2, 1)]
    if problem.dtype == "fp32":  # products pass through registers
        return [(16, 2, 16 if wide > 64 else 32, 8 if wide > 64 else 4, 1, 16), *small[12:]]
    if device.backend == "hip":
        return [(32, 4, 32, 4, 1, 32), *small]
    channels = 64 if problem.value_dim > 64 else 32  # where columns are one tile, more spill
    large = [(64, 4, 64, 8, 1, channels), (64, 4, 32, 8, 1, channels)] if asynchronous(device) else []
    if not backward and large:
        four = [(64, 4, 64, 4, 2, 64)] if wide <= 64 else []
        large = [(64, 4, 32, 8, 1, 64)] if wide > 128 else [*four, (64, 4, 64, 8, 2, 64)]
    middle = [(32, 4, 32, 4, 2, 32), (32, 4, 32, 4, 1, 32), (32, 4, 32, 8, 1, 32)]
    return [*large, *middle, *small]


def _parts(backward: bool, chunks: int, busy: float) -> tuple[int, int]:
    """SPAN and WALK by default; busy: walks along all for each multiprocessor."""
    if backward:
        return 1, 16 if chunks > 32 and busy < 0.5 else 128 if chunks > 512 else 0
    if chunks <= 16 or busy >= 0.5:
        return 0, 0
    joined = 16 if chunks * busy >= 16 else 8
    return (joined, joined) if chunks > 32 else (4, 0)


def _default(problem: ChannelDecay, device: Device) -> Config:
    """Forward one walk along all, where that makes the GPU's multiprocessors busy; else several, joined by a scan."""
    most, length = (max(16, triton.next_power_of_2(n)) for n in (problem.value_dim, problem.seq))
    configs, exact = [], problem.dtype == "fp32"
    for chunk, pair_warps, columns, warps, stages, channels in _shapes(problem, device):
        chunk, columns = min(chunk, length), min(columns, most)
        chunks = triton.cdiv(problem.seq, chunk)
        programs = problem.batch * problem.heads * triton.cdiv(problem.value_dim, columns)
        span, walk = _parts(_backward(problem), chunks, programs / device.sm_count)
        if exact and problem.wide > 128 and chunks > 1:  # a state and its products at once would spill
            span, walk = _parts(True, chunks, programs / device.sm_count)
        whole = not (_backward(problem) or span)
        state_v = 16 if exact or problem.wide > 128 else 32 if problem.wide > 64 else 64
        values = {
            "CHUNK": chunk, "PAIR_WARPS": pair_warps, "BLOCK_V": columns, "SPAN": span, "WALK": walk,
            "STATE_V": min(64 if whole else state_v, most),
            "STATE_WARPS": 4, "num_warps": warps, "num_stages": stages, "SLICE": min(channels, problem.wide),
        }  # fmt: skip
        if _backward(problem):
            del values["SPAN"]
        configs.append(Config(values))
    return next((each for each in configs if _reject(problem, each, device) is None), configs[-1])


def _work(problem: ChannelDecay, config: Config) -> Cost:
    """Whole chunks and tiles; what one kernel writes for the next, and what is read again for each tile of columns."""
    chunk, columns, size = config.number("CHUNK"), config.number("BLOCK_V"), problem.torch_dtype.itemsize
    chunks, tiles, floor = triton.cdiv(problem.seq, chunk), triton.cdiv(problem.value_dim, columns), problem.cost()
    tokens, backward = problem.batch * problem.heads * chunks * chunk, _backward(problem)
    wide, levels, kept = problem.wide, chunk.bit_length() - 1, 2 if problem.dtype == "bf16" else 4
    (span, walk), values = walks(chunks, config), tiles * columns
    flops, moved = 2.0 * levels * chunk * wide, (4 * wide + chunk) * size + 4 * wide
    state = wide * values / chunk * kept
    walked = (wide * triton.cdiv(problem.value_dim, config.number("STATE_V")) + values) * size
    passes = 0 if _whole(config) else (1 if walk == chunks else 2)
    both = 2 if backward else 1
    moved += both * (passes * walked + 2 * state / span)
    flops += both * passes * 2 * wide * values
    if backward:
        slices = triton.cdiv(wide, config.number("SLICE"))
        flops += (
            slices * 4 * chunk * values + 4 * wide * values + 4 * levels * chunk * wide + 2 * values * (wide + chunk)
        )
        moved += slices * 2 * values * size + 4 * wide * size + 8 * wide + (wide + chunk + 2 * values) * size
    else:
        flops += 2 * values * (chunk + 2 * wide)
        moved += (tiles * (2 * wide + chunk) + 2 * values) * size
    return Cost(max(float(tokens * flops), floor.flops), max(float(tokens * moved), floor.bytes))


_AXES = {
    "CHUNK": powers_of_two(16, 64),
    "PAIR_WARPS": powers_of_two(1, 8),
    "BLOCK_V": powers_of_two(16, 128),
    "SPAN": (0, 1, 2, 4, 8, 16),
    "WALK": (0, 8, 16, 32, 128),
    "STATE_V": powers_of_two(16, 128),
    "STATE_WARPS": (4, 8),
    "num_warps": powers_of_two(1, 8),
    "num_stages": (1, 2, 3),
    "SLICE": powers_of_two(16, 64),
}

SPACE = Space(_AXES, _reject, _default, _work, carries=partial(walks_alike, _default))
_BACKWARD = {axis: values for axis, values in _AXES.items() if axis != "SPAN"}
SPACE_BWD = Space(_BACKWARD, _reject, _default, _work, carries=partial(walks_alike, _default))
