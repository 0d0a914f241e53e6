"""What the problems of all families have in common whose tokens are added to a state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from tilebook import bounds, op
from tilebook.problem import next_power_of_2


@dataclass(frozen=True)
class Recurrent(op.Problem):
    """q and k (B, H, S, D), v (B, H, S, V).

    Subclasses have the flag `initial`: there is a state before the first token, or a gradient of the last.
    """

    EXACT: ClassVar[frozenset[str]] = frozenset({"head_dim", "value_dim"})
    PRODUCTS: ClassVar[int]
    """Floating-point operations a token and number of the state, at least."""

    batch: int = op.size("B")
    heads: int = op.size("H")
    seq: int = op.size("S")
    head_dim: int = op.size("D")
    value_dim: int = op.size("V", like="head_dim")
    dtype: str = "bf16"

    @classmethod
    def posed(cls, q: torch.Tensor, v: torch.Tensor, *properties: bool | str) -> Self:
        """The problem of a call with these tensors; properties: the fields behind the dtype."""
        make: Any = cls
        found: Self = make(*q.shape, v.shape[-1], op.dtype_name(q.dtype), *properties)
        return found

    def check(self) -> None:
        bounds.linear_attention(self)

    @property
    def wide(self) -> int:
        """Rows of a state in registers."""
        return max(16, next_power_of_2(self.head_dim))

    @property
    def tokens(self) -> int:
        return self.batch * self.heads * self.seq

    @property
    def states(self) -> int:
        """Numbers of all heads' states."""
        return self.batch * self.heads * self.head_dim * self.value_dim

    def neighbours(self) -> Sequence[Self]:
        few: Any = dataclasses.replace(self, batch=2, heads=3)
        return [dataclasses.replace(few, seq=n, initial=more) for n, more in ((1, False), (453, True), (2500, False))]

    def normal(self, source: Any, device: torch.device | str, *widths: int) -> tuple[torch.Tensor, ...]:
        """Numbers (B, H, S, width) in the problem's dtype."""
        shape = self.batch, self.heads, self.seq
        return tuple(op.normal((*shape, width), source, device, self.torch_dtype) for width in widths)

    def decays(self, source: Any, device: torch.device | str, *widths: int) -> torch.Tensor:
        """Log-decays (B, H, S, …) of 1 down to 1e-6."""
        g = op.normal((self.batch, self.heads, self.seq, *widths), source, device, torch.float32)
        return g if g.is_meta else -(g * g * g * g).clamp(max=138) / 10

    def start(self, source: Any, device: torch.device | str, more: int = 0) -> torch.Tensor:
        """A state, or the gradient of one, with `more` columns than v."""
        shape = self.batch, self.heads, self.head_dim, self.value_dim + more
        return op.normal(shape, source, device, torch.float32)

    def moved(self, of_keys: int, of_values: int) -> int:
        """Bytes of so many tensors like q, and so many like v."""
        return self.tokens * (of_keys * self.head_dim + of_values * self.value_dim) * self.torch_dtype.itemsize

    def flops(self) -> float:
        return float(self.PRODUCTS * self.tokens * self.head_dim * self.value_dim)
