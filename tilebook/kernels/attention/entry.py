"""Attention as one of PyTorch's ops: schema, shapes, gradients. Loads no kernel before one is to run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.attention.check import check
from tilebook.kernels.attention.form import Form, form, simplest
from tilebook.kernels.attention.layout import like
from tilebook.kernels.attention.pytorch import BOUNDS, plain, twice
from tilebook.layout import rows
from tilebook.sharding import divides

Options = tuple[Form, float]


@functools.cache
def registered() -> Any:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.attention.ops import attention_bwd, attention_fwd

    return attention_fwd, attention_bwd


def arguments(tensors: Tensors, options: Options) -> tuple[Any, ...]:
    """The forward op's arguments."""
    q, k, v, *extras = tensors
    return (q, k, v, *options, *[x for x in extras if x is not None])


def posed(tensors: Tensors, packed: tuple[Any, ...]) -> tuple[Any, Any]:
    """The forward op, and the problem that a call of it is; options as the schema has them."""
    op = registered()[0]
    return op, op.problem.of(*arguments(tensors, _unpack(tensors, packed)))


def _check(tensors: Tensors, options: Any) -> None:
    q, k, v, bias, slopes, seed = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    check(q, k, v, bias, slopes)
    if bias is not None and bias.ndim != 4:
        raise ValueError(f"expected bias (B, H, Sq, Sk) or ones in their places, not {tuple(bias.shape)}")
    softcap, dropout = options[4:6]
    if softcap < 0 or not 0 <= dropout < 1:
        raise ValueError(f"softcap must not be negative, and dropout in [0, 1); got {softcap} and {dropout}")
    if (seed is None) == (dropout > 0) or (seed is not None and (seed.dtype, seed.shape) != (torch.int64, (1,))):
        raise ValueError("dropout takes a seed, int64 of shape (1,), and nothing else does")


def _forward(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    if choice is None:
        q, k, v, *extras = tensors
        assert q is not None
        if k is not None and not k.numel():  # kernels divide by the sum of what they have seen
            return like(q).zero_(), torch.full(q.shape[:-1], -torch.inf, dtype=torch.float32, device=q.device)
        tensors = (*(rows(x) for x in (q, k, v) if x is not None), *extras)
        choice = dispatch.lookup(registered()[0], arguments(tensors, options))
    return choice(*arguments(tensors, options))  # type: ignore[no-any-return]


def _backward(dy: torch.Tensor, tensors: Tensors, kept: Tensors, options: Options, needs: Sequence[bool]) -> Tensors:
    q, k, v, bias, *others = tensors
    if needs[4]:
        raise RuntimeError("tilebook::attention_fwd has no gradient for alibi_slopes: tilebook.attention has one")
    (o, lse), (found, scale) = kept, options
    # What was saved may have come back otherwise than it was.
    dy, q, k, v, o = (rows(x) for x in (dy, q, k, v, o) if x is not None)
    lse = lse if lse is None else lse.contiguous()
    if bias is not None and bias.dtype != torch.bool and (found.bias == "dbias") != needs[3]:
        found = form(**{**asdict(found), "bias": "dbias" if needs[3] else "bias"})
    extras = [x for x in (bias, *others) if x is not None]
    args = dy, q, k, v, o, lse, found, scale, *extras
    choice = dispatch.lookup(registered()[1], args)
    if extras and choice.native and _host_bound(q, k):
        choice = dispatch.own(choice)
    grads = choice(*args)
    return (*grads[:3], grads[3] if needs[3] else None, None, None)


def _host_bound(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Has the GPU done such a call before the host has made PyTorch's of a mask or bias, with all that comes before it?

    Our kernel is one launch that is repeated. A graph that is being captured is replayed without the host.
    """
    small = q.is_cuda and q.numel() * k.shape[2] <= BOUNDS[1]
    return small and not torch.cuda.is_current_stream_capturing()


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    q = tensors[0]
    assert q is not None
    return like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


def _pack(options: Options) -> tuple[Any, ...]:
    found, scale = options
    return (
        scale, found.left, found.right, found.bottom_right, found.softcap, found.dropout, found.tf32,
        found.deterministic,
    )  # fmt: skip


def _unpack(tensors: Tensors, values: tuple[Any, ...]) -> Options:
    """The form in its simplest terms, which a trace with symbolic lengths could not know."""
    q, k, _, bias, slopes, _ = tensors
    assert q is not None
    assert k is not None
    scale, left, right, corner, softcap, dropout, tf32, deterministic = values
    if left >= 0 or right > 0 or corner:
        left, right, corner = simplest(q.shape[2], k.shape[2], left, right, corner)
    kind: Any = "" if bias is None else "mask" if bias.dtype == torch.bool else "bias"
    found = form(
        left=left, right=right, bottom_right=corner, softcap=softcap, bias=kind, alibi=slopes is not None,
        dropout=dropout, tf32=tf32, deterministic=deterministic,
    )  # fmt: skip
    return found, scale


def _flops(tensors: Tensors, options: Any, needs: Sequence[bool] | None) -> int:
    """Two products forward, five backward, of every pair of a row and a column, masked or not."""
    q, k, *_ = tensors
    assert q is not None
    assert k is not None
    return (4 if needs is None else 10) * q.numel() * k.shape[2]


def _shards(tensors: dict[str, Any]) -> list[dict[str, int | None]]:
    """By batch, and by heads where each GPU gets whole groups of them. What drops depends on the place in the batch."""
    q, k, bias, slopes = (tensors.get(name) for name in ("q", "k", "bias", "alibi_slopes"))
    if tensors.get("seed") is not None:
        return []

    def cut(axis: int) -> dict[str, int | None]:
        found: dict[str, int | None] = dict.fromkeys(("q", "k", "v", "o", "lse"), axis)
        if bias is not None and bias.shape[axis] > 1:
            found["bias"] = axis
        if slopes is not None and axis - 2 + len(slopes.shape) >= 0:
            found["alibi_slopes"] = axis - 2 + len(slopes.shape)
        return found

    return [cut(axis) for axis in (0, 1) if q is not None and k is not None and divides(q, axis) and divides(k, axis)]


ATTENTION = Entry(
    name="attention",
    tensors=("q", "k", "v", "bias?", "alibi_slopes?", "seed?"),
    options=(
        "float scale", "int left", "int right", "bool bottom_right", "float softcap", "float dropout", "bool tf32",
        "bool deterministic",
    ),
    outputs=("o", "lse"),
    kept=(0, 1),
    forward=_forward,
    backward=_backward,
    check=_check,
    plain=plain,
    twice=twice,
    fake=_fake,
    pack=_pack,
    unpack=_unpack,
    casts=("q", "k", "v"),
    fold=("q", "k", "v"),
    flops=_flops,
    shards=_shards,
)  # fmt: skip
