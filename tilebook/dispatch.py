"""Runs an op with the winner for this GPU and problem: memo → snapshot → nearest → default. Never tunes, never raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tilebook import device as devices
from tilebook.op import Config, Implementation, Op

_forced: tuple[str, Config | None] | None = None


@contextmanager
def use(implementation: str, config: Config | None = None) -> Iterator[None]:
    """Inside the block every op that has it runs this implementation, with this config or its default.

    For tests and comparisons; it holds for tensors on the CPU too (a Triton kernel then needs `TRITON_INTERPRET=1`).
    """
    global _forced
    previous, _forced = _forced, (implementation, config)
    try:
        yield
    finally:
        _forced = previous


def serves(op: Op[Any], *args: Any) -> bool:
    """Can a kernel of ours run this call? If not, the family's public function runs PyTorch's own implementation."""
    problem = op.problem.of(*args)
    if _forced is not None:
        return op.implementations[_forced[0]].supports(problem) if _forced[0] in op.implementations else False
    return args[0].is_cuda and op.tunable.supports(problem)


def run(op: Op[Any], *args: Any) -> tuple[torch.Tensor, ...]:
    """One call of the op with the implementation and config chosen for it."""
    problem = op.problem.of(*args)
    chosen: Implementation = op.tunable
    config: Config | None = None
    if _forced is not None and _forced[0] in op.implementations:
        chosen, config = op.implementations[_forced[0]], _forced[1]
    if chosen.space is not None and config is None:
        gpu = devices.current(args[0].device.index or 0) if args[0].is_cuda else devices.CATALOGUE["NVIDIA H200"]
        config = chosen.space.default(problem, gpu)
    return chosen(*args, config=config)
