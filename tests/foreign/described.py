"""Kernels of other people on tensor descriptors, with and without faults. Imported by name in workers."""

import torch
import triton
import triton.language as tl
from others import DAMAGE, OUTSIDE, RAGGED, SILENT, autotune
from triton.tools.tensor_descriptor import TensorDescriptor

FAULTS = (SILENT, OUTSIDE, RAGGED, DAMAGE)


def blocks(arguments):
    """As in Triton's tutorials: the program does not know the block sizes when it makes its descriptors."""
    for name in ("x", "y"):
        arguments[name].block_shape = [arguments["BLOCK"], 16]
    if arguments["FAULT"] == OUTSIDE:
        arguments["y"].shape = [arguments["y"].shape[0] + 1, *arguments["y"].shape[1:]]


def configs(*faults):
    right = [triton.Config({"BLOCK": block, "FAULT": 0}, pre_hook=blocks) for block in (16, 32, 64)]
    return [*right, *(triton.Config({"BLOCK": 32, "FAULT": fault}, pre_hook=blocks) for fault in faults)]


@autotune(configs(*FAULTS), key=["rows"])
@triton.jit
def triple_kernel(x, y, rows, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * 16
    value = x.load([row, column])
    if FAULT == 1:
        return
    if FAULT == 5:
        x.store([row, column], value)
        x.store([row, column], value + 1)
    if FAULT == 4 and row + BLOCK > rows:
        return
    y.store([row, column], value * 3)


def triple(x):
    y = torch.empty_like(x)
    described = (TensorDescriptor(each, list(each.shape), list(each.stride()), [1, 16]) for each in (x, y))
    grid = lambda meta: (triton.cdiv(x.shape[0], meta["BLOCK"]), triton.cdiv(x.shape[1], 16))  # noqa: E731
    triple_kernel[grid](*described, x.shape[0])
    return y


@autotune([triton.Config({"BLOCK": block}) for block in (16, 32)], key=["rows"])
@triton.jit
def made_inside_kernel(x, y, rows, cols, BLOCK: tl.constexpr):
    """It makes its descriptors itself, for which Triton wants an allocator on the GPU."""
    source = tl.make_tensor_descriptor(x, [rows, cols], [cols, 1], [BLOCK, 16])
    target = tl.make_tensor_descriptor(y, [rows, cols], [cols, 1], [BLOCK, 16])
    row = tl.program_id(0) * BLOCK
    for column in range(0, cols, 16):
        target.store([row, column], source.load([row, column]) * 2)


def made_inside(x):
    y = torch.empty_like(x)
    made_inside_kernel[lambda meta: (triton.cdiv(x.shape[0], meta["BLOCK"]),)](x, y, *x.shape)
    return y
