"""The configs of the kernel of rotary position embedding, and what of them follows from problem and GPU."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.rope.problem import Rope
from tilebook.op import Config, Cost, Space, powers_of_two

_MOST_ELEMENTS = 32
"""That a thread has of its program's heads; angles and results take as much again."""


def _numbers(problem: Rope, config: Config) -> int:
    """Numbers that a program rotates, those that are not there among them."""
    half: int = triton.next_power_of_2(problem.rotated // 2)
    return config.number("ROWS") * config.number("HEADS") * 2 * half


def _reject(problem: Rope, config: Config, device: Device) -> str | None:
    threads, numbers = config.number("num_warps") * device.warp_size, _numbers(problem, config)
    if config["HEADS"] != 1 and config.number("HEADS") > triton.next_power_of_2(max(problem.heads, problem.heads_kv)):
        return "more heads than there are"
    if config["ROWS"] != 1 and config.number("ROWS") > triton.next_power_of_2(problem.seq):
        return "more tokens than there are"
    if numbers > _MOST_ELEMENTS * threads and config != _least(problem, device):
        return f"{numbers // threads} elements a thread"
    if config["num_warps"] != 1 and numbers < 16 // problem.torch_dtype.itemsize * threads:
        return "less than 16 bytes a thread"
    return None


def _least(problem: Rope, device: Device) -> Config:
    """One head of one token, for heads that are wider than any."""
    return Config(ROWS=1, HEADS=1, num_warps=8)


def _default(problem: Rope, device: Device) -> Config:
    """8 heads, and tokens up to 2048 numbers; 16 numbers a thread."""
    heads = min(8, triton.next_power_of_2(max(problem.heads, problem.heads_kv)))
    each = 2 * heads * triton.next_power_of_2(problem.rotated // 2)
    rows = max(1, min(16, 2048 // each, triton.next_power_of_2(problem.seq)))
    warps = max(1, min(8, rows * each // (16 * device.warp_size)))
    return Config(ROWS=rows, HEADS=heads, num_warps=warps)


def _work(problem: Rope, config: Config) -> Cost:
    """Heads and tokens that are not there count as operations."""
    floor, rows, heads = problem.cost(), config.number("ROWS"), config.number("HEADS")
    padded = (triton.cdiv(problem.heads, heads) + triton.cdiv(problem.heads_kv, heads)) * heads
    padded *= triton.cdiv(problem.seq, rows) * rows
    return Cost(floor.flops * padded / ((problem.heads + problem.heads_kv) * problem.seq), floor.bytes)


AXES = {
    "ROWS": powers_of_two(1, 16),
    "HEADS": powers_of_two(1, 32),
    "num_warps": powers_of_two(1, 8),
}
SPACE = Space(AXES, _reject, _default, _work)
