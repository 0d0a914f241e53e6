"""The gated delta rule: linear attention whose state forgets what a key stood for before it learns its new value.

Gated DeltaNet (Yang, Kautz & Hatamizadeh, 2024, https://arxiv.org/abs/2412.06464), the linear layers of Qwen3-Next;
without decays DeltaNet (Yang et al., 2024, https://arxiv.org/abs/2406.06484), whose chunks these kernels have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import dispatch
from tilebook.call import Way, constant, native, way
from tilebook.casting import autocast
from tilebook.kernels.attention.check import multiplier
from tilebook.kernels.delta_rule.check import check_heads, check_step
from tilebook.kernels.delta_rule.entry import DELTA, arguments, registered
from tilebook.kernels.delta_rule.pytorch import step
from tilebook.kernels.linear_attention.packs import forgetting, wide

__all__ = ["gated_delta_rule", "gated_delta_rule_step"]


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    normalize_qk: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> Any:
    """o_t = scale · h_tᵀ q_t of the states h_t = exp(g_t) (I − β_t k_t k_tᵀ) h_{t−1} + β_t k_t v_tᵀ.

    Args:
        q: queries (B, H, S, D). Any strides; fastest where the last axis is contiguous.
        k: keys (B, H, S, D). |k|² β must be at most 2, or states grow without end: see `normalize_qk`.
        v: values (B, H, S, V); or of a multiple of the heads, of which each of q and k serves as many, one after the
            other. H is that of v from here on.
        log_decay: g, at most 0, (B, H, S), or None for 0. What is below −100, −infinity too, counts as −100.
        beta: β, how much of its value a token writes, (B, H, S), from 0 to 1; up to 2 it may turn states around.
        scale: what outputs are multiplied by; D^-0.5 if None.
        initial_state: h_0 (B, H, D, V), or None for 0.
        return_state: return (o, state) with the last state.
        normalize_qk: divide each row x of q and k by √(|x|² + 1e-6), inside the kernels.
        cu_seqlens: where packed sequences begin and end, (N + 1,) int32 or int64 from 0 to S; B is 1 then. Each begins
            with a state of 0; neither initial_state nor return_state goes with it. Empty sequences are allowed.

    Returns:
        o (B, H, S, V), in the dtype of v; with `return_state` also h_S (B, H, D, V) in fp32. Both are differentiable in
        every tensor that is given, log_decay, beta and initial_state included.

    Kernels serve bf16, fp16 and fp32 on a GPU with D and V up to 256: products in the dtype of q, states and sums in
    fp32, exponents never above 0. Results repeat bit for bit. All else runs as plain PyTorch, by chunks too. Under
    autocast q, k and v are cast.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
        TypeError: a scale that is to be learnt.
    """
    given = tuple(x for x in (q, k, v, log_decay, beta, initial_state, cu_seqlens) if x is not None)
    if has_torch_function(given):
        return handle_torch_function(
            gated_delta_rule, given, q, k, v, log_decay, beta, scale=scale, initial_state=initial_state,
            return_state=return_state, normalize_qk=normalize_qk, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    constant("scale", scale)
    route = way(q, k, v, beta, optional=(log_decay, initial_state, cu_seqlens))
    each = check_heads(q, k, v)
    if each > 1:
        q, k = (x.repeat_interleave(each, 1) for x in (q, k))
    log_decay, beta, start = (wide(x, q) for x in (log_decay, beta, initial_state))
    if cu_seqlens is not None:
        log_decay = forgetting(q, log_decay, cu_seqlens, initial_state is not None or return_state)
    o, state = _run(route, (q, k, v, log_decay, beta, start), (multiplier(scale, q), bool(normalize_qk)))
    return (o, state) if return_state else o


def gated_delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    log_decay: torch.Tensor | None,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of `gated_delta_rule`, for decoding: its output and the state behind it.

    Args:
        q: (B, H, D).
        k: (B, H, D).
        v: (B, H, V), or of more heads, as there.
        state: (B, H, D, V) in fp32, as `return_state` gives it. It is not written to.
        log_decay: (B, H) or (H,), or None.
        beta: (B, H) or (H,).
        scale: as there.
        normalize_qk: as there.

    Returns:
        o (B, H, V) in the dtype of v, and the next state in fp32. In PyTorch's own functions, differentiable.

    Raises:
        ValueError: shapes that do not go together.
    """
    way(q, k, v, state, beta, optional=(log_decay,))
    each = check_heads(q, k, v)
    if each > 1:
        q, k = (x.repeat_interleave(each, 1) for x in (q, k))
    check_step(q, k, v, state, log_decay, beta)
    return step(q, k, v, wide(state, q), log_decay, beta, multiplier(scale, q), normalize_qk)


def _run(route: Way, tensors: tuple[Any, ...], options: tuple[float, bool]) -> tuple[torch.Tensor, ...]:
    """(o, state) by what serves the call."""
    tensors = *autocast(*tensors[:3]), *tensors[3:]
    DELTA.check(tensors, options)
    if route == "pytorch":
        return DELTA.plain(tensors, options)  # type: ignore[no-any-return]
    if route == "op":
        return DELTA.through(tensors, options)[:2]
    if not tensors[2].numel():
        return DELTA.plain(tensors, options)  # type: ignore[no-any-return]
    args, forward = arguments(tensors, options), registered()[0]
    choice = dispatch.known(forward, args) or dispatch.lookup(forward, args)
    if native(choice, tensors):
        choice.calls += 1
        return DELTA.plain(tensors, options)  # type: ignore[no-any-return]
    return DELTA.direct(choice, tensors, options)[:2]
