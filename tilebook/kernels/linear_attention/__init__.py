"""Linear attention: a state that tokens are added to, in the place of scores of all pairs.

Katharopoulos et al., 2020 (https://arxiv.org/abs/2006.16236), normalized by its weights; with decays RetNet (Sun et
al., 2023), Mamba-2 (Dao & Gu, 2024, https://arxiv.org/abs/2405.21060) and gated linear attention (Yang et al., 2024,
https://arxiv.org/abs/2312.06635), whose chunks these kernels have.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import dispatch
from tilebook.call import Entry, Way, constant, native, way
from tilebook.casting import autocast
from tilebook.kernels import bidirectional
from tilebook.kernels.attention.check import multiplier
from tilebook.kernels.bidirectional import features
from tilebook.kernels.bidirectional.check import check_alike
from tilebook.kernels.bidirectional.features import check_rows
from tilebook.kernels.bidirectional.form import FEATURES, MAPPED, PERFORMER
from tilebook.kernels.linear_attention.check import check, check_step
from tilebook.kernels.linear_attention.entry import GATED, NORMALIZED, arguments, registered
from tilebook.kernels.linear_attention.packs import forgetting, wide
from tilebook.kernels.linear_attention.pytorch import step

_channels = importlib.import_module("tilebook.kernels.channel_decay")  # which is made of parts of this family

__all__ = ["gated_linear_attention", "linear_attention", "linear_attention_step"]


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> Any:
    """o_t = scale · h_tᵀ q_t of the states h_t = exp(g_t) h_{t−1} + k_t v_tᵀ, in time linear in the sequence.

    Args:
        q: queries (B, H, S, D). Any strides; fastest where the last axis is contiguous.
        k: keys (B, H, S, D).
        v: values (B, H, S, V).
        log_decay: g, at most 0: (B, H, S) of each head and token (Mamba-2, simple GLA), or (H,) of each head (RetNet,
            Lightning); (B, H, S, D) of each channel of k and token (GLA), whose channels of states have decays of their
            own, or (H, D). None is 0, plain linear attention. What is below −100, −infinity too, counts as −100.
        scale: what outputs are multiplied by; D^-0.5 if None.
        initial_state: h_0 (B, H, D, V), or None for 0.
        return_state: return (o, state) with the last state.
        cu_seqlens: where packed sequences begin and end, (N + 1,) int32 or int64 from 0 to S; B is 1 then. Each begins
            with a state of 0; neither initial_state nor return_state goes with it. Empty sequences are allowed.

    Returns:
        o (B, H, S, V), in the dtype of v; with `return_state` also h_S (B, H, D, V) in fp32. Both are differentiable in
        every tensor that is given, log_decay and initial_state included.

    Kernels serve bf16, fp16 and fp32 on a GPU with D and V up to 256: products in the dtype of q, states and sums in
    fp32, exponents never above 0. Results repeat bit for bit. All else runs as plain PyTorch, by chunks too. Under
    autocast q, k and v are cast.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
        TypeError: a scale that is to be learnt.
    """
    given = tuple(x for x in (q, k, v, log_decay, initial_state, cu_seqlens) if x is not None)
    if has_torch_function(given):
        return handle_torch_function(
            gated_linear_attention, given, q, k, v, log_decay, scale=scale, initial_state=initial_state,
            return_state=return_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    constant("scale", scale)
    route = way(q, k, v, optional=(log_decay, initial_state, cu_seqlens))
    if log_decay is not None:
        log_decay = wide(log_decay, q)
        if log_decay.ndim == 1 and q.ndim == 4 and log_decay.shape == q.shape[1:2]:
            log_decay = log_decay[None, :, None].expand(q.shape[:3])
        elif log_decay.ndim == 2 and q.ndim == 4 and log_decay.shape == q.shape[1::2]:
            log_decay = log_decay[None, :, None].expand(q.shape)
    if cu_seqlens is not None:
        log_decay = forgetting(q, log_decay, cu_seqlens, initial_state is not None or return_state)
    tensors, factor = (q, k, v, log_decay, wide(initial_state, q)), multiplier(scale, q)
    if log_decay is not None and log_decay.ndim == 4:
        o, state = _channels.attend(route, tensors, factor)
    else:
        o, state = _causal(route, GATED, tensors, ("none", factor))
    return (o, state) if return_state else o


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: Any = "elu+1",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> Any:
    """Σ_j (φ(q_i) · φ(k_j)) v_j / (eps + Σ_j φ(q_i) · φ(k_j)), in time linear in the sequence.

    Args:
        q: queries (B, H, S, D). Any strides.
        k: keys (B, H, S, D); not causal, of another length too.
        v: values (B, H, S, V), as many as keys.
        feature_map: φ: "elu+1" (Katharopoulos et al., 2020), "relu", "softmax" (over D), "performer" (FAVOR+,
            Choromanski et al., 2021: 64 positive orthogonal random features, the same at every call, whose expectation
            is exact attention; `features.performer` has other numbers of them and seeds), None for q and k as they are,
            or a function of q and of k, whose last axis may change.
        causal: token i sees the tokens j ≤ i only.
        normalize: divide by the sum of the weights; φ must be positive then.
        eps: what is added to that sum.
        initial_state: what earlier tokens have left: (B, H, D, V), normalized (B, H, D, V + 1), whose last column is
            the sum of φ(k); D is that of the features.
        return_state: return (o, state), the state with the tokens of this call, in fp32.
        cu_seqlens: of packed sequences, as in `gated_linear_attention`; causal only.

    Returns:
        o (B, H, S, V), in the dtype of v, differentiable in q, k, v and initial_state, as the state is.

    Causal, the kernels of `gated_linear_attention` run, with the division in them. Not causal, with a map that has a
    name, normalized and without states, others do. Both make features of rows where they read them, so that features
    never reach memory, but for causal Performer and functions, whose are made before. Performer's are divided by the
    largest that each of them has over all keys; causal, by the largest so far. Else it is two products of PyTorch's;
    keys are divided by their number there, so that fp16 does not overflow.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, or a feature map of no known name.
        TypeError: an eps that is to be learnt.
    """
    given = tuple(x for x in (q, k, v, initial_state, cu_seqlens) if x is not None)
    if has_torch_function(given):
        return handle_torch_function(
            linear_attention, given, q, k, v, feature_map=feature_map, causal=causal, normalize=normalize, eps=eps,
            initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    constant("eps", eps)
    eps = float(eps)
    if cu_seqlens is not None and not causal:
        raise ValueError("cu_seqlens goes with causal=True only")
    route = way(q, k, v, optional=(initial_state, cu_seqlens))
    if not causal and normalize and initial_state is None and not return_state and bidirectional.named(feature_map):
        return bidirectional.attend(route, q, k, v, None, feature_map, eps)
    if causal and type(feature_map) is str and feature_map == PERFORMER and q.numel():
        check_rows(q, k)
        begins = None
        if cu_seqlens is not None:
            begins = forgetting(q, None, cu_seqlens, initial_state is not None or return_state) == -torch.inf
        o, state = performed(route, q, k, v, bool(normalize), eps, begins=begins, state=wide(initial_state, q))
        return (o, state) if return_state else o
    name = feature_map if causal and type(feature_map) is str and feature_map in MAPPED else "none"
    if name == "none":
        q, k = features.mapped(q, k, feature_map)
    else:
        check_rows(q, k)
    state, starts = wide(initial_state, q), None
    if cu_seqlens is not None:
        starts = forgetting(q, None, cu_seqlens, initial_state is not None or return_state)
    if not causal:
        o, state = _everything(q, k, v, state, bool(normalize), eps)
    elif normalize:
        o, state = _causal(route, NORMALIZED, (q, k, v, starts, state), (name, 1.0, eps))
    else:
        o, state = _causal(route, GATED, (q, k, v, starts, state), (name, 1.0))
    return (o, state) if return_state else o


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of `gated_linear_attention`, for decoding: its output and the state behind it.

    Args:
        q: (B, H, D).
        k: (B, H, D).
        v: (B, H, V).
        state: (B, H, D, V) in fp32, as `return_state` gives it. It is not written to.
        log_decay: (B, H) or (H,), of each channel (B, H, D), or None.
        scale: as there.

    Returns:
        o (B, H, V) in the dtype of v, and the next state in fp32. In PyTorch's own functions, differentiable.

    Raises:
        ValueError: shapes that do not go together.
    """
    way(q, k, v, state, optional=(log_decay,))
    check_step(q, k, v, state, log_decay, channels=True)
    return step(q, k, v, wide(state, q), log_decay, multiplier(scale, q))


def performed(
    route: Way, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, normalize: bool, eps: float, *,
    begins: torch.Tensor | None = None, weights: torch.Tensor | None = None, state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(o, state) of causal Performer. begins, weights: as `features.in_order` has them. States are of features that
    nothing divides."""
    check(q, k, q, None, None, False)
    known = None
    if state is not None:
        made_of = q.new_empty(*q.shape[:3], FEATURES)
        check(made_of, made_of, v, None, state, normalize)
        known = (state[..., -1] if normalize else state.abs().amax(-1)).detach().log()
    made = features.in_order(q, k, begins=begins, weights=weights, known=known)
    if state is not None:
        state = state * (-made.first).exp()[..., None, None]
    tensors = made.phi_q, made.phi_k, v, wide(made.decay, q), state
    entry, options = (NORMALIZED, ("none", 1.0, eps)) if normalize else (GATED, ("none", 1.0))
    o, last = _causal(route, entry, tensors, options)
    return o, last * made.last.exp()[..., None, None]


def _causal(route: Way, entry: Entry, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """(o, state) by what serves the call."""
    tensors = *autocast(*tensors[:3]), *tensors[3:]
    args = choice = None
    if route == "direct" and all(x.ndim == 4 and x.numel() for x in tensors[:3]):
        args = arguments(tensors, options)
        choice = dispatch.known(registered()[0], args)
    if choice is None:  # a call like one before is not checked again
        entry.check(tensors, options)
        if route == "op":
            return entry.through(tensors, options)[:2]
        if args is None:
            return entry.plain(tensors, options)  # type: ignore[no-any-return]
        choice = dispatch.lookup(registered()[0], args)
    if native(choice, tensors):
        choice.calls += 1
        return entry.plain(tensors, options)  # type: ignore[no-any-return]
    return entry.direct(choice, tensors, options)[:2]


def _everything(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor | None, normalize: bool, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token sees all: a product for the state, and one with it."""
    q, k, v = autocast(q, k, v)
    check_rows(q, k)
    check_alike(q, k, v)
    check(k, k, v, None, state, normalize)
    wide, count = torch.promote_types(q.dtype, torch.float32), max(1, k.shape[2])
    k = k / count
    whole = (k.mT @ v).to(wide)
    if normalize:
        whole = torch.cat((whole, k.sum(-2, dtype=wide)[..., None]), -1)
    if state is not None:
        whole = whole + state / count
    o = (q @ whole[..., : v.shape[-1]].to(q.dtype)).to(wide)
    den = (q.to(wide) * whole[..., None, :, -1]).sum(-1, keepdim=True) + eps / count if normalize else 1 / count
    o = o / den
    return o.to(v.dtype), whole * count
