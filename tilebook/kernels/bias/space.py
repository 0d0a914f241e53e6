"""The configs of the kernels that sum rows up, and what of them follows from problem and GPU."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.bias.problem import Problem
from tilebook.op import Config, Cost, Space, powers_of_two

_MOST_ELEMENTS = 64
"""That a thread has of a block."""


def _reject(problem: Problem, config: Config, device: Device) -> str | None:
    block, rows, split = (config.number(name) for name in ("BLOCK", "ROWS", "SPLIT"))
    threads = config.number("num_warps") * device.warp_size
    if block > max(AXES["BLOCK"][0], triton.next_power_of_2(problem.width)):
        return "a block is wider than the rows"
    if rows * split > max(AXES["ROWS"][0], triton.next_power_of_2(problem.rows)):
        return "more rows than there are"
    if rows * block > _MOST_ELEMENTS * threads:
        return f"{rows * block // threads} elements a thread"
    if config["num_warps"] != 1 and rows * block < 16 // problem.torch_dtype.itemsize * threads:
        return "less than 16 bytes a thread"
    return None


def _default(problem: Problem, device: Device) -> Config:
    """Blocks of 128 columns, and four programs a multiprocessor, as far as there are rows for them."""
    high = max(AXES["ROWS"][0], min(32, triton.next_power_of_2(problem.rows)))
    across = triton.cdiv(problem.width, 128)
    wanted = max(1, 4 * device.sm_count // across)
    most = max(1, triton.next_power_of_2(problem.rows) // high)
    split = min(AXES["SPLIT"][-1], most, 1 << (wanted.bit_length() - 1))
    block = max(AXES["BLOCK"][0], min(128, triton.next_power_of_2(problem.width)))
    warps = max(1, min(4, high * block // (8 * device.warp_size)))
    return Config(BLOCK=block, ROWS=high, SPLIT=split, num_warps=1 << (warps.bit_length() - 1))


def _work(problem: Problem, config: Config) -> Cost:
    """Columns that are not there count as operations, and parts are written and read."""
    floor, block = problem.cost(), config.number("BLOCK")
    padded = triton.cdiv(problem.width, block) * block
    parts = 8.0 * config.number("SPLIT") * problem.width
    return Cost(floor.flops * padded / problem.width, floor.bytes + parts)


AXES = {
    "BLOCK": powers_of_two(64, 512),
    "ROWS": powers_of_two(4, 64),
    "SPLIT": powers_of_two(1, 256),
    "num_warps": powers_of_two(1, 8),
}
SPACE = Space(AXES, _reject, _default, _work)
