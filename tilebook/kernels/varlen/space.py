"""The configs for packed sequences: attention's, judged for as many tokens in sequences of equal length."""

from __future__ import annotations

from typing import Any

from tilebook.device import Device
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.varlen.problem import ForwardProblem
from tilebook.occupancy import asynchronous
from tilebook.op import Config, Cost, Op, Space


def _like(op: Op[Any]) -> Space:
    """The space of attention's own kernels, whose tiles are the same."""
    space = op.tunable.space
    assert space is not None

    def work(problem: ForwardProblem, config: Config) -> Cost:
        assert space.work is not None
        done = [space.work(part, config) for part in problem.parts]
        return Cost(sum(each.flops for each in done), sum(each.bytes for each in done))

    def reject(problem: ForwardProblem, config: Config, device: Device) -> str | None:
        return space.reject(problem.even, config, device)

    def default(problem: ForwardProblem, device: Device) -> Config:
        config = space.default(problem.even, device)
        # Without descriptors, where a sequence begins takes registers too, and these tiles leave none.
        wide = asynchronous(device) and problem.even.width > 64 and not config["DESCRIPTORS"]
        return config.replace(BLOCK_M1=32) if wide and "BLOCK_M1" in config else config

    # What came later there, the kernels here have not got.
    axes = {axis: values for axis, values in space.axes.items() if axis not in space.later}
    axes["DESCRIPTORS"] = (0, 1)
    return Space(axes, reject, default, work)


SPACE = _like(attention_fwd)
SPACE_BWD = _like(attention_bwd)
