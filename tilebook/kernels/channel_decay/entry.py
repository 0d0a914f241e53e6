"""Decays by channel as PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.attention.layout import like
from tilebook.kernels.channel_decay.check import check
from tilebook.kernels.channel_decay.pytorch import plain
from tilebook.kernels.linear_attention.layout import new_state
from tilebook.layout import rows

Options = tuple[float]


@functools.cache
def registered() -> tuple[Any, Any]:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.channel_decay.ops import channel_decay_bwd, channel_decay_fwd

    return channel_decay_fwd, channel_decay_bwd


def arguments(tensors: Tensors, options: Options) -> tuple[Any, ...]:
    """The forward op's, of an entry's tensors and options."""
    *given, state = tensors
    return *(rows(x) for x in given if x is not None), state, *options


def _check(tensors: Tensors, options: Options) -> None:
    check(*tensors)  # type: ignore[arg-type]


def _forward(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    args = arguments(tensors, options)
    if not args[2].numel():
        return plain(args[:5], args[5:])
    return (dispatch.lookup(registered()[0], args) if choice is None else choice)(*args)  # type: ignore[no-any-return]


def _backward(
    do: torch.Tensor | None, dstate: torch.Tensor | None, tensors: Tensors, kept: Tensors, options: Options,
    needs: Sequence[bool],
) -> Tensors:  # fmt: skip
    do = torch.zeros_like(tensors[2]) if do is None else do  # type: ignore[arg-type]
    if do.numel():
        args = arguments(tensors, options)
        grads: Sequence[Any] = dispatch.run(registered()[1], rows(do), dstate, *args, bool(needs[3]))
    else:
        nothing = [None if x is None else torch.zeros_like(x) for x in tensors]
        grads = *nothing[:4], nothing[4] if dstate is None else dstate
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    q, _, v, *_ = tensors
    assert q is not None
    assert v is not None
    return like(v), new_state(q, v, False)


def _flops(tensors: Tensors, options: Any, needs: Sequence[bool] | None) -> int:
    """What each token adds to a state and reads there, and the gradients of that; chunks multiply more."""
    q, _, v, *_ = tensors
    assert q is not None
    assert v is not None
    return int((4 if needs is None else 10) * q.numel() * v.shape[-1])


_TENSORS = ("q", "k", "v", "log_decay", "initial_state?")
_EVERYTHING = *(each.rstrip("?") for each in _TENSORS), "o", "state"

CHANNELS = Entry(
    name="channel_decay",
    tensors=_TENSORS,
    options=("float scale",),
    outputs=("o", "state"),
    kept=(),
    forward=_forward,
    backward=_backward,
    check=_check,
    plain=lambda tensors, options: plain((found := arguments(tensors, options))[:5], found[5:]),
    fake=_fake,
    casts=("q", "k", "v"),
    fold=_EVERYTHING[: len(_TENSORS)],
    results=2,
    flops=_flops,
    shards=lambda tensors: [dict.fromkeys(_EVERYTHING, axis) for axis in (0, 1)],
)
