"""The configs of the kernels, and what of them follows from problem and GPU.

WALK: chunks that a program adds to its state, 0 for all; what several have found is joined by another kernel.
"""

from __future__ import annotations

from functools import partial

import triton

from tilebook.device import Device
from tilebook.kernels.bidirectional.form import PERFORMER
from tilebook.kernels.bidirectional.problem import BackwardProblem, Bidirectional
from tilebook.occupancy import asynchronous, crowded, too_large, walks_alike
from tilebook.op import Config, Cost, Space, powers_of_two

_BUSY = 2
"""Programs for each multiprocessor, that a walk is cut up for by default."""


def _backward(problem: Bidirectional) -> bool:
    return isinstance(problem, BackwardProblem)


def _longest(problem: Bidirectional) -> int:
    """Tokens that states are made of."""
    return max(problem.seq, problem.keys) if _backward(problem) else problem.keys


def _needs(problem: Bidirectional, config: Config) -> tuple[int, int]:
    """fp32 numbers in registers and bytes of shared memory of the largest kernel, about."""
    chunk, columns, size = config.number("CHUNK"), config.number("BLOCK_V"), problem.torch_dtype.itemsize
    wide, features, ring = problem.wide, problem.wide_features, max(1, config.number("num_stages") - 1)
    loaded, directions = chunk * (wide + columns) * size * ring, 0
    state = features * columns
    if problem.feature_map == PERFORMER:
        directions = features * wide * (size if problem.dtype == "fp32" else 2 * size)
    if _backward(problem):
        return 2 * chunk * features + chunk * max(wide, columns), loaded + directions + 2 * state * size
    return state + chunk * features, loaded + directions + state * size


def _reject(problem: Bidirectional, config: Config, device: Device) -> str | None:
    chunk, columns, warps = config.number("CHUNK"), config.number("BLOCK_V"), config.number("num_warps")
    walk, longest = config.number("WALK"), _longest(problem)
    if columns > max(16, triton.next_power_of_2(problem.value_dim)):
        return "a tile has more columns than there are"
    if chunk > max(16, triton.next_power_of_2(max(problem.seq, problem.keys))):
        return "a chunk is longer than the sequence"
    if walk and walk * chunk >= longest:
        return "a walk along all is 0"
    if device.backend == "hip" and config.number("num_stages") > 2:
        return "more than 2 stages do not pay on AMD GPUs"
    if chunk * min(columns, problem.wide_features) < 32 * warps:
        return f"{warps} warps need larger tiles"
    elements, shared = _needs(problem, config)
    return too_large(shared, device) or crowded(elements, warps, device)


def _default(problem: Bidirectional, device: Device) -> Config:
    """Tiles that compile without spills, and walks so long that all multiprocessors are busy."""
    most = max(16, triton.next_power_of_2(problem.value_dim))
    length = max(16, triton.next_power_of_2(max(problem.seq, problem.keys)))
    exact, wide = problem.dtype == "fp32", max(problem.wide, problem.wide_features)
    stages = 1 if problem.feature_map == PERFORMER else 2
    shapes = [(64, 64, 4, stages), (64, 32, 4, stages)] if wide <= 64 and asynchronous(device) else []
    shapes += [(64, 64, 8, 2), (64, 32, 8, 1)] if wide <= 128 else []
    shapes += [
        (32, 32, 8, 1),
        (32, 32, 4, 1),
        (16, 32, 4, 1),
        (16, 16, 8, 1),
        (16, 16, 4, 1),
        (16, 16, 2, 1),
        (16, 16, 1, 1),
    ]
    configs = []
    for chunk, columns, warps, stages in [(16, 16, 4, 1), (16, 16, 8, 1), *shapes[-2:]] if exact else shapes:
        chunk, columns = min(chunk, length), min(columns, most)
        programs = problem.batch * problem.heads * triton.cdiv(problem.value_dim, columns)
        chunks, walk = triton.cdiv(_longest(problem), chunk), 0
        for each in (64, 16, 4):
            if programs * triton.cdiv(chunks, walk or chunks) < _BUSY * device.sm_count and each < chunks:
                walk = each
        values = {"CHUNK": chunk, "BLOCK_V": columns, "WALK": walk, "num_warps": warps, "num_stages": stages}
        configs.append(Config(values))
    return next((each for each in configs if _reject(problem, each, device) is None), configs[-1])


def _work(problem: Bidirectional, config: Config) -> Cost:
    """Whole chunks; rows are read again for each tile of columns."""
    floor = problem.cost()
    tiles = triton.cdiv(problem.value_dim, config.number("BLOCK_V"))
    chunk = config.number("CHUNK")
    padding = triton.cdiv(problem.seq, chunk) * chunk / problem.seq
    return Cost(floor.flops * padding * (1 + tiles) / 2, floor.bytes * (1 + tiles) / 2)


SPACE = Space(
    {
        "CHUNK": powers_of_two(16, 128),
        "BLOCK_V": powers_of_two(16, 128),
        "WALK": (0, 4, 16, 64),
        "num_warps": powers_of_two(1, 8),
        "num_stages": (1, 2, 3),
    },
    _reject,
    _default,
    _work,
    carries=partial(walks_alike, _default),
)
