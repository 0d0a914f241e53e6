"""The configs of linear attention's kernels, and what of them follows from problem and GPU.

SPAN: chunks that a program of the last kernel takes, one after the other; 0 is all of them, which needs no other kernel
forward. Backward it is always one. What each begins with is found before by walks of WALK chunks, 0 for one walk along
all; several are joined by a scan.
"""

from __future__ import annotations

from functools import partial

import triton

from tilebook.arch import since_blackwell
from tilebook.device import Device
from tilebook.kernels.linear_attention.problem import BackwardProblem, LinearAttention
from tilebook.occupancy import asynchronous, crowded, too_large, walks_alike
from tilebook.op import Config, Cost, Space, powers_of_two

_MOST_WALKS = 1024


def walks(chunks: int, config: Config) -> tuple[int, int]:
    """Chunks of a program of the last kernel, and of a walk that finds states."""
    span, walk = int(config.get("SPAN", 1)), config.number("WALK")
    return min(span or chunks, chunks), min(walk or chunks, chunks)


def _backward(problem: LinearAttention) -> bool:
    return isinstance(problem, BackwardProblem)


def _mapped(problem: LinearAttention) -> bool:
    """Are features made of rows in registers, before they are factors of products?"""
    return problem.feature_map != "none"


def _whole(config: Config) -> bool:
    """Does the last kernel go along all, with no states from before?"""
    return config.get("SPAN", 1) == 0


def _needs(problem: LinearAttention, config: Config, device: Device) -> tuple[int, int]:
    """fp32 numbers in registers and bytes of shared memory of a program of the last kernel, about."""
    chunk, columns, wide = config.number("CHUNK"), config.number("BLOCK_V"), problem.wide
    size, ring = problem.torch_dtype.itemsize, max(1, config.number("num_stages") - 1)
    pairs, state = chunk * chunk, wide * columns
    if _backward(problem):
        kept = 2 if problem.dtype == "bf16" else 4  # states wait as they are kept
        swept = 2 * chunk * columns * size + 2 * state * kept
        shared = 2 * chunk * wide * size + swept * (ring if config.number("num_stages") > 1 else 0) + pairs * size
        return pairs + 2 * chunk * wide + chunk * columns, shared + 2 * state * size
    loaded, made = chunk * (2 * wide + columns) * size, 2 * chunk * wide * size if _mapped(problem) else 0
    return state + pairs + chunk * columns, loaded * ring + made + state * size + pairs * size


def _reject(problem: LinearAttention, config: Config, device: Device) -> str | None:
    chunk, columns, warps = config.number("CHUNK"), config.number("BLOCK_V"), config.number("num_warps")
    walk, state_v, state_warps = config.number("WALK"), config.number("STATE_V"), config.number("STATE_WARPS")
    wide, most = problem.wide, max(16, triton.next_power_of_2(problem.value_dim))
    chunks, span = triton.cdiv(problem.seq, chunk), int(config.get("SPAN", 1))
    if columns > most or state_v > most:
        return "a tile has more columns than there are"
    if chunk > max(16, triton.next_power_of_2(problem.seq)):
        return "a chunk is longer than the sequence"
    again = span != 1 and not _backward(problem)  # of a chunk's tiles a new state is made, in the place of others
    unaligned = config["num_stages"] == 1 or problem.value_dim % columns != 0
    narrow = columns < 64 and (unaligned or _mapped(problem))
    if device.arch == "sm_90" and again and narrow and warps >= 4 and chunk >= 64:
        return "ptxas 12.8 loses track of where narrow tiles are that lie in each other's places"
    sums = problem.normalized and problem.dtype == "bf16" and not _backward(problem)
    if sums and chunk < 32 and chunks > 1 and span == 1:
        return "sums of keys are rounded in front of every 16 tokens"
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
    if chunk * min(chunk, columns, wide) < 32 * warps:
        return f"{warps} warps need larger tiles"
    if chunk * max(columns, wide) > 4096 * warps:
        return "tiles are worth more warps"
    elements, shared = _needs(problem, config, device)
    reason = too_large(shared, device) or crowded(elements, warps, device)
    if reason or _whole(config):
        return reason
    state_shared = (2 * chunk * (wide + state_v) + wide * state_v) * problem.torch_dtype.itemsize
    return too_large(state_shared, device) or crowded(2 * wide * state_v, state_warps, device)


def _shapes(problem: LinearAttention, device: Device) -> list[tuple[int, int, int, int]]:
    """Chunk, columns, warps and stages that compile without spills, the best guess first."""
    wide, backward = problem.wide, _backward(problem)
    padded = problem.head_dim != wide or problem.value_dim % 64
    small = [(chunk, columns, warps, 1) for chunk in (32, 16) for columns in (32, 16) for warps in (8, 4, 2, 1)]
    if problem.dtype == "fp32":  # products pass through registers
        return small[:1] + small[8:] if wide <= 64 else [(16, 32 if wide <= 128 else 16, 8, 1), *small[8:]]
    if wide > 128:
        return [(16, 32, 8, 1), *small[8:]] if backward else [(32, 32, 8, 1), *small]
    if backward and not asynchronous(device):  # factors of products pass through registers
        return [(16 if device.backend == "hip" and wide > 64 else 32, 64, 8, 1), *small]
    if padded and backward:
        return [(64, 32, 8, 1), *small]
    four = [(64, 64, 4, 2), (64, 64, 4, 1)] if wide <= 64 else []
    if not backward:
        longer = [] if problem.normalized or _mapped(problem) else [(128, 64, 8, 2)]  # they want registers too
        wider = [(64, 64, 4, 3), *four] if wide <= 64 else [*longer, (64, 64, 8, 3)]
        narrow = [(64, 32, 8, 1)] if _mapped(problem) else four
        four = [] if padded else wider if asynchronous(device) else narrow
    return [*four, (64, 64, 8, 2), (64, 64, 8, 1), (64, 32, 8, 1), (64, 32, 4, 1), (64, 16, 4, 1), *small]


def _parts(backward: bool, chunks: int, busy: float) -> tuple[int, int]:
    """SPAN and WALK by default; busy: walks along all for each multiprocessor."""
    if backward:
        return 1, 16 if chunks > 32 and busy < 0.5 else 128 if chunks > 512 else 0
    if chunks <= 16 or busy >= 0.5:
        return 0, 0
    joined = 16 if chunks * busy >= 16 else 8
    return (joined, joined) if chunks > 32 else (4, 0)


def _default(problem: LinearAttention, device: Device) -> Config:
    """Forward one walk along all, where that makes the GPU's multiprocessors busy; else several, joined by a scan."""
    most, length = (max(16, triton.next_power_of_2(n)) for n in (problem.value_dim, problem.seq))
    configs, exact, wide = [], problem.dtype == "fp32", problem.wide
    full = wide > 128 or (wide > 64 and _mapped(problem) and since_blackwell(device))  # registers, with 64 columns
    for chunk, columns, warps, stages in _shapes(problem, device):
        chunk = min(chunk, length)
        chunks = triton.cdiv(problem.seq, chunk)
        programs = problem.batch * problem.heads * triton.cdiv(problem.value_dim, columns)
        span, walk = _parts(_backward(problem), chunks, programs / device.sm_count)
        whole = not (_backward(problem) or span)
        values = {
            "CHUNK": chunk, "BLOCK_V": min(columns, most), "SPAN": span, "WALK": walk,
            "STATE_V": min(64 if whole else 16 if exact else 32 if full else 64, most),
            "STATE_WARPS": 8 if exact and not whole else 4, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
        if _backward(problem):
            del values["SPAN"]
        configs.append(Config(values))
    return next((each for each in configs if _reject(problem, each, device) is None), configs[-1])


def _work(problem: LinearAttention, config: Config) -> Cost:
    """Whole chunks and tiles; what walks read and write of states, and read again of keys and values."""
    chunk, columns = config.number("CHUNK"), config.number("BLOCK_V")
    chunks, size = triton.cdiv(problem.seq, chunk), problem.torch_dtype.itemsize
    (span, walk), floor, backward = walks(chunks, config), problem.cost(), _backward(problem)
    pairs, tiles = problem.batch * problem.heads, triton.cdiv(problem.value_dim, columns)
    # Products inside chunks and with states, of the last kernel; walks that find states.
    inside = (4 * problem.wide + 2 * tiles * columns) if backward else tiles * (problem.wide + columns)
    flops = 2.0 * pairs * chunks * chunk * (chunk * inside + (3 if backward else 2) * problem.wide * tiles * columns)
    read = floor.bytes * (1 if backward else 1 + (tiles - 1) / 2)
    if not _whole(config):
        passes, kept = 1 if walk == chunks else 2, 2 if span == 1 and problem.dtype == "bf16" else 4
        tokens = pairs * problem.seq * (problem.head_dim + problem.value_dim)
        states = problem.states * (
            2 * kept * triton.cdiv(chunks, span) + (16 * triton.cdiv(chunks, walk) if passes > 1 else 0)
        )
        read += (2 if backward else 1) * (float(passes * tokens * size) + states)
        flops += (2 if backward else 1) * 2.0 * passes * pairs * chunks * chunk * problem.wide * problem.value_dim
    return Cost(max(flops, floor.flops), read)


_AXES = {
    "CHUNK": powers_of_two(16, 128),
    "BLOCK_V": powers_of_two(16, 128),
    "SPAN": (0, 1, 2, 4, 8, 16),
    "WALK": (0, 8, 16, 32, 128),
    "STATE_V": powers_of_two(16, 128),
    "STATE_WARPS": (4, 8),
    "num_warps": powers_of_two(1, 8),
    "num_stages": (1, 2, 3),
}

SPACE = Space(_AXES, _reject, _default, _work, carries=partial(walks_alike, _default))
_BACKWARD = {axis: values for axis, values in _AXES.items() if axis != "SPAN"}
SPACE_BWD = Space(_BACKWARD, _reject, _default, _work, carries=partial(walks_alike, _default))
