"""What a cell's calls are given: tensors by PyTorch alone, and what of scores is hidden."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from cells import Cell

Tensors = list[torch.Tensor]


@dataclass
class Inputs:
    """What a call takes: `leaves`, which have gradients in training, then `others`, masks, slopes and lengths.

    `gradient` is that of the output.
    """

    leaves: Tensors
    others: Tensors
    gradient: torch.Tensor | None

    def copy(self) -> Inputs:
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in self.leaves]
        gradient = None if self.gradient is None else self.gradient.clone()
        return Inputs(leaves, self.others, gradient)

    @property
    def bytes(self) -> int:
        given = [*self.leaves, *([] if self.gradient is None else [self.gradient])]
        return sum(x.numel() * x.element_size() for x in given)


def dtype_of(cell: Cell) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[cell.dtype]


def inputs(cell: Cell, device: str, seed: int = 0) -> Inputs:
    source, dtype, s = torch.Generator(device).manual_seed(seed), dtype_of(cell), cell.sizes

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=source, device=device) * scale).to(dtype)

    others: Tensors = []
    if cell.kind == "mlp":
        m, h, i = s["rows"], s["width"], s["inner"]
        leaves = [random(m, h), random(i, h, scale=h**-0.5), random(i), random(h, i, scale=i**-0.5), random(h)]
        out: tuple[int, ...] = (m, h)
    elif cell.kind in ("norms", "layer_norm"):
        out = s["rows"], s["width"]
        leaves = [random(*out), *(random(s["width"]) for _ in range(s["vectors"]))]
    elif cell.kind == "packed":
        total_q, total_k = sum(s["lengths_q"]), sum(s["lengths_k"])
        out, key = (total_q, s["heads"], s["head_dim"]), (total_k, s["heads_kv"], s["head_dim"])
        leaves = [random(*out), random(*key), random(*key)]
        for lengths in (s["lengths_q"], s["lengths_k"]):
            others.append(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device))
    else:
        out = (s["batch"], s["heads"], s["seq_q"], s["head_dim"])
        key = (s["batch"], s["heads_kv"], s["seq_k"], s["head_dim"])
        leaves = [random(*out), random(*key), random(*key)]
        others = _tables(cell, device, source)
        if s.get("bias") == "bias" and cell.step == "training":
            leaves.append(others.pop(0))
    gradient = None
    if cell.step == "training":
        gradient = random(*out)
        for x in leaves:
            x.requires_grad_()
    return Inputs(leaves, others, gradient)


def _tables(cell: Cell, device: str, source: torch.Generator) -> Tensors:
    """The bias or mask, and ALiBi's slopes, where the form has them."""
    s, found = cell.sizes, []
    if s.get("bias"):
        lengths = {"b": s["batch"], "h": s["heads"], "q": s["seq_q"], "k": s["seq_k"]}
        shape = tuple(n if axis in s["axes"] else 1 for axis, n in lengths.items())
        if s["bias"] == "mask":  # key padding: every sequence ends somewhere in its second half
            ends = torch.randint(s["seq_k"] // 2, s["seq_k"] + 1, (*shape[:3], 1), generator=source, device=device)
            found.append((torch.arange(s["seq_k"], device=device) < ends).expand(shape).contiguous())
        else:
            found.append(torch.randn(shape, generator=source, device=device).to(dtype_of(cell)))
    if s.get("alibi"):
        steps = torch.arange(1, s["heads"] + 1, device=device, dtype=torch.float32)
        found.append(2.0 ** (-8.0 * steps / s["heads"]))
    return found


def scores_mask(cell: Cell, others: Tensors, device: str, rows: slice | None = None) -> torch.Tensor | None:
    """All that the form does to scores by sums and masks, as PyTorch's `attn_mask`: booleans where they suffice."""
    s, rest = cell.sizes, list(others)
    mask: torch.Tensor | None = None
    i = torch.arange(s["seq_q"], device=device)[rows or slice(None), None]
    j = torch.arange(s["seq_k"], device=device)
    left, right = s["left"], 0 if s["causal"] else s["right"]
    if left >= 0 or right >= 0:
        mask = torch.ones(len(i), s["seq_k"], dtype=torch.bool, device=device)
        mask = mask & (j >= i - left) if left >= 0 else mask
        mask = (mask & (j <= i + right) if right >= 0 else mask)[None, None]
    added: torch.Tensor | None = None
    if s["bias"]:
        table = rest.pop(0)
        table = table if rows is None or table.shape[2] == 1 else table[:, :, rows]
        if s["bias"] == "mask":
            mask = table if mask is None else mask & table
        else:
            added = table
    if s["alibi"]:
        slopes = rest.pop(0)[None, :, None, None]
        added = -slopes * (i - j).abs() if added is None else added - slopes * (i - j).abs()
    if added is None:
        return mask
    added = added.to(dtype_of(cell)) if rows is None else added
    return added if mask is None else added.masked_fill(~mask, -torch.inf)
