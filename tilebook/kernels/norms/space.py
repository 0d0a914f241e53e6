"""The configs of the norms' kernels, and what of them follows from problem and GPU."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.norms.problem import Norm
from tilebook.op import Config, Cost, Space, powers_of_two

_SIDE = 8
"""Rows that a program takes at least where they are side by side: of fp32 they are one sector of 32 bytes."""


def _block(problem: Norm, config: Config) -> int:
    """Columns in registers at a time; if they are not all, a row is read twice, the second time from the L2 cache."""
    width: int = triton.next_power_of_2(problem.width)
    return min(config.number("BLOCK"), width)


def _reject(problem: Norm, config: Config, device: Device, registers: int) -> str | None:
    """`registers`: how many each element takes."""
    block, rows, warps = _block(problem, config), config.number("ROWS"), config.number("num_warps")
    threads = warps * device.warp_size
    if threads > 1024:
        return f"{threads} threads in a block"
    if block < config.number("BLOCK") and config["BLOCK"] != FORWARD_AXES["BLOCK"][0]:
        return "a smaller BLOCK holds the row"
    if problem.beside:
        if rows < _SIDE:
            return f"less than {_SIDE} rows side by side"
        if rows * block * 4 > device.shared_per_block:
            return "more than shared memory can turn"
    elif rows > 16:
        return "more rows than are worth having"
    if rows > max(_SIDE if problem.beside else 1, triton.next_power_of_2(problem.beside or problem.rows)):
        return "more rows than there are"
    most = min(device.registers_per_sm // threads, 256) // registers
    if rows * block > most * threads:
        return f"{rows * block // threads} elements a thread, of {most} that registers hold"
    if warps > 1 and rows * block < 16 // problem.torch_dtype.itemsize * threads:
        return "less than 16 bytes a thread"
    return None


def _reject_fwd(problem: Norm, config: Config, device: Device) -> str | None:
    return _reject(problem, config, device, 2)


def _reject_bwd(problem: Norm, config: Config, device: Device) -> str | None:
    threads = config.number("num_warps") * device.warp_size
    if config["PER_SM"] != 1 and config.number("PER_SM") * threads > device.threads_per_sm:
        return "more programs than an SM can hold at once"
    return _reject(problem, config, device, 3 + problem.vectors)  # sums over rows wait in registers as well


def _default_fwd(problem: Norm, device: Device) -> Config:
    """As many rows as have 1024 elements, else one row, 16384 columns at a time; 16 elements a thread.

    Of rows that are side by side 8 to 32, 1024 columns at a time.
    """
    width = triton.next_power_of_2(problem.width)
    rows = max(1, min(16, 1024 // width, triton.next_power_of_2(problem.rows)))
    block = max(1024, min(16384, width))
    if problem.beside:
        rows = max(_SIDE, min(32, 4096 // width, triton.next_power_of_2(problem.beside)))
        block = 1024
    warps = max(1, rows * min(block, width) // (16 * device.warp_size))
    return Config(ROWS=rows, BLOCK=block, num_warps=warps)


def _default_bwd(problem: Norm, device: Device) -> Config:
    """Of rows 256 to 2048 wide 4096 elements at a time, of those up to 4096 one; others, and rows that are side by
    side, as in the forward pass. What is wider than fits is read by halves."""
    forward, width = _default_fwd(problem, device), triton.next_power_of_2(problem.width)
    config = Config({**forward, "PER_SM": 1 if problem.width > 4096 else 2})
    if not problem.beside and width <= 4096:
        narrow = width <= 2048
        rows = min(4096 // max(width, 64), triton.next_power_of_2(problem.rows)) if narrow else 1
        tiled = config.replace(ROWS=max(1, rows), num_warps=4, PER_SM=2 if narrow else 4)
        config = tiled if _reject_bwd(problem, tiled, device) is None else config
    half = {"BLOCK": config.number("BLOCK") // 2, "num_warps": max(1, config.number("num_warps") // 2)}
    return config if _reject_bwd(problem, config, device) is None else config.replace(**half)


def _work(problem: Norm, config: Config) -> Cost:
    """Rows in a last program that are not there count, and the second reading of what registers do not hold."""
    floor = problem.cost()
    length = problem.beside or problem.rows
    rows = triton.cdiv(length, config.number("ROWS")) * config.number("ROWS")
    again = 1.5 if _block(problem, config) < problem.width else 1.0
    return Cost(floor.flops * rows / length, floor.bytes * again)


FORWARD_AXES = {
    "ROWS": powers_of_two(1, 64),
    "BLOCK": powers_of_two(1024, 65536),
    "num_warps": powers_of_two(1, 32),
}
SPACE = Space(FORWARD_AXES, _reject_fwd, _default_fwd, _work)
SPACE_BWD = Space({**FORWARD_AXES, "PER_SM": powers_of_two(1, 8)}, _reject_bwd, _default_bwd, _work)
