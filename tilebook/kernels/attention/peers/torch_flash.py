"""FlashAttention-2 as PyTorch was built with it, called below SDPA, which does not reach its windows, as our ops."""

from __future__ import annotations

import torch

from tilebook.device import Device
from tilebook.kernels.attention.form import Form, sides
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.problem import BackwardProblem, ForwardProblem
from tilebook.layout import aligned

_aten = torch.ops.aten

Problem = ForwardProblem | BackwardProblem


def _expressible(problem: Problem) -> bool:
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


def available(device: Device) -> bool:
    return device.backend == "cuda" and device.capability >= 80


def supports(problem: Problem) -> bool:
    """PyTorch's build has neither soft-cap nor ALiBi. The plain form is `torch`; its windows SDPA does not reach."""
    return _expressible(problem) and not (problem.softcap or problem.alibi or problem.form.plain)


def _masked(form: Form, q: torch.Tensor, k: torch.Tensor) -> tuple[bool, int, int]:
    """(causal, left, right) in FlashAttention's terms."""
    left, right = sides(form, q.shape[2], k.shape[2])
    return left is None and right == 0, -1 if left is None else left, -1 if right is None else right


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    causal, left, right = _masked(form, q, k)
    views = [aligned(x).transpose(1, 2) for x in (q, k, v)]
    lengths, window = (q.shape[2], k.shape[2]), {"window_size_left": left, "window_size_right": right}
    o, lse, *_ = _aten._flash_attention_forward(*views, None, None, *lengths, 0.0, causal, False, scale=scale, **window)
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
) -> tuple[torch.Tensor, ...]:
    """Adds up dq by atomics."""
    causal, left, right = _masked(form, q, k)
    views = [aligned(x).transpose(1, 2) for x in (do, q, k, v, o)]
    lengths, window = (q.shape[2], k.shape[2]), {"window_size_left": left, "window_size_right": right}
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # not read: there is no dropout
    found = _aten._flash_attention_backward(
        *views, lse, None, None, *lengths, 0.0, causal, seed, seed, scale=scale, **window
    )
    return tuple(x.transpose(1, 2) for x in found)


attention_fwd.implementation("torch_flash", available=available, supports=supports)(forward)
attention_bwd.implementation("torch_flash", available=available, supports=supports, deterministic=False)(backward)
