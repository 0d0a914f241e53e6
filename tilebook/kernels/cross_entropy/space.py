"""The configs of cross entropy's kernels, and what of them follows from problem and GPU."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.cross_entropy.problem import CrossEntropy
from tilebook.op import Config, Cost, Space, powers_of_two

_MOST_ELEMENTS = 64
"""That a thread has of a block: more bytes in flight than an SM's share of the bandwidth needs."""


def _block(problem: CrossEntropy, config: Config) -> int:
    classes: int = triton.next_power_of_2(problem.classes)
    return min(config.number("BLOCK"), classes)


def _reject(problem: CrossEntropy, config: Config, device: Device, registers: int) -> str | None:
    """`registers`: how many each element takes."""
    block, rows, warps = _block(problem, config), config.number("ROWS"), config.number("num_warps")
    threads = warps * device.warp_size
    if threads > 1024:
        return f"{threads} threads in a block"
    if block < config.number("BLOCK") and config["BLOCK"] != AXES["BLOCK"][0]:
        return "a smaller BLOCK holds the row"
    if rows > 1 and block < problem.classes:
        return "several rows at once are held whole"
    if rows > 1 and rows > triton.next_power_of_2(problem.rows):
        return "more rows than there are"
    most = min(min(device.registers_per_sm // threads, 256) // registers, _MOST_ELEMENTS)
    if rows * block > most * threads:
        return f"{rows * block // threads} elements a thread, of {most} that registers hold"
    if warps > 1 and rows * block < 16 // problem.torch_dtype.itemsize * threads:
        return "less than 16 bytes a thread"
    return None


def _reject_fwd(problem: CrossEntropy, config: Config, device: Device) -> str | None:
    block, stages = _block(problem, config), config.number("STAGES")
    if stages > 1 and (config["ROWS"] != 1 or problem.classes < stages * block):
        return "no blocks to load ahead"
    shared = stages * block * problem.torch_dtype.itemsize
    if stages > 1 and shared > device.shared_per_block:
        return f"{shared} bytes of blocks in flight, of {device.shared_per_block} shared memory"
    # A row's sum waits by columns, and under label smoothing that of its logits.
    return _reject(problem, config, device, 2 + problem.smoothed)


def _reject_bwd(problem: CrossEntropy, config: Config, device: Device) -> str | None:
    return _reject(problem, config, device, 2)


def _shape(problem: CrossEntropy, most: int, each: int) -> dict[str, int]:
    """As many rows as have 1024 elements, else `most` columns of one; `each` elements a thread."""
    classes = triton.next_power_of_2(problem.classes)
    rows = max(1, min(16, 1024 // classes, triton.next_power_of_2(problem.rows)))
    block = max(AXES["BLOCK"][0], min(most, classes))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, rows * min(block, classes) // (each * 32))}


def _default_fwd(problem: CrossEntropy, device: Device) -> Config:
    return Config(**_shape(problem, 4096, 16), STAGES=1)


def _default_bwd(problem: CrossEntropy, device: Device) -> Config:
    return Config(**_shape(problem, 4096, 16))


def _work(problem: CrossEntropy, config: Config) -> Cost:
    """Rows in a last program that are not there count."""
    floor = problem.cost()
    rows = triton.cdiv(problem.rows, config.number("ROWS")) * config.number("ROWS")
    return Cost(floor.flops * rows / problem.rows, floor.bytes)


AXES = {
    "ROWS": powers_of_two(1, 16),
    "BLOCK": powers_of_two(1024, 16384),
    "num_warps": powers_of_two(1, 32),
}
SPACE = Space({**AXES, "STAGES": (1, 2, 3)}, _reject_fwd, _default_fwd, _work)
SPACE_BWD = Space(AXES, _reject_bwd, _default_bwd, _work)
