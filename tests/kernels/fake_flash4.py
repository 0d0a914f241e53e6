"""The two functions of `flash_attn.cute.interface` that we call, in eager PyTorch and in that package's own terms.

Tensors are (B, S, H, D), diagonals end in the last row and column, outputs are written where the caller wants them.
"""

import torch

calls = []
"""Name and tensor arguments of every call."""

told = []
"""What each call of the forward chose beside its arguments: tile, P in registers, overlap."""


def _scores(q, k, softmax_scale, causal, window_size_left, window_size_right):
    """Masked scores (B, H, Sq, Sk) in fp32, and k repeated for the heads that share it."""
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2).float()
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), keys) * softmax_scale
    (n_q, n_k), right = scores.shape[2:], 0 if causal else window_size_right
    diagonal = torch.arange(n_q)[:, None] + n_k - n_q
    columns = torch.arange(n_k)
    if window_size_left is not None and right is not None and window_size_left < 0 and right < 0:
        return scores, keys
    if window_size_left is not None:
        scores = scores.masked_fill(columns < diagonal - window_size_left, -torch.inf)
    if right is not None:
        scores = scores.masked_fill(columns > diagonal + right, -torch.inf)
    return scores, keys


def _checked(name, tensors, outputs):
    calls.append((name, tensors))
    for x in outputs:
        assert x.stride(-1) == 1
        assert 0 not in x.stride()
        assert all(step % 8 == 0 for step in x.stride()[:-1]) or x.dtype == torch.float32


def _flash_attn_fwd(
    q,
    k,
    v,
    *,
    softmax_scale,
    causal=False,
    window_size_left=None,
    window_size_right=None,
    tile_mn=None,
    mma_pv_is_rs=None,
    intra_wg_overlap=None,
    out=None,
    lse=None,
):
    _checked("fwd", (q, k, v), (out, lse))
    told.append((tile_mn, mma_pv_is_rs, intra_wg_overlap))
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    scores, _ = _scores(q, k, softmax_scale, causal, window_size_left, window_size_right)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], 2).float()
    out.copy_(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values))
    lse.copy_(scores.logsumexp(-1))
    return out, lse, None, None, None


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    *,
    softmax_scale,
    causal=False,
    window_size_left=None,
    window_size_right=None,
    deterministic=False,
    dq=None,
    dk=None,
    dv=None,
):
    _checked("bwd", (q, k, v, out, dout), (dq, dk, dv))
    assert deterministic in (False, True)
    group = q.shape[2] // k.shape[2]
    scores, keys = _scores(q, k, softmax_scale, causal, window_size_left, window_size_right)
    p, grad = (scores - lse[..., None]).exp(), dout.float()
    delta = (out.float() * grad).sum(-1).transpose(1, 2)
    dp = torch.einsum("bqhd,bkhd->bhqk", grad, v.repeat_interleave(group, 2).float())
    ds = p * (dp - delta[..., None]) * softmax_scale
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", ds, keys))
    dk.copy_(torch.einsum("bhqk,bqhd->bkhd", ds, q.float()).unflatten(2, (-1, group)).sum(3))
    dv.copy_(torch.einsum("bhqk,bqhd->bkhd", p, grad).unflatten(2, (-1, group)).sum(3))
    return dq, dk, dv
