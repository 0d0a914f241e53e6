"""What attention is, spelled out, and what kernels and PyTorch's own path are held to by it."""

import math

import torch

import tilebook
from tilebook import device as devices
from tilebook import dispatch
from tilebook import op as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = devices.find("H200")
FORWARD, BACKWARD = ops.get("attention_fwd"), ops.get("attention_bwd")


def formula(q, k, v, scale=None, causal=False, window=None, softcap=0.0, alibi_slopes=None, bias=None, attn_mask=None):
    """(o, lse), spelled out in the dtype of the inputs; rows that see nothing are 0 and -inf."""
    group, n_q, n_k = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(n_q, device=q.device)[:, None], torch.arange(n_k, device=q.device)
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(q.shape[:2])[..., None, None]
        scores = scores - (slopes * (i + n_k - n_q - j).abs()).to(scores.dtype)
    if bias is not None:
        scores = scores + bias
    seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device)
    if attn_mask is not None:
        seen = seen & attn_mask
    diagonal = i if causal in (True, "top_left") else i + n_k - n_q
    left, right = window or (None, None)
    if causal:
        seen = seen & (j <= diagonal)
    if left is not None and left >= 0:
        seen = seen & (j >= diagonal - left)
    if right is not None and right >= 0:
        seen = seen & (j <= diagonal + right)
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.detach().logsumexp(-1)
    dead = (lse == -math.inf)[..., None]
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0) @ v, lse


def tensors(*shapes, dtype=torch.bfloat16, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).to(DEVICE, dtype) for shape in shapes]


def agree(options, shapes, dtype=torch.float16, seed=0, tolerance=4e-3):
    """Kernels and PyTorch's own path give o, lse and every gradient of the formula."""
    q, k, v = tensors(*shapes, dtype=dtype, seed=seed)
    (do,) = tensors(q.shape, dtype=dtype, seed=seed + 1)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    bias = options.get("bias")
    right = dict(options)
    if bias is not None:
        right["bias"] = bias.double().requires_grad_()
        exact.append(right["bias"])
    truth, lse = formula(*exact[:3], **right)
    truths = truth, *torch.autograd.grad(truth, exact, do.double())
    # What is summed over thousands of scores errs by more than its own rounding, in PyTorch as here.
    same = [x.detach().to(dtype).requires_grad_() for x in exact]
    plain, _ = formula(*same[:3], **(options if bias is None else options | {"bias": same[3]}))
    theirs = plain, *torch.autograd.grad(plain, same, do)
    for kernels in (True, False):
        given_ = [x.clone().requires_grad_() for x in (q, k, v)]
        ours = dict(options)
        if bias is not None:
            ours["bias"] = bias.clone().requires_grad_()
        with dispatch.use("triton" if kernels else "torch"):
            o, got = tilebook.attention(*given_, **ours, return_lse=True)
            grads = torch.autograd.grad(o, [*given_, *([ours["bias"]] if bias is not None else [])], do)
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), lse, rtol=1e-3, atol=3e-3)
        for mine, other, usual in zip((o, *grads), truths, theirs, strict=True):
            assert mine.isfinite().all()
            floor = tolerance * max(1.0, other.abs().max().item())
            if mine.ndim == 4 and mine.shape[-1] == 1:
                # One number for whole rows: adding it changes nothing, so its gradient is 0 but for what the row sums
                # of p · dp, taken from the rounded o, leave behind; that adds up like noise.
                floor += 5e-4 * (o.numel() / o.shape[-1]) ** 0.5
            assert (mine.double() - other).abs().max() <= floor + 2 * (usual.double() - other).abs().max(), options


def shapes(n_q, n_k, heads=2, heads_kv=2, width=32, batch=1):
    return (batch, heads, n_q, width), (batch, heads_kv, n_k, width), (batch, heads_kv, n_k, width)
