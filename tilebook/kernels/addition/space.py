"""The configs of the kernels that add two tensors up, and what of them follows from problem and GPU."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.addition.problem import Problem
from tilebook.op import Config, Cost, Space, powers_of_two

_MOST_NUMBERS = 64
"""Of a thread."""


def _reject(problem: Problem, config: Config, device: Device) -> str | None:
    numbers = config.number("ROWS") * config.number("COLUMNS")
    threads = config.number("num_warps") * device.warp_size
    if numbers > _MOST_NUMBERS * threads:
        return f"{numbers // threads} numbers a thread"
    if numbers < 16 // problem.torch_dtype.itemsize * threads:
        return "less than 16 bytes a thread"
    if problem.lies == "flat" and config.number("ROWS") != config.number("COLUMNS"):
        return "a block in one order has no sides"
    return None


def _default(problem: Problem, device: Device) -> Config:
    """Eight numbers a thread in one order, and tiles of sixteen where orders differ."""
    side, threads = (32, 128) if problem.lies == "flat" else (64, 256)
    return Config(ROWS=side, COLUMNS=side, num_warps=threads // device.warp_size)


def _work(problem: Problem, config: Config) -> Cost:
    """What blocks hold beyond the edges counts as operations."""
    floor = problem.cost()
    if problem.lies == "flat":
        return floor
    padded = 1
    for size, block in ((problem.rows, config.number("ROWS")), (problem.width, config.number("COLUMNS"))):
        padded *= triton.cdiv(size, block) * block
    return Cost(floor.flops * padded / (problem.rows * problem.width), floor.bytes)


AXES = {"ROWS": powers_of_two(32, 128), "COLUMNS": powers_of_two(32, 128), "num_warps": powers_of_two(2, 8)}
SPACE = Space(AXES, _reject, _default, _work)
