"""mLSTM's memory as PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs.

o = n / m, m = max(|w|, floor) + eps, makes dn = do / m, and dw = −sign(w) (do · o) / m where |w| is the larger. `floor`
has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Tensors
from tilebook.kernels.attention.layout import like
from tilebook.kernels.linear_attention.check import check as check_linear
from tilebook.kernels.linear_attention.entries import entry, flops
from tilebook.kernels.linear_attention.layout import new_state
from tilebook.kernels.mlstm.pytorch import chunked, plain
from tilebook.layout import rows

Options = tuple[float, float]


@functools.cache
def registered() -> tuple[Any, Any]:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.mlstm.ops import mlstm_bwd, mlstm_fwd

    return mlstm_fwd, mlstm_bwd


def arguments(tensors: Tensors, options: Options) -> tuple[Any, ...]:
    """The forward op's, of an entry's tensors and options."""
    q, k, v, *more = tensors
    return *(rows(x) for x in (q, k, v) if x is not None), *more, *options


def _check(tensors: Tensors, options: Options) -> None:
    q, k, v, g, log_input, floor, state = tensors
    for each in (g, log_input, floor):
        check_linear(q, k, v, each, state, True)  # type: ignore[arg-type]


def _forward(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    args = arguments(tensors, options)
    if not args[2].numel():
        return chunked(*args)
    return (dispatch.lookup(registered()[0], args) if choice is None else choice)(*args)  # type: ignore[no-any-return]


def _backward(
    do: torch.Tensor | None, dstate: torch.Tensor | None, tensors: Tensors, kept: Tensors, options: Options,
    needs: Sequence[bool],
) -> Tensors:  # fmt: skip
    (*given, floor, state), (o, den), (scale, eps) = tensors, kept, options
    assert o is not None
    assert den is not None
    assert floor is not None
    do = torch.zeros_like(o) if do is None else do
    if not o.numel():
        nothing = [None if x is None else torch.zeros_like(x) for x in tensors]
        grads: Sequence[Any] = *nothing[:6], nothing[6] if dstate is None else dstate
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
    part = 1 / (torch.maximum(den.abs(), floor) + eps)
    above = (do.float() * part[..., None]).to(o.dtype)
    # Of the rounded gradient: where one token is all, what its weight gains and loses must be the same number.
    weight = torch.where(den.abs() > floor, -(above.float() * o.float()).sum(-1) * den.sign(), 0)
    args = *(rows(x) for x in given if x is not None), state
    *grads, dstart = dispatch.run(registered()[1], rows(above), dstate, *args, weight, scale)
    grads = *grads, None, dstart
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    q, _, v, *_ = tensors
    assert q is not None
    assert v is not None
    return like(v), new_state(q, v, True), q.new_empty(q.shape[:3], dtype=torch.float32)


def _plain(tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    args = arguments(tensors, options)
    return plain(args[:7], args[7:])


MEMORY = entry(
    "mlstm",
    ("q", "k", "v", "log_decay", "log_input", "floor", "initial_state?"),
    ("o", "state", "den"),
    options=("float scale", "float eps"),
    kept=(0, 2),
    forward=_forward,
    backward=_backward,
    check=_check,
    plain=_plain,
    fake=_fake,
    flops=flops(4, 10),  # what each token adds to a state and reads there
)
