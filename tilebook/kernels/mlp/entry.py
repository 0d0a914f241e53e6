"""The MLP block as one of PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.mlp.check import check
from tilebook.kernels.mlp.form import ACTIVATIONS
from tilebook.kernels.mlp.pytorch import act, each_alone, linear, plain
from tilebook.layout import rows

Options = tuple[str, bool]
"""The activation, and whether z = x W1ᵀ + b1 is kept for a backward pass."""


@functools.cache
def registered() -> Any:
    """(up, down, backward of the activation, gradients), as the tuner and the registry know them."""
    from tilebook.kernels.mlp.ops import mlp_act_bwd, mlp_down_fwd, mlp_grads_bwd, mlp_up_fwd

    return mlp_up_fwd, mlp_down_fwd, mlp_act_bwd, mlp_grads_bwd


def _check(tensors: Tensors, options: Any) -> None:
    x = tensors[0]
    assert x is not None
    check(*tensors)  # type: ignore[arg-type]
    if x.ndim != 2:
        raise ValueError(f"expected x (M, H), not {tuple(x.shape)}")
    if options[0] not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {options[0]!r}")


def _forward(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    up, down, _, _ = registered()
    x, w1, b1, w2, b2 = tensors
    if choice is None:
        assert x is not None
        assert b1 is not None
        assert b2 is not None
        x, b1, b2 = rows(x), rows(b1), rows(b2)
        choice = dispatch.lookup(up, (x, w1, b1, *options))
    h, z = choice(x, w1, b1, *options)
    return *dispatch.run(down, h, w2, b2), z


def _backward(dy: torch.Tensor, tensors: Tensors, kept: Tensors, options: Options, needs: Sequence[bool]) -> Tensors:
    _, _, backward_of_act, gradients = registered()
    x, w1, b1, w2, _ = tensors
    (z,), activation = kept, options[0]
    assert x is not None
    assert w1 is not None
    assert z is not None
    # Whoever calls the op may not have let it keep z.
    z = linear(x, w1, b1) if z.ndim == 1 else z.contiguous()
    if dy.shape != x.shape or z.shape != (x.shape[0], w1.shape[0]):
        raise ValueError(f"dy {tuple(dy.shape)} and z {tuple(z.shape)} are not of x {tuple(x.shape)}")
    if not any(needs[:3]):  # the first layer is frozen
        dw2 = torch.mm(dy.t(), act(z, activation)) if needs[3] else None
        return None, None, None, dw2, dy.sum(0) if needs[4] else None
    dz, h = dispatch.run(backward_of_act, dy, w2, z, activation)
    if all(needs):
        return dispatch.run(gradients, dy, h, dz, x, w1)
    each = each_alone(dy, h, dz, x, w1)
    return tuple(make() if need else None for need, make in zip(needs, each, strict=True))


def _fake(tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    x, w1, _, w2, _ = tensors
    assert x is not None
    assert w1 is not None
    assert w2 is not None
    return x.new_empty(x.shape[0], w2.shape[0]), x.new_empty(x.shape[0], w1.shape[0]) if options[1] else x.new_empty(0)


def _flops(tensors: Tensors, options: Any, needs: Sequence[bool] | None) -> int:
    """Two products forward; backward one for each matrix that needs a gradient, and one to pass the second layer."""
    x, w1, *_ = tensors
    assert x is not None
    assert w1 is not None
    products = 2 if needs is None else needs[0] + needs[1] + needs[3] + any(needs[:3])
    return products * 2 * x.shape[0] * w1.numel()


def _shards(tensors: dict[str, Any]) -> list[dict[str, int | None]]:
    """By rows of x. Halves of the two layers would leave sums to be added up, which PyTorch's own products do."""
    return [dict.fromkeys(("x", "y", "z"), 0)]


MLP = Entry(
    name="mlp",
    tensors=("x", "w1", "b1", "w2", "b2"),
    options=("str activation", "bool save"),
    outputs=("y", "z"),
    kept=(1,),
    forward=_forward,
    backward=_backward,
    check=_check,
    plain=plain,
    fake=_fake,
    casts=("x", "w1", "b1", "w2", "b2"),
    flops=_flops,
    shards=_shards,
)
