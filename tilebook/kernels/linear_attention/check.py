"""What a call of linear attention must satisfy."""

from __future__ import annotations

import torch

from tilebook.kernels.bidirectional.form import MAPPED


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor | None, state: torch.Tensor | None,
    normalize: bool,
) -> None:  # fmt: skip
    """Raises ValueError for tensors that do not go together."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"linear attention takes tensors of shape (batch, heads, sequence, head dimension); {shapes}")
    if q.shape != k.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q and k must have one shape, and v the same but for its head dimension; {shapes}")
    if not (q.shape[3] and v.shape[3]):
        raise ValueError(f"head dimensions must be at least 1; {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating point dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    expected = (*q.shape[:2], q.shape[3], v.shape[3] + int(normalize))
    for name, x, shape in (("log_decay", log_decay, q.shape[:3]), ("initial_state", state, expected)):
        if x is not None and (x.shape != shape or x.dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"{name} must be fp32 of shape {tuple(shape)}; got {x.dtype} {tuple(x.shape)}")
    if any(x is not None and x.device != q.device for x in (k, v, log_decay, state)):
        raise ValueError("all tensors must be on one device")


def check_map(name: str) -> None:
    """Raises ValueError for a feature map that kernels do not have."""
    if name not in ("none", *MAPPED):
        raise ValueError(f"feature_map must be none, {', '.join(MAPPED[:-1])} or {MAPPED[-1]}, not {name!r}")


def check_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, log_decay: torch.Tensor | None,
    channels: bool = False,
) -> None:  # fmt: skip
    """Raises ValueError for tensors of one token that do not go together with a state. channels: may they have decays
    of their own?"""
    expected = q.shape == k.shape and v.shape[:-1] == q.shape[:-1] and q.ndim == v.ndim == 3
    if not expected or state.shape != (*q.shape, v.shape[-1]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, state))
        raise ValueError(f"expected q, k (B, H, D), v (B, H, V) and state (B, H, D, V), not {shapes}")
    if log_decay is not None:
        possible = [tuple(shape) for shape in (q.shape[:2], q.shape[1:2], *([q.shape] if channels else []))]
        if tuple(log_decay.shape) not in possible:
            raise ValueError(f"log_decay must have shape {' or '.join(map(str, possible))}")
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point() and state.is_floating_point()):
        raise ValueError(
            f"q, k, v and state must be floating point; got {q.dtype}, {k.dtype}, {v.dtype}, {state.dtype}"
        )
    device = q.device
    alike = k.device == device and v.device == device and state.device == device
    if not alike or (log_decay is not None and log_decay.device != device):
        raise ValueError("all tensors must be on one device")
