"""MLPs of two layers, and of three with a gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tilebook.hooks import usual
from tilebook.kernels.glu import swiglu
from tilebook.kernels.mlp import mlp

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
}


class MLP(nn.Sequential):
    """Linear, activation, Linear by `tilebook.mlp`; its state dict is that of `torch.nn.Sequential` of the three.

    Args:
        in_features: the width of what comes in and, without out_features, of what comes out.
        hidden_features: the width between the layers.
        out_features: another width of what comes out, which is PyTorch's to serve; or None.
        activation: "gelu", "gelu_tanh" or "relu".
        bias: do the layers add biases? Without, they are PyTorch's to serve.
        device, dtype: of the parameters.

    (…, in_features) → (…, out_features), under autocast in its dtype. Where somebody has put other layers in, or has
    hooks on them, they are called one by one.

    Raises:
        KeyError: another activation.
    """

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int | None = None, *, activation: str = "gelu",
        bias: bool = True, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        between = _ACTIVATIONS[activation]()
        out = in_features if out_features is None else out_features
        super().__init__(
            nn.Linear(in_features, hidden_features, **made), between, nn.Linear(hidden_features, out, **made)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = fused(x, *self) if len(self) == 3 else None
        one_by_one: Any = super().forward
        return one_by_one(x) if found is None else found

    def __getitem__(self, at: Any) -> Any:
        # Of its own class PyTorch would make a slice, too.
        return nn.Sequential(*self)[at] if isinstance(at, slice) else super().__getitem__(at)


def fused(x: torch.Tensor, up: Any, between: Any, down: Any) -> torch.Tensor | None:
    """down(between(up(x))) by `tilebook.mlp`; None where the three have to be called."""
    name = activation(between)
    if name is None or not usual(up, down) or not x.shape[-1:] == (up.in_features,) == (down.out_features,):
        return None
    return mlp(x, up.weight, up.bias, down.weight, down.bias, activation=name)


def activation(between: Any) -> str | None:
    """What `tilebook.mlp` calls a function or module of PyTorch's; None for what it does not know."""
    if between is F.gelu or between is F.relu:
        return str(between.__name__)
    if usual(between, of=nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(between.approximate)
    return "relu" if usual(between, of=nn.ReLU) and not between.inplace else None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) by `tilebook.swiglu`; its state dict is that of transformers' `LlamaMLP`.

    Args:
        in_features: the width of what comes in and, without out_features, of what comes out.
        hidden_features: the width between the layers.
        out_features: another width of what comes out, or None.
        bias: do the layers add biases?
        recompute: keep the input alone between forward and backward.
        device, dtype: of the parameters.

    (…, in_features) → (…, out_features), under autocast in its dtype. Where somebody has put other layers in, or has
    hooks on them, they are called one by one.
    """

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int | None = None, *, bias: bool = False,
        recompute: bool = False, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(in_features, hidden_features, **made)
        self.up_proj = nn.Linear(in_features, hidden_features, **made)
        self.down_proj = nn.Linear(hidden_features, in_features if out_features is None else out_features, **made)
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = self.gate_proj, self.up_proj, self.down_proj
        if not usual(*layers):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]
        tensors = [*(each.weight for each in layers), *(each.bias for each in layers)]
        return swiglu(x, *tensors, recompute=self.recompute)

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}"
