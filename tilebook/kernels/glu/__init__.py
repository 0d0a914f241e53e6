"""Gated linear units: h = act(gate) · up, alone (Dauphin et al., 2017) or between linear layers (Shazeer, 2020).

One kernel forward, one backward; the products around them are cuBLAS's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.overrides import handle_torch_function, has_torch_function

from tilebook.call import Tensors, recorded, way
from tilebook.casting import autocast, autocast_dtype
from tilebook.kernels.glu.check import check, check_block
from tilebook.kernels.glu.entry import BLOCK, GLU, addressed, registered
from tilebook.kernels.glu.pytorch import BOUNDS, HOST_BOUND, block, plain
from tilebook.left import ORDINARY, again, gated, recall
from tilebook.traced import ahead, described

__all__ = ["geglu", "glu", "swiglu"]

Optional = torch.Tensor | None


@gated("glu")
def glu(gate: torch.Tensor, up: torch.Tensor | None = None, activation: str = "silu") -> torch.Tensor:
    """h = act(gate) · up, elementwise (Shazeer, 2020, eq. 5), in fp32 inside.

    Args:
        gate: (…, F), floating point; any strides, fastest where the last axis is contiguous. Without `up` (…, 2F):
            gate in the first half of the last axis and up in the second, and one gradient for both.
        up: (…, F), or None.
        activation: "silu" (x σ(x)), "gelu" (x Φ(x), Hendrycks & Gimpel, 2016) or "gelu_tanh" (their approximation).

    Returns:
        (…, F) in the dtype of gate.

    Kernels of ours run for fp16, bf16 and fp32 on a GPU where a verdict has them ahead; under `torch.compile`, ahead of
    its own code. All else, as tensors of two dtypes, runs as plain PyTorch. Differentiable in both; nothing is kept
    beside them.

    Raises:
        ValueError: shapes or devices that do not go together, tensors that are not floating point, an odd last axis
            where up is None, or an unknown activation.
    """
    given = (gate,) if up is None else (gate, up)
    if has_torch_function(given):
        found: torch.Tensor = handle_torch_function(glu, given, gate, up, activation)
        return found
    own = None
    if all(type(each) in ORDINARY for each in given) and type(activation) is str:
        near = "glu", gate.shape, up is None, activation
        if again(near, *given):
            return plain((gate, up), (activation,))
        own = near, gate.stride(), *[(each.shape, each.dtype) for each in given]
        if recall(own, near, *given):
            return plain((gate, up), (activation,))
    route = way(gate, optional=(up,))
    alike = gate.ndim > 0 and (up is None or (up.shape, up.dtype) == (gate.shape, gate.dtype))
    if route == "pytorch" or torch.compiler.is_compiling() or not alike or not gate.numel():
        check(gate, up, activation)
        if route == "op" and alike and gate.numel() and _ahead((gate, up), activation, recorded(given)):
            return _shaped(GLU.through(_flat(gate, up), (activation,))[0], gate)
        return plain((gate, up), (activation,))
    tensors, bounds = _flat(gate, up), (HOST_BOUND, HOST_BOUND)
    outputs = GLU.serve(
        route, registered()[0], tensors, (activation,), lambda: check(gate, up, activation),
        own=own, size=gate.numel(), bounds=bounds,
    )  # fmt: skip
    return plain((gate, up), (activation,)) if outputs is None else _shaped(outputs[0], gate)


@gated("swiglu")
def swiglu(
    x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor | None, down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None, up_bias: torch.Tensor | None = None, down_bias: torch.Tensor | None = None,
    *, recompute: bool = False,
) -> torch.Tensor:  # fmt: skip
    """y = (silu(x Wgᵀ + bg) · (x Wuᵀ + bu)) Wdᵀ + bd, the gated block of a transformer (Shazeer, 2020, eq. 6).

    Between forward and backward x, gate = x Wgᵀ + bg and up = x Wuᵀ + bu are kept; their product h is made again by the
    kernel that computes the gradients of gate and up.

    Args:
        x: (…, H), floating point; any strides, fastest where the last axis is contiguous.
        gate_weight: Wg (F, H), as `torch.nn.Linear(H, F).weight` is; (2F, H), with Wu in the second half, where
            up_weight is None.
        up_weight: Wu (F, H), or None.
        down_weight: Wd (N, F).
        gate_bias: bg (F,), or (2F,) where up_weight is None; or None.
        up_bias: bu (F,), or None.
        down_bias: bd (N,), or None.
        recompute: keep x alone; gate and up are computed again, too.

    Returns:
        (…, N) in the dtype of x; under autocast in autocast's dtype, as `torch.nn.functional.linear` does.

    The kernel of `tilebook.glu` runs between PyTorch's own products, for fp16, bf16 and fp32 on a GPU where verdicts
    have it ahead; all else runs as plain PyTorch. Differentiable in every tensor. `torch.compile` traces plain PyTorch,
    which its own compiler fuses, but where verdicts have us ahead of it.

    Raises:
        ValueError: ranks, sizes, dtypes or devices that do not fit together.
    """
    given = x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias
    if has_torch_function(given):
        found: torch.Tensor = handle_torch_function(swiglu, _there(given), *given, recompute=recompute)
        return found
    return _block(given, "silu", recompute)


@gated("geglu")
def geglu(
    x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor | None, down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None, up_bias: torch.Tensor | None = None, down_bias: torch.Tensor | None = None,
    *, approximate: str = "tanh", recompute: bool = False,
) -> torch.Tensor:  # fmt: skip
    """y = (gelu(x Wgᵀ + bg) · (x Wuᵀ + bu)) Wdᵀ + bd, as `swiglu` but with GELU (Shazeer, 2020, eq. 6).

    Args:
        x: (…, H), as all that follows to down_bias like those of `swiglu`.
        gate_weight: Wg (F, H), or both (2F, H).
        up_weight: Wu (F, H), or None.
        down_weight: Wd (N, F).
        gate_bias: bg (F,), or both (2F,); or None.
        up_bias: bu (F,), or None.
        down_bias: bd (N,), or None.
        approximate: "tanh", or "none" for x Φ(x) (Hendrycks & Gimpel, 2016), as `torch.nn.functional.gelu` has it.
        recompute: keep x alone between forward and backward.

    Returns:
        (…, N) in the dtype of x; under autocast in autocast's dtype.

    Raises:
        ValueError: what `swiglu` raises, or an unknown approximation.
    """
    given = x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias
    if has_torch_function(given):
        found: torch.Tensor = handle_torch_function(
            geglu, _there(given), *given, approximate=approximate, recompute=recompute
        )
        return found
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate must be tanh or none, not {approximate!r}")
    return _block(given, "gelu_tanh" if approximate == "tanh" else "gelu", recompute)


def _there(given: Tensors) -> tuple[torch.Tensor, ...]:
    return tuple(each for each in given if each is not None)


def _flat(gate: torch.Tensor, up: Optional) -> Tensors:
    """(M, F) each, as kernels step through them."""
    return addressed(tuple(x if x is None or x.ndim == 2 else x.reshape(-1, x.shape[-1]) for x in (gate, up)))


def _shaped(made: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return made if like.ndim == 2 else made.view(*like.shape[:-1], made.shape[1])


def _ahead(call: tuple[Any, ...], activation: str, trained: bool) -> bool:
    """Are our kernels ahead of what its compiler makes of a program that is being traced? `call`: gate and up."""
    device = next(each for each in call if each is not None).device
    seen = described(*call, activation)
    names = "glu_fwd", "glu_bwd"
    return seen is not None and ahead("glu", names if trained else names[:1], seen, device)


def _block(given: Tensors, activation: str, recompute: bool) -> torch.Tensor:
    """What `swiglu` and `geglu` are: PyTorch's own functions, or our kernel between its products."""
    there, options = _there(given), (activation, bool(recompute))
    x: Any = given[0]
    own = None
    if all(type(each) in ORDINARY for each in there):
        near = "gated_mlp", x.shape, options, autocast_dtype(x), tuple(each is None for each in given)
        if again(near, *there):
            return block(given, options)
        own = near, *[(each.shape, each.dtype) for each in there]
        if recall(own, near, *there):
            return block(given, options)
    route = way(*there)
    whole, given = given, autocast(*given)  # PyTorch keeps what it casts for a parameter's next use
    some = x.ndim > 0 and x.numel() > 0 and given[1].numel() > 0  # type: ignore[union-attr]
    if route == "pytorch" or torch.compiler.is_compiling() or not some:
        check_block(*given)  # type: ignore[arg-type]
        if route == "op" and some and _block_ahead(given, activation):
            return _shaped(BLOCK.through(_rows(given), options)[0], x)
        return block(whole, options)
    tensors, weight = _rows(given), cast(torch.Tensor, given[3])
    outputs = BLOCK.serve(
        route, registered()[0], tensors, options, lambda: check_block(*given),  # type: ignore[arg-type]
        args=(*tensors, *options, recorded(tensors)), posed=lambda device: (*_between(tensors, device), activation),
        own=own, size=x.numel() // x.shape[-1] * weight.numel(), bounds=BOUNDS,
    )  # fmt: skip
    return block(whole, options) if outputs is None else _shaped(outputs[0], x)


def _rows(given: Tensors) -> Tensors:
    """x as (M, H), and biases as kernels step through them."""
    x: Any = given[0]
    return *addressed((x if x.ndim == 2 else x.reshape(-1, x.shape[-1]),)), *given[1:4], *addressed(given[4:])


def _between(tensors: Tensors, device: Any) -> Tensors:
    """Empty gate and up of these (x, weights, …), by which the activation's problem is known."""
    x, gate_weight, up_weight, *_ = tensors
    shapes = [None if each is None else (*x.shape[:-1], each.shape[0]) for each in (gate_weight, up_weight)]  # type: ignore[union-attr]
    return tuple(None if shape is None else x.new_empty(shape, device=device) for shape in shapes)  # type: ignore[union-attr]


def _block_ahead(given: Tensors, activation: str) -> bool:
    """Are our kernels ahead of what its compiler makes of a program that is being traced?"""
    x: Any = given[0]
    shapes = described(*given[:3])
    if shapes is None:
        return False
    (rows, dtype), *weights = shapes
    seen = *(None if each is None else ((*rows[:-1], each[0][0]), dtype) for each in weights), activation
    names = "glu_fwd", "glu_bwd"
    return ahead("glu", names if recorded(given) else names[:1], seen, x.device)
