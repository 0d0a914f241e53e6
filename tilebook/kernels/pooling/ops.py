"""The op of max pooling's gradient with its reference, and what computes it."""

from __future__ import annotations

import torch

from tilebook import op
from tilebook.kernels.pooling import launch
from tilebook.kernels.pooling.problem import Problem, by_channels, order
from tilebook.kernels.pooling.space import SPACE
from tilebook.windows import Form


def fused(problem: Problem) -> bool:
    """PyTorch's kernel serves, unless a verdict has ours ahead."""
    return True


@op.define("max_pool2d_bwd", Problem, direction="bwd", fused=fused)
def max_pool2d_bwd(dy: torch.Tensor, indices: torch.Tensor, height: int, width: int, form: str) -> torch.Tensor:
    """dx (B, C, height, width) of y, indices = max_pool2d(x): each number of dy goes where its window was largest.

    dy: (B, C, rows, columns).
    indices: of the same shape, int64: of a number its row times `width` plus its column.
    form: kernel, stride and padding, written k…x…s…x…p…x….
    """
    flat = dy.new_zeros(*dy.shape[:2], height * width).scatter_add(2, indices.flatten(2), dy.flatten(2))
    found: torch.Tensor = flat.unflatten(2, (height, width))
    return found


_MOST_NUMBERS = 1 << 30
"""Of an image, of all its channels where they lie side by side: 32 bits count them, and what blocks hold beyond."""
_MOST_ASKED = 64
"""Comparisons of a cell, all of which stand in the code."""


def supports(problem: Problem) -> bool:
    """Does our kernel serve it?"""
    numbers = problem.height * problem.width * problem.inner
    return problem.dtype in ("bf16", "fp16", "fp32") and numbers < _MOST_NUMBERS and problem.asked <= _MOST_ASKED


max_pool2d_bwd.implementation("triton", space=SPACE, supports=supports)(launch.gradient)


@max_pool2d_bwd.implementation("torch")
def _torch(dy: torch.Tensor, indices: torch.Tensor, height: int, width: int, form: str) -> torch.Tensor:
    """What PyTorch's autograd runs, which asks the input for its shape alone."""
    kernel, stride, padding = (list(pair) for pair in Form.read(form))
    shape, laid = (*dy.shape[:2], height, width), order(by_channels(indices))
    like = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=laid)
    found: torch.Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        dy, like, kernel, stride, padding, [1, 1], False, indices
    )
    return found
