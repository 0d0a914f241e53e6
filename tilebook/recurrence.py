"""Layers of transformers' hybrid models whose states follow the gated delta rule, on `tilebook.gated_delta_rule`.

They call a function of their file, which takes tensors (B, S, H, D): PyTorch's own functions there, or those of
flash-linear-attention where that is installed. Which of a step in decoding they call stays theirs.
"""

from __future__ import annotations

import functools
import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from tilebook import dispatch
from tilebook.device import package_version
from tilebook.inputs import dtype_name
from tilebook.kernels.delta_rule import gated_delta_rule
from tilebook.kernels.delta_rule.entry import registered
from tilebook.kernels.delta_rule.problem import Problem
from tilebook.substitution import called, calls, rebuilt
from tilebook.trial import Forward, Function, Left, alike, drawn, result, served_with

_CHUNKED = "torch_chunk_gated_delta_rule"
_ROWS, _WIDTH, _COLUMNS = 5, 8, 6


def recurrent(module: nn.Module) -> tuple[str, Function] | None:
    """What a layer with the gated delta rule calls from now on; None for what is none. Raises Left."""
    forward = type(module).forward
    if not calls(forward, _CHUNKED):
        return None
    if "forward" in module.__dict__:
        raise Left("its forward was changed already")
    if _with_ours(forward, called(forward, _CHUNKED)) is None:
        raise Left("has another delta rule than tilebook.gated_delta_rule")
    return "attention with tilebook.gated_delta_rule", Forward(_forward, module)


@functools.cache
def _with_ours(forward: Any, theirs: Any) -> Function | None:
    """A function's code with our rule in the place of `theirs`, if they compute the same; else None."""
    if not callable(theirs) or not _same_rule(theirs):
        return None

    def ours(query: Any, key: Any, value: Any, **options: Any) -> Any:
        if not _takes(query, key, value, **options):
            return theirs(query, key, value, **options)
        return _ruled(query, key, value, **options)

    return rebuilt(forward, {_CHUNKED: ours})


def _takes(query: Any, key: Any, value: Any, *, g: Any = None, beta: Any = None, **options: Any) -> bool:
    """Is it a call that ours computes, and is to serve? Where other kernels are installed a verdict must say so."""
    given = query, key, value, g, beta
    if not all(isinstance(x, torch.Tensor) for x in given) or not query.dtype == key.dtype == value.dtype:
        return False
    if query.ndim != 4 or options.get("seq_idx") is not None:
        return False
    packed = options.get("cu_seqlens") is not None
    states = options.get("initial_state") is not None or bool(options.get("output_final_state"))
    if packed and (query.shape[0] != 1 or states):
        return False
    return not _fla_installed() or dispatch.forced() or _covered(query, value, **options)


@functools.cache
def _fla_installed() -> bool:
    return package_version("fla-core") != "unknown"


def _covered(query: torch.Tensor, value: torch.Tensor, **options: Any) -> bool:
    """Is there a verdict on such a call?"""
    batch, seq, heads, columns = value.shape
    initial, normalize = options.get("initial_state") is not None, bool(options.get("use_qk_l2norm_in_kernel"))
    kind = dtype_name(query.dtype)
    problem = Problem(batch, heads, seq, query.shape[-1], columns, kind, True, initial, normalize)
    return dispatch.choose(registered()[0], problem, query.device).verdict is not None


def _ruled(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, g: torch.Tensor, beta: torch.Tensor,
    initial_state: torch.Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None, **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Their function by ours. `others` are of no consequence: the length of chunks, and what is for other layers."""
    found = gated_delta_rule(
        *(x.transpose(1, 2) for x in (query, key, value, g, beta)), initial_state=initial_state,
        return_state=bool(output_final_state), normalize_qk=bool(use_qk_l2norm_in_kernel), cu_seqlens=cu_seqlens,
    )  # fmt: skip
    o, state = found if output_final_state else (found, None)
    return o.transpose(1, 2), state


def _same_rule(theirs: Function) -> bool:
    """Does it compute on random numbers what ours does? Of kernels of others what they stand for is asked.

    Heads of q and k may be fewer than those of v: repeated by the function, or, before transformers 5.18, by layers
    whose function then takes as many of all.
    """
    theirs = inspect.unwrap(theirs)
    return _agrees(theirs, 4) is True and _agrees(theirs, 2) is not False


def _agrees(theirs: Function, heads: int) -> bool | None:
    """Does it compute what ours does of so many heads of q and k beside four of v? None where it does not take them."""
    draw = drawn()
    q, k, v = draw(2, _ROWS, heads, _WIDTH), draw(2, _ROWS, heads, _WIDTH), draw(2, _ROWS, 4, _COLUMNS)
    given = {"g": -draw(2, _ROWS, 4).square(), "beta": draw(2, _ROWS, 4).sigmoid(), "output_final_state": True}
    for normalize, state in ((True, draw(2, 4, _WIDTH, _COLUMNS)), (False, None)):
        how = given | {"initial_state": state, "use_qk_l2norm_in_kernel": normalize}
        keys = k if normalize else k / k.norm(dim=-1, keepdim=True)
        try:
            found = result(partial(theirs, **how), q, keys, v)
        except Left:
            return None
        right = result(partial(_ruled, **how), q, keys, v)
        if not (isinstance(found, tuple) and len(found) == 2 and all(map(alike, found, right))):
            return False
    return True


def _forward(module: Any, /, *args: Any, **kwargs: Any) -> Any:
    forward = type(module).forward
    if not torch.compiler.is_compiling() and served_with(args, kwargs):
        forward = _with_ours(forward, called(forward, _CHUNKED)) or forward
    return forward(module, *args, **kwargs)
