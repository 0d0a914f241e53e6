"""Attention in eager PyTorch, piece by piece for any sequence length: the reference that kernels are judged by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tilebook.kernels.attention.form import Form, extras, limits
from tilebook.kernels.attention.philox import survives

# Elements of the largest temporary (256 MiB in fp32); about four of that size live at once.
_PIECE = 1 << 26


def _wide(x: torch.Tensor) -> torch.Tensor:
    """At least fp32: fp64 stays what it is."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class _Piece:
    """Some (batch · kv head) pairs and some query rows of them, and what the form does to their scores."""

    form: Form
    tensors: tuple[torch.Tensor, ...]
    shape: tuple[int, int, int, int, int]  # B, Hkv, G, Sq, Sk
    pairs: slice
    rows: slice
    device: torch.device

    @property
    def heads(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch (n, 1) and query head (n, G) of each pair."""
        batch, heads_kv, group, _, _ = self.shape
        pairs = torch.arange(batch * heads_kv, device=self.device)[self.pairs, None]
        return pairs // heads_kv, pairs % heads_kv * group + torch.arange(group, device=self.device)

    @property
    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (rows, 1) and columns (Sk,) by number."""
        rows = torch.arange(self.rows.start, self.rows.stop, device=self.device)
        return rows[:, None], torch.arange(self.shape[4], device=self.device)

    def _cut(self, table: torch.Tensor) -> torch.Tensor:
        """The (n, G, rows, Sk) part, or one that broadcasts to it, of a tensor that broadcasts to (B, H, Sq, Sk)."""
        batch, heads_kv, group, _, _ = self.shape
        batches, heads = self.heads
        part = table.expand(batch, heads_kv * group, -1, -1)[batches, heads]
        return part if part.shape[2] == 1 else part[:, :, self.rows]

    def scores(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores in fp32, -inf where masked, and the derivative of the soft-cap; q (n, G, rows, D), k (n, Sk, D).

        Nothing is written over: under `torch.vmap` a table may have a batch that the products do not have.
        """
        scores, slope = _wide(q @ k[:, None].mT) * scale, None
        if self.form.softcap:
            bent = torch.tanh(scores / self.form.softcap)
            scores, slope = bent * self.form.softcap, 1 - bent.square()
        rows, columns = self._grid
        batch, heads_kv, group, n_q, n_k = self.shape
        bias, slopes, _ = extras(self.form, self.tensors)
        if slopes is not None:
            batches, heads = self.heads
            steep = slopes.expand(batch, heads_kv * group)[batches, heads][..., None, None]
            scores = scores - steep.float() * (rows + (n_k - n_q) - columns).abs()
        if bias is not None and self.form.bias != "mask":
            scores = scores + self._cut(bias).to(scores.dtype)
        elif bias is not None:
            scores = scores.masked_fill(~self._cut(bias), -torch.inf)
        before, after = limits(self.form, n_q, n_k)
        if before is not None:
            scores = scores.masked_fill(columns < rows - before, -torch.inf)
        if after is not None:
            scores = scores.masked_fill(columns > rows + after, -torch.inf)
        return scores, slope

    def kept(self) -> torch.Tensor | None:
        """What dropout multiplies weights with: 0 or 1 / (1 - probability); None without dropout."""
        _, _, seed = extras(self.form, self.tensors)
        if seed is None:
            return None
        _, heads_kv, group, _, _ = self.shape
        batches, heads = self.heads
        pairs = (batches * (heads_kv * group) + heads)[..., None, None]
        rows, columns = self._grid
        return survives(seed, pairs, rows, columns, self.form.dropout).float() / (1 - self.form.dropout)


def _pieces(
    q: torch.Tensor, k: torch.Tensor, form: Form, tensors: tuple[torch.Tensor, ...]
) -> Iterator[tuple[_Piece, slice, slice]]:
    """Pieces whose scores are small enough, with their slices of (batch · kv head) and of rows."""
    (batch, heads, n_q, _), (heads_kv, n_k) = q.shape, k.shape[1:3]
    pairs, group = batch * heads_kv, heads // heads_kv
    some = max(1, _PIECE // max(1, group * n_q * n_k))
    rows = max(1, n_q if some > 1 else min(n_q, _PIECE // max(1, group * n_k)))
    for first in range(0, pairs, some):
        for row in range(0, n_q, rows):
            pair, part = slice(first, first + some), slice(row, min(row + rows, n_q))
            yield _Piece(form, tensors, (batch, heads_kv, group, n_q, n_k), pair, part, q.device), pair, part


def _grouped(x: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """(B, H, S, …) → (B·Hkv, G, S, …)"""
    batch, heads = x.shape[:2]
    return x.reshape(batch * heads_kv, heads // heads_kv, *x.shape[2:])


def _add(total: torch.Tensor, part: torch.Tensor, piece: _Piece) -> None:
    """Adds a piece (n, G, rows, Sk) to a tensor that broadcasts to (B, H, Sq, Sk)."""
    batches, heads = piece.heads
    across = [axis for axis in (2, 3) if total.shape[axis] == 1]
    part = part.sum(across, keepdim=True) if across else part
    part = part.to(total.dtype)
    at = batches * (total.shape[0] > 1), heads * (total.shape[1] > 1)
    (total if 2 in across else total[:, :, piece.rows]).index_put_(at, part, accumulate=True)


def _weights(scores: torch.Tensor) -> torch.Tensor:
    """softmax(scores), 0 in rows that see nothing.

    Not by the log-sum-exp: in a row of the most negative number alone the logarithm of their count is lost in it.
    """
    return torch.softmax(scores, -1).masked_fill_(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)


def log_sum_exp(q: torch.Tensor, k: torch.Tensor, form: Form, scale: float, *tensors: torch.Tensor) -> torch.Tensor:
    """Natural log of the softmax's denominators, (B, H, Sq) in fp32; -inf for rows that see nothing."""
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    queries, keys, out = _grouped(q, k.shape[1]), k.flatten(0, 1), _grouped(lse, k.shape[1])
    for piece, pair, rows in _pieces(q, k, form, tensors):
        out[pair, :, rows] = torch.logsumexp(piece.scores(queries[pair, :, rows], keys[pair], scale)[0], -1)
    return lse


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *tensors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """o = softmax(scores) v and the log-sum-exp; softmax in fp32, matrix products in the dtype of the inputs."""
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    queries, keys, values = _grouped(q, k.shape[1]), k.flatten(0, 1), v.flatten(0, 1)
    o_out, lse_out = _grouped(o, k.shape[1]), _grouped(lse, k.shape[1])
    for piece, pair, rows in _pieces(q, k, form, tensors):
        scores, _ = piece.scores(queries[pair, :, rows], keys[pair], scale)
        p, kept = _weights(scores), piece.kept()
        p = p if kept is None else p * kept
        o_out[pair, :, rows] = p.to(q.dtype) @ values[pair][:, None]
        lse_out[pair, :, rows] = torch.logsumexp(scores, -1)
    return o, lse


def composed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *tensors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` as one composition of PyTorch's functions, for autograd and `torch.compile`."""
    (batch, heads, n_q, _), (heads_kv, n_k) = q.shape, k.shape[1:3]
    shape = batch, heads_kv, heads // heads_kv, n_q, n_k
    piece = _Piece(form, tensors, shape, slice(0, batch * heads_kv), slice(0, n_q), q.device)
    scores, _ = piece.scores(_grouped(q, heads_kv), k.flatten(0, 1), scale)
    # A softmax of nothing is NaN, and so is its derivative: such rows see everything, and then count for nothing.
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    p, kept = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0), piece.kept()
    o = (p if kept is None else p * kept).to(q.dtype) @ v.flatten(0, 1)[:, None]
    lse = torch.logsumexp(scores.detach(), -1)
    return o.reshape(q.shape), lse.reshape(q.shape[:-1])


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    form: Form,
    scale: float,
    *tensors: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and, where the form wants it, dbias, with the softmax recomputed from q and k.

    So nothing rounded by a forward pass enters.
    """
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    dbias = torch.zeros(tensors[0].shape, dtype=wide, device=q.device) if form.bias == "dbias" else None
    queries, grads, dq_out = (_grouped(x, k.shape[1]) for x in (q, do, dq))
    keys, values, dk_out, dv_out = (x.flatten(0, 1) for x in (k, v, dk, dv))
    for piece, pair, rows in _pieces(q, k, form, tensors):
        some_q, some_do = queries[pair, :, rows], grads[pair, :, rows]
        scores, slope = piece.scores(some_q, keys[pair], scale)
        p, kept = _weights(scores), piece.kept()
        dp = _wide(some_do @ values[pair][:, None].mT)
        if kept is not None:
            dp = dp * kept
        # One product over (group · rows) sums the heads that share a key.
        dropped = p if kept is None else p * kept
        dv_out[pair] += dropped.to(q.dtype).flatten(1, 2).mT @ some_do.flatten(1, 2)
        ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p)
        if dbias is not None:
            _add(dbias, ds, piece)
        ds = (ds if slope is None else ds * slope).mul_(scale).to(q.dtype)
        dq_out[pair, :, rows] = ds @ keys[pair][:, None]
        dk_out[pair] += ds.flatten(1, 2).mT @ some_q.flatten(1, 2)
    found = dq, dk.to(k.dtype), dv.to(v.dtype)
    return found if dbias is None else (*found, dbias.to(tensors[0].dtype))
