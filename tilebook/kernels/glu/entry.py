"""Gated linear units, alone and between linear layers, as PyTorch's ops. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.glu.check import check, check_block
from tilebook.kernels.glu.form import ACTIVATIONS
from tilebook.kernels.glu.pytorch import linear, plain, plain_block
from tilebook.layout import rows


@functools.cache
def registered() -> tuple[Any, Any]:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.glu.ops import glu_bwd, glu_fwd

    return glu_fwd, glu_bwd


def addressed(tensors: Tensors) -> Tensors:
    """The tensors as kernels step through them, copied only where they are not so."""
    return tuple(None if x is None else rows(x) for x in tensors)


def _width(gate: torch.Tensor, up: torch.Tensor | None) -> int:
    return gate.shape[-1] // (2 if up is None else 1)


# The activation and the product alone


def _check(tensors: Tensors, options: Any) -> None:
    gate, up = tensors
    assert gate is not None
    check(gate, up, *options)
    if gate.ndim != 2 or (up is not None and up.dtype != gate.dtype):
        raise ValueError(f"expected gate and up (M, F) in one dtype, not {tuple(gate.shape)} in {gate.dtype}")


def _forward(choice: Any, tensors: Tensors, options: tuple[str]) -> tuple[torch.Tensor, ...]:
    if choice is None:
        tensors = addressed(tensors)
        choice = dispatch.lookup(registered()[0], (*tensors, *options))
    return choice(*tensors, *options)  # type: ignore[no-any-return]


def _backward(dh: torch.Tensor, tensors: Tensors, kept: Tensors, options: tuple[str], needs: Sequence[bool]) -> Tensors:
    gate, up = tensors
    assert gate is not None
    if dh.shape != (gate.shape[0], _width(gate, up)):
        raise ValueError(f"dh {tuple(dh.shape)} is not of gate {tuple(gate.shape)}")
    found = dispatch.run(registered()[1], dh, *addressed(tensors), *options, False)
    return found if up is not None else (*found, None)


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    gate, up = tensors
    assert gate is not None
    return (gate.new_empty(gate.shape[0], _width(gate, up)),)


def _shards(tensors: dict[str, Any]) -> list[dict[str, int | None]]:
    """By rows; by columns where gate and up are apart."""
    axes = (0,) if tensors.get("up") is None else (0, 1)
    return [dict.fromkeys(("gate", "up", "h"), axis) for axis in axes]


GLU = Entry(
    name="glu",
    tensors=("gate", "up?"),
    options=("str activation",),
    outputs=("h",),
    kept=(),
    forward=_forward,
    backward=_backward,
    check=_check,
    plain=plain,
    fake=_fake,
    fold=("gate", "up"),
    shards=_shards,
)


# The whole block

Options = tuple[str, bool]
"""The activation, and whether gate and up are computed again for a backward pass, not kept."""


def _check_block(tensors: Tensors, options: Any) -> None:
    x = tensors[0]
    assert x is not None
    check_block(*tensors)  # type: ignore[arg-type]
    if x.ndim != 2:
        raise ValueError(f"expected x (M, H), not {tuple(x.shape)}")
    if options[0] not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {options[0]!r}")


def _first_layer(tensors: Tensors) -> Tensors:
    x, gate_weight, up_weight, _, gate_bias, up_bias, _ = tensors
    return linear(x, gate_weight, gate_bias), None if up_weight is None else linear(x, up_weight, up_bias)


def _forward_block(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    gate, up = _first_layer(tensors)
    assert gate is not None
    run = functools.partial(dispatch.run, registered()[0]) if choice is None else choice
    y = linear(run(gate, up, options[0])[0], tensors[3], tensors[6])
    kept = (None, None) if options[1] else (gate, up)
    return y, *(gate.new_empty(0) if each is None else each for each in kept)


def _backward_block(dy: torch.Tensor, tensors: Tensors, kept: Tensors, options: Options, needs: Any) -> Tensors:
    x, gate_weight, up_weight, down_weight, *_ = tensors
    assert x is not None
    assert gate_weight is not None
    assert down_weight is not None
    if dy.shape != (x.shape[0], down_weight.shape[0]):
        raise ValueError(f"dy {tuple(dy.shape)} is not of x {tuple(x.shape)}")
    gate, up = kept
    # Whoever calls the op may have had them computed again or not.
    if gate is None or gate.ndim != 2 or (up_weight is not None and (up is None or up.ndim != 2)):
        gate, up = _first_layer(tensors)
    assert gate is not None
    up = None if up_weight is None else up
    if gate.shape != (x.shape[0], gate_weight.shape[0]) or (up is not None and up.shape != gate.shape):
        raise ValueError(f"gate {tuple(gate.shape)} and up are not of x {tuple(x.shape)}")
    need_x, need_gate, need_up, need_down, *biases = needs
    gate, up = rows(gate), None if up is None else rows(up)
    dbias = dy.sum(0) if biases[2] else None
    if not any((need_x, need_gate, need_up, *biases[:2])):  # the first layer is frozen
        h = dispatch.run(registered()[0], gate, up, options[0])[0] if need_down else None
        return None, None, None, None if h is None else torch.mm(dy.t(), h), None, None, dbias
    dh = torch.mm(dy, down_weight)
    found = dispatch.run(registered()[1], dh, gate, up, options[0], need_down)
    h = found[-1] if need_down else None
    dgate, dup = found[0], None if up is None else found[1]
    dx = torch.mm(dgate, gate_weight) if need_x else None
    if dx is not None and dup is not None and up_weight is not None:
        dx.addmm_(dup, up_weight)
    return (
        dx,
        torch.mm(dgate.t(), x) if need_gate else None,
        torch.mm(dup.t(), x) if need_up and dup is not None else None,
        None if h is None else torch.mm(dy.t(), h),
        dgate.sum(0) if biases[0] else None,
        dup.sum(0) if biases[1] and dup is not None else None,
        dbias,
    )


def _fake_block(tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    x, gate_weight, up_weight, down_weight, *_ = tensors
    assert x is not None
    assert gate_weight is not None
    assert down_weight is not None
    rows, inner = x.shape[0], gate_weight.shape[0]
    gate = x.new_empty(0) if options[1] else x.new_empty(rows, inner)
    up = x.new_empty(0) if options[1] or up_weight is None else x.new_empty(rows, inner)
    return x.new_empty(rows, down_weight.shape[0]), gate, up


def _flops(tensors: Tensors, options: Any, needs: Sequence[bool] | None) -> int:
    """Products with gate, up and down forward; backward one for each gradient, one to pass the second layer."""
    x, gate, up, down, *_ = tensors
    assert x is not None
    first = [each.numel() for each in (gate, up) if each is not None]
    assert down is not None
    if needs is None:
        counted = sum(first) + down.numel()
    else:
        before = any(needs[at] for at in (0, 1, 2, 4, 5))
        counted = needs[0] * sum(first) + sum(n for n, need in zip(first, needs[1:3], strict=False) if need)
        counted += (needs[3] + before) * down.numel() + options[1] * sum(first)
    return 2 * x.shape[0] * counted


BLOCK = Entry(
    name="gated_mlp",
    tensors=("x", "gate_weight", "up_weight?", "down_weight", "gate_bias?", "up_bias?", "down_bias?"),
    options=("str activation", "bool recompute"),
    outputs=("y", "gate", "up"),
    kept=(1, 2),
    forward=_forward_block,
    backward=_backward_block,
    check=_check_block,
    plain=plain_block,
    fake=_fake_block,
    casts=("x", "gate_weight", "up_weight", "down_weight", "gate_bias", "up_bias", "down_bias"),
    flops=_flops,
    shards=lambda tensors: [dict.fromkeys(("x", "y", "gate", "up"), 0)],
)
