"""The configs of the kernel of max pooling's gradient, and what of them follows from problem and GPU."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.pooling.problem import Problem
from tilebook.op import Config, Cost, Space, powers_of_two

_MOST_CELLS = 16
"""Of a thread, each with as many sums as a stride has numbers."""


def _reject(problem: Problem, config: Config, device: Device) -> str | None:
    block, threads = config.number("BLOCK"), config.number("num_warps") * device.warp_size
    if not threads <= block <= _MOST_CELLS * threads:
        return f"{block / threads:g} cells a thread"
    if block > max(AXES["BLOCK"][0], triton.next_power_of_2(problem.cells)):
        return "a block is larger than a plane"
    return None


def _default(problem: Problem, device: Device) -> Config:
    """Two cells a thread, in small blocks: on an H200 they ran 10 % faster than four times as large ones."""
    block = 256 if 128 < problem.cells < 256 else 128  # one block of a plane rather than a second that is half empty
    return Config(BLOCK=block, num_warps=max(1, block // 2 // device.warp_size))


def _work(problem: Problem, config: Config) -> Cost:
    """What blocks hold beyond the end of a plane counts as operations."""
    floor, block = problem.cost(), config.number("BLOCK")
    return Cost(floor.flops * triton.cdiv(problem.cells, block) * block / problem.cells, floor.bytes)


AXES = {"BLOCK": powers_of_two(128, 2048), "num_warps": powers_of_two(1, 8)}
SPACE = Space(AXES, _reject, _default, _work)
