"""The ops of rotary position embedding with their references, and what computes them."""

from __future__ import annotations

import torch

from tilebook import inductor, op
from tilebook.kernels.rope import launch
from tilebook.kernels.rope.problem import BackwardProblem, Problem, Rope
from tilebook.kernels.rope.pytorch import joined, over_heads, plain, turned
from tilebook.kernels.rope.space import SPACE

Both = tuple[torch.Tensor, torch.Tensor]

_HOST_BOUND = 1 << 21
"""Numbers up to which the GPU is done before the host has found a compiled call again."""


def fused(problem: Rope) -> bool:
    """PyTorch's functions serve, unless a verdict has ours ahead."""
    return True


# References, in fp64: fp32 inputs are judged too


@op.define("rope_fwd", Problem, fused=fused)
def rope_fwd(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> Both:
    """y = x · cos + turned(x) · sin for x of q (B, H, S, D) and k (B, Hkv, S, D), cos and sin (B or 1, S, R).

    turned makes (−b, a) of every pair (a, b) among the first R numbers of a head; the others pass.
    """
    return _forward(torch.float64, q, k, cos, sin, interleaved)


@op.define("rope_bwd", BackwardProblem, direction="bwd", fused=fused)
def rope_bwd(dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> Both:
    """dx = dy · cos − turned(dy · sin) for the gradients dy of both."""
    return _backward(torch.float64, dq, dk, cos, sin, interleaved)


def _forward(
    dtype: torch.dtype, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> Both:
    first, second = plain(tuple(x.to(dtype) for x in (q, k, cos, sin)), (interleaved,))
    return first.to(q.dtype), second.to(k.dtype)


def _backward(
    dtype: torch.dtype, dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> Both:
    cos, sin, width = over_heads(cos.to(dtype)), over_heads(sin.to(dtype)), cos.shape[-1]

    def back(dy: torch.Tensor) -> torch.Tensor:
        part = dy[..., :width].to(dtype)
        return joined(dy, part * cos - turned(part * sin, interleaved))

    return back(dq), back(dk)


def supports(problem: Rope) -> bool:
    """Do our kernels serve it?"""
    return problem.dtype in ("bf16", "fp16", "fp32") and problem.head_dim <= 1024


rope_fwd.implementation("triton", space=SPACE, supports=supports)(launch.forward)
rope_bwd.implementation("triton", space=SPACE, supports=supports)(launch.backward)


@rope_fwd.implementation("torch")
def _torch_fwd(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> Both:
    return plain((q, k, cos, sin), (interleaved,))


@rope_bwd.implementation("torch")
def _torch_bwd(dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> Both:
    """Fewer kernels than PyTorch's autograd starts, which takes slices and concatenations apart again."""
    return _backward(torch.promote_types(dq.dtype, cos.dtype), dq, dk, cos, sin, interleaved)


def outlasts_the_host(problem: Rope) -> bool:
    return problem.batch * problem.seq * (problem.heads + problem.heads_kv) * problem.head_dim > _HOST_BOUND


inductor.register(rope_fwd, _forward, torch.float32, supports=outlasts_the_host)
inductor.register(rope_bwd, _backward, torch.float32, supports=outlasts_the_host)

rope_fwd.backward = rope_bwd
