"""The configs of mLSTM's kernels: those of linear attention, with defaults of their own.

Input gates and the divisor want registers: a program that carries a state along would spill, so that by default states
are found before (SPAN 1), and tiles are smaller.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import triton

from tilebook.device import Device
from tilebook.kernels.linear_attention.problem import BackwardProblem, LinearAttention
from tilebook.kernels.linear_attention.space import SPACE as LINEAR
from tilebook.kernels.linear_attention.space import SPACE_BWD as LINEAR_BWD
from tilebook.kernels.linear_attention.space import _parts as parts
from tilebook.occupancy import asynchronous, walks_alike
from tilebook.op import Config

_SMALL = [(16, columns, warps, 1) for columns in (32, 16) for warps in (8, 4, 2, 1)]


def _shapes(problem: LinearAttention, device: Device) -> list[tuple[int, int, int, int]]:
    """Chunk, columns, warps and stages that compile without spills, the best guess first."""
    wide, backward = problem.wide, isinstance(problem, BackwardProblem)
    if problem.dtype == "fp32":  # products pass through registers
        return [(16, 32, 4, 1) if wide <= 64 else (16, 16, 8, 1), *_SMALL]
    if wide > 128 or (backward and not asynchronous(device)):
        return [(16, 32, 8, 1), *_SMALL]
    if not asynchronous(device):
        return [(32, 32, 4, 1), *_SMALL]
    if backward:
        return [(64, 64 if wide <= 64 and problem.value_dim % 64 == 0 else 32, 8, 1), *_SMALL]
    return [(64, 64, 8, 1), (32, 32, 4, 1), *_SMALL]


def _default(problem: LinearAttention, device: Device) -> Config:
    most, length = (max(16, triton.next_power_of_2(n)) for n in (problem.value_dim, problem.seq))
    space, configs = LINEAR_BWD if isinstance(problem, BackwardProblem) else LINEAR, []
    for chunk, columns, warps, stages in _shapes(problem, device):
        chunk, columns = min(chunk, length), min(columns, most)
        chunks = triton.cdiv(problem.seq, chunk)
        programs = problem.batch * problem.heads * triton.cdiv(problem.value_dim, columns)
        values: dict[str, int] = {
            "CHUNK": chunk, "BLOCK_V": columns, "SPAN": 1, "WALK": parts(True, chunks, programs / device.sm_count)[1],
            "STATE_V": min(16 if problem.dtype == "fp32" or problem.wide > 128 else 32, most), "STATE_WARPS": 4,
            "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
        configs.append(Config({axis: values[axis] for axis in space.axes}))
    return next((each for each in configs if space.reject(problem, each, device) is None), configs[-1])


_CARRIES = partial(walks_alike, _default)

SPACE = dataclasses.replace(LINEAR, default=_default, carries=_CARRIES)
SPACE_BWD = dataclasses.replace(LINEAR_BWD, default=_default, carries=_CARRIES)
