"""The norms as PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.norms.check import check, check_alike
from tilebook.kernels.norms.pytorch import layer, of_sum, rms
from tilebook.layout import rows, transposed


@functools.cache
def registered(name: str) -> tuple[Any, Any]:
    """(forward, backward) of a norm, as the tuner and the registry know them."""
    from tilebook.kernels.norms import ops

    return getattr(ops, f"{name}_fwd"), getattr(ops, f"{name}_bwd")


def addressed(tensors: Tensors) -> Tensors:
    """x and what is beside it as the kernels step through them, copied only where they are not so.

    x (B, S, N) stays as it is, see `turned`.
    """
    x, *others = tensors
    assert x is not None
    return x if x.ndim == 3 else rows(x), *(None if each is None else rows(each) for each in others)


def turned(op: Any, args: Sequence[Any], at: int = 0) -> tuple[Any, ...] | None:
    """The arguments of an op, of which the one `at` is x (…, N), with x as (B, S, N) where it lies transposed.

    None where it lies otherwise, or no verdict is on just that: kernels then take a copy, (M, N).
    """
    x = transposed(args[at])
    if x is None:
        return None
    given = (*args[:at], x, *args[at + 1 :])
    choice = dispatch.lookup(op, given)
    if choice.source in ("exact", "forced"):
        return given
    choice.calls += 1  # it is missed
    return None


def _taken(op: Any, args: Sequence[Any], at: int = 0) -> Sequence[Any]:
    """The arguments as its kernels take them: with x as it lies, or (M, N)."""
    x = args[at]
    if x.ndim == 2:
        return args
    return turned(op, args, at) or (*args[:at], x.reshape(-1, x.shape[-1]), *args[at + 1 :])


def _entry(
    name: str, vectors: Sequence[str], statistics: Sequence[str], plain: Callable[[Tensors, Any], Any], *more: str
) -> Entry:
    """more: what is added to x first."""
    addends, results = ("x", *more), ("y", "h") if more else ("y",)

    def checked(tensors: Tensors, options: Any) -> None:
        x, *given = tensors
        assert x is not None
        for other in given[: len(more)]:
            assert other is not None
            check_alike(x, other)
            if x.ndim != 2 or other.dtype != x.dtype:
                raise ValueError(f"expected x and residual (M, N) of one dtype, not {x.dtype} and {other.dtype}")
        check(vectors, x, given[len(more) :])
        if x.ndim not in (2, 3):
            raise ValueError(f"expected x (M, N) or (B, S, N), not {tuple(x.shape)}")

    def forward(choice: Any, tensors: Tensors, options: tuple[float]) -> tuple[torch.Tensor, ...]:
        x, args = tensors[0], (*tensors, *options)
        assert x is not None
        if choice is None:
            op = registered(name)[0]
            args = tuple(_taken(op, (*addressed(tensors), *options)))
            choice = dispatch.lookup(op, args)
        y, *others = choice(*args)
        return y if x.ndim == 2 else y.view(x.shape), *others

    def backward(
        dy: torch.Tensor, tensors: Tensors, kept: Tensors, options: tuple[float], needs: Sequence[bool]
    ) -> Tensors:
        x = tensors[0]
        assert x is not None
        count = math.prod(x.shape[:-1])
        if dy.shape != x.shape or any(each is None or each.shape != (count,) for each in kept):
            shapes = [None if each is None else tuple(each.shape) for each in (dy, *kept)]
            raise ValueError(f"dy and statistics of shapes {shapes} are not of x {tuple(x.shape)}")
        op, statistics = registered(name)[1], [each if each is None else rows(each) for each in kept]
        args = rows(dy.reshape(-1, x.shape[-1])), *addressed(tensors), *statistics
        dx, *sums = dispatch.run(op, *_taken(op, args, 1))
        found = iter((dx.view(x.shape), *sums))
        return tuple(None if each is None else next(found) for each in tensors)

    def backward_of_sum(
        dy: torch.Tensor | None, dh: torch.Tensor | None, tensors: Tensors, kept: Tensors, options: Any, needs: Any
    ) -> Tensors:
        h = tensors[0]
        assert h is not None
        if dy is None:
            assert dh is not None
            return dh.clone(), *(None if each is None else torch.zeros_like(each) for each in tensors[1:])
        if dh is None:
            return NORMS[name.removeprefix("add_")].backward(dy, tensors, kept, options, needs)  # type: ignore[misc]
        if dy.shape != h.shape or dh.shape != h.shape or any(x is None or x.shape != h.shape[:1] for x in kept):
            shapes = [None if each is None else tuple(each.shape) for each in (dy, dh, *kept)]
            raise ValueError(f"gradients and statistics of shapes {shapes} are not of h {tuple(h.shape)}")
        given = rows(dy), rows(dh), *addressed(tensors), *(each if each is None else rows(each) for each in kept)
        found = iter(dispatch.run(registered(name)[1], *given))
        return tuple(None if each is None else next(found) for each in tensors)

    def fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
        x = tensors[0]
        assert x is not None
        count = math.prod(x.shape[:-1])
        numbers = (x.new_empty(count, dtype=torch.float32) for _ in statistics)
        return *(x.new_empty(x.shape) for _ in results), *numbers

    return Entry(
        name=name,
        tensors=(*addends, *(f"{each}?" for each in vectors)),
        options=("float eps",),
        outputs=(*results, *statistics),
        kept=tuple(range(len(results), len(results) + len(statistics))),
        addends=len(addends) if more else 0,
        results=len(results),
        forward=forward,
        backward=backward_of_sum if more else backward,
        check=checked,
        plain=plain,
        fake=fake,
        shards=lambda tensors: [dict.fromkeys((*addends, *results, *statistics), 0)],
    )


RMS_NORM = _entry("rms_norm", ("weight",), ("rstd",), rms)
LAYER_NORM = _entry("layer_norm", ("weight", "bias"), ("mean", "rstd"), layer)
ADD_RMS_NORM = _entry("add_rms_norm", ("weight",), ("rstd",), partial(of_sum, rms), "residual")
ADD_LAYER_NORM = _entry("add_layer_norm", ("weight", "bias"), ("mean", "rstd"), partial(of_sum, layer), "residual")
NORMS = {each.name: each for each in (RMS_NORM, LAYER_NORM)}
