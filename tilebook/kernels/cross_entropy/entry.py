"""Cross entropy as one of PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.cross_entropy.check import check_rows
from tilebook.kernels.cross_entropy.pytorch import each
from tilebook.layout import rows

Options = tuple[float, int, float, float]
"""label_smoothing, ignore_index, softcap, z_loss."""


@functools.cache
def registered() -> tuple[Any, Any]:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.cross_entropy.ops import cross_entropy_bwd, cross_entropy_fwd

    return cross_entropy_fwd, cross_entropy_bwd


def _check(tensors: Tensors, options: Any) -> None:
    logits, target = tensors
    assert logits is not None
    assert target is not None
    check_rows(logits, target)


def _forward(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    logits, target = tensors
    assert logits is not None
    if choice is None:
        logits = rows(logits)
        if not logits.shape[0]:
            return _fake((logits, target), options)
        choice = dispatch.lookup(registered()[0], (logits, target, *options))
    return choice(logits, target, *options)  # type: ignore[no-any-return]


def _backward(dy: torch.Tensor, tensors: Tensors, kept: Tensors, options: Options, needs: Sequence[bool]) -> Tensors:
    (logits, target), (lse,) = tensors, kept
    assert logits is not None
    if dy.shape != logits.shape[:1] or lse is None or lse.shape != logits.shape[:1]:
        shapes = [None if x is None else tuple(x.shape) for x in (dy, lse)]
        raise ValueError(f"dloss and lse of shapes {shapes} are not of logits {tuple(logits.shape)}")
    if not logits.shape[0]:
        return torch.empty_like(logits), None
    args = rows(dy.float()), rows(logits), target, rows(lse)
    return dispatch.run(registered()[1], *args, *options)[0], None


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    logits = tensors[0]
    assert logits is not None
    loss, lse = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    return loss, lse


CROSS_ENTROPY = Entry(
    name="cross_entropy",
    tensors=("logits", "target"),
    options=("float label_smoothing", "int ignore_index", "float softcap", "float z_loss"),
    outputs=("loss", "lse"),
    kept=(1,),
    forward=_forward,
    backward=_backward,
    check=_check,
    plain=each,
    fake=_fake,
    fold=("logits", "target"),
    shards=lambda tensors: [dict.fromkeys(("logits", "target", "loss", "lse"), 0)],
)
