"""Causal linear attention as PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs.

Two ops are made of one family: of the normalized one more is kept, and its gradients are those of the other, with a
column of v that is 1 throughout. o = n / m, m = den + eps, makes dn = do / m, and dden = −(do · o) / m.

Options are a feature map that kernels have, a scale, and of the normalized op what is added to divisors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Entry, Tensors
from tilebook.kernels.attention.layout import like
from tilebook.kernels.linear_attention.check import check, check_map
from tilebook.kernels.linear_attention.layout import new_state
from tilebook.kernels.linear_attention.pytorch import plain
from tilebook.layout import rows

Options = tuple[Any, ...]


@functools.cache
def registered() -> tuple[Any, Any]:
    """(forward, backward), as the tuner and the registry know them."""
    from tilebook.kernels.linear_attention.ops import linear_attention_bwd, linear_attention_fwd

    return linear_attention_fwd, linear_attention_bwd


def arguments(tensors: Tensors, options: Options) -> tuple[Any, ...]:
    """The forward op's, of an entry's tensors and options."""
    (q, k, v, *more), (feature_map, scale, *eps) = tensors, options
    given = [rows(x) for x in (q, k, v) if x is not None]
    return *given, *more, scale, bool(eps), eps[0] if eps else 0.0, feature_map


def _check(tensors: Tensors, options: Options) -> None:
    q, k, v, g, state = tensors
    check(q, k, v, g, state, _normalized(options))  # type: ignore[arg-type]
    check_map(options[0])


def _normalized(options: Options) -> bool:
    return len(options) == 3


def _forward(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    args = arguments(tensors, options)
    if not args[2].numel():
        o, state = plain(args[:5], args[5:])
        outputs: tuple[torch.Tensor, ...] = o, state, o.new_empty(o.shape[:3], dtype=torch.float32)
    else:
        outputs = (dispatch.lookup(registered()[0], args) if choice is None else choice)(*args)
    return outputs[: 2 + _normalized(options)]


def _gradients(
    do: torch.Tensor, dstate: torch.Tensor | None, tensors: Tensors, weight: torch.Tensor | None, scale: float,
    decayed: bool, feature_map: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    q, k, v, g, state = tensors
    given = (rows(x) for x in (q, k, v) if x is not None)
    args = rows(do), dstate, *given, g, state, weight, scale, decayed, feature_map
    if not do.numel():
        nothing = do.new_empty(0, dtype=torch.float32)
        grads = [nothing if x is None else torch.zeros_like(x) for x in tensors]
        return *grads[:4], nothing if state is None else grads[4] if dstate is None else dstate
    return dispatch.run(registered()[1], *args)


def _needed(grads: Sequence[torch.Tensor], needs: Sequence[bool]) -> Tensors:
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _backward(
    do: torch.Tensor | None, dstate: torch.Tensor | None, tensors: Tensors, kept: Tensors, options: Options,
    needs: Sequence[bool],
) -> Tensors:  # fmt: skip
    feature_map, scale = options
    do = torch.zeros_like(tensors[2]) if do is None else do  # type: ignore[arg-type]
    return _needed(_gradients(do, dstate, tensors, None, scale, bool(needs[3]), feature_map), needs)


def _backward_of_quotient(
    do: torch.Tensor | None, dstate: torch.Tensor | None, tensors: Tensors, kept: Tensors, options: Options,
    needs: Sequence[bool],
) -> Tensors:  # fmt: skip
    (feature_map, scale, eps), (o, den) = options, kept
    assert o is not None
    assert den is not None
    do = torch.zeros_like(o) if do is None else do
    # Divisors grow with the sequence, and fp16 has little room below: the scale takes back what gradients are given.
    room = 2.0 ** (max(1, o.shape[2]).bit_length() // 2) if o.dtype == torch.float16 else 1.0
    part = room / (den + eps)
    weight = -(do.float() * o.float()).sum(-1) * part
    above = (do.float() * part[..., None]).to(o.dtype)
    return _needed(_gradients(above, dstate, tensors, weight, scale / room, bool(needs[3]), feature_map), needs)


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    q, _, v, *_ = tensors
    assert q is not None
    assert v is not None
    normalize = _normalized(options)
    outputs = like(v), new_state(q, v, normalize), q.new_empty(q.shape[:3], dtype=torch.float32)
    return outputs if normalize else outputs[:2]


def _flops(tensors: Tensors, options: Any, needs: Sequence[bool] | None) -> int:
    """What each token adds to a state and reads there, and the gradients of that; chunks multiply more."""
    q, _, v, *_ = tensors
    assert q is not None
    assert v is not None
    return int((4 if needs is None else 10) * q.numel() * v.shape[-1])


def _entry(name: str, options: tuple[str, ...], kept: tuple[int, ...], **how: Any) -> Entry:
    tensors = ("q", "k", "v", "log_decay?", "initial_state?")
    outputs = ("o", "state", "den")[: 2 + _normalized(options)]
    everything = *(each.rstrip("?") for each in tensors), *outputs
    return Entry(
        name=name,
        tensors=tensors,
        options=options,
        outputs=outputs,
        kept=kept,
        forward=_forward,
        fake=_fake,
        check=_check,
        plain=lambda tensors, options: plain((found := arguments(tensors, options))[:5], found[5:]),
        casts=("q", "k", "v"),
        fold=everything[: len(tensors)],
        results=2,
        flops=_flops,
        shards=lambda tensors: [dict.fromkeys(everything, axis) for axis in (0, 1)],
        **how,
    )


GATED = _entry(
    "gated_linear_attention",
    ("str feature_map", "float scale"),
    (),
    backward=_backward,
)
NORMALIZED = _entry(
    "linear_attention",
    ("str feature_map", "float scale", "float eps"),
    (0, 2),
    backward=_backward_of_quotient,
)
