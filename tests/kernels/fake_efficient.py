"""PyTorch's two memory-efficient operators in eager PyTorch, as strict as they are about what they are given."""

import torch

_ALIGNMENT, _BLOCK = 16, 32
_LEAST = torch.finfo(torch.float32).min / 1.4426950408889634


def _checked(q, k, v, bias, scores):
    assert q.shape[1] == k.shape[1] == v.shape[1]
    for x in (q, k, v, *(() if bias is None else (bias,))):
        assert x.dtype == q.dtype
        assert x.stride(-1) == 1
        assert x.data_ptr() % _ALIGNMENT == 0
        assert all(step * x.itemsize % _ALIGNMENT == 0 for step, n in zip(x.stride(), x.shape[:-1]) if n > 1)  # noqa: B905
    assert bias is None or bias.shape == scores


def _scores(q, k, bias, causal, scale):
    scores = q.float() @ k.float().mT * scale
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        rows, columns = (torch.arange(n) for n in scores.shape[2:])
        scores = scores.masked_fill(columns > rows[:, None], -torch.inf)
    return scores.masked_fill(scores < _LEAST, -torch.inf)


class Aten:
    """`torch.ops.aten`."""

    @staticmethod
    def _scaled_dot_product_efficient_attention(
        q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
    ):
        assert (compute_log_sumexp, dropout_p) == (True, 0.0)
        scores = _scores(q, k, attn_bias, is_causal, scale)
        _checked(q, k, v, attn_bias, scores.shape)
        o = scores.softmax(-1).nan_to_num() @ v.float()
        lse = scores.logsumexp(-1)
        lse = torch.where(lse == -torch.inf, 0.0, lse)  # so it says of rows that see nothing
        lse = torch.nn.functional.pad(lse, (0, -q.shape[2] % _BLOCK), value=torch.inf)
        o = o.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        return o, lse, torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)

    @staticmethod
    def _scaled_dot_product_efficient_attention_backward(
        do, q, k, v, attn_bias, out, lse, seed, offset, dropout_p, grad_input_mask, is_causal=False, *, scale=None
    ):
        scores = _scores(q, k, attn_bias, is_causal, scale)
        _checked(q, k, v, attn_bias, scores.shape)
        assert dropout_p == 0.0
        assert lse.shape[-1] % _BLOCK == 0
        assert out.transpose(1, 2).is_contiguous()
        assert grad_input_mask[:3] == [True] * 3
        p = (scores - lse[..., : q.shape[2], None]).exp()
        grad = do.float()
        dp = grad @ v.float().mT
        ds = p * (dp - (out.float() * grad).sum(-1, keepdim=True))
        found = [scale * ds @ k.float(), scale * ds.mT @ q.float(), p.mT @ grad]
        dbias = None
        if grad_input_mask[3]:
            dbias = ds.masked_fill(~torch.isfinite(scores), torch.nan) if is_causal else ds  # skipped, so not written
        return *(x.to(q.dtype) for x in found), None if dbias is None else dbias.to(q.dtype)
