"""Linear attention without an order of tokens as PyTorch's ops. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.bidirectional.check import check
from tilebook.kernels.bidirectional.form import PERFORMER
from tilebook.kernels.bidirectional.layout import empty
from tilebook.kernels.bidirectional.pytorch import forward, gradients, plain
from tilebook.layout import rows

Options = tuple[str, float, float]


@functools.cache
def registered() -> tuple[Any, Any]:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.bidirectional.ops import (
        bidirectional_linear_attention_bwd,
        bidirectional_linear_attention_fwd,
    )

    return bidirectional_linear_attention_fwd, bidirectional_linear_attention_bwd


def arguments(tensors: Tensors, options: Options) -> tuple[Any, ...]:
    q, k, v, mask, omega = tensors
    given = (rows(x) for x in (q, k, v) if x is not None)
    return *given, mask, None if omega is None else omega.contiguous(), *options


def _check(tensors: Tensors, options: Options) -> None:
    q, k, v, mask, omega = tensors
    check(q, k, v, mask, omega, *options)  # type: ignore[arg-type]


def _forward(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    args = arguments(tensors, options)
    if not (args[0].numel() and args[2].numel()):
        return forward(*args)
    return (dispatch.lookup(registered()[0], args) if choice is None else choice)(*args)  # type: ignore[no-any-return]


def _backward(do: torch.Tensor, tensors: Tensors, kept: Tensors, options: Options, needs: Sequence[bool]) -> Tensors:
    o, state, den = (x for x in kept if x is not None)
    q, k, v, mask, omega, *_ = arguments(tensors, options)
    args = rows(do), q, k, v, mask, omega, rows(o), state.contiguous(), den.contiguous()
    some = do.numel() and k.numel()
    found = dispatch.run(registered()[1], *args, *options) if some else gradients(*args, *options)
    return *(grad if need else None for grad, need in zip(found, needs, strict=False)), None, None


def _fake(tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    q, _, v, _, omega = tensors
    assert q is not None
    assert v is not None
    return empty(q, v, q.shape[-1] if omega is None else omega.shape[1])


def _flops(tensors: Tensors, options: Options, needs: Sequence[bool] | None) -> int:
    """What each key adds to a state and each query reads there, and Performer's features; and the gradients of that."""
    q, k, v, _, omega = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    width = q.shape[-1]
    features, tokens = width if omega is None else omega.shape[1], (q.numel() + k.numel()) // width
    made = 2 * features * width if options[0] == PERFORMER else 0
    return int(tokens * (2 * features * v.shape[-1] + made) * (1 if needs is None else 2.5))


BIDIRECTIONAL = Entry(
    name="bidirectional_linear_attention",
    tensors=("q", "k", "v", "mask?", "omega?"),
    options=("str feature_map", "float scale", "float eps"),
    outputs=("o", "state", "den"),
    kept=(0, 1, 2),
    forward=_forward,
    backward=_backward,
    check=_check,
    plain=plain,
    fake=_fake,
    casts=("q", "k", "v"),
    fold=("q", "k", "v", "mask"),
    flops=_flops,
    shards=lambda tensors: [
        dict.fromkeys(("q", "k", "v", "mask", "o", "state", "den"), 0),
        dict.fromkeys(("q", "k", "v", "o", "state", "den"), 1),
    ],
)
