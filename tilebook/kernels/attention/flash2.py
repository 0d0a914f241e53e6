"""FlashAttention-2, the kernels PyTorch was built with and those of the package `flash-attn`, as our ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tilebook.device import Device, package_version
from tilebook.kernels.attention.form import Form, extras, sides
from tilebook.kernels.attention.problem import BackwardProblem, ForwardProblem
from tilebook.kernels.attention.tiles import like

_aten = torch.ops.aten

Problem = ForwardProblem | BackwardProblem


def expressible(problem: Problem) -> bool:
    """Has FlashAttention the mask, and does it compute what is no mask?

    Its windows end in the last row and column, and a negative side is none. With more rows than columns it takes some
    sides for none that are not, and rows may see nothing, whose log-sum-exp it calls +inf.
    """
    if problem.bias or problem.dropout or problem.dtype not in ("bf16", "fp16"):
        return False
    left, right = sides(problem.form, problem.seq_q, problem.seq_k)
    limited = left is not None or right is not None
    meant = problem.seq_q <= problem.seq_k and (left is None or left >= 0) and (right is None or right >= 0)
    return problem.head_dim % 8 == 0 and problem.head_dim <= 256 and (meant or not limited)


def torch_available(device: Device) -> bool:
    return device.backend == "cuda" and device.capability >= 80


def torch_supports(problem: Problem) -> bool:
    """PyTorch's build has neither soft-cap nor ALiBi. The plain form is `torch`; its windows SDPA does not reach."""
    return expressible(problem) and not (problem.softcap or problem.alibi or problem.form.plain)


def masked(form: Form, q: torch.Tensor, k: torch.Tensor) -> tuple[bool, int, int]:
    """(causal, left, right) in FlashAttention's terms."""
    left, right = sides(form, q.shape[2], k.shape[2])
    return left is None and right == 0, -1 if left is None else left, -1 if right is None else right


def torch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    causal, left, right = masked(form, q, k)
    views = [x.transpose(1, 2) for x in (q, k, v)]
    lengths, window = (q.shape[2], k.shape[2]), {"window_size_left": left, "window_size_right": right}
    o, lse, *_ = _aten._flash_attention_forward(*views, None, None, *lengths, 0.0, causal, False, scale=scale, **window)
    return o.transpose(1, 2), lse


def torch_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Adds up dq by atomics."""
    causal, left, right = masked(form, q, k)
    views = [x.transpose(1, 2) for x in (do, q, k, v, o)]
    lengths, window = (q.shape[2], k.shape[2]), {"window_size_left": left, "window_size_right": right}
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # not read: there is no dropout
    found = _aten._flash_attention_backward(
        *views, lse, None, None, *lengths, 0.0, causal, seed, seed, scale=scale, **window
    )
    return tuple(x.transpose(1, 2) for x in found)


def available(device: Device) -> bool:
    """Is the package installed, with an interface that has soft-cap and returns four results?"""
    return device.backend == "cuda" and device.capability >= 80 and _installed()


@functools.cache
def _installed() -> bool:
    """Asked of the installed distributions: importing loads hundreds of MB of kernels."""
    found = package_version("flash-attn")
    parts = found.split(".")
    return found != "unknown" and parts[0] == "2" and int(parts[1]) >= 7


def supports(problem: Problem) -> bool:
    """Windows, soft-cap, ALiBi, groups. The soft-cap's tanh is approximate: the tuner decides whether it will do."""
    return expressible(problem)


@functools.cache
def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its forward and its backward, imported when the first call needs them."""
    from flash_attn import flash_attn_interface

    return flash_attn_interface._wrapped_flash_attn_forward, flash_attn_interface._wrapped_flash_attn_backward


def _options(form: Form, q: torch.Tensor, k: torch.Tensor, slopes: torch.Tensor | None) -> dict[str, Any]:
    """What both functions take beside tensors and the scale."""
    causal, left, right = masked(form, q, k)
    return {
        "dropout_p": 0.0,
        "causal": causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": form.softcap,
        "alibi_slopes": slopes,
    }


def _shifted(lse: torch.Tensor, form: Form, k: torch.Tensor, slopes: torch.Tensor | None, sign: int) -> torch.Tensor:
    """Log-sum-exps from its scores to ours (-1), or back (+1).

    Under a causal mask it adds slope · column instead of taking off slope · (diagonal - column): the same weights, but
    log-sum-exps higher by slope · diagonal.
    """
    n_q, n_k = lse.shape[2], k.shape[2]
    if slopes is None or sides(form, n_q, n_k) != (None, 0):
        return lse
    diagonal = torch.arange(n_k - n_q, n_k, device=lse.device, dtype=torch.float32)
    return lse + sign * slopes[..., None] * diagonal


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *tensors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    run, _ = _functions()
    _, slopes, _ = extras(form, tensors)
    views = [x.transpose(1, 2) for x in (q, k, v)]
    with torch.cuda.device_of(q):  # it runs on the current GPU
        o, lse, *_ = run(*views, softmax_scale=scale, return_softmax=False, **_options(form, q, k, slopes))
    return o.transpose(1, 2), _shifted(lse, form, k, slopes, -1)


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
    *tensors: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adds up dq by atomics, unless the form demands otherwise."""
    _, run = _functions()
    _, slopes, _ = extras(form, tensors)
    dq, dk, dv = like(q), like(k), like(v)
    views = [x.transpose(1, 2) for x in (do, q, k, v, o)]
    grads = {"dq": dq.transpose(1, 2), "dk": dk.transpose(1, 2), "dv": dv.transpose(1, 2)}
    lse = _shifted(lse, form, k, slopes, 1)
    with torch.cuda.device_of(q):
        run(
            *views,
            lse,
            **grads,
            softmax_scale=scale,
            deterministic=form.deterministic,
            **_options(form, q, k, slopes),
        )
    return dq, dk, dv
