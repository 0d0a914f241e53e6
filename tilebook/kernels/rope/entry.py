"""Rotary position embedding as one of PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.rope.check import check
from tilebook.kernels.rope.pytorch import plain
from tilebook.layout import rows


@functools.cache
def registered() -> tuple[Any, Any]:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.rope.ops import rope_bwd, rope_fwd

    return rope_fwd, rope_bwd


def addressed(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors as the kernel steps through them, cos and sin (B or 1, S, R); copied only where they are not so."""
    q, k, *angles = tensors
    return _heads(q), _heads(k), *(rows(x if x.ndim == 3 else x[None]) for x in angles)


def _heads(x: torch.Tensor) -> torch.Tensor:
    """`x`, whose heads lie within 2³¹ numbers, as the kernel counts them; copied only where they do not."""
    x = rows(x)
    near = x.ndim != 4 or x.shape[1] * x.stride(1) < 1 << 31
    return x if near else x.transpose(1, 2).contiguous().transpose(1, 2)


def _check(tensors: Tensors, options: Any) -> None:
    q, k, cos, sin = tensors
    check(q, k, cos, sin)  # type: ignore[arg-type]
    assert cos is not None
    if cos.ndim != 3 or k.dtype != q.dtype:  # type: ignore[union-attr]
        raise ValueError("expected cos and sin (B or 1, S, R), and q and k in one dtype")


def _forward(choice: Any, tensors: Tensors, options: tuple[bool]) -> tuple[torch.Tensor, ...]:
    if choice is None:
        tensors = addressed(tensors)  # type: ignore[arg-type]
        choice = dispatch.lookup(registered()[0], (*tensors, *options))
    return choice(*tensors, *options)  # type: ignore[no-any-return]


def _backward(
    dq: torch.Tensor, dk: torch.Tensor, tensors: Tensors, kept: Tensors, options: tuple[bool], needs: Sequence[bool]
) -> Tensors:
    if any(needs[2:]):
        raise ValueError("cos and sin get no gradient of this op: they must not require one")
    return *dispatch.run(registered()[1], *addressed((dq, dk, *tensors[2:])), *options), None, None  # type: ignore[arg-type]


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    q, k, *_ = tensors
    assert q is not None
    assert k is not None
    return torch.empty_like(_heads(q)), torch.empty_like(_heads(k))


def _shards(tensors: dict[str, Any]) -> list[dict[str, int | None]]:
    """By heads, and by sequences where cos and sin are of all of them."""
    heads: dict[str, int | None] = dict.fromkeys(("q", "k", "rotated_q", "rotated_k"), 1)
    if tensors["cos"].shape[0] == 1:
        return [heads, dict.fromkeys(heads, 0)]
    return [heads, dict.fromkeys((*heads, "cos", "sin"), 0)]


ROPE = Entry(
    name="rope",
    tensors=("q", "k", "cos", "sin"),
    options=("bool interleaved",),
    outputs=("rotated_q", "rotated_k"),
    kept=(),
    forward=_forward,
    backward=_backward,
    check=_check,
    plain=plain,  # type: ignore[arg-type]
    fake=_fake,
    results=2,
    linear=("q", "k"),
    shards=_shards,
)
