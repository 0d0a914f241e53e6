"""mLSTM: a matrix memory with exponential gates, xLSTM's layer that has no recurrence between tokens.

Beck et al., 2024 (https://arxiv.org/abs/2405.04517), §2.3; with sigmoid input gates and without a normalizer as in Beck
et al., 2025 (https://arxiv.org/abs/2503.14376). It runs on the kernels of linear attention with a decay of each head.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import dispatch
from tilebook.call import Way, constant, native, way
from tilebook.casting import autocast
from tilebook.kernels.attention.check import multiplier
from tilebook.kernels.linear_attention import gated_linear_attention
from tilebook.kernels.linear_attention.packs import forgetting, wide
from tilebook.kernels.linear_attention.pytorch import LEAST
from tilebook.kernels.mlstm.check import check, check_gate
from tilebook.kernels.mlstm.entry import MEMORY, arguments, registered

__all__ = ["mlstm", "mlstm_step"]

Gate = Literal["exp", "sigmoid"]


def mlstm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    input_gate: torch.Tensor,
    forget_gate: torch.Tensor,
    *,
    gate: Gate = "exp",
    scale: float | None = None,
    eps: float = 0.0,
    initial_state: Any = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> Any:
    """o_t = C_tᵀ q_t / max(|n_t · q_t|, 1) of C_t = f_t C_{t−1} + i_t k_t v_tᵀ and n_t = f_t n_{t−1} + i_t k_t.

    f is the sigmoid of the forget gate, i the exponential of the input gate, which has no end; so nothing is computed
    but C e^(−m), n e^(−m) and, for 1, e^(−m), with m_t = max(log f_t + m_{t−1}, log i_t).

    Args:
        q: queries (B, H, S, D).
        k: keys (B, H, S, D).
        v: values (B, H, S, V).
        input_gate: of each head and token (B, H, S), before its exponential or sigmoid; −infinity writes nothing.
        forget_gate: of each head and token (B, H, S), before its sigmoid. What keeps less than e^−100 counts as that.
        gate: "exp", or "sigmoid": i is a sigmoid then, and o_t = C_tᵀ q_t, without normalizer.
        scale: what products of q and k are multiplied by; D^-0.5 if None, as in the paper, which has it in k.
        eps: what is added to the divisor; xLSTM's published code has 1e-6. Not of "sigmoid".
        initial_state: (C e^(−m), n e^(−m), m) that earlier tokens have left: (B, H, D, V), (B, H, D) and (B, H), as
            `return_state` gives them. Of "sigmoid" C alone.
        return_state: return (o, state) with the state behind the last token, in fp32.
        cu_seqlens: of packed sequences, as in `gated_linear_attention`.

    Returns:
        o (B, H, S, V), in the dtype of v. It and the state are differentiable in every tensor but m, which changes
        nothing but how large numbers are on the way; of a state that is put to use otherwise than by `mlstm` and
        `mlstm_step` gradients are those with m held.

    Kernels serve bf16, fp16 and fp32 on a GPU with D and V up to 256, fp32 with D up to 128; all else runs as plain
    PyTorch, by chunks too. In them weights are stabilized by the logarithm of their sum in the place of their largest,
    which is the same function, so that fp16 holds sums of any length.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, or a gate of no known name.
        TypeError: a scale or an eps that is to be learnt.
    """
    parts = tuple(initial_state) if isinstance(initial_state, (tuple, list)) else (initial_state,)
    given = tuple(x for x in (q, k, v, input_gate, forget_gate, *parts, cu_seqlens) if x is not None)
    if has_torch_function(given):
        return handle_torch_function(
            mlstm, given, q, k, v, input_gate, forget_gate, gate=gate, scale=scale, eps=eps,
            initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    constant("eps", eps)
    route = way(q, k, v, input_gate, forget_gate, optional=(*parts, cu_seqlens))
    check_gate(gate)
    check(q, k, v, input_gate, forget_gate, None if initial_state is None else parts, gate)
    scale, states = multiplier(scale, q), initial_state is not None or return_state
    log_i, log_f = wide(input_gate, q), F.logsigmoid(wide(forget_gate, q))
    if cu_seqlens is not None:
        log_f = forgetting(q, log_f, cu_seqlens, states)
    if gate == "sigmoid":
        o, last = _run(q, k, _times(v, log_i.sigmoid()), log_f, initial_state, scale)
        return (o, last) if return_state else o
    before = None if initial_state is None else tuple(wide(x, q) for x in parts)
    o, state = _exponential(route, q, k, v, log_i, log_f.clamp(min=LEAST), before, scale, float(eps), cu_seqlens)
    return (o, state) if return_state else o


def mlstm_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    input_gate: torch.Tensor,
    forget_gate: torch.Tensor,
    state: Any,
    *,
    gate: Gate = "exp",
    scale: float | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, Any]:
    """One token of `mlstm`, for decoding: its output and the state behind it.

    Args:
        q: (B, H, D).
        k: (B, H, D).
        v: (B, H, V).
        input_gate: (B, H), before its exponential or sigmoid.
        forget_gate: (B, H), before its sigmoid.
        state: as `mlstm` gives it, in fp32. It is not written to.
        gate: as there.
        scale: as there.
        eps: as there.

    Returns:
        o (B, H, V) in the dtype of v, and the next state in fp32. In PyTorch's own functions, differentiable.

    Raises:
        ValueError: shapes that do not go together, or a gate of no known name.
    """
    check_gate(gate)
    parts = tuple(state) if isinstance(state, (tuple, list)) else (state,)
    rows = [x.unsqueeze(2) for x in (q, k, v, input_gate, forget_gate)]
    check(rows[0], rows[1], rows[2], rows[3], rows[4], parts, gate)
    memory, *rest = (wide(x, q) for x in parts)
    kind, scale = memory.dtype, multiplier(scale, q)
    log_i, log_f = input_gate.to(kind), F.logsigmoid(forget_gate.to(kind)).clamp(min=LEAST)
    query, key, value = (x.to(kind) for x in (q, k, v))
    if gate == "sigmoid":
        memory = memory * log_f.exp()[..., None, None] + _outer(key * log_i.sigmoid()[..., None], value)
        return (_asked(query, memory) * scale).to(v.dtype), memory
    n, m = rest
    top = torch.maximum(log_f + m, log_i).detach()
    kept, written = (log_f + m - top).exp()[..., None], key * (log_i - top).exp()[..., None]
    memory, n = memory * kept[..., None] + _outer(written, value), n * kept + written
    weight = (query * n).sum(-1, keepdim=True) * scale
    divisor = torch.maximum(weight.abs(), (-top).exp()[..., None]) + eps
    return (_asked(query, memory) * scale / divisor).to(v.dtype), (memory, n, top)


def _exponential(
    route: Way, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_i: torch.Tensor, log_f: torch.Tensor,
    before: tuple[torch.Tensor, ...] | None, scale: float, eps: float, ends: torch.Tensor | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:  # fmt: skip
    """(o, state) with weights that are divided by their sum: with M its logarithm, decays are f_t e^(M_{t−1} − M_t)."""
    start = log_f.new_zeros(log_f.shape[:2]) if before is None else before[2]
    total, top = _stabilizers(log_i.detach(), log_f.detach(), start.detach())
    steps = (torch.cat((start.detach().to(total.dtype)[..., None], total[..., :-1]), -1) - total).to(log_f.dtype)
    total = total.to(log_f.dtype)
    # At most 0 but for rounding, by which a maximum would cut gradients off.
    decays, written = log_f + steps, log_i - total
    if ends is not None:
        decays = forgetting(q, decays, ends, False)
    memory = None if before is None else torch.cat((before[0], before[1][..., None]), -1)
    tensors = q, k, v, decays, written, (-total).exp(), memory
    o, memory = _attend(route, tensors, (scale, eps))
    # What the last token's numbers were divided by, in the place of which a state has its largest.
    last = log_f.shape[2] - 1
    more = (total[..., last] - top).exp() if last >= 0 else torch.ones_like(top)
    memory = memory * more[..., None, None]
    return o, (memory[..., :-1], memory[..., -1], top)


def _attend(route: Way, tensors: tuple[Any, ...], options: tuple[float, float]) -> tuple[torch.Tensor, ...]:
    """(o, state) of an entry's tensors and options, by what serves the call."""
    tensors = *autocast(*tensors[:3]), *tensors[3:]
    MEMORY.check(tensors, options)
    if route == "pytorch" or (route == "direct" and not tensors[2].numel()):
        return MEMORY.plain(tensors, options)  # type: ignore[no-any-return]
    if route == "op":
        return MEMORY.through(tensors, options)[:2]
    args, forward = arguments(tensors, options), registered()[0]
    choice = dispatch.known(forward, args) or dispatch.lookup(forward, args)
    if native(choice, tensors):
        choice.calls += 1
        return MEMORY.plain(tensors, options)  # type: ignore[no-any-return]
    return MEMORY.direct(choice, tensors, options)[:2]


def _stabilizers(log_i: torch.Tensor, log_f: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logarithms of the sums of all tokens' weights, with that of the state before, in fp64, and the last m."""
    sums = log_f.double().cumsum(-1)
    writes = torch.cat((start.double()[..., None], log_i.double() - sums), -1)
    total = writes.logcumsumexp(-1)[..., 1:] + sums
    end = sums[..., -1] if sums.shape[-1] else torch.zeros_like(start, dtype=sums.dtype)
    return total, (writes.amax(-1) + end).to(log_f.dtype)


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decays: torch.Tensor, state: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    made: tuple[torch.Tensor, torch.Tensor] = gated_linear_attention(
        q, k, v, decays, scale=scale, initial_state=state, return_state=True
    )
    return made


def _times(v: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Values with the gate of each token, rounded once."""
    return (v.to(gate.dtype) * gate[..., None]).to(v.dtype)


def _outer(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return key[..., :, None] * value[..., None, :]


def _asked(query: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    return (query[..., None, :] @ memory).squeeze(-2)
