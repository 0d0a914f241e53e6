"""Somebody's program for the GPU, whose kernels' configs have faults that only a GPU has. Records, or is served.

A config's `FAULT` is what is wrong with it; 0 is nothing. Prints the blocks that its kernels run.
"""

import plain_of_others
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer
from triton.tools.tensor_descriptor import TensorDescriptor

FAULTS = {"silent": 1, "race": 2, "outside": 3, "ragged": 4, "damage": 5, "hang": 6, "beyond": 7}


def listed():
    right = [triton.Config({"BLOCK": block, "FAULT": 0}, num_warps=4) for block in (256, 512, 1024)]
    return [*right, *(triton.Config({"BLOCK": 512, "FAULT": fault}, num_warps=4) for fault in FAULTS.values())]


def first(call, quantiles):
    """Nothing is run to be timed: some of it would never end."""
    return [1.0, 1.0, 1.0]


@triton.autotune(listed(), key=["kind"], do_bench=first)
@triton.jit
def scale_kernel(x, y, flag, n, kind: tl.constexpr, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n).to(tl.float32) * 3
    if FAULT == 2:
        value += (globaltimer() // 64 % 2).to(tl.float32)
    if FAULT == 3:
        tl.store(y + at, value.to(y.dtype.element_ty), mask=at < n + 8)
    elif FAULT == 4:
        tl.store(y + at, value.to(y.dtype.element_ty), mask=at < n // BLOCK * BLOCK)
    elif FAULT != 1:
        tl.store(y + at, value.to(y.dtype.element_ty), mask=at < n)
    if FAULT == 5:
        tl.store(x + at, value.to(x.dtype.element_ty), mask=at < n)
    if FAULT == 6:
        spin = tl.load(flag)
        while spin == 0:
            spin = tl.load(flag, volatile=True)
    if FAULT == 7:
        tl.store(y + at + (1 << 36), value.to(y.dtype.element_ty), mask=at < n)


@triton.autotune(
    [triton.Config({"BLOCK": block}, num_warps=4) for block in (256, 512, 1024)], key=["cols"], restore_value=["y"]
)
@triton.heuristics({"EVEN": lambda args: args["cols"] % args["BLOCK"] == 0})
@triton.jit
def add_kernel(x, y, top, cols, x_row, y_row, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """y += x in place, and the sum of each row."""
    row, total = tl.program_id(0), 0.0
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_row + at, mask=at < cols, other=0.0).to(tl.float32)
        value += tl.load(y + row * y_row + at, mask=at < cols, other=0.0).to(tl.float32)
        tl.store(y + row * y_row + at, value.to(y.dtype.element_ty), mask=at < cols)
        total += tl.sum(value)
    tl.store(top + row, total)


@triton.autotune(
    [triton.Config({"BLOCK": block}, num_warps=4) for block in (256, 512, 1024)], key=["n"], reset_to_zero=["y"]
)
@triton.jit
def total_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y, tl.sum(tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)))


def block_shape(arguments):
    arguments["x"].block_shape = [arguments["BLOCK"], 64]


@triton.autotune(
    [triton.Config({"BLOCK": block}, num_warps=4, pre_hook=block_shape) for block in (32, 64, 128)], key=["rows"]
)
@triton.jit
def tiles_kernel(x, y, rows, cols, BLOCK: tl.constexpr):
    """2 x, which is in a descriptor of the program's, into one that the kernel makes."""
    target = tl.make_tensor_descriptor(y, [rows, cols], [cols, 1], [BLOCK, 64])
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * 64
    target.store([row, column], x.load([row, column]) * 2)


def scratch(size, alignment, stream):
    return torch.empty(size, dtype=torch.int8, device="cuda")


def tiles():
    x = torch.randn(1000, 512, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    triton.set_allocator(scratch)
    described = TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 64])
    tiles_kernel[lambda meta: (triton.cdiv(1000, meta["BLOCK"]), 8)](described, y, *x.shape)
    assert torch.equal(y, 2 * x)


def main():
    for n in (1 << 20, (1 << 20) + 77):
        x = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        y, flag = torch.empty_like(x), torch.zeros(1, device="cuda", dtype=torch.int32)
        scale_kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK"]),)](x, y, flag, n, "bf16")
        assert torch.equal(y, 3 * x)
    x, y = torch.randn(512, 8192, device="cuda")[:, :3000], torch.randn(512, 3000, device="cuda")
    top, expected = torch.empty(512, device="cuda"), x + y
    add_kernel[(512,)](x, y, top, 3000, x.stride(0), y.stride(0))
    torch.testing.assert_close(y, expected)
    total = torch.zeros(1, device="cuda")
    total_kernel[lambda meta: (triton.cdiv(1 << 20, meta["BLOCK"]),)](
        torch.ones(1 << 20, device="cuda"), total, 1 << 20
    )
    assert total.item() == 1 << 20
    tiles()
    for kernel in (scale_kernel, add_kernel, total_kernel, tiles_kernel):
        searched = getattr(kernel, "configs_timings", None) is not None
        print(kernel.base_fn.__name__, kernel.best_config.kwargs["BLOCK"], "searched" if searched else "served")
    print("plain_kernel", plain_of_others.plain())


if __name__ == "__main__":
    main()
