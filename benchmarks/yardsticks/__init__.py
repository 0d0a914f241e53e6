"""The calls that are compared: inputs, what a user of PyTorch would have called, what a user of tilebook calls.

Nothing here but `ours` touches tilebook, so that a process can ask what PyTorch runs by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cells import Cell

from yardsticks.drawn import Inputs, inputs, scores_mask

__all__ = ["Call", "Inputs", "inputs", "our_step", "ours", "step", "yardsticks"]

Call = Callable[..., torch.Tensor]

EPS = 1e-6


def yardsticks(cell: Cell, given: Inputs, device: str) -> dict[str, Callable[[], Call]]:
    """What people would call instead, by name, each made when it is asked for; one where PyTorch fuses the call."""
    s = cell.sizes
    grouped: dict[str, Any] = {"enable_gqa": True} if s.get("heads") != s.get("heads_kv") else {}
    if cell.kind == "mlp":
        return {"torch": lambda: _mlp(s["activation"])}
    if cell.kind == "norms":
        return {"torch": lambda: lambda x, *w: F.rms_norm(x, x.shape[1:], *w, eps=EPS)}
    if cell.kind == "layer_norm":
        return {"torch": lambda: lambda x, *vectors: F.layer_norm(x, x.shape[1:], *vectors, eps=EPS)}
    if cell.kind == "attention":
        causal = s["causal"]
        return {"torch": lambda: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, **grouped)}
    if cell.kind == "decode":
        reach = s["window"]

        def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if reach:
                k, v = k[:, :, -reach:], v[:, :, -reach:]
            return F.scaled_dot_product_attention(q, k, v, **grouped)

        return {"torch": lambda: decode}
    if cell.kind == "packed":
        return {
            "varlen_attn": lambda: _varlen(cell),
            "flex": lambda: _flex_packed(cell, device),
            "flash-attn-4": lambda: _flash4_packed(cell),
        }
    found = {"flex": lambda: _flex(cell, device), "flash-attn-4": lambda: _flash4(cell)}
    return {"sdpa with a mask": lambda: _masked(cell, given, device, grouped), **found}


def _mlp(activation: str) -> Call:
    act: Any = {"gelu": F.gelu, "relu": F.relu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    return lambda x, w1, b1, w2, b2: F.linear(act(F.linear(x, w1, b1)), w2, b2)


def _masked(cell: Cell, given: Inputs, device: str, grouped: dict[str, Any]) -> Call:
    if cell.sizes["softcap"]:
        raise NotImplementedError("PyTorch's function caps no scores")
    with torch.no_grad():
        mask = scores_mask(cell, [*given.leaves[3:], *given.others], device)
    trained = len(given.leaves) > 3

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        whole = scores_mask(cell, list(others), device) if trained else mask
        return F.scaled_dot_product_attention(q, k, v, whole, **grouped)

    return call


_compiled: dict[str, Any] = {}


def _compiled_flex(form: str, device: str) -> Any:
    """FlexAttention compiled for each shape alone: a second one would make numbers of its form inputs on the host."""
    from torch.nn.attention.flex_attention import flex_attention

    if form not in _compiled:
        torch._dynamo.config.recompile_limit = 256
        _compiled[form] = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
    return _compiled[form]


def _flex(cell: Cell, device: str) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask

    s = cell.sizes
    if s["bias"] == "bias" and cell.step == "training":
        raise NotImplementedError("the gradient of a bias that FlexAttention reads is not compared")
    left, right, cap = s["left"], 0 if s["causal"] else s["right"], s["softcap"]
    padded = s["bias"] == "mask"
    ends: Any = None

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        keep = j >= 0
        if left >= 0:
            keep = keep & (j >= i - left)
        if right >= 0:
            keep = keep & (j <= i + right)
        return keep & (j < ends[b]) if padded else keep

    def changed(table: Any, slopes: Any) -> Any:
        def score(x: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            if cap:
                x = cap * torch.tanh(x / cap)
            if table is not None:
                at = (at if n > 1 else 0 for at, n in zip((b, h, i, j), table.shape, strict=True))
                x = x + table[tuple(at)]
            return x if slopes is None else x - slopes[h] * (i - j).abs()

        return score

    kept: dict[str, Any] = {}
    form = f"{left >= 0} {right >= 0} {cap} {s['bias']}{s['axes']} {s['alibi']}"
    attend = _compiled_flex(form, device)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        nonlocal ends
        if "mask" not in kept:  # made once, as for all layers of a model
            if padded:
                ends = others[0].sum(-1).flatten()
            limited = left >= 0 or right >= 0 or padded
            size = (s["batch"] if padded else None, None, s["seq_q"], s["seq_k"])
            kept["mask"] = create_block_mask(seen, *size, device=device) if limited else None
            rest = list(others)
            table = rest.pop(0) if s["bias"] else None
            slopes = rest.pop(0) if s["alibi"] else None
            plain = not cap and slopes is None and (table is None or padded)
            kept["score"] = None if plain else changed(None if padded else table, slopes)
        found: torch.Tensor = attend(
            q, k, v, score_mod=kept["score"], block_mask=kept["mask"], enable_gqa=s["heads"] != s["heads_kv"]
        )
        return found

    return call


def _named(function: Any, **options: Any) -> dict[str, Any]:
    """The options that this version of a function takes under their names."""
    taken = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in taken}


def _flash4(cell: Cell) -> Call:
    from flash_attn.cute import flash_attn_func

    s = cell.sizes
    if s["bias"] or s["alibi"]:
        raise NotImplementedError("flash-attn-4 takes no bias")
    right = 0 if s["causal"] else s["right"]
    sides = tuple(None if n < 0 else n for n in (s["left"], right))
    causal = s["causal"] and s["left"] < 0
    window = {} if causal or sides == (None, None) else {"window_size": sides}
    options = _named(flash_attn_func, causal=causal, softcap=s["softcap"], **window)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return call


def _flash4_packed(cell: Cell) -> Call:
    from flash_attn.cute import flash_attn_varlen_func

    s = cell.sizes
    longest = {"max_seqlen_q": max(s["lengths_q"]), "max_seqlen_k": max(s["lengths_k"])}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor) -> torch.Tensor:
        options = _named(flash_attn_varlen_func, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=s["causal"], **longest)
        found = flash_attn_varlen_func(q, k, v, **options)
        return found[0] if isinstance(found, tuple) else found

    return call


def _varlen(cell: Cell) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    s = cell.sizes
    taken = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = _named(varlen_attn, enable_gqa=s["heads"] != s["heads_kv"])
    if s["causal"]:
        options |= {"is_causal": True} if "is_causal" in taken else {"window_size": (-1, 0)}
    longest = max(s["lengths_q"]), max(s["lengths_k"])

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = varlen_attn(q, k, v, cu_q, cu_k, *longest, **options)
        return found

    return call


def _flex_packed(cell: Cell, device: str) -> Call:
    """FlexAttention over the whole pack as one sequence, with a mask that parts it."""
    from torch.nn.attention.flex_attention import create_block_mask

    s = cell.sizes
    lengths = [torch.tensor(n, device=device) for n in (s["lengths_q"], s["lengths_k"])]
    part_q, part_k = (torch.repeat_interleave(torch.arange(len(n), device=device), n) for n in lengths)
    starts = [torch.cumsum(n, 0) - n for n in lengths]
    shift = lengths[1] - lengths[0] + starts[1] - starts[0]  # from a row's place to that of its diagonal

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        same = part_q[i] == part_k[j]
        return same & (j <= i + shift[part_q[i]]) if s["causal"] else same

    attend, kept = _compiled_flex(f"packed {s['causal']}", device), []

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *cu: torch.Tensor) -> torch.Tensor:
        if not kept:
            kept.append(create_block_mask(seen, None, None, len(part_q), len(part_k), device=device))
        views = [x.transpose(0, 1)[None] for x in (q, k, v)]
        found: torch.Tensor = attend(*views, block_mask=kept[0], enable_gqa=s["heads"] != s["heads_kv"])
        return found[0].transpose(0, 1)

    return call


def ours(cell: Cell) -> Call:
    """tilebook's public function for the same call."""
    import tilebook

    s = cell.sizes
    if cell.kind == "mlp":
        return lambda *given: tilebook.mlp(*given, activation=s["activation"])
    if cell.kind == "norms":
        return lambda *given: tilebook.rms_norm(*given, eps=EPS)
    if cell.kind == "layer_norm":
        return lambda *given: tilebook.layer_norm(*given, eps=EPS)
    if cell.kind == "decode":
        return lambda q, k, v: tilebook.attention_decode(q, k, v, window=s["window"] or None)
    if cell.kind == "packed":
        longest = {"max_seqlen_q": max(s["lengths_q"]), "max_seqlen_k": max(s["lengths_k"])}
        return lambda *given: tilebook.attention_varlen(*given, causal=s["causal"], **longest)
    if cell.kind == "attention":
        return lambda q, k, v: tilebook.attention(q, k, v, causal=s["causal"])
    banded = s["left"] >= 0 or s["right"] > 0
    options = {"causal": s["causal"], "softcap": s["softcap"]}
    options |= {"window": (s["left"], 0 if s["causal"] else s["right"])} if banded else {}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        rest, named = list(others), dict[str, torch.Tensor]()
        if s["bias"]:
            named["attn_mask" if s["bias"] == "mask" else "bias"] = rest.pop(0)
        if s["alibi"]:
            named["alibi_slopes"] = rest.pop(0)
        found: torch.Tensor = tilebook.attention(q, k, v, **options, **named)
        return found

    return call


IN_PLACE = frozenset({"attention", "norms", "layer_norm"})
"""Kinds of which people keep PyTorch's own call, and turn tilebook on."""


class Placed:
    """A step of PyTorch's own call, with tilebook on in the block in which it is made."""

    def __init__(self, its: Callable[[Inputs], Any]) -> None:
        import tilebook

        self.its, self.around = its, tilebook.enabled

    def __call__(self, given: Inputs) -> Any:
        return self.its(given)


def our_step(cell: Cell, made: Inputs, device: str, called: bool) -> Callable[[Inputs], Any]:
    """What a user of tilebook runs: PyTorch's own call while it is on; or its function, where there is no such call or
    it is to be `called`."""
    if called or cell.kind not in IN_PLACE:
        return step(cell, ours(cell))
    return Placed(step(cell, yardsticks(cell, made, device)["torch"]()))


def step(cell: Cell, call: Call) -> Callable[[Inputs], Any]:
    """The call as it is timed: by itself without gradients, or with the gradients of all leaves."""
    if cell.step == "forward":

        def forward(given: Inputs) -> Any:
            with torch.no_grad():
                return (call(*given.leaves, *given.others),)

        return forward

    def training(given: Inputs) -> Any:
        with torch.enable_grad():
            o = call(*given.leaves, *given.others)
            return (o.detach(), *torch.autograd.grad(o, given.leaves, given.gradient))

    return training
