"""What a call of `attention_decode` must satisfy."""

from __future__ import annotations

import torch


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor | None,
    block_table: torch.Tensor | None,
    softcap: float,
    window: int | None,
) -> None:
    """Raises ValueError for what does not go together. Looks at no number that lies on a GPU."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention_decode takes tensors of four dimensions; {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must have the same head dimension; {shapes}")
    heads_kv = k.shape[1] if block_table is None else k.shape[2]
    if (q.shape[1] % heads_kv) if heads_kv else q.shape[1]:
        raise ValueError(f"the heads of q must be a multiple of the heads of k and v; {shapes}")
    if block_table is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"q, k and v must have the same batch size; {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if block_table is not None and seq_lens is None:
        raise ValueError("a block table needs seq_lens")
    for name, x, ndim, shape in (("seq_lens", seq_lens, 1, "(B,)"), ("block_table", block_table, 2, "(B, blocks)")):
        if x is None:
            continue
        if x.ndim != ndim or x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have shape {shape} with B = {q.shape[0]}, not {tuple(x.shape)}")
        if x.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, not {x.dtype}")
    devices = [x.device for x in (q, k, v, seq_lens, block_table) if x is not None]
    if len(set(devices)) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(map(str, devices))}")
    if softcap < 0:
        raise ValueError(f"softcap must not be negative; got {softcap}")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be at least 1; got {window}")
