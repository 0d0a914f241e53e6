"""FlashAttention-3, the module `flash_attn_interface` of the package `flash-attn-3` (Hopper), as our ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tilebook.device import Device, package_version
from tilebook.kernels.attention.flash2 import expressible, masked
from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.problem import BackwardProblem, ForwardProblem
from tilebook.kernels.attention.tiles import like


def available(device: Device) -> bool:
    return device.capability == 90 and _installed()


@functools.cache
def _installed() -> bool:
    return package_version("flash-attn-3") != "unknown"


def supports(problem: ForwardProblem | BackwardProblem) -> bool:
    """Windows, soft-cap and groups. The soft-cap's tanh is approximate: whether it will do, the tuner decides."""
    return expressible(problem) and not problem.alibi


@functools.cache
def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its forward and its backward, imported when the first call needs them."""
    import flash_attn_interface

    return flash_attn_interface._flash_attn_forward, flash_attn_interface._flash_attn_backward


def _options(form: Form, q: torch.Tensor, k: torch.Tensor, scale: float) -> dict[str, Any]:
    """What both functions take beside tensors and the causal flag, which has another name in each."""
    _, left, right = masked(form, q, k)
    return {"softmax_scale": scale, "window_size_left": left, "window_size_right": right, "softcap": form.softcap}


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    run, _ = _functions()
    causal, _, _ = masked(form, q, k)
    views = [x.transpose(1, 2) for x in (q, k, v)]
    with torch.cuda.device_of(q):  # it runs on the current GPU
        o, lse, *_ = run(*views, causal=causal, **_options(form, q, k, scale))
    return o.transpose(1, 2), lse


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adds up dq by atomics, unless the form demands otherwise."""
    _, run = _functions()
    causal, _, _ = masked(form, q, k)
    dq, dk, dv = like(q), like(k), like(v)
    views = [x.transpose(1, 2) for x in (do, q, k, v, o)]
    grads = {"dq": dq.transpose(1, 2), "dk": dk.transpose(1, 2), "dv": dv.transpose(1, 2)}
    with torch.cuda.device_of(q):
        run(
            *views,
            lse,
            **grads,
            is_causal=causal,
            deterministic=form.deterministic,
            **_options(form, q, k, scale),
        )
    return dq, dk, dv
