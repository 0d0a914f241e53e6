"""The configs of the kernel of a convolution's weight gradient, and what of them follows from problem and GPU."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.convolution.problem import Problem
from tilebook.occupancy import crowded, too_large
from tilebook.op import Config, Cost, Space, powers_of_two


def _across(config: Config) -> int:
    """Columns of a program's tile: channels of so many taps."""
    return config.number("BLOCK_C") * config.number("TAPS")


def _tiles(problem: Problem, config: Config) -> int:
    blocks = triton.cdiv(problem.outputs, config.number("BLOCK_O")) * triton.cdiv(
        problem.channels, config.number("BLOCK_C")
    )
    return int(blocks * triton.cdiv(problem.taps, config.number("TAPS")))


def _reject(problem: Problem, config: Config, device: Device) -> str | None:
    rows, columns, deep = config.number("BLOCK_O"), _across(config), config.number("BLOCK_K")
    warps, stages = config.number("num_warps"), config.number("num_stages")
    if rows > max(AXES["BLOCK_O"][0], triton.next_power_of_2(problem.outputs)):
        return "a tile has more outputs than there are"
    if config.number("BLOCK_C") > max(AXES["BLOCK_C"][0], triton.next_power_of_2(problem.channels)):
        return "a tile has more channels than there are"
    if config.number("TAPS") > triton.next_power_of_2(problem.taps):
        return "more taps than there are"
    if columns > 256:
        return "more than 256 columns"
    if rows * columns < 1024 * warps and config != _least(problem, device):
        return f"{warps} warps need larger tiles"
    if config["SPLIT"] != 1 and config.number("SPLIT") * deep > problem.positions:
        return "fewer positions than splits"
    if device.backend == "hip" and stages > 2:
        return "more than 2 stages do not pay on AMD GPUs"
    ring = max(1, stages - 1) if device.backend == "hip" else stages
    shared = (rows + columns) * deep * problem.torch_dtype.itemsize * ring
    return too_large(shared, device) or crowded(rows * columns, warps, device)


def _least(problem: Problem, device: Device) -> Config:
    return Config(BLOCK_O=32, BLOCK_C=16, TAPS=1, BLOCK_K=32, SPLIT=1, num_warps=4, num_stages=2)


def _default(problem: Problem, device: Device) -> Config:
    """Tiles of 128 × 128 where there is so much, and so many splits that the last round of programs is full."""
    wide = max(16, min(64, triton.next_power_of_2(problem.channels)))
    for rows, columns, deep, warps, stages in ((128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 32, 4, 2)):
        taps = max(1, min(columns // wide, triton.next_power_of_2(problem.taps)))
        config = Config(
            BLOCK_O=rows, BLOCK_C=wide, TAPS=taps, BLOCK_K=deep, SPLIT=1, num_warps=warps, num_stages=stages
        )
        full = max(AXES["SPLIT"], key=lambda split: _filled(problem, config.replace(SPLIT=split), device))
        config = config.replace(SPLIT=full)
        if _reject(problem, config, device) is None:
            return config
    return _least(problem, device)


def _filled(problem: Problem, config: Config, device: Device) -> tuple[bool, float]:
    """Is it possible, and how much of the rounds of programs has work, less what joining many splits costs."""
    places = 2 * device.sm_count
    programs = _tiles(problem, config) * config.number("SPLIT")
    share = programs / (triton.cdiv(programs, places) * places) - 0.01 * config.number("SPLIT")
    return _reject(problem, config, device) is None, share


def _work(problem: Problem, config: Config) -> Cost:
    """Outputs, channels and taps that are not there count as operations."""
    floor = problem.cost()
    padded = _tiles(problem, config) * config.number("BLOCK_O") * _across(config)
    return Cost(floor.flops * padded / (problem.outputs * problem.channels * problem.taps), floor.bytes)


AXES = {
    "BLOCK_O": powers_of_two(32, 256),
    "BLOCK_C": powers_of_two(16, 128),
    "TAPS": powers_of_two(1, 8),
    "BLOCK_K": powers_of_two(32, 128),
    "SPLIT": (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64),
    "num_warps": powers_of_two(4, 8),
    "num_stages": (1, 2, 3, 4, 5),
}
SPACE = Space(AXES, _reject, _default, _work)
