"""Attention in eager PyTorch, piece by piece for any sequence length: the reference that kernels are judged by."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Elements of the largest temporary (256 MiB in fp32); about four of that size live at once.
_PIECE = 1 << 26


def _pieces(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of (batch · kv head, query rows) whose scores fit into one piece; q (BHkv, G, Sq, D), k (BHkv, Sk, D)."""
    pairs, group, n_q, n_k = q.shape[0], q.shape[1], q.shape[2], k.shape[1]
    some = max(1, _PIECE // (group * n_q * n_k))
    rows = n_q if some > 1 else max(1, min(n_q, _PIECE // (group * n_k)))
    for pair in range(0, pairs, some):
        for row in range(0, n_q, rows):
            yield slice(pair, pair + some), slice(row, min(row + rows, n_q))


def _grouped(x: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """(B, H, S, …) → (B·Hkv, G, S, …)"""
    batch, heads = x.shape[:2]
    return x.reshape(batch * heads_kv, heads // heads_kv, *x.shape[2:])


def _scores(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float, first_row: int) -> torch.Tensor:
    """scale · q kᵀ in fp32, -inf where masked; q (n, G, rows, D), k (n, Sk, D)."""
    scores = (q @ k[:, None].mT).float().mul_(scale)
    if causal:
        rows = torch.arange(first_row, first_row + q.shape[2], device=q.device)
        scores.masked_fill_(rows[:, None] < torch.arange(k.shape[1], device=q.device), -torch.inf)
    return scores


def log_sum_exp(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """Natural log of the softmax's denominators, (B, H, Sq) in fp32."""
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    queries, keys, out = _grouped(q, k.shape[1]), k.flatten(0, 1), _grouped(lse, k.shape[1])
    for pair, rows in _pieces(queries, keys):
        out[pair, :, rows] = torch.logsumexp(_scores(queries[pair, :, rows], keys[pair], causal, scale, rows.start), -1)
    return lse


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """o = softmax(scale · q kᵀ) v and the log-sum-exp; softmax in fp32, matrix products in the dtype of the inputs."""
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    queries, keys, values = _grouped(q, k.shape[1]), k.flatten(0, 1), v.flatten(0, 1)
    o_out, lse_out = _grouped(o, k.shape[1]), _grouped(lse, k.shape[1])
    for pair, rows in _pieces(queries, keys):
        scores = _scores(queries[pair, :, rows], keys[pair], causal, scale, rows.start)
        denominators = torch.logsumexp(scores, -1)
        p = scores.sub_(denominators[..., None]).exp_().to(q.dtype)
        o_out[pair, :, rows] = p @ values[pair][:, None]
        lse_out[pair, :, rows] = denominators
    return o, lse


def backward(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv with the softmax recomputed from q and k, so that nothing rounded by a forward pass enters."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    queries, grads, dq_out = (_grouped(x, k.shape[1]) for x in (q, do, dq))
    keys, values, dk_out, dv_out = (x.flatten(0, 1) for x in (k, v, dk, dv))
    for pair, rows in _pieces(queries, keys):
        some_q, some_do = queries[pair, :, rows], grads[pair, :, rows]
        p = torch.softmax(_scores(some_q, keys[pair], causal, scale, rows.start), -1)
        dp = (some_do @ values[pair][:, None].mT).float()
        # One product over (group · rows) sums the heads that share a key.
        dv_out[pair] += p.to(q.dtype).flatten(1, 2).mT @ some_do.flatten(1, 2)
        ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p).mul_(scale).to(q.dtype)
        dq_out[pair, :, rows] = ds @ keys[pair][:, None]
        dk_out[pair] += ds.flatten(1, 2).mT @ some_q.flatten(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
