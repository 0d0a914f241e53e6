"""What entries of recurrences over a state have in common: q, k, v and more of each token, an initial state last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.attention.layout import like
from tilebook.kernels.linear_attention.layout import new_state
from tilebook.layout import rows


def fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    """o and a state without a column of weights."""
    q, _, v, *_ = tensors
    assert q is not None
    assert v is not None
    return like(v), new_state(q, v, False)


def flops(forward: int, backward: int) -> Callable[[Tensors, Any, Sequence[bool] | None], int]:
    """So many operations for each number of a token's state; chunks multiply more."""

    def counted(tensors: Tensors, options: Any, needs: Sequence[bool] | None) -> int:
        q, _, v, *_ = tensors
        assert q is not None
        assert v is not None
        return int((forward if needs is None else backward) * q.numel() * v.shape[-1])

    return counted


def entry(name: str, tensors: Sequence[str], outputs: Sequence[str], **fields: Any) -> Entry:
    """An entry whose tensors all have batches and heads in front, along which it can be split."""
    given = tuple(each.rstrip("?") for each in tensors)
    everything = *given, *outputs
    return Entry(
        name=name, tensors=tuple(tensors), outputs=tuple(outputs), casts=("q", "k", "v"), fold=given, results=2,
        shards=lambda _: [dict.fromkeys(everything, axis) for axis in (0, 1)], **fields,
    )  # fmt: skip


@dataclass(frozen=True)
class Recurrence:
    """One whose gradient needs nothing but what was given.

    registered: its ops, forward and backward, as the tuner and the registry know them.
    arguments: the forward op's, of an entry's tensors and options.
    plain: PyTorch's functions, of tensors and options.
    told: what the backward op takes besides, of which gradients are needed.
    """

    registered: Callable[[], tuple[Any, Any]]
    arguments: Callable[[Tensors, Any], tuple[Any, ...]]
    plain: Callable[[Any, Any], tuple[torch.Tensor, ...]]
    told: Callable[[Sequence[bool]], tuple[Any, ...]] = lambda needs: ()

    def composed(self, tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
        """By PyTorch's functions."""
        args = self.arguments(tensors, options)
        return self.plain(args[: len(tensors)], args[len(tensors) :])

    def forward(self, choice: Any, tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
        args = self.arguments(tensors, options)
        if not args[2].numel():
            return self.composed(tensors, options)
        served = dispatch.lookup(self.registered()[0], args) if choice is None else choice
        return served(*args)  # type: ignore[no-any-return]

    def backward(
        self, do: torch.Tensor | None, dstate: torch.Tensor | None, tensors: Tensors, kept: Tensors, options: Any,
        needs: Sequence[bool],
    ) -> Tensors:  # fmt: skip
        do = torch.zeros_like(tensors[2]) if do is None else do  # type: ignore[arg-type]
        if do.numel():
            args = *self.arguments(tensors, options), *self.told(needs)
            grads: Sequence[Any] = dispatch.run(self.registered()[1], rows(do), dstate, *args)
        else:
            *nothing, state = (None if x is None else torch.zeros_like(x) for x in tensors)
            grads = *nothing, state if dstate is None else dstate
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
