"""PyTorch's own choice: the yardstick of every kernel, and what serves where none can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from tilebook.call import tf32_allowed
from tilebook.kernels.attention import eager
from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.form import form as made
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.peers import cudnn, efficient
from tilebook.kernels.attention.peers.heads import repeat_heads, sum_heads
from tilebook.kernels.attention.pytorch import causally, in_vectors, sdpa
from tilebook.layout import aligned
from tilebook.torch_ops import recording

_aten = torch.ops.aten


def _backend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *mask: torch.Tensor
) -> SDPBackend:
    """The kernel that PyTorch's function picks for this call on the GPU; on the CPU it is composed."""
    if not q.is_cuda:
        return SDPBackend.MATH
    grouped, bias = q.shape[1] != k.shape[1], mask[0] if mask else None
    found = torch._fused_sdp_choice(q, k, v, bias, 0.0, form.causal, scale=scale, enable_gqa=grouped)
    return SDPBackend(found)


def _folded(
    q: torch.Tensor, k: torch.Tensor, form: Form, extras: tuple[torch.Tensor, ...]
) -> tuple[Form, tuple[torch.Tensor, ...]]:
    """The form and its extra tensors with one mask or bias for two, where its gradient is that of the one given."""
    shape = q.shape[2], k.shape[2]
    if not form.folded or (form.bias == "dbias" and extras[0].shape[2:] != shape):
        return form, extras
    return made(bias=form.bias, tf32=form.tf32), (causally(extras[0], *shape),)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *extras: torch.Tensor) -> Any:
    """The peer whose kernels PyTorch runs under this mask or bias, None where it composes the call.

    It wants a bias in the dtype of q, and rounds another.
    """
    if form.composed or form.tf32 or not form.bias or (form.bias != "mask" and extras[0].dtype != q.dtype):
        return None
    backend = _backend(q, k, v, form, scale, in_vectors(extras[0], k.shape[2], q.dtype))
    if backend == SDPBackend.CUDNN_ATTENTION and form.bias != "dbias":
        return cudnn
    return efficient if backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION) else None


@contextmanager
def _precision(form: Form) -> Iterator[None]:
    """Products of fp32 tensors as the form has them: a yardstick errs as kernels may."""
    if not form.tf32 or tf32_allowed():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *extras: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    form, extras = _folded(q, k, form, extras)
    peer = _masked(q, k, v, form, scale, *extras)
    if peer is not None:
        return peer.forward(q, k, v, form, scale, *extras)  # type: ignore[no-any-return]
    if not form.plain or form.tf32:  # SDPA's kernels do not round to tf32
        with _precision(form):
            return eager.forward(q, k, v, form, scale, *extras)
    if q.is_cuda:
        q, k, v = aligned(q), aligned(k), aligned(v)
    backend = _backend(q, k, v, form, scale)
    if backend == SDPBackend.CUDNN_ATTENTION:
        return cudnn.forward(q, k, v, form, scale)
    if backend == SDPBackend.EFFICIENT_ATTENTION:
        return efficient.forward(q, k, v, form, scale)
    if backend != SDPBackend.FLASH_ATTENTION or q.shape[-1] % 8:
        o = sdpa(q, k, v, form.causal, scale)
        return o, eager.log_sum_exp(q.float(), k.float(), form, scale)
    heads = q.shape[1]
    o, lse, *_ = _aten._scaled_dot_product_flash_attention(
        q, repeat_heads(k, heads), repeat_heads(v, heads), 0.0, form.causal, False, scale=scale
    )
    return o, lse


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
    *extras: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    form, extras = _folded(q, k, form, extras)
    peer = _masked(q, k, v, form, scale, *extras)
    if peer is not None:
        return peer.backward(do, q, k, v, o, lse, form, scale, *extras)  # type: ignore[no-any-return]
    if not form.plain or form.tf32:
        with _precision(form):
            return eager.backward(do, q, k, v, form, scale, *extras)
    if q.is_cuda:
        do, q, k, v, o, lse = (*(aligned(x) for x in (do, q, k, v, o)), lse.contiguous())
    backend = _backend(q, k, v, form, scale)
    if backend == SDPBackend.CUDNN_ATTENTION:
        return cudnn.backward(do, q, k, v, o, lse, form, scale)
    if backend == SDPBackend.EFFICIENT_ATTENTION:
        return efficient.backward(do, q, k, v, o, lse, form, scale)  # type: ignore[return-value]
    if backend != SDPBackend.FLASH_ATTENTION or q.shape[-1] % 8:
        with recording():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            dq, dk, dv = torch.autograd.grad(sdpa(q, k, v, form.causal, scale), (q, k, v), do)
        return dq, dk, dv
    heads, heads_kv = q.shape[1], k.shape[1]
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # not read: there is no dropout
    lengths = q.shape[2], k.shape[2]
    inputs = q, repeat_heads(k, heads), repeat_heads(v, heads)
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
        do, *inputs, o, lse, None, None, *lengths, 0.0, form.causal, seed, seed, scale=scale
    )
    return dq, sum_heads(dk, heads_kv), sum_heads(dv, heads_kv)


def _alone(function: Callable[..., Any], cudnns: Callable[..., Any], first: int, tensors: int) -> Callable[..., Any]:
    """The function as a program runs it: under a mask or bias cuDNN's kernel alone, where PyTorch has that.

    first: the place of q, before k and v; tensors: how many come before the form.
    """

    def called(*args: Any) -> Any:
        q, k, v = args[first : first + 3]
        form, scale, *extras = args[tensors:]
        form, given = _folded(q, k, form, tuple(extras))
        alone = _masked(q, k, v, form, scale, *given) is cudnn
        return cudnns(*args[:tensors], form, scale, *given) if alone else function(*args)

    return called


attention_fwd.implementation("torch", timed=_alone(forward, cudnn.called, 0, 3))(forward)
attention_bwd.implementation("torch", deterministic=False, timed=_alone(backward, cudnn.called_backward, 1, 6))(
    backward
)
