"""mLSTM's memory as PyTorch's op: schema, shapes, gradients. Loads no kernel before one runs.

o = n / m, m = max(|w|, floor) + eps, makes dn = do / m, and dw = −sign(w) (do · o) / m where |w| is the larger; the
rest are gradients of linear attention, of which w is a column of v that is 1 throughout. `floor` has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.attention.layout import like
from tilebook.kernels.linear_attention.check import check as check_linear
from tilebook.kernels.linear_attention.entry import _gradients as linear_gradients
from tilebook.kernels.linear_attention.layout import new_state
from tilebook.kernels.mlstm.pytorch import chunked, plain
from tilebook.layout import rows

Options = tuple[float, float]


@functools.cache
def registered() -> tuple[Any]:
    """(forward,), as the tuner and the registry know it."""
    from tilebook.kernels.mlstm.ops import mlstm_fwd

    return (mlstm_fwd,)


def arguments(tensors: Tensors, options: Options) -> tuple[Any, ...]:
    """The forward op's, of an entry's tensors and options."""
    q, k, v, *more = tensors
    return *(rows(x) for x in (q, k, v) if x is not None), *more, *options


def _check(tensors: Tensors, options: Options) -> None:
    q, k, v, g, floor, state = tensors
    check_linear(q, k, v, g, state, True)  # type: ignore[arg-type]
    if floor is None or q is None or floor.shape != q.shape[:3] or floor.device != q.device:
        raise ValueError("floor must have the shape of log-decays")


def _forward(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    args = arguments(tensors, options)
    if not args[2].numel():
        return chunked(*args)
    return (dispatch.lookup(registered()[0], args) if choice is None else choice)(*args)  # type: ignore[no-any-return]


def _backward(
    do: torch.Tensor | None, dstate: torch.Tensor | None, tensors: Tensors, kept: Tensors, options: Options,
    needs: Sequence[bool],
) -> Tensors:  # fmt: skip
    (q, k, v, g, floor, state), (o, den), (scale, eps) = tensors, kept, options
    assert o is not None
    assert den is not None
    assert floor is not None
    do = torch.zeros_like(o) if do is None else do
    part = 1 / (torch.maximum(den.abs(), floor) + eps)
    above = (do.float() * part[..., None]).to(o.dtype)
    # Of the rounded gradient: where one token is all, what its weight gains and loses must be the same number.
    weight = torch.where(den.abs() > floor, -(above.float() * o.float()).sum(-1) * den.sign(), 0)
    dq, dk, dv, dg, dstart = linear_gradients(
        above, dstate, (q, k, v, g, state), weight, scale, bool(needs[3]), "none"
    )  # fmt: skip
    grads = dq, dk, dv, dg, None, dstart
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    q, _, v, *_ = tensors
    assert q is not None
    assert v is not None
    return like(v), new_state(q, v, True), q.new_empty(q.shape[:3], dtype=torch.float32)


def _flops(tensors: Tensors, options: Any, needs: Sequence[bool] | None) -> int:
    """What each token adds to a state and reads there, and the gradients of that; chunks multiply more."""
    q, _, v, *_ = tensors
    assert q is not None
    assert v is not None
    return int((4 if needs is None else 10) * q.numel() * v.shape[-1])


_TENSORS = ("q", "k", "v", "log_decay", "floor", "initial_state?")
_EVERYTHING = *(each.rstrip("?") for each in _TENSORS), "o", "state", "den"

MEMORY = Entry(
    name="mlstm",
    tensors=_TENSORS,
    options=("float scale", "float eps"),
    outputs=("o", "state", "den"),
    kept=(0, 2),
    forward=_forward,
    backward=_backward,
    check=_check,
    plain=lambda tensors, options: plain((found := arguments(tensors, options))[:6], found[6:]),
    fake=_fake,
    casts=("q", "k", "v"),
    fold=_EVERYTHING[: len(_TENSORS)],
    results=2,
    flops=_flops,
    shards=lambda tensors: [dict.fromkeys(_EVERYTHING, axis) for axis in (0, 1)],
)
