"""A product of matrices, right in three hundred ways that round differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilebook import op as ops
from tilebook.op import Config, Cost, Op, Space

TERMS = (32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Product(ops.Problem):
    """y = a b for a (M, K), b (K, N)."""

    m: int = ops.size("M")
    n: int = ops.size("N")
    k: int = ops.size("K")
    dtype: str = "bf16"

    def inputs(self, device: Any, seed: int) -> tuple[Any, ...]:
        source = ops.generator(device, seed)
        a, b = (torch.randn(shape, generator=source) for shape in ((self.m, self.k), (self.k, self.n)))
        return a.to(self.torch_dtype), (b * self.k**-0.5).to(self.torch_dtype)

    def cost(self) -> Cost:
        return Cost(2.0 * self.m * self.n * self.k, 0.0)

    def neighbours(self) -> Sequence[Product]:
        return replace(self, m=self.m + 3), replace(self, m=1), replace(self, m=2 * self.m)


def _sum(parts: list[torch.Tensor], how: str) -> torch.Tensor:
    """Of partial products in fp32: one after the other, from the end, in pairs, or in fp64."""
    if how == "pairs":
        while len(parts) > 1:
            parts = [sum(parts[i : i + 2]) for i in range(0, len(parts), 2)]  # type: ignore[misc]
        return parts[0]
    if how == "double":
        return torch.stack(parts).double().sum(0).float()
    total = torch.zeros_like(parts[0])
    for part in parts if how == "forward" else reversed(parts):
        total += part
    return total


def _run(a: torch.Tensor, b: torch.Tensor, *, config: Config) -> torch.Tensor:
    terms = config.number("terms")
    pieces = zip(a.float().split(terms, 1), b.float().split(terms, 0), strict=True)
    y = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    return y.copy_(_sum([left @ right for left, right in pieces], str(config["how"])))


AXES = {"terms": TERMS, "how": ("forward", "backward", "pairs", "double")}
PRODUCT: Op[Product] = Op("product", Product, lambda a, b: a @ b, "fwd")
PRODUCT.implementation("triton", space=Space(AXES, lambda *_: None, lambda *_: Config(terms=32, how="pairs")))(_run)
PRODUCT.implementation("torch")(lambda a, b: a @ b)

PROBLEMS = [
    Product(m, n, k, dtype)
    for m, n, k in ((16, 16, 64), (32, 48, 128), (7, 33, 100), (64, 8, 257), (5, 5, 512))
    for dtype in ("bf16", "fp16", "fp32")
]
