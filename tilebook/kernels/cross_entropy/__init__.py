"""Cross entropy of logits and class indices: lse(x) − x_t, without writing log-probabilities down.

With label smoothing (Szegedy et al., 2016), a soft-cap of the logits (Gemma 2, 2024) and a z-loss (PaLM, Chowdhery et
al., 2022, §5). The exponentials of a row are summed up in one reading (Milakov & Gimelshein, 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import dispatch
from tilebook.call import Tensors, constant, left_whole, recorded, way
from tilebook.casting import autocast_on
from tilebook.kernels.cross_entropy import pytorch
from tilebook.kernels.cross_entropy.check import REDUCTIONS, check
from tilebook.kernels.cross_entropy.entry import CROSS_ENTROPY, registered
from tilebook.kernels.cross_entropy.problem import IGNORED
from tilebook.kernels.cross_entropy.pytorch import HOST_BOUND
from tilebook.layout import rows
from tilebook.left import ORDINARY, again, gated, keep, known, recall, unsettled
from tilebook.traced import ahead, described

__all__ = ["cross_entropy"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@gated("cross_entropy")
def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """−log softmax(x)_t of the logits x and the class t of each row, as `torch.nn.functional.cross_entropy`.

    With label smoothing ε it is (1 − ε)(−log p_t) + ε mean(−log p) (Szegedy et al., 2016, §7), and z_loss adds
    z · lse², lse = log Σ eˣ (Chowdhery et al., 2022, §5). One reading of the logits forward, one and one writing
    backward; nothing of their size is kept beside them.

    Args:
        input: x: (N, C), (C,) or (N, C, d1, …), floating point; fastest where the classes are contiguous.
        target: t: (N,), () or (N, d1, …), int64; or probabilities, floating point in the shape of input.
        weight: (C,), of the classes, or None.
        ignore_index: the target of rows that do not count: loss and gradient 0.
        reduction: "mean" over the rows that count (weighted by their classes' weights), "sum" or "none".
        label_smoothing: ε, between 0 and 1.
        softcap: c > 0 for c · tanh(x / c) in the place of x (Gemma 2, 2024, §2); 0 for none.
        z_loss: z; 0 for none. Only with class indices and without weight.

    Returns:
        A number, or with "none" the shape of a target of class indices; in the dtype of input, in fp32 under autocast.

    Kernels of ours run for fp16, bf16 and fp32 with class indices and without weight on a GPU where a verdict has them
    ahead, and compute in fp32; under `torch.compile`, ahead of its own code. All else, as classes that are not
    contiguous, runs as plain PyTorch. A target that is neither a class nor `ignore_index` is an error in PyTorch, on a
    GPU one that ends the process; our kernels read nothing there and make loss and gradient of its row NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, an unknown reduction, a label_smoothing outside
            0 … 1, a softcap that is negative or infinite, or a z_loss with weight or probabilities.
    """
    given = tuple(x for x in (input, target, weight) if x is not None)
    if has_torch_function(given):
        more: Any = {"softcap": softcap, "z_loss": z_loss}
        found: torch.Tensor = handle_torch_function(
            cross_entropy, given, input, target, weight, ignore_index, reduction, label_smoothing, **more
        )
        return found
    for name, number in (("label_smoothing", label_smoothing), ("softcap", softcap), ("z_loss", z_loss)):
        if type(number) is not float:
            constant(name, number)
    options = float(label_smoothing), ignore_index, float(softcap), float(z_loss)
    plain = input, target, weight, ignore_index, reduction, *options[:1], *options[2:]
    near = None
    if type(input) in ORDINARY and type(target) in ORDINARY and weight is None and type(ignore_index) is int:
        near = _near(input, target, options)
        if reduction in REDUCTIONS and again(near, input, target):
            return pytorch.cross_entropy(*plain)
    route, flat = way(input, target, optional=(weight,)), None
    if route != "pytorch" and reduction in REDUCTIONS and takes(input, target, weight, ignore_index):
        flat = flattened(input)
    tensors = flat, None if flat is None else target.reshape(-1)
    choice = dispatch.known(registered()[0], (*tensors, *options)) if route == "direct" and flat is not None else None
    if choice is None:
        check(input, target, weight, reduction, *options[:1], *options[2:])
        if flat is None or (route == "op" and not _served(tensors, options)):
            return pytorch.cross_entropy(*plain)
        if route == "op":
            return _reduced(CROSS_ENTROPY.through(tensors, options)[0], input, target, ignore_index, reduction)
    if near is not None:
        own = near, input.stride(), target.stride(), input.dtype
        if recall(own, near, input, target):
            return pytorch.cross_entropy(*plain)
    if choice is None:
        choice = dispatch.lookup(registered()[0], (*tensors, *options))
    if near is not None and unsettled(own, choice):
        bound = 0 if softcap or z_loss else HOST_BOUND  # PyTorch has several kernels more for these
        keep(own, known(choice, input.numel(), (bound, bound)))
    if left_whole(choice, tensors):
        choice.calls += 1
        return pytorch.cross_entropy(*plain)
    return _reduced(CROSS_ENTROPY.direct(choice, tensors, options)[0], input, target, ignore_index, reduction)


def takes(input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: Any) -> bool:
    """Is it a call with class indices, of shapes that go together and dtypes that our kernels have?"""
    if weight is not None or input.dtype not in _DTYPES or target.dtype != torch.int64 or not input.numel():
        return False
    classes = min(1, input.ndim - 1)
    return type(ignore_index) is int and target.shape == (*input.shape[:classes], *input.shape[classes + 1 :])


def flattened(input: torch.Tensor) -> torch.Tensor | None:
    """input as (rows, classes), where that is a view of it with the classes contiguous; else None."""
    if input.ndim == 1:
        return rows(input).unsqueeze(0)
    if input.ndim == 2:
        return rows(input)
    last = input.movedim(1, -1)
    if last.stride(-1) != 1:
        return None
    step = last.stride(-2)  # all other axes together must be one
    for n, stride in zip(reversed(last.shape[:-1]), reversed(last.stride()[:-1]), strict=True):
        if n > 1 and stride != step:
            return None
        step *= n
    return last.reshape(-1, last.shape[-1])


def pytorchs(input: Any, target: Any, weight: Any, label_smoothing: Any) -> bool:
    """Is an eager call like one that is known to be PyTorch's own to serve?"""
    if type(input) not in ORDINARY or type(target) not in ORDINARY or weight is not None:
        return False
    return again(_near(input, target, (label_smoothing, 0, 0.0, 0.0)), input, target)


def _near(input: torch.Tensor, target: torch.Tensor, options: tuple[float, int, float, float]) -> tuple[Any, ...]:
    smoothing, _, softcap, z_loss = options
    return "cross_entropy", input.shape, target.shape, smoothing != 0, softcap != 0, z_loss != 0


def _served(tensors: Tensors, options: tuple[Any, ...]) -> bool:
    """Do kernels of ours serve a call on the op's way?"""
    if torch.compiler.is_compiling():
        return _ahead(tensors, options)
    forward = registered()[0]
    return not CROSS_ENTROPY.left_to_pytorch(lambda: (forward, forward.problem.of(*tensors, *options)), tensors)


def _reduced(
    loss: torch.Tensor, input: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str
) -> torch.Tensor:
    """The losses of all rows as they are asked for, in PyTorch's dtype."""
    if reduction == "none":
        loss = loss.reshape(target.shape)
    elif reduction == "sum":
        loss = loss.sum()
    else:
        loss = loss.sum() / (target != ignore_index).sum()
    return loss if input.dtype == torch.float32 or autocast_on(input) else loss.to(input.dtype)


def _ahead(tensors: Tensors, options: tuple[Any, ...]) -> bool:
    """Are our kernels ahead of what its compiler makes of a program that is being traced?"""
    call, first = described(*tensors, *options), tensors[0]
    assert first is not None
    names = ("cross_entropy_fwd", "cross_entropy_bwd") if recorded(tensors) else ("cross_entropy_fwd",)
    return call is not None and ahead("cross_entropy", names, call, first.device)
