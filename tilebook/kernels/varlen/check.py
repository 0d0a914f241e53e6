"""What a call of `attention_varlen` must satisfy."""

from __future__ import annotations

import torch

from tilebook.call import watched


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    """Raises ValueError for what does not go together. Looks at no number that lies on a GPU."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ValueError(f"attention_varlen takes tensors of shape (tokens, heads, head dimension); {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; {shapes}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q, k and v must have the same head dimension; {shapes}")
    if (q.shape[1] % k.shape[1]) if k.shape[1] else q.shape[1]:
        raise ValueError(f"the heads of q must be a multiple of the heads of k and v; {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if ends.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, not {ends.dtype}")
        if ends.ndim != 1 or not len(ends) or len(ends) != len(cu_seqlens_q):
            found = f"got {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
            raise ValueError(f"cu_seqlens_q and cu_seqlens_k must both have shape (B + 1,); {found}")
    devices = [x.device for x in (q, k, v, cu_seqlens_q, cu_seqlens_k)]
    if len(set(devices)) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(map(str, devices))}")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(longest, int | torch.SymInt) or longest < 0:
            raise ValueError(f"{name} must be an int and not negative; got {longest!r}")
    if cu_seqlens_q.device.type == "cpu" and not watched():  # they can be read without waiting
        for name, ends, total in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, len(k))):
            if ends[0] != 0 or ends[-1] > total or (ends.diff() < 0).any():
                raise ValueError(f"{name} must rise from 0 to at most {total}; got {ends.tolist()}")
