"""Loss and gradients of a model's head by chunks of rows, so that of the logits no more than a chunk exists at once.

A chunk's gradient is written over its logits, and what follows of it is added up at once. So all is done in the forward
pass, of which nothing has to be computed again, and a backward pass has to multiply by the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tilebook import dispatch
from tilebook.kernels.cross_entropy.launch import backward_in_place
from tilebook.kernels.cross_entropy.ops import cross_entropy_bwd, cross_entropy_fwd
from tilebook.kernels.linear_cross_entropy.entry import kept_dtypes
from tilebook.kernels.linear_cross_entropy.kernels import scale_kernel
from tilebook.launch import launch
from tilebook.layout import rows
from tilebook.op import Op

CHUNK_BYTES = 1 << 30
"""Of logits that exist at once, as far as rows allow."""

FEWEST_ROWS = 1024
"""Of a chunk: products of fewer do not fill a GPU."""

ROUNDED_SUMS = 4
"""Sums over chunks that may be rounded to 16 bits each, until the error is twice that of one product; more are fp32."""

_WIDEST_WHOLE = 16384
"""Classes up to which a program of the kernels may take several rows, which then must lie one behind the other."""

_VECTOR, _LINE = 16, 128
"""Bytes that a row's length is a multiple of where products are fast, and that it is rounded up to otherwise."""

# `out_dtype` with a sum that is in fp32 already.
_WIDE_SUMS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)

_BLOCK, _PROGRAMS = 4096, 2048


def step_of(count: int, classes: int, itemsize: int) -> int:
    """Rows of a chunk: as equal as multiples of 128 can be."""
    most = max(FEWEST_ROWS, CHUNK_BYTES // (classes * itemsize) // 128 * 128)
    chunks = max(1, -(-count // most))
    return max(1, min(count, -(-count // chunks // 128) * 128))


def run(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    options: tuple[float, int, float, float], mean: bool, dtype: torch.dtype, wants: Sequence[bool],
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """loss and share () in fp32; then gradients of input, weight and bias, of no numbers where they are not wanted.

    They are those of the loss once they are multiplied by share. In fp16 a mean's gradient is too small a number for
    some logits, and would not be larger by the scale of a loss that comes later: there they are those of the sum.
    """
    input, weight, target, bias = tensors
    count, classes = len(input), len(weight)
    x, w, b = rows(input.to(dtype)), weight.to(dtype), None if bias is None else bias.to(dtype)
    counted = (target != options[1]).sum()
    each = counted.float().reciprocal() if mean else torch.ones_like(counted, dtype=torch.float32)
    late = dtype == torch.float16
    upper = (torch.ones_like(each) if late else each).expand(count).contiguous()
    share = torch.where(each.isinf(), 0.0, each) if late else torch.ones_like(each)
    losses = upper.new_empty(count)
    step = step_of(count, classes, dtype.itemsize)
    kept = kept_dtypes(tensors, dtype)
    dx = input.new_empty(input.shape if wants[0] else 0, dtype=kept[0])
    many = count > ROUNDED_SUMS * step
    dw = weight.new_empty(weight.shape if wants[1] else 0, dtype=torch.float32 if many else kept[1])
    db = upper.new_zeros(classes if bias is not None and wants[2] else 0)
    unit = _LINE // dtype.itemsize
    lined = classes > _WIDEST_WHOLE and classes * dtype.itemsize % _VECTOR
    logits_of = x.new_empty(step, -(-classes // unit) * unit if lined else classes)
    for start in range(0, count, step):
        some = slice(start, start + step)
        h, t = x[some], target[some]
        logits = logits_of[: len(h), :classes]
        if b is None:
            torch.mm(h, w.t(), out=logits)
        else:
            torch.addmm(b, h, w.t(), out=logits)
        losses[some], lse = _call(cross_entropy_fwd, logits, t, *options)
        if not any(wants):
            continue
        grad = _gradient(upper[some], logits, t, lse, *options)
        if wants[0]:
            _product(dx[some], grad, w)
        if wants[1]:
            _add(dw, grad.t(), h, start == 0)
        if bias is not None and wants[2]:
            db += grad.sum(0, dtype=torch.float32)
    if not count:
        dw.zero_()
    loss = losses.sum()
    return loss / counted if mean else loss, share, dx, dw.to(kept[1]), db.to(kept[2])


def within(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current GPU, PyTorch on the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, in_place: bool = False) -> torch.Tensor:
    """x · factor (), a number in fp32, rounded once to `dtype`; over x where that may be and has its dtype."""
    in_place = in_place and x.dtype == dtype and x.is_contiguous()
    x = x.contiguous()
    out = x if in_place else torch.empty_like(x, dtype=dtype)
    if not x.is_cuda:
        return out.copy_(x.float() * factor)
    if x.numel():
        with within(x):
            scale(x, factor, out)
    return out


def scale(x: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    """out = x · factor. out may be x, of which nothing is read then where the factor is 1."""
    programs = min(-(-x.numel() // _BLOCK), _PROGRAMS)
    launch(scale_kernel, (programs,), x, factor, out, x.numel(), BLOCK=_BLOCK, SAME=out is x)


def _choice(op: Op[Any], args: tuple[Any, ...]) -> Any:
    """Our own kernel where it may run: in this loop PyTorch has no function in whose place it would be."""
    choice = dispatch.lookup(op, args)
    own = dispatch.own(choice)
    if own is not choice:
        choice.calls += 1  # what is missed is weighed by it
    return own


def _call(op: Op[Any], *args: Any) -> Any:
    return _choice(op, args)(*args)


def _gradient(*args: Any) -> torch.Tensor:
    """cross_entropy_bwd, over the logits where our kernel runs."""
    choice, logits = _choice(cross_entropy_bwd, args), args[1]
    first = not choice.calls and logits.is_cuda and torch.cuda.is_current_stream_capturing()
    if choice.implementation is not cross_entropy_bwd.tunable or choice.spare is not None or first:
        return choice(*args)[0]  # type: ignore[no-any-return]
    try:
        backward_in_place(*args, config=choice.config)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the choice knows what serves where its kernel does not run
        return choice(*args)[0]  # type: ignore[no-any-return]
    choice.calls += 1
    return logits  # type: ignore[no-any-return]


def _product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _add(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total += a @ b; total = a @ b where it is the first."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif a.is_cuda and _WIDE_SUMS:
        torch.addmm(total, a, b, total.dtype, beta=0 if first else 1, out=total)
    else:
        product = torch.mm(a, b, out_dtype=total.dtype) if a.is_cuda else a.float() @ b.float()
        total.copy_(product) if first else total.add_(product)
