"""The two ops of attention: their names, signatures and references. What computes them registers itself with them."""

from __future__ import annotations

import importlib

import torch

from tilebook.kernels.attention import eager
from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.native import native
from tilebook.kernels.attention.problem import BackwardProblem, ForwardProblem
from tilebook.op import define


def _fused(problem: ForwardProblem) -> bool:
    """Has PyTorch a kernel that anybody would call? A bias that learns has none on every GPU that is fast."""
    form = problem.form
    return not (form.composed or form.bias == "dbias" or problem.deterministic)


@define("attention_fwd", ForwardProblem, fused=_fused, native=native)
def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *extras: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, Sq, D), k and v (B, Hkv, Sk, D) → o (B, H, Sq, D), lse (B, H, Sq) in fp32, natural log. scale > 0.

    extras: what the form asks for: bias, slopes, seed. A row that sees nothing is 0, and its lse -inf.
    """
    return eager.forward(q, k, v, form, scale, *extras)


@define("attention_bwd", BackwardProblem, direction="bwd", fused=_fused, native=native)
def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
    *extras: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `attention_fwd`: dq like q, dk and dv like k and v, summed over the query heads that share them.

    Where the form wants it also dbias, like the bias, summed over what the bias is broadcast along.
    """
    return eager.backward(do, q, k, v, form, scale, *extras)


attention_fwd.backward = attention_bwd

importlib.import_module("tilebook.kernels.attention.implementations")  # what computes the ops registers itself
