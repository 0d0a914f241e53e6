"""A script that tunes its own kernel and runs it, with an interpreter in the place of the GPU. Prints what served."""

import sys

import torch
import triton
import triton.language as tl
import tune_on_cpu

import tilebook


@tilebook.autotune([triton.Config({"BLOCK": block}) for block in (16, 32, 64)], key=["n"])
@triton.jit
def double_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def plain_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)


tilebook.give_space(plain_kernel, {"BLOCK": (16, 32, 64)})


def plain(n):
    """The block that ran."""
    x, blocks = torch.randn(n), []
    y = torch.empty_like(x)
    plain_kernel[lambda meta: blocks.append(meta["BLOCK"]) or (triton.cdiv(n, meta["BLOCK"]),)](x, y, n, BLOCK=16)
    assert torch.equal(y, x + 1)
    return blocks[-1]


def double(n):
    x = torch.randn(n)
    y = torch.empty_like(x)
    double_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, y, n)
    assert torch.equal(y, 2 * x)
    return double_kernel.best_config.kwargs["BLOCK"]


if __name__ == "__main__":
    tune_on_cpu.pretend()
    before = double(100)
    (row,) = tilebook.tune(lambda: double(100), registry=sys.argv[1])
    print(before, row["op"], row["problem"], row["config"]["BLOCK"], double(100))
    before = plain(100)
    (row,) = tilebook.tune(lambda: plain(100), registry=sys.argv[1])
    print(before, row["op"], row["problem"], row["config"]["BLOCK"], plain(70))
    try:
        tilebook.tune(lambda: None, registry=sys.argv[1])
    except tilebook.errors.UsageError as refused:
        print(refused)
