"""What a call of mLSTM must satisfy beside what linear attention asks for."""

from __future__ import annotations

from typing import Any

import torch

GATES = "exp", "sigmoid"


def check_gate(gate: str) -> None:
    """Raises ValueError for an input gate of no known name."""
    if gate not in GATES:
        raise ValueError(f"gate must be {' or '.join(GATES)}, not {gate!r}")


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, input_gate: torch.Tensor, forget_gate: torch.Tensor,
    state: tuple[Any, ...] | None, gate: str,
) -> None:  # fmt: skip
    """Raises ValueError for tensors that do not go together."""
    for name, x in (("q", q), ("k", k), ("v", v), ("input_gate", input_gate), ("forget_gate", forget_gate)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, not {type(x).__name__}")
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape != k.shape or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"expected q and k (B, H, S, D) and v (B, H, S, V), not {shapes}")
    for name, x in (("input_gate", input_gate), ("forget_gate", forget_gate)):
        if x.shape != q.shape[:3] or not x.is_floating_point() or x.device != q.device:
            got = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} must be floating point of shape {tuple(q.shape[:3])} beside q; got {got}")
    if state is None:
        return
    batch, heads, _, width = q.shape
    shapes_of_state = [(batch, heads, width, v.shape[3]), (batch, heads, width), (batch, heads)]
    expected = shapes_of_state[:1] if gate == "sigmoid" else shapes_of_state
    found = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in state]
    if found != expected:
        raise ValueError(f"a state of {gate} gates has the shapes {expected}; got {found}")
