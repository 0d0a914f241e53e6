"""The Triton kernels of gated linear units. A program takes ROWS rows of BLOCK columns.

Where `up` is None, gate holds it too, `width` columns further on; the same goes for `dup` and dgate.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column numbers of the program's block, and which of them exist. Blocks of a row come one by one."""
    blocks = tl.cdiv(width, BLOCK)
    r = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return r.to(tl.int64)[:, None], c[None, :], (r < rows)[:, None] & (c < width)[None, :]


@triton.jit
def _load(pointer, r, c, stride, inside):
    return tl.load(pointer + r * stride + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, values, r, c, stride, inside):
    tl.store(pointer + r * stride + c, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _both(gate, up, r, c, width, stride_gate, stride_up, inside):
    g = _load(gate, r, c, stride_gate, inside)
    if up is None:
        return g, _load(gate + width, r, c, stride_gate, inside)
    else:
        return g, _load(up, r, c, stride_up, inside)


@triton.jit
def _share(g, ACTIVATION: tl.constexpr):
    """s and its derivative, where the activation is g · s."""
    if ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the logistic function of 2u
        share = tl.sigmoid(1.5957691216057308 * g * (1.0 + 0.044715 * g * g))
        slope = share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        share = tl.sigmoid(g)
        slope = share * (1.0 - share)
    return share, slope


@triton.jit(do_not_specialize=["rows"])
def fwd_kernel(
    gate, up, h, rows, width, stride_gate, stride_up,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h = g · s(g) · u."""
    r, c, inside = _place(rows, width, ROWS, BLOCK)
    g, u = _both(gate, up, r, c, width, stride_gate, stride_up, inside)
    share, _ = _share(g, ACTIVATION)
    _store(h, g * share * u, r, c, width, inside)


@triton.jit(do_not_specialize=["rows"])
def bwd_kernel(
    dh, gate, up, dgate, dup, h, rows, width, stride_dh, stride_gate, stride_up,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate = dh · u · (s + g s′), dup = dh · g · s, and h again unless it is None."""
    r, c, inside = _place(rows, width, ROWS, BLOCK)
    g, u = _both(gate, up, r, c, width, stride_gate, stride_up, inside)
    upper = _load(dh, r, c, stride_dh, inside)
    share, slope = _share(g, ACTIVATION)
    passed = g * share
    if dup is None:
        _store(dgate, upper * u * (share + g * slope), r, c, 2 * width, inside)
        _store(dgate + width, upper * passed, r, c, 2 * width, inside)
    else:
        _store(dgate, upper * u * (share + g * slope), r, c, width, inside)
        _store(dup, upper * passed, r, c, width, inside)
    if h is not None:
        _store(h, passed * u, r, c, width, inside)
