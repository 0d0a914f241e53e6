"""Linear cross entropy as one of PyTorch's ops: schema, shapes, gradients. Loads no kernel before one runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tilebook.call import Entry, Tensors
from tilebook.kernels.linear_cross_entropy.check import check_rows
from tilebook.kernels.linear_cross_entropy.pytorch import summed

Options = tuple[float, int, float, float, bool, torch.dtype, bool, bool, bool]
"""label_smoothing, ignore_index, softcap, z_loss; is it a mean; the products' dtype; which gradients will be wanted."""

_PARAMETERS = 0, 1, 3
"""Those of the tensors that have gradients."""


def _forward(choice: Any, tensors: Tensors, options: Options) -> tuple[torch.Tensor, ...]:
    from tilebook.kernels.linear_cross_entropy.chunks import run, within

    first: Any = tensors[0]
    with within(first), torch.no_grad():
        return run(tensors, options[:4], *options[4:6], options[6:])  # type: ignore[arg-type]


def _backward(
    dy: torch.Tensor, tensors: Tensors, kept: Tensors, options: Options, needs: Sequence[bool], last: bool = False
) -> Tensors:
    from tilebook.kernels.linear_cross_entropy.chunks import scaled

    needed = [needs[which] for which in _PARAMETERS]
    if any(need and not want for need, want in zip(needed, options[6:], strict=True)):
        # Nobody could tell when the loss was made: in a transform, or in a graph that was traced without gradients.
        kept, last = _forward(None, tensors, (*options[:6], *needed))[1:], True  # type: ignore[arg-type]
    share, *grads = kept
    assert share is not None
    factor, found = dy.float() * share, list[torch.Tensor | None]([None] * len(tensors))
    for which, need, grad in zip(_PARAMETERS, needed, grads, strict=True):
        x = tensors[which]
        if need and x is not None and grad is not None:
            # A view: autograd takes what nobody else holds as a parameter's gradient, without a copy.
            found[which] = scaled(grad, factor, x.dtype, last).view(x.shape)
    return tuple(found)


def _check(tensors: Tensors, options: Any) -> None:
    check_rows(*tensors)  # type: ignore[arg-type]


def _fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    dtypes = kept_dtypes(tensors, options[5])
    input: Any = tensors[0]
    found = [input.new_empty((), dtype=torch.float32) for _ in range(2)]
    for x, want, dtype in zip((input, tensors[1], tensors[3]), options[6:], dtypes, strict=True):
        found.append(input.new_empty(x.shape if x is not None and want else 0, dtype=dtype))
    return tuple(found)


def kept_dtypes(tensors: Sequence[torch.Tensor | None], dtype: torch.dtype) -> list[torch.dtype]:
    """Of the gradients of input, weight and bias that are kept: fp16 may be too narrow before they are scaled."""
    input, weight, _, bias = tensors
    assert input is not None
    summed = [torch.float32 if x is None or torch.float16 in (dtype, x.dtype) else x.dtype for x in (weight, bias)]
    return [torch.float32 if input.dtype == torch.float32 else dtype, *summed]


def _flops(tensors: Any, options: Any, needs: Sequence[bool] | None) -> int:
    """Of the products, all of which a forward pass has made."""
    rows, features = tensors[0]
    products = 1 + options[6] + options[7] if needs is None else 0
    return int(2 * rows * features * tensors[1][0] * products)


LINEAR_CROSS_ENTROPY = Entry(
    name="linear_cross_entropy",
    tensors=("input", "linear_weight", "target", "linear_bias?"),
    options=(
        *("float label_smoothing", "int ignore_index", "float softcap", "float z_loss", "bool mean"),
        *("ScalarType dtype", "bool wants_input", "bool wants_weight", "bool wants_bias"),
    ),
    outputs=("loss", "share", "dinput", "dweight", "dbias"),
    kept=(1, 2, 3, 4),
    forward=_forward,
    backward=_backward,
    last=functools.partial(_backward, last=True),
    check=_check,
    plain=summed,
    fake=_fake,
    flops=_flops,
)
