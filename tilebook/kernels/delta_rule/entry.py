"""The gated delta rule as PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.attention.layout import like
from tilebook.kernels.delta_rule.check import check
from tilebook.kernels.delta_rule.pytorch import plain
from tilebook.kernels.linear_attention.layout import new_state
from tilebook.layout import rows

Options = tuple[float, bool]


@functools.cache
def registered() -> tuple[Any, Any]:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.delta_rule.ops import gated_delta_rule_bwd, gated_delta_rule_fwd

    return gated_delta_rule_fwd, gated_delta_rule_bwd


def arguments(tensors: Tensors, options: Options) -> tuple[Any, ...]:
    """The forward op's, of an entry's tensors and options."""
    q, k, v, *more = tensors
    return *(rows(x) for x in (q, k, v) if x is not None), *more, *options


def _check(tensors: Tensors, options: Options) -> None:
    check(*tensors)  # type: ignore[arg-type]


def _forward(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    args = arguments(tensors, options)
    if not args[2].numel():
        return plain(args[:6], args[6:])
    return (dispatch.lookup(registered()[0], args) if choice is None else choice)(*args)  # type: ignore[no-any-return]


def _backward(
    do: torch.Tensor | None, dstate: torch.Tensor | None, tensors: Tensors, kept: Tensors, options: Options,
    needs: Sequence[bool],
) -> Tensors:  # fmt: skip
    do = torch.zeros_like(tensors[2]) if do is None else do  # type: ignore[arg-type]
    if do.numel():
        grads: Sequence[Any] = dispatch.run(registered()[1], rows(do), dstate, *arguments(tensors, options))
    else:
        nothing = [None if x is None else torch.zeros_like(x) for x in tensors]
        grads = *nothing[:5], nothing[5] if dstate is None else dstate
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    q, _, v, *_ = tensors
    assert q is not None
    assert v is not None
    return like(v), new_state(q, v, False)


def _flops(tensors: Tensors, options: Any, needs: Sequence[bool] | None) -> int:
    """What each token finds in a state, adds to it and reads there, and the gradients of that; chunks multiply more."""
    q, _, v, *_ = tensors
    assert q is not None
    assert v is not None
    return int((6 if needs is None else 16) * q.numel() * v.shape[-1])


_TENSORS = ("q", "k", "v", "log_decay?", "beta", "initial_state?")
_EVERYTHING = *(each.rstrip("?") for each in _TENSORS), "o", "state"

DELTA = Entry(
    name="gated_delta_rule",
    tensors=_TENSORS,
    options=("float scale", "bool normalize"),
    outputs=("o", "state"),
    kept=(),
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
