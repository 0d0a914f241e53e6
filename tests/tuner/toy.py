"""A small op on the CPU, with right and wrong implementations, for tests of the tuner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilebook import op as ops
from tilebook.op import Config, Cost, Op, Space, powers_of_two


@dataclass(frozen=True)
class Scaling(ops.Problem):
    """y = 3 x for x of (rows, width)."""

    rows: int = ops.size("M")
    width: int = ops.size("H")
    dtype: str = "bf16"
    twice: bool = ops.flag()

    @classmethod
    def of(cls, x: torch.Tensor) -> Scaling:
        return cls(x.shape[0], x.shape[1], ops.dtype_name(x.dtype))

    def inputs(self, device: Any, seed: int) -> tuple[Any, ...]:
        if str(device) == "meta":
            return (torch.empty(self.rows, self.width, dtype=self.torch_dtype, device="meta"),)
        x = torch.randn(self.rows, self.width, generator=torch.Generator().manual_seed(seed))
        return (x.to(self.torch_dtype),)

    def cost(self) -> Cost:
        return Cost(self.rows * self.width, 4.0 * self.rows * self.width)

    def neighbours(self) -> Sequence[Scaling]:
        return (Scaling(self.rows + 3, self.width, self.dtype), Scaling(2 * self.rows, self.width, self.dtype))


def _reject(problem: Scaling, config: Config, device: Any) -> str | None:
    return "too large a tile" if config.number("BLOCK") * config.number("num_warps") > 1024 else None


SPACE = Space(
    axes={"BLOCK": powers_of_two(16, 512), "num_warps": powers_of_two(1, 16), "num_stages": (1, 2, 3, 4)},
    reject=_reject,
    default=lambda problem, device: Config(BLOCK=16, num_warps=1, num_stages=1),
)


def make_op(function: Any = None, deterministic: bool = True) -> Op[Scaling]:
    """The op; `function(x, config)` is its tunable implementation, a right one by default."""

    def reference(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    def right(x: torch.Tensor, *, config: Config) -> torch.Tensor:
        y = torch.empty_like(x)
        y.copy_(x.float() * 3)
        return y

    made: Op[Scaling] = Op("scaling_fwd", Scaling, reference, "fwd")
    made.implementation("triton", space=SPACE, deterministic=deterministic)(function or right)
    made.implementation("torch")(lambda x: x * 3)
    return made
