"""FlashAttention-2 in eager PyTorch and in its own terms, behind the operators of PyTorch that we call.

Tensors are (B, S, H, D), diagonals end in the last row and column, negative sides are none.
"""

import torch

calls = []
"""Name and tensor arguments of every call."""


def _scores(q, k, scale, causal, left, right):
    """Masked scores (B, H, Sq, Sk) in fp32, and k for every query head."""
    n_q, n_k = q.shape[1], k.shape[1]
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2).float()
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), keys) * scale
    left, right = (-1 if side >= n_k else side for side in (left, 0 if causal else right))
    diagonal, columns = torch.arange(n_q)[:, None] + n_k - n_q, torch.arange(n_k)
    if left >= 0 or right >= 0:
        left, right = (n_k if side < 0 else side for side in (left, right))
        scores = scores.masked_fill((columns < diagonal - left) | (columns > diagonal + right), -torch.inf)
    return scores, keys


def _forward(q, k, v, *how):
    calls.append(("fwd", (q, k, v)))
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    scores, _ = _scores(q, k, *how)
    lse = scores.logsumexp(-1)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], 2).float()
    o = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(), values)
    return o.to(q.dtype), torch.where(lse == -torch.inf, torch.inf, lse)


def _backward(dout, q, k, v, out, lse, *how):
    calls.append(("bwd", (dout, q, k, v, out)))
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.is_contiguous()
    group = q.shape[2] // k.shape[2]
    scores, keys = _scores(q, k, *how)
    p, grad = (scores - lse[..., None]).exp(), dout.float()
    delta = (out.float() * grad).sum(-1).transpose(1, 2)
    dp = torch.einsum("bqhd,bkhd->bhqk", grad, v.repeat_interleave(group, 2).float())
    ds = p * (dp - delta[..., None]) * how[0]
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, keys)
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, q.float()).unflatten(2, (-1, group)).sum(3)
    dv = torch.einsum("bhqk,bqhd->bkhd", p, grad).unflatten(2, (-1, group)).sum(3)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


class Aten:
    """`torch.ops.aten`, as PyTorch built FlashAttention-2."""

    @staticmethod
    def _flash_attention_forward(
        q,
        k,
        v,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        *,
        scale,
        window_size_left,
        window_size_right,
    ):
        assert (cum_seq_q, cum_seq_k, dropout_p, return_debug_mask) == (None, None, 0.0, False)
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        o, lse = _forward(q, k, v, scale, is_causal, window_size_left, window_size_right)
        return o, lse, torch.empty(2), torch.empty(0), torch.empty(0)

    @staticmethod
    def _flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        rng_state,
        unused,
        *,
        scale,
        window_size_left,
        window_size_right,
    ):
        assert (cum_seq_q, cum_seq_k, dropout_p, max_q, max_k) == (None, None, 0.0, q.shape[1], k.shape[1])
        return _backward(dout, q, k, v, out, lse, scale, is_causal, window_size_left, window_size_right)
