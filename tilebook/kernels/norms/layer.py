"""LayerNorm: y = (x − mean) · rstd · weight + bias, rstd = 1 / √(variance + eps)    (Ba, Kiros & Hinton, 2016).

Its ops with their references, and what computes them: RMSNorm's kernels, of rows that are centred first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch

from tilebook import inductor, op
from tilebook.kernels.norms import launch
from tilebook.kernels.norms.problem import Norm, rstd
from tilebook.kernels.norms.rms import fused, outlasts_the_host, supports
from tilebook.kernels.norms.space import SPACE, SPACE_BWD
from tilebook.op import Config, Cost

Vector = torch.Tensor | None
Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class LayerNormProblem(Norm):
    """x, weight, bias, eps → y, mean, rstd. No bias without a weight."""

    FAMILY = "layer_norm"
    STATISTICS = 2
    VECTORS = 2

    @classmethod
    def of(cls, x: torch.Tensor, weight: Vector, bias: Vector, eps: float) -> Self:
        return cls.posed(x, weight, bias)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        (x,), vectors = self.drawn(device, seed, 1)
        return x, *vectors, 1e-5

    def cost(self) -> Cost:
        return Cost(8.0 * self.rows * self.width, self.moved(2, self.vectors))


@dataclass(frozen=True)
class LayerNormBackwardProblem(Norm):
    """dy, x, weight, bias, mean, rstd → dx, dweight, dbias."""

    FAMILY = "layer_norm"
    STATISTICS = 2
    VECTORS = 2

    @classmethod
    def of(
        cls, dy: torch.Tensor, x: torch.Tensor, weight: Vector, bias: Vector, mean: torch.Tensor, rstd: torch.Tensor
    ) -> Self:
        return cls.posed(x, weight, bias)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        (dy, x), vectors = self.drawn(device, seed, 2)
        if x.is_meta:
            return dy, x, *vectors, *torch.empty(2, len(dy), device=device)
        values = x.float().reshape(dy.shape)
        mean = values.mean(-1)
        return dy, x, *vectors, mean, rstd(values - mean[:, None], 1e-5)

    def cost(self) -> Cost:
        # The weight is read, the gradients of both vectors are written.
        return Cost(13.0 * self.rows * self.width, self.moved(3, self.vectors + (self.vectors > 0)))

    @classmethod
    def examples(cls) -> list[Self]:
        return [*super().examples(), *(cls.parse(f"M7,N{width},unbiased", "bf16") for width in (96, 1300))]


@op.define("layer_norm_fwd", LayerNormProblem, family="layer_norm", fused=fused)
def layer_norm_fwd(x: torch.Tensor, weight: Vector, bias: Vector, eps: float) -> Outputs:
    """x (M, N), or (B, S, N) that lies transposed, weight and bias (N,) or None → y (M, N) in the dtype of x, mean and
    rstd (M,) in fp32.
    """
    return _forward(torch.float64, x, weight, bias, eps)


def _forward(dtype: torch.dtype, x: torch.Tensor, weight: Vector, bias: Vector, eps: float) -> Outputs:
    values = x.to(dtype).reshape(-1, x.shape[-1])
    mean = values.mean(-1)
    centred = values - mean[:, None]
    scale = rstd(centred, eps)
    y = centred * scale[:, None]
    y = y if weight is None else y * weight.to(dtype)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype), mean.float(), scale.float()


@op.define("layer_norm_bwd", LayerNormBackwardProblem, direction="bwd", family="layer_norm", fused=fused)
def layer_norm_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: Vector, bias: Vector, mean: torch.Tensor, rstd: torch.Tensor
) -> Outputs:
    """x̂ = (x − mean) · rstd, g = dy · weight → dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)), then, where there are a
    weight and a bias, dweight = Σ dy · x̂ and dbias = Σ dy over the rows."""
    return _backward(torch.float64, dy, x, weight, bias, mean, rstd)


def _backward(
    dtype: torch.dtype, dy: torch.Tensor, x: torch.Tensor, weight: Vector, bias: Vector, mean: torch.Tensor,
    rstd: torch.Tensor,
) -> Outputs:  # fmt: skip
    scale, upper = rstd.to(dtype)[:, None], dy.to(dtype)
    normal = (x.to(dtype).reshape(dy.shape) - mean.to(dtype)[:, None]) * scale
    g = upper if weight is None else upper * weight.to(dtype)
    dx = scale * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))
    sums = ((weight, upper * normal), (bias, upper))
    return dx.to(x.dtype), *(each.sum(0).to(vector.dtype) for vector, each in sums if vector is not None)


@layer_norm_fwd.implementation("triton", space=SPACE, supports=supports)
def _triton_fwd(x: torch.Tensor, weight: Vector, bias: Vector, eps: float, *, config: Config) -> Outputs:
    return launch.forward(x, weight, bias, eps, config, centred=True)


@layer_norm_bwd.implementation("triton", space=SPACE_BWD, supports=supports)
def _triton_bwd(*args: Any, config: Config) -> Outputs:
    return launch.backward(*args, config=config)


def _alike(x: torch.Tensor, *others: Vector) -> tuple[Any, ...]:
    """The tensors as PyTorch's kernels take them: of one dtype, on the CPU fp32, which keeps the statistics so."""
    same = x.is_cuda and all(each is None or each.dtype == x.dtype for each in others)
    return (x, *others) if same else tuple(None if each is None else each.float() for each in (x, *others))


@layer_norm_fwd.implementation("torch")
def _torch_fwd(x: torch.Tensor, weight: Vector, bias: Vector, eps: float) -> Outputs:
    given, *vectors = _alike(x, weight, bias)
    y, mean, scale = torch.ops.aten.native_layer_norm(given, x.shape[-1:], *vectors, eps)
    return y.to(x.dtype).view(-1, x.shape[-1]), mean.view(-1), scale.view(-1)


@layer_norm_bwd.implementation("torch")
def _torch_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: Vector, bias: Vector, mean: torch.Tensor, rstd: torch.Tensor
) -> Outputs:
    given, upper, *vectors = _alike(x, dy.view(x.shape), weight, bias)
    wanted, each_row = [True, weight is not None, bias is not None], (*x.shape[:-1], 1)
    found: Any = torch.ops.aten.native_layer_norm_backward(
        upper, given, x.shape[-1:], mean.view(each_row), rstd.view(each_row), *vectors, wanted
    )
    dx, *sums = (each.to(like.dtype) for each, like in zip(found, (x, weight, bias), strict=True) if like is not None)
    return dx.reshape(dy.shape), *sums


inductor.register(layer_norm_fwd, _forward, torch.float32, supports=outlasts_the_host)
inductor.register(layer_norm_bwd, _backward, torch.float32, supports=outlasts_the_host)

layer_norm_fwd.backward = layer_norm_bwd
