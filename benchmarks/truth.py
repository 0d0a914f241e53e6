"""What a cell's outputs should be, in fp32, and how far outputs are from it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from cells import Cell
from yardsticks import Inputs, yardsticks
from yardsticks.drawn import Tensors, scores_mask

_WHOLE = ("mlp", "norms", "layer_norm")  # kinds of which all is judged
_PIECE = 1 << 27  # scores that are in memory at once


def _parts(cell: Cell, tensors: Iterable[torch.Tensor]) -> Tensors:
    """What is judged of o and the gradients: of attention the last sequence and the last group of heads."""
    found, s = list(tensors), cell.sizes
    if cell.kind in _WHOLE:
        return found
    found = found[:4]  # a bias's gradient is as large as all scores
    group, heads_kv = s["heads"] // s["heads_kv"], s["heads_kv"]
    starts = (group * (heads_kv - 1), heads_kv - 1)  # of the last group in q, and in k and v
    heads = [starts[0], *([starts[0], starts[1], starts[1]] if len(found) > 1 else [])]
    if cell.kind != "packed":
        return [x[-1:, first:] for x, first in zip(found, heads, strict=True)]
    rows = [s["lengths_q"][-1], *([s["lengths_q"][-1], s["lengths_k"][-1], s["lengths_k"][-1]])]
    return [
        x[len(x) - n :, first:].transpose(0, 1)[None]
        for x, first, n in zip(found, heads, rows[: len(heads)], strict=True)
    ]


def reference(cell: Cell, given: Inputs) -> Tensors:
    """What is judged, in fp32 from the same inputs."""
    if cell.kind in _WHOLE:
        leaves = [x.detach().float().requires_grad_() for x in given.leaves]
        with torch.enable_grad():
            o = next(iter(yardsticks(cell, given, "cpu").values()))()(*leaves)
        if given.gradient is None:
            return [o.detach()]
        return [o.detach(), *torch.autograd.grad(o, leaves, given.gradient.float())]
    q, k, v = given.leaves[:3]
    _, q, k, v = (x.detach().float() for x in _parts(cell, (q, q, k, v)))
    do = None if given.gradient is None else _parts(cell, (given.gradient,))[0].float()
    tables = [*(x.detach() for x in given.leaves[3:]), *given.others]
    return _attention_reference(cell, q, k, v, do, tables)


def _attention_reference(
    cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor | None, others: Tensors
) -> Tensors:
    """Rows by pieces: no matrix of scores is ever whole."""
    leaves = [x.requires_grad_(do is not None) for x in (q, k, v)]
    n_q, n_k = q.shape[2], k.shape[2]
    piece, o = max(1, _PIECE // (q.shape[1] * n_k)), torch.empty_like(q)
    for first in range(0, n_q, piece):
        rows = slice(first, min(first + piece, n_q))
        with torch.set_grad_enabled(do is not None):
            scores = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5
            scores, seen = _changed(cell, scores, others, rows, (n_q, n_k))
            p = torch.softmax(scores, -1)
            part = (p if seen is None else p.masked_fill(~seen, 0.0)) @ v
            if do is not None:
                (part * do[:, :, rows]).sum().backward()
        o[:, :, rows] = part.detach()
    return [o.detach()] if do is None else [o.detach(), *(x.grad for x in leaves if x.grad is not None)]


def _changed(
    cell: Cell, scores: torch.Tensor, others: Tensors, rows: slice, lengths: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The form done to a piece of scores; False where a row sees nothing at all."""
    s, device = cell.sizes, str(scores.device)
    n_q, n_k = lengths
    if s.get("softcap"):
        scores = s["softcap"] * torch.tanh(scores / s["softcap"])
    i, j = torch.arange(n_q, device=device)[rows, None], torch.arange(n_k, device=device)
    if cell.kind == "decode":
        return (scores.masked_fill(j < n_k - s["window"], -torch.inf) if s["window"] else scores), None
    if cell.kind == "packed":
        return (scores.masked_fill(j > i + n_k - n_q, -torch.inf) if s["causal"] else scores), None
    mask = scores_mask(cell, others, device, rows)
    if mask is None:
        return scores, None
    heads = scores.shape[1]
    mask = mask[-1:] if mask.shape[0] > 1 else mask
    mask = mask[:, -heads:] if mask.shape[1] > 1 else mask
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    seen = (scores > -torch.inf).any(-1, True)
    return scores.masked_fill(~seen, 0.0), seen


def errors(cell: Cell, outputs: Iterable[torch.Tensor], truth: Tensors) -> list[float]:
    """‖x - truth‖ / ‖truth‖ of o and of each gradient; not a number where an output has one."""
    with torch.no_grad():
        return [
            float((x.float() - y).norm() / y.norm().clamp_min(1e-30))
            for x, y in zip(_parts(cell, outputs), truth, strict=True)
        ]
