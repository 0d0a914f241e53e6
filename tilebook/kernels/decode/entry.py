"""Decoding as one of PyTorch's ops: schema and shapes; it has no gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.attention.layout import like
from tilebook.kernels.decode.check import check
from tilebook.kernels.decode.pytorch import plain, seen
from tilebook.layout import rows
from tilebook.sharding import divides


@functools.cache
def registered() -> Any:
    """The op, as the tuner and the registry know it."""
    from tilebook.kernels.decode.ops import decode

    return decode


def _check(tensors: Tensors, options: Any) -> None:
    check(*tensors, *options[2:])  # type: ignore[arg-type]


def _forward(choice: Any, tensors: Tensors, options: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    if choice is None:
        q, k, v, *rest = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        if rest == [None, None] and options[-1] is not None:
            k, v, window = seen(q, k, v, options[-1])
            options = *options[:-1], window
        tensors = (*(rows(x) for x in (q, k, v) if x is not None), *rest)
        choice = dispatch.lookup(registered(), (*tensors, *options))
    return choice(*tensors, *options)  # type: ignore[no-any-return]


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    q = tensors[0]
    assert q is not None
    return like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


def _flops(tensors: Tensors, options: Any, needs: Any) -> int:
    """Two products of every row with all that the cache has room for: how long sequences are is known on the GPU."""
    q, k, _, _, table = tensors
    assert q is not None
    assert k is not None
    return 4 * q.numel() * (k.shape[2] if table is None else table.shape[1] * k.shape[1])


def _shards(tensors: dict[str, Any]) -> list[dict[str, int | None]]:
    """By batch, and by heads where each GPU gets whole groups of them; blocks of a paged cache are everybody's."""
    q, k, paged = tensors["q"], tensors["k"], tensors.get("block_table") is not None
    batch: dict[str, int | None] = dict.fromkeys(("q", "o", "lse", "seq_lens", "block_table"), 0)
    if not paged:
        batch |= {"k": 0, "v": 0}
    axis = 2 if paged else 1
    heads: dict[str, int | None] = {"q": 1, "o": 1, "lse": 1, "k": axis, "v": axis}
    possible = ((batch, divides(q, 0)), (heads, divides(q, 1) and divides(k, axis)))
    return [cut for cut, even in possible if even]


DECODE = Entry(
    name="attention_decode",
    tensors=("q", "k", "v", "seq_lens?", "block_table?"),
    options=("bool causal", "float scale", "float softcap", "int? window"),
    outputs=("o", "lse"),
    kept=(),
    forward=_forward,
    backward=None,
    check=_check,
    plain=plain,
    fake=_fake,
    fold=("q", "k", "v"),
    flops=_flops,
    shards=_shards,
)
