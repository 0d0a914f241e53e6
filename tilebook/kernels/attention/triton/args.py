"""What kernels and their parts hand each other, as structs: Triton takes named tuples of tensors, numbers, constants.

Three rules of Triton 3.6 to 3.9 decide what is in a struct. `do_not_specialize` does not reach into one: lengths and
limits, not every value of which may be another binary, are arguments of their own. Nor do host-side descriptors work
in one: tensors that may come as such are, too. And constants of a struct inside a struct are lost on the way into a
function, so that none is nested there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

POINTERS, DESCRIBED, PACKED, MADE = (tl.constexpr(kind) for kind in range(4))
"""How tiles are loaded (`Tile.DESCRIPTORS`): by pointers, by tensor descriptors that the host made, by such of packed
sequences, or by such as each program makes for itself."""

VECTOR = tl.constexpr(8)
"""Numbers of a bias or mask that are loaded together."""

UNSPECIALIZED = ["n_outer", "n_heads", "group", "n_q", "n_k", "before", "after"]
"""Arguments of every kernel of which one binary serves all values."""


class Steps(NamedTuple):
    """Elements from batch to batch, head to head and row to row of a tensor (B, H, S, D); the last axis is contiguous.

    Of a tensor (T, H, D) of packed sequences, whose batch is a sequence's first row, the first is that of a row too.
    """

    b: Any
    h: Any
    s: Any


class Matrix(NamedTuple):
    """A tensor as kernels read and write it: a pointer or a descriptor, and its steps."""

    source: Any
    b: Any
    h: Any
    s: Any


class Packs(NamedTuple):
    """Where packed sequences begin, (n_outer + 1,) int32 each: rows of q, and of k and v."""

    cu_q: Any
    cu_k: Any


class Stats(NamedTuple):
    """What the backward pass keeps of each row, (B, H, Sq) in fp32: log-sum-exp, and delta = Σ o do."""

    lse: Any
    delta: Any


class Scores(NamedTuple):
    """What is done to scores beside limits: a call's optional tensors, with their steps, and numbers; None is without.

    mask, bias: steps b, h, m and n over batch, head, row and column, 0 where it is broadcast, of rows None, and None of
    heads where a mask is the same for all of both. vectors: 1 where columns lie side by side and their number is a
    multiple of VECTOR, as are the other steps. dbias: (B, H, Sq, Sk).
    """

    mask: Any = None
    bias: Any = None
    b: Any = None
    h: Any = None
    m: Any = None
    n: Any = None
    vectors: Any = None
    slopes: Any = None
    slope_b: Any = None
    slope_h: Any = None
    softcap: Any = None
    seed: Any = None
    dropout: Any = None
    dbias: Any = None


class Marks(NamedTuple):
    """The same for one head, with its limits: row i sees columns i - before … i + after."""

    before: Any
    after: Any
    mask: Any
    bias: Any
    base: Any
    m: Any
    n: Any
    vectors: Any
    slope: Any
    softcap: Any
    seed: Any
    dropout: Any


class Where(NamedTuple):
    """Some rows of a Matrix: those of one head of one batch or sequence. n: how many. pair: batch · heads + head, where
    sequences are not packed."""

    batch: Any
    head: Any
    n: Any
    pair: Any


class Rules(NamedTuple):
    """Constants that a form decides.

    CAUSAL: a mask aligned top-left. BANDED: other limits. SCORED: something is done to the scores themselves, which are
    in natural units then, else in powers of two. GAPS: rows may see nothing. TF32: as tensor cores take fp32.
    BOTTOM_RIGHT: limits of packed sequences count from the last row and column.
    """

    CAUSAL: Any
    BANDED: Any
    SCORED: Any
    GAPS: Any
    TF32: Any
    BOTTOM_RIGHT: Any


class Tile(NamedTuple):
    """Constants that a config and the head dimension decide. WIDTH: the head dimension; D: the power of two above it.

    HEADS: heads that take turns, see `place`.
    """

    D: Any
    WIDTH: Any
    BLOCK_M: Any
    BLOCK_N: Any
    HEADS: Any
    DESCRIPTORS: Any


def rules(*, causal: bool, banded: bool, scored: bool, gaps: bool, tf32: bool, bottom_right: bool = False) -> Rules:
    return Rules(*map(tl.constexpr, (causal, banded, scored, gaps, tf32, bottom_right)))
