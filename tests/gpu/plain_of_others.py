"""Somebody's kernel without an autotuner, and what launches it."""

import torch
import triton
import triton.language as tl

SPACES = {"plain_of_others:plain_kernel": {"space": {"BLOCK": [32, 1024, 2048], "num_warps": [4, 8]}}}
"""What the program itself passes is the worst of it."""


@triton.jit
def plain_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)


def plain():
    """The block that runs: the last that the grid was computed for."""
    x, blocks = torch.randn(1 << 20, device="cuda"), []
    y = torch.empty_like(x)

    def grid(meta):
        blocks.append(meta["BLOCK"])
        return (triton.cdiv(x.numel(), meta["BLOCK"]),)

    plain_kernel[grid](x, y, x.numel(), BLOCK=32, num_warps=4)
    assert torch.equal(y, x + 1)
    return blocks[-1]
