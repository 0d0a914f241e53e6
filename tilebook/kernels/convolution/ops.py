"""The op of a convolution's weight gradient with its reference, and what computes it."""

from __future__ import annotations

import torch

from tilebook import op
from tilebook.kernels.convolution import launch
from tilebook.kernels.convolution.problem import Problem
from tilebook.kernels.convolution.space import SPACE
from tilebook.windows import Form


def fused(problem: Problem) -> bool:
    """cuDNN's kernel serves, unless a verdict has ours ahead."""
    return True


@op.define("conv2d_weight_bwd", Problem, direction="bwd", fused=fused)
def conv2d_weight_bwd(dy: torch.Tensor, x: torch.Tensor, form: str) -> torch.Tensor:
    """dW (O, C, …) of y = conv2d(x, W), for dy (B, O, …) and x (B, C, H, W): for each tap a product over all positions.

    form: kernel, stride and padding, written k…x…s…x…p…x….
    """
    (rows, columns), (down, right), (above, beside) = Form.read(form)
    upper, padded = dy.transpose(0, 1).flatten(1), torch.nn.functional.pad(x, (beside, beside, above, above))
    height, width = ((size - 1) * step + 1 for size, step in zip(dy.shape[2:], (down, right), strict=True))
    taps = [
        upper @ padded[:, :, i : i + height : down, j : j + width : right].transpose(0, 1).flatten(1).T
        for i in range(rows)
        for j in range(columns)
    ]
    found: torch.Tensor = torch.stack(taps, -1).unflatten(-1, (rows, columns))
    return found


_MOST = 1 << 31
"""Numbers of a tensor that 32 bits can count."""


def supports(problem: Problem) -> bool:
    """Do our kernels serve it? Images with their padding, and gradients, are counted in 32 bits."""
    (above, beside), channels = problem.shape.padding, (problem.channels, problem.outputs)
    padded = problem.batch * problem.channels * (problem.height + 2 * above) * (problem.width + 2 * beside)
    large = max(padded, problem.positions * problem.outputs) >= _MOST
    return problem.dtype in ("bf16", "fp16") and not large and all(each % 8 == 0 for each in channels)


conv2d_weight_bwd.implementation("triton", space=SPACE, supports=supports)(launch.weight)


@conv2d_weight_bwd.implementation("torch")
def _torch(dy: torch.Tensor, x: torch.Tensor, form: str) -> torch.Tensor:
    """What PyTorch's autograd runs."""
    kernel, stride, padding = Form.read(form)
    like = x.new_empty(dy.shape[1], x.shape[1], *kernel)
    more = list(stride), list(padding), [1, 1], False, [0, 0], 1, [False, True, False]
    found: torch.Tensor = torch.ops.aten.convolution_backward(dy, x, like, None, *more)[1]
    return found
