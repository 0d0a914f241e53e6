"""Ops whose candidates misbehave by kind. Imported by workers, so it imports little."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilebook import op as ops
from tilebook.op import Config, Cost, Op, Space

GOOD = 4
"""Right candidates of every problem, the default among them."""

MOST = 25
"""Bad candidates of one problem: a search that gains nothing stops before it has tried many more."""


@dataclass(frozen=True)
class Pair(ops.Problem):
    """y = 3 x and z = 5 x for x (rows, width). `count` candidates of `kind` are bad; `rows` tell problems apart."""

    rows: int = ops.size("M")
    width: int = ops.size("N")
    count: int = ops.size("C")
    dtype: str = "fp16"
    kind: str = "good"

    @classmethod
    def of(cls, x: torch.Tensor) -> Pair:
        return cls(x.shape[0], x.shape[1], 0, ops.dtype_name(x.dtype))

    def inputs(self, device: Any, seed: int) -> tuple[Any, ...]:
        source = ops.generator(device, seed)
        return (torch.randn(self.rows, self.width, generator=source, device=device).to(self.torch_dtype),)

    def cost(self) -> Cost:
        return Cost(2.0 * self.rows * self.width, 3.0 * self.torch_dtype.itemsize * self.rows * self.width)

    def neighbours(self) -> Sequence[Pair]:
        return replace(self, rows=self.rows + 3), replace(self, rows=2 * self.rows)


MADE: list[Op[Pair]] = []
"""Every injected op of this process; `registered` makes them known by name."""

Candidate = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(x, n) → y, z: the n-th candidate of its kind."""


def make_injected(name: str, good: Candidate, kinds: Mapping[str, Candidate]) -> Op[Pair]:
    """An op with candidates (kind, n); those of the problem's kind are bad, `good` is right."""

    def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 3, x * 5

    def reject(problem: Pair, config: Config, device: Any) -> str | None:
        limits = {"good": GOOD, problem.kind: problem.count}
        return None if config.number("n") < limits.get(str(config["kind"]), 0) else "of another problem"

    def run(x: torch.Tensor, *, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
        return {"good": good, **kinds}[str(config["kind"])](x, config.number("n"))

    op = Op(name, Pair, reference, "fwd")
    axes = {"kind": ("good", *kinds), "n": tuple(range(MOST))}
    op.implementation("triton", space=Space(axes, reject, lambda *_: Config(kind="good", n=0)))(run)
    op.implementation("torch")(reference)
    MADE.append(op)
    return op


def problems(kind: str, count: int, rows: int = 64, width: int = 48, most: int = MOST) -> list[Pair]:
    """Problems with `count` bad candidates of this kind in all, at most `most` each."""
    shares = [min(most, count - start) for start in range(0, count, most)]
    return [Pair(rows + 8 * index, width, share, kind=kind) for index, share in enumerate(shares)]
