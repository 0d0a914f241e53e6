"""Attention of packed sequences as one of PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.attention.form import Form, form
from tilebook.kernels.attention.layout import like
from tilebook.kernels.varlen.check import check
from tilebook.kernels.varlen.limits import bucket, simplest
from tilebook.kernels.varlen.pytorch import Options, plain
from tilebook.layout import rows
from tilebook.sharding import divides


@functools.cache
def registered() -> Any:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.varlen.ops import attention_varlen_bwd, attention_varlen_fwd

    return attention_varlen_fwd, attention_varlen_bwd


def _check(tensors: Tensors, options: Any) -> None:
    check(*tensors, *options[:2])  # type: ignore[arg-type]
    if options[5] < 0:
        raise ValueError(f"softcap must not be negative; got {options[5]}")


def _forward(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    if choice is None:
        q, k, v, *ends = tensors
        tensors = (*(rows(x) for x in (q, k, v) if x is not None), *ends)
        choice = dispatch.lookup(registered()[0], (*tensors, *options))
    return choice(*tensors, *options)  # type: ignore[no-any-return]


def _backward(dy: torch.Tensor, tensors: Tensors, kept: Tensors, options: Options, needs: Sequence[bool]) -> Tensors:
    # What was saved may have come back otherwise than it was.
    dy, q, k, v, o = (rows(x) for x in (dy, *tensors[:3], kept[0]) if x is not None)
    lse, cu_q, cu_k = (x.contiguous() for x in (kept[1], *tensors[3:]) if x is not None)
    return *dispatch.run(registered()[1], dy, q, k, v, o, lse, cu_q, cu_k, *options), None, None


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    q = tensors[0]
    assert q is not None
    return like(q), torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)


def _flops(tensors: Tensors, options: Any, needs: Sequence[bool] | None) -> int:
    """Those of attention for each sequence, which has the greatest length where a trace does not know its own."""
    q, _, _, *ends = tensors
    assert q is not None
    lengths = [
        x.diff().tolist() if type(x) is torch.Tensor and not x.is_meta else [most] * (len(x) - 1)
        for x, most in zip(ends, options[:2], strict=True)
        if x is not None
    ]
    pairs = sum(n_q * n_k for n_q, n_k in zip(*lengths, strict=True))
    return int((4 if needs is None else 10) * q.shape[1] * q.shape[2] * pairs)


def _pack(options: Options) -> tuple[Any, ...]:
    max_q, max_k, found, scale = options
    return (
        max_q, max_k, scale, found.left, found.right, found.bottom_right, found.softcap, found.tf32,
        found.deterministic,
    )  # fmt: skip


def _unpack(tensors: Tensors, values: tuple[Any, ...]) -> Options:
    """The form in its simplest terms, which a trace with symbolic lengths could not know."""
    max_q, max_k, scale, left, right, corner, softcap, tf32, deterministic = values
    max_q, max_k = bucket(max_q), bucket(max_k)
    left, right, corner = simplest(max_q, max_k, left, right, corner)
    found = form(
        left=left, right=right, bottom_right=corner, softcap=softcap, tf32=tf32, deterministic=deterministic
    )  # fmt: skip
    return max_q, max_k, found, scale


def _shards(tensors: dict[str, Any]) -> list[dict[str, int | None]]:
    """By heads where each GPU gets whole groups of them: sequences lie one after the other, of any lengths."""
    heads: dict[str, int | None] = {**dict.fromkeys(("q", "k", "v", "o"), 1), "lse": 0}
    return [heads] if divides(tensors["q"], 1) and divides(tensors["k"], 1) else []


VARLEN = Entry(
    name="attention_varlen",
    tensors=("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
    options=(
        "SymInt max_seqlen_q", "SymInt max_seqlen_k", "float scale", "int left", "int right", "bool bottom_right",
        "float softcap", "bool tf32", "bool deterministic",
    ),
    outputs=("o", "lse"),
    kept=(0, 1),
    forward=_forward,
    backward=_backward,
    check=_check,
    plain=plain,
    fake=_fake,
    pack=_pack,
    unpack=_unpack,
    casts=("q", "k", "v"),
    flops=_flops,
    shards=_shards,
)  # fmt: skip


__all__ = ["VARLEN", "Form", "registered"]
