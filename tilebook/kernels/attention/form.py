"""What attention computes beside the softmax of products: masks, windows, biases, soft-cap, dropout."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Bias = Literal["", "mask", "bias", "dbias"]


@dataclass(frozen=True, eq=False, slots=True)
class Form:
    """One way to attend. Made by `form`, so that equal forms are one object and compare at no cost.

    left, right:  row i sees columns i - left … i + right of its diagonal; -1 is without limit. Causal is right = 0.
    bottom_right: the diagonal ends in the last row and column; else it starts in the first row and column.
    softcap:      scores s become softcap · tanh(s / softcap); 0 is off.
    bias:         an extra tensor that broadcasts to (B, H, Sq, Sk): "mask" of booleans, True where a pair takes part;
                  "bias", added to the scores; "dbias", a bias whose gradient is wanted.
    alibi:        an extra tensor of slopes, (H,) or (B, H) in fp32: slope · |i + Sk - Sq - j| is taken off the scores.
    dropout:      probability that a weight is dropped, with an extra tensor, the int64 seed, (1,).
    tf32:         may products of fp32 tensors round their factors to tf32?
    deterministic: only implementations that give the same bits every time may serve.

    Extra tensors follow the scale in an op's arguments, in the order bias, slopes, seed.
    """

    left: int = -1
    right: int = -1
    bottom_right: bool = False
    softcap: float = 0.0
    bias: Bias = ""
    alibi: bool = False
    dropout: float = 0.0
    tf32: bool = False
    deterministic: bool = False

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def plain(self) -> bool:
        """Is it what every implementation has: all pairs, or those of a causal mask aligned top-left?"""
        return not (banded(self) or self.softcap or self.bias or self.alibi or self.dropout)

    @property
    def composed(self) -> bool:
        """Must PyTorch compose it, by way of a matrix of all pairs? Its own dropout drops other weights."""
        return bool(banded(self) or self.softcap or self.alibi or self.dropout or (self.causal and self.bias))

    @property
    def folded(self) -> bool:
        """Is it a causal mask and another or a bias, which PyTorch's kernels take as one?"""
        return bool(self.causal and self.bias) and not (
            banded(self) or self.softcap or self.alibi or self.dropout or self.deterministic
        )


@functools.cache
def _interned(*values: object) -> Form:
    return Form(*values)  # type: ignore[arg-type]


def form(
    *,
    left: int = -1,
    right: int = -1,
    bottom_right: bool = False,
    softcap: float = 0.0,
    bias: Bias = "",
    alibi: bool = False,
    dropout: float = 0.0,
    tf32: bool = False,
    deterministic: bool = False,
) -> Form:
    """The one object for this form."""
    values = left, right, bottom_right, float(softcap), bias, alibi, float(dropout), tf32, deterministic
    # What is traced is not looked up, and so need not be the one object.
    return Form(*values) if torch.compiler.is_compiling() else _interned(*values)


PLAIN, CAUSAL = form(), form(right=0)


def banded(form: Form) -> bool:
    """Are there limits other than the one of a causal mask aligned top-left?"""
    return form.left >= 0 or form.right > 0 or (form.right == 0 and form.bottom_right)


def simplest(n_q: int, n_k: int, left: int, right: int, bottom_right: bool) -> tuple[int, int, bool]:
    """The same band of rows and columns without limits that hide nothing. Causal aligned top-left stays what it is."""
    bottom_right = bottom_right and n_q != n_k
    shift = n_k - n_q if bottom_right else 0
    if left - shift >= n_q - 1:
        left = -1
    if (right or bottom_right) and right + shift >= n_k - 1:
        right = -1
    left, right = max(left, -1), max(right, -1)
    return left, right, bottom_right and (left >= 0 or right >= 0)


def limits(form: Form, n_q: int, n_k: int) -> tuple[int | None, int | None]:
    """(before, after): row i sees columns i - before … i + after, counted from the top left; None is without limit."""
    shift = n_k - n_q if form.bottom_right else 0
    return (form.left - shift if form.left >= 0 else None, form.right + shift if form.right >= 0 else None)


def sides(form: Form, n_q: int, n_k: int) -> tuple[int | None, int | None]:
    """Columns that a row sees before and after a diagonal that ends in the last row and column, as FlashAttention's."""
    before, after = limits(form, n_q, n_k)
    shift = n_k - n_q
    return None if before is None else before + shift, None if after is None else after - shift


def extras(
    form: Form, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(bias, slopes, seed) of an op's extra tensors, None for each that the form lacks."""
    rest = list(tensors)
    bias = rest.pop(0) if form.bias else None
    slopes = rest.pop(0) if form.alibi else None
    seed = rest.pop(0) if form.dropout else None
    return bias, slopes, seed
