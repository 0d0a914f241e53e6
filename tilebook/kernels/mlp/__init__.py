"""MLP block: y = act(x W1ᵀ + b1) W2ᵀ + b2, with GELU (Hendrycks & Gimpel, 2016) or ReLU between two linear layers.

Two kernels forward, one backward; the rest of the backward is plain products, which are cuBLAS's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from tilebook.call import left_whole, recorded, way
from tilebook.casting import autocast, autocast_dtype
from tilebook.kernels.mlp.check import check
from tilebook.kernels.mlp.entry import MLP, registered
from tilebook.kernels.mlp.form import ACTIVATIONS
from tilebook.kernels.mlp.pytorch import BOUNDS, plain
from tilebook.layout import rows
from tilebook.left import ORDINARY, again, gated, recall
from tilebook.traced import ahead, described

__all__ = ["mlp"]


@gated("mlp")
def mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    activation: str = "gelu",
) -> torch.Tensor:
    """y = act(x W1ᵀ + b1) W2ᵀ + b2, the two-layer block of a transformer (Vaswani et al., 2017, §3.3).

    The activation is computed with the first product, and its derivative with the product that needs it. Between
    forward and backward only z = x W1ᵀ + b1 is kept beside the inputs: act(z) is computed again, not stored.

    Args:
        x: (…, H), floating point; any strides, fastest where the last axis is contiguous.
        w1: (I, H), as `torch.nn.Linear(H, I).weight` is.
        b1: (I,), or None.
        w2: (H, I), as `torch.nn.Linear(I, H).weight` is.
        b2: (H,), or None.
        activation: "gelu" (x Φ(x), Hendrycks & Gimpel, 2016), "gelu_tanh" (their approximation) or "relu".

    Returns:
        (…, H) in the dtype of x; under autocast in autocast's dtype, as `torch.nn.functional.linear` does.

    Kernels of ours run for fp16 and bf16 on a GPU, with fp32 accumulation, where a verdict has them ahead; all else
    (other dtypes, the CPU, no bias, an empty x) runs as plain PyTorch, with the same result. Differentiable in every
    tensor. `torch.compile` traces plain PyTorch, which its own compiler fuses, but where verdicts have us ahead of it.

    Raises:
        ValueError: ranks, sizes, dtypes or devices that do not fit together, or an unknown activation.
    """
    given: tuple[Any, ...] = x, w1, b1, w2, b2
    own = None
    if b1 is not None and b2 is not None and type(x) in ORDINARY and type(activation) is str:
        near = "mlp", x.shape, activation, autocast_dtype(x)
        if again(near, *given):
            return plain(given, (activation,))
        if all(type(each) in ORDINARY for each in given):
            own = (near, *[each.shape for each in given[1:]], *[each.dtype for each in given])
            if recall(own, near, *given):
                return plain(given, (activation,))
    if has_torch_function(given):
        found: torch.Tensor = handle_torch_function(mlp, given, *given, activation=activation)
        return found
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    route = way(x, w1, w2, optional=(b1, b2))
    x, w1, b1, w2, b2 = autocast(*given)
    if route == "pytorch" or b1 is None or b2 is None or torch.compiler.is_compiling():
        check(x, w1, b1, w2, b2)
        if route == "op" and b1 is not None and b2 is not None and _ahead((x, w1, b1, w2, b2), activation):
            flat = rows(x.reshape(-1, x.shape[-1]))
            options = activation, recorded((x, w1, b1, w2, b2))
            return _shaped(MLP.through((flat, w1, rows(b1), w2, rows(b2)), options)[0], x)
        return plain((x, w1, b1, w2, b2), (activation,))
    flat = rows(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) if x.numel() and x.ndim else x)
    tensors = flat, w1, rows(b1), w2, rows(b2)
    options = activation, recorded(tensors)

    def checked() -> bool:
        check(x, w1, b1, w2, b2)
        return not (x.numel() and w1.numel())

    outputs = MLP.serve(
        route, registered()[0], tensors, options, checked, posed=lambda device: (*tensors[:3], *options), own=own,
        size=flat.numel() * w1.numel() / max([1, *w1.shape[-1:]]), bounds=BOUNDS, whole=left_whole,
    )  # fmt: skip
    return plain((x, w1, b1, w2, b2), options) if outputs is None else _shaped(outputs[0], x)


def _shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def _ahead(tensors: tuple[torch.Tensor, ...], activation: str) -> bool:
    """Are our kernels ahead of what its compiler makes of a program that is being traced?"""
    x, w1, b1, _, _ = tensors
    trained = recorded(tensors)
    call = described(x, w1, b1, activation, trained)
    names = "mlp_up_fwd", "mlp_down_fwd", "mlp_act_bwd", "mlp_grads_bwd"
    return call is not None and x.numel() > 0 and ahead("mlp", names if trained else names[:2], call, x.device)
