"""The configs of the kernels of gated linear units, and what of them follows from problem and GPU."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.glu.problem import Glu
from tilebook.op import Config, Cost, Space, powers_of_two

_MOST_ELEMENTS = 32
"""That a thread has of a block: more bytes in flight than an SM's share of the bandwidth needs."""


def _block(problem: Glu, config: Config) -> int:
    width: int = triton.next_power_of_2(problem.width)
    return min(config.number("BLOCK"), width)


def _reject(problem: Glu, config: Config, device: Device) -> str | None:
    block, rows = _block(problem, config), config.number("ROWS")
    threads = config.number("num_warps") * device.warp_size
    if block < config.number("BLOCK") and config["BLOCK"] != AXES["BLOCK"][0]:
        return "a smaller BLOCK holds the row"
    if rows > 1 and block < problem.width:
        return "several rows at once are held whole"
    if rows > 1 and rows > triton.next_power_of_2(problem.rows):
        return "more rows than there are"
    if rows * block > _MOST_ELEMENTS * threads:
        return f"{rows * block // threads} elements a thread"
    if config["num_warps"] != 1 and rows * block < 16 // problem.torch_dtype.itemsize * threads:
        return "less than 16 bytes a thread"
    return None


def _default(problem: Glu, device: Device) -> Config:
    """As many rows as have 1024 elements, else 1024 columns of one; 8 elements a thread."""
    width: int = triton.next_power_of_2(problem.width)
    rows = max(1, min(16, 1024 // width, triton.next_power_of_2(problem.rows)))
    block = min(max(AXES["BLOCK"][0], width), 1024)
    return Config(ROWS=rows, BLOCK=block, num_warps=max(1, rows * min(block, width) // (8 * device.warp_size)))


def _work(problem: Glu, config: Config) -> Cost:
    """Rows and columns that are not there count as operations."""
    floor, rows, block = problem.cost(), config.number("ROWS"), _block(problem, config)
    padded = triton.cdiv(problem.rows, rows) * rows * triton.cdiv(problem.width, block) * block
    return Cost(floor.flops * padded / (problem.rows * problem.width), floor.bytes)


AXES = {
    "ROWS": powers_of_two(1, 16),
    "BLOCK": powers_of_two(512, 8192),
    "num_warps": powers_of_two(1, 16),
}
SPACE = Space(AXES, _reject, _default, _work)
