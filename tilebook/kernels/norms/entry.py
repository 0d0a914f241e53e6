"""The norms as PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.norms.check import check
from tilebook.kernels.norms.pytorch import layer, rms
from tilebook.layout import rows


@functools.cache
def registered(name: str) -> tuple[Any, Any]:
    """(forward, backward) of a norm, as the tuner and the registry know them."""
    from tilebook.kernels.norms import ops

    return getattr(ops, f"{name}_fwd"), getattr(ops, f"{name}_bwd")


def addressed(tensors: Tensors) -> Tensors:
    """x and the parameter vectors as the kernels step through them, copied only where they are not so."""
    x, *vectors = tensors
    assert x is not None
    return rows(x), *(None if each is None else rows(each) for each in vectors)


def _entry(
    name: str, vectors: Sequence[str], statistics: Sequence[str], plain: Callable[[Tensors, Any], torch.Tensor]
) -> Entry:
    def checked(tensors: Tensors, options: Any) -> None:
        x, *given = tensors
        assert x is not None
        check(vectors, x, given)
        if x.ndim != 2:
            raise ValueError(f"expected x (M, N), not {tuple(x.shape)}")

    def forward(choice: Any, tensors: Tensors, options: tuple[float]) -> tuple[torch.Tensor, ...]:
        if choice is None:
            tensors = addressed(tensors)
            choice = dispatch.lookup(registered(name)[0], (*tensors, *options))
        return choice(*tensors, *options)  # type: ignore[no-any-return]

    def backward(
        dy: torch.Tensor, tensors: Tensors, kept: Tensors, options: tuple[float], needs: Sequence[bool]
    ) -> Tensors:
        x = tensors[0]
        assert x is not None
        if dy.shape != x.shape or any(each is None or each.shape != x.shape[:1] for each in kept):
            shapes = [None if each is None else tuple(each.shape) for each in (dy, *kept)]
            raise ValueError(f"dy and statistics of shapes {shapes} are not of x {tuple(x.shape)}")
        statistics = [each if each is None else rows(each) for each in kept]
        found = iter(dispatch.run(registered(name)[1], rows(dy), *addressed(tensors), *statistics))
        return tuple(None if each is None else next(found) for each in tensors)

    def fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return x.new_empty(x.shape), *(x.new_empty(x.shape[0], dtype=torch.float32) for _ in statistics)

    return Entry(
        name=name,
        tensors=("x", *(f"{each}?" for each in vectors)),
        options=("float eps",),
        outputs=("y", *statistics),
        kept=tuple(range(1, 1 + len(statistics))),
        forward=forward,
        backward=backward,
        check=checked,
        plain=plain,
        fake=fake,
        shards=lambda tensors: [dict.fromkeys(("x", "y", *statistics), 0)],
    )


RMS_NORM = _entry("rms_norm", ("weight",), ("rstd",), rms)
LAYER_NORM = _entry("layer_norm", ("weight", "bias"), ("mean", "rstd"), layer)
