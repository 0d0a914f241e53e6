"""RMSNorm as one of PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors, rows, vector
from tilebook.kernels.norms.pytorch import plain


@functools.cache
def registered() -> Any:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.norms.ops import rms_norm_bwd, rms_norm_fwd

    return rms_norm_fwd, rms_norm_bwd


def _forward(choice: Any, tensors: Tensors, options: tuple[float]) -> tuple[torch.Tensor, ...]:
    if choice is None:
        x, weight = tensors
        assert x is not None
        assert weight is not None
        tensors = rows(x), vector(weight)
        choice = dispatch.lookup(registered()[0], (*tensors, *options))
    return choice(*tensors, *options)  # type: ignore[no-any-return]


def _backward(
    dy: torch.Tensor, tensors: Tensors, kept: Tensors, options: tuple[float], needs: Sequence[bool]
) -> Tensors:
    x, weight = tensors
    assert weight is not None
    dx, dweight = dispatch.run(registered()[1], dy, x, vector(weight), *kept)
    return dx, dweight


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    x = tensors[0]
    assert x is not None
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


NORM = Entry(
    name="rms_norm",
    tensors=("x", "weight"),
    options=("float eps",),
    outputs=("y", "rstd"),
    kept=(1,),
    forward=_forward,
    backward=_backward,
    plain=plain,
    fake=_fake,
    shards=lambda tensors: [dict.fromkeys(("x", "y", "rstd"), 0)],
)
