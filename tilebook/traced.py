"""What a program under `torch.compile` runs of ours: an op, where it was measured to beat what would run without it.

All else is traced as PyTorch's own functions, which the compiler fuses with what is around them, and which cost the
host less than an op in Python.
"""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

import torch

from tilebook import dispatch

COMPILER = "inductor"
"""The implementation that is PyTorch's compiler, see `tilebook.inductor`."""


def described(*args: Any) -> tuple[Any, ...] | None:
    """The arguments of a call that is being traced, as constants; None where a size is not known yet.

    A graph for all sizes cannot be another for those with a verdict.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value  # here: it loads a computer algebra system

    found: list[Any] = []
    for each in args:
        if not isinstance(each, torch.Tensor):
            found.append(each)
            continue
        for n in each.shape:
            if not has_static_value(n):
                return None
        found.append((tuple(each.shape), each.dtype))
    return tuple(found)


def _gpu() -> bool:
    """Is there a GPU? Programs are traced for GPUs without one, too."""
    return torch.cuda.is_available()


def ahead(
    family: str, names: tuple[str, ...], args: tuple[Any, ...], device: torch.device, *, flat: bool = True
) -> bool:
    """Are our kernels ahead of the compiler's in all of these ops of `tilebook.kernels.<family>`, on this GPU?

    args: those of the first op, `described`; if `flat`, all axes but the last of the first of them are rows. The
    problems of the other ops have the same fields.
    """
    if device.type != "cuda" or not _gpu():
        return False
    first, *others = (getattr(importlib.import_module(f"tilebook.kernels.{family}.ops"), name) for name in names)
    given = [torch.empty(each[0], dtype=each[1], device="meta") if isinstance(each, tuple) else each for each in args]
    if flat:
        given[0] = given[0].reshape(-1, args[0][0][-1])  # rows of more than one axis
    problem = first.problem.of(*given)
    posed = {each.name: getattr(problem, each.name) for each in fields(problem)}
    return dispatch.ahead_of(first, problem, device, COMPILER) and all(
        dispatch.ahead_of(op, op.problem(**posed), device, COMPILER) for op in others
    )


def left(
    family: str, args: tuple[Any, ...], options: tuple[Any, ...], trained: bool, device: torch.device, bounded: bool
) -> bool:
    """Is a call of the family PyTorch's own to serve, with the gradients that will be wanted?

    args, options: of its op, the tensors `described`. bounded: the host takes as long for the call as the GPU.
    """
    if device.type != "cuda" or not _gpu():
        return False
    entry = importlib.import_module(f"tilebook.kernels.{family}.entry")
    meta = tuple(None if each is None else torch.empty(each[0], dtype=each[1], device="meta") for each in args)
    op, problem = entry.posed(meta, options)
    if bounded and op.fused(problem):
        return True
    choice = dispatch.choose(op, problem, device)
    return bool(choice.native and (not trained or dispatch.backward_of(choice).native))


# They run while a call is traced, and what they find is a constant of the graph, as
# `torch.compiler.assume_constant_result` has it, which would load the compiler.
ahead._dynamo_marked_constant = True  # type: ignore[attr-defined]
left._dynamo_marked_constant = True  # type: ignore[attr-defined]
