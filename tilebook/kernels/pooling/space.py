"""The configs of the kernel of max pooling's gradient, and what of them follows from problem and GPU."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.pooling.problem import Problem
from tilebook.op import Config, Cost, Space, powers_of_two

_MOST_NUMBERS = 32
"""Of a thread, each of which asks all windows that it is in."""


def _size(problem: Problem) -> int:
    """Numbers that are counted together."""
    return problem.height * problem.width * (problem.channels if problem.last else 1)


def _reject(problem: Problem, config: Config, device: Device) -> str | None:
    block, threads = config.number("BLOCK"), config.number("num_warps") * device.warp_size
    if not threads <= block <= _MOST_NUMBERS * threads:
        return f"{block / threads:g} numbers a thread"
    if block > max(AXES["BLOCK"][0], triton.next_power_of_2(_size(problem))):
        return "a block is larger than a plane"
    return None


def _default(problem: Problem, device: Device) -> Config:
    """Four numbers a thread."""
    block = max(AXES["BLOCK"][0], min(1024, triton.next_power_of_2(_size(problem))))
    return Config(BLOCK=block, num_warps=max(1, block // 4 // device.warp_size))


def _work(problem: Problem, config: Config) -> Cost:
    """What blocks hold beyond the end of a plane counts as operations."""
    floor, size = problem.cost(), _size(problem)
    return Cost(floor.flops * triton.cdiv(size, config.number("BLOCK")) * config.number("BLOCK") / size, floor.bytes)


AXES = {"BLOCK": powers_of_two(256, 4096), "num_warps": powers_of_two(1, 8)}
SPACE = Space(AXES, _reject, _default, _work)
