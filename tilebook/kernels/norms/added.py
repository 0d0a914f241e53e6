"""Norms of a sum: y = norm(h), h = x + residual, and both are results, as a residual stream wants them.

Their ops with their references, and what computes them: the norms' kernels, which add on the way. One gradient is that
of x and of the residual: the norm's, and what there is of h beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch

from tilebook import inductor, op
from tilebook.kernels.norms import launch, layer, rms
from tilebook.kernels.norms.problem import Norm, RMSProblem, rstd
from tilebook.kernels.norms.rms import fused, outlasts_the_host, supports
from tilebook.kernels.norms.space import SPACE, SPACE_BWD
from tilebook.op import Config, Cost

Outputs = tuple[torch.Tensor, ...]
Formula = Callable[..., Outputs]

_TRAINED = {
    "rms_norm": (("M8192,N2048", ("bf16",)), ("M8192,N4096", ("bf16",))),
    "layer_norm": (("M16384,N768", ("bf16", "fp32")), ("M32768,N768", ("bf16", "fp32"))),
}
"""Shapes of training steps, of the norms of either family."""


class _Added(Norm):
    """Rows (M, N) of x and of the residual, in one dtype."""

    TRANSFER = 0.0  # nobody has looked
    TURNED = False

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        shapes = _TRAINED[cls.FAMILY]
        return {"training": [cls.parse(shape, dtype) for shape, dtypes in shapes for dtype in dtypes]}


class _Forward(_Added):
    @classmethod
    def of(cls, x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> Self:
        return cls.posed(x, *rest[: cls.VECTORS])

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        both, vectors = self.drawn(device, seed, 2)
        return *both, *vectors, 1e-5

    def cost(self) -> Cost:
        return Cost((1.0 + 4.0 * self.STATISTICS) * self.rows * self.width, self.moved(4, self.vectors))


class _Backward(_Added):
    @classmethod
    def of(cls, dy: torch.Tensor, dh: torch.Tensor, h: torch.Tensor, *rest: Any) -> Self:
        return cls.posed(h, *rest[: cls.VECTORS])

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        (dy, dh, h), vectors = self.drawn(device, seed, 3)
        if h.is_meta:
            return dy, dh, h, *vectors, *torch.empty(self.STATISTICS, self.rows, device=device)
        centre = [h.float().mean(-1)] * (self.STATISTICS - 1)
        values = h.float() - centre[0][:, None] if centre else h.float()
        return dy, dh, h, *vectors, *centre, rstd(values, 1e-5)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        # LayerNorm's gradient of one column is nothing but rounding, of no size beside dh that could be judged.
        return [each for each in super().examples() if each.width > 1 or cls.STATISTICS == 1]

    def cost(self) -> Cost:
        # The weight is read, the gradients of the vectors are written.
        moved = self.moved(4, self.vectors + (self.vectors > 0))
        return Cost((8.0 + 3.0 * self.STATISTICS) * self.rows * self.width, moved)


class _Layer(Norm):
    FAMILY = "layer_norm"
    STATISTICS = 2
    VECTORS = 2


@dataclass(frozen=True)
class AddRMSNormProblem(_Forward, RMSProblem):
    """x, residual, weight, eps → y, h, rstd."""


@dataclass(frozen=True)
class AddRMSNormBackwardProblem(_Backward, RMSProblem):
    """dy, dh, h, weight, rstd → dx, dweight."""


@dataclass(frozen=True)
class AddLayerNormProblem(_Forward, _Layer):
    """x, residual, weight, bias, eps → y, h, mean, rstd. No bias without a weight."""


@dataclass(frozen=True)
class AddLayerNormBackwardProblem(_Backward, _Layer):
    """dy, dh, h, weight, bias, mean, rstd → dx, dweight, dbias."""


def _forward(norm: Formula, dtype: torch.dtype, x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> Outputs:
    h = (x.to(dtype) + residual.to(dtype)).to(x.dtype)
    y, *statistics = norm(dtype, h, *rest)
    return y, h, *statistics


def _backward(
    norm: Formula, dtype: torch.dtype, dy: torch.Tensor, dh: torch.Tensor, h: torch.Tensor, *rest: Any
) -> Outputs:
    dx, *sums = norm(dtype, dy.to(dtype), h.to(dtype), *rest)
    return (dx + dh.to(dtype)).to(h.dtype), *sums


@op.define("add_rms_norm_fwd", AddRMSNormProblem, family="add_rms_norm", fused=fused)
def add_rms_norm_fwd(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float) -> Outputs:
    """x and residual (M, N), weight (N,) or None → y and h (M, N), h = x + residual, rstd (M,) in fp32."""
    return _forward(rms._forward, torch.float64, x, residual, weight, eps)


@op.define("add_rms_norm_bwd", AddRMSNormBackwardProblem, direction="bwd", family="add_rms_norm", fused=fused)
def add_rms_norm_bwd(
    dy: torch.Tensor, dh: torch.Tensor, h: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> Outputs:
    """dh plus the gradient that RMSNorm has of h, then, where there is a weight, its gradient."""
    return _backward(rms._backward, torch.float64, dy, dh, h, weight, rstd)


@op.define("add_layer_norm_fwd", AddLayerNormProblem, family="add_layer_norm", fused=fused)
def add_layer_norm_fwd(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> Outputs:
    """x and residual (M, N), weight and bias (N,) or None → y and h (M, N), h = x + residual, mean and rstd (M,) in
    fp32.
    """
    return _forward(layer._forward, torch.float64, x, residual, weight, bias, eps)


@op.define("add_layer_norm_bwd", AddLayerNormBackwardProblem, direction="bwd", family="add_layer_norm", fused=fused)
def add_layer_norm_bwd(
    dy: torch.Tensor, dh: torch.Tensor, h: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    mean: torch.Tensor, rstd: torch.Tensor,
) -> Outputs:  # fmt: skip
    """dh plus the gradient that LayerNorm has of h, then, where there are a weight and a bias, theirs."""
    return _backward(layer._backward, torch.float64, dy, dh, h, weight, bias, mean, rstd)


@add_rms_norm_fwd.implementation("triton", space=SPACE, supports=supports)
def _rms_fwd(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, *, config: Config
) -> Outputs:
    return launch.forward(x, weight, None, eps, config, centred=False, residual=residual)


@add_rms_norm_bwd.implementation("triton", space=SPACE_BWD, supports=supports)
def _rms_bwd(
    dy: torch.Tensor, dh: torch.Tensor, h: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor, *,
    config: Config,
) -> Outputs:  # fmt: skip
    return launch.backward(dy, h, weight, None, None, rstd, config=config, dtotal=dh)


@add_layer_norm_fwd.implementation("triton", space=SPACE, supports=supports)
def _layer_fwd(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, *,
    config: Config,
) -> Outputs:  # fmt: skip
    return launch.forward(x, weight, bias, eps, config, centred=True, residual=residual)


@add_layer_norm_bwd.implementation("triton", space=SPACE_BWD, supports=supports)
def _layer_bwd(dy: torch.Tensor, dh: torch.Tensor, *rest: Any, config: Config) -> Outputs:
    return launch.backward(dy, *rest, config=config, dtotal=dh)


def _two_calls(norm: op.Op[Any], x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> Outputs:
    h = x + residual
    y, *statistics = norm.implementations["torch"](h, *rest)
    return y, h, *statistics


def _two_calls_back(norm: op.Op[Any], dy: torch.Tensor, dh: torch.Tensor, *rest: Any) -> Outputs:
    dx, *sums = norm.implementations["torch"](dy, *rest)
    return dx + dh, *sums


add_rms_norm_fwd.implementation("torch")(partial(_two_calls, rms.rms_norm_fwd))
add_rms_norm_bwd.implementation("torch")(partial(_two_calls_back, rms.rms_norm_bwd))
add_layer_norm_fwd.implementation("torch")(partial(_two_calls, layer.layer_norm_fwd))
add_layer_norm_bwd.implementation("torch")(partial(_two_calls_back, layer.layer_norm_bwd))

inductor.register(add_rms_norm_fwd, _forward, rms._forward, torch.float32, supports=outlasts_the_host)
inductor.register(add_rms_norm_bwd, _backward, rms._backward, torch.float32, supports=outlasts_the_host)
inductor.register(add_layer_norm_fwd, _forward, layer._forward, torch.float32, supports=outlasts_the_host)
inductor.register(add_layer_norm_bwd, _backward, layer._backward, torch.float32, supports=outlasts_the_host)

add_rms_norm_fwd.backward = add_rms_norm_bwd
add_layer_norm_fwd.backward = add_layer_norm_bwd
