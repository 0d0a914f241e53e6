"""The configs of the forward kernel: which can run, which are worth trying, and which one serves without a verdict."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.attention.problem import ForwardProblem
from tilebook.launch import HOST_DESCRIPTORS_S
from tilebook.occupancy import asynchronous, crowded, oversized, pointless, rows_and_tiles, too_large
from tilebook.op import DTYPES, Config, Cost, Space


def supports(problem: ForwardProblem) -> bool:
    widest = 128 if problem.exact else 256  # more does not fit into registers without tensor cores
    return problem.dtype in DTYPES and problem.head_dim % 8 == 0 and 16 <= problem.head_dim <= widest


def usual(problem: ForwardProblem) -> bool:
    """What is timed above all: plain attention in 16 bits, with a head dimension that needs no padding."""
    return problem.form.plain and problem.dtype in ("bf16", "fp16") and problem.head_dim == problem.width


def skipping(problem: ForwardProblem, device: Device) -> bool:
    """Do many small programs do better, each of which skips what no row of its sequence sees? As seen on an H200."""
    return device.capability == 90 and problem.keys_alone and problem.width <= 64


def proven(problem: ForwardProblem) -> bool:
    """Seen right on an H200, and not where PyTorch may be faster: it has kernels for padded widths, biases and fp32."""
    return usual(problem) or (problem.dtype in ("bf16", "fp16") and problem.form.composed)


MADE_BY_KERNEL = 2
"""The value of DESCRIPTORS that costs the host nothing: each program makes its own, in memory of the launcher's."""


def _reject(problem: ForwardProblem, config: Config, device: Device) -> str | None:
    rows, columns, warps, stages, heads, descriptors = (
        config.number(axis) for axis in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "HEADS", "DESCRIPTORS")
    )
    cap = int(config.get("MAXNREG", 0))
    if descriptors and device.capability < 90:
        return "tensor descriptors need sm_90 or later"
    if descriptors and problem.exact:
        return "products in full fp32 read their operands through registers"
    short = problem.floor_s(device) < HOST_DESCRIPTORS_S
    if descriptors == 1 and short:
        return "the GPU would wait for the host to make its tensor descriptors"
    if descriptors == MADE_BY_KERNEL and not short:
        return "the host has the time to make the tensor descriptors that every program would make"
    if device.backend == "hip" and stages > 2:
        return "more than 2 stages do not pay on AMD GPUs"
    if oversized(rows, problem.seq_q, 64) or oversized(columns, problem.seq_k, 32):
        return "a block is larger than the sequence"
    fewest = 4 if problem.exact else 16
    if rows < fewest * warps:
        return f"{warps} warps need a BLOCK_M of at least {fewest * warps}"
    if cap and not descriptors and device.capability >= 90:
        return "with tensor descriptors the same tiles need fewer registers"
    if heads > 1 and (not problem.causal or heads > problem.batch * problem.heads):
        return "taking turns between heads only balances causal masks, over as many heads as there are"
    width = problem.width
    operand = 0 if asynchronous(device) else rows * width // 2  # q as two halves in a register
    scores = rows * columns * (1 + problem.companions)
    shared, tiles = _shared(problem, config, device), rows * width + scores + operand
    programs = triton.cdiv(problem.seq_q, rows) * problem.batch * problem.heads
    return (
        too_large(shared, device)
        or crowded(tiles, warps, device)
        or pointless(cap, tiles, warps, shared, programs, device)
    )


def _shared(problem: ForwardProblem, config: Config, device: Device) -> int:
    """Bytes of shared memory, as compiled kernels report them or a little more: q, and a ring of k and v tiles."""
    rows, columns, stages = (config.number(axis) for axis in ("BLOCK_M", "BLOCK_N", "num_stages"))
    ring = columns * (2 * stages if stages > 1 else 1)  # unpipelined, k is done with when v comes
    itemsize = problem.torch_dtype.itemsize
    width, scores = problem.width * itemsize, rows * columns * itemsize
    if device.backend == "hip":  # the newest tile of AMD's ring is on its way in registers
        return max(rows * width, columns * width, scores) + 2 * columns * width * (stages - 1)
    table = problem.table_itemsize * rows * columns * max(1, stages - 1)  # tiles of a bias or mask wait there too
    if not asynchronous(device):  # q moves on to registers, and its place is used again
        return max(rows + min(2, stages) * columns, ring) * width + scores + table
    barriers = 1024 if config["DESCRIPTORS"] else 0
    return (rows + ring) * width + barriers + table


def _default(problem: ForwardProblem, device: Device) -> Config:
    """The first that fits of a few good shapes: 128 rows where that gives every SM a block, else 64.

    On Hopper 64 rows and 4 warps, so that several programs share an SM and one's products hide another's softmax; with
    a causal mask narrower blocks, for the diagonal, and several heads at a time.
    """
    modern, width = asynchronous(device), problem.width
    stages = 3 if modern else 2
    shapes = [(64, 64, 4, stages), (64, 32, 4, 2), (64, 32, 4, 1)]
    if triton.cdiv(problem.seq_q, 128) * problem.batch * problem.heads >= device.sm_count:
        large = (128, 64, 4, stages) if width <= 64 else (128, 128 if width == 128 and modern else 64, 8, 2)
        shapes.insert(0, large)
    if problem.exact:  # operands live in registers too
        shapes = [(64, 32, 8 if width <= 64 else 16, 1)]
    axes = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"
    descriptors = device.capability >= 90 and problem.floor_s(device) >= HOST_DESCRIPTORS_S and not problem.exact
    rest = {"HEADS": 1, "DESCRIPTORS": int(descriptors)}
    configs = [Config(dict(zip(axes, shape, strict=True)) | rest) for shape in shapes]
    if device.capability == 90 and descriptors and usual(problem) and width <= 128:
        shape = (64, 64, 4, 3) if problem.causal else (64, 128, 4, 2 if width <= 64 else 1)
        first = Config(dict(zip(axes, shape, strict=True)) | rest)
        configs[:0] = [first.replace(HEADS=4), first] if problem.causal else [first]
    if skipping(problem, device):
        configs.insert(0, Config(dict(zip(axes, (64, 32, 4, 4), strict=True)) | rest | {"DESCRIPTORS": 0}))
    return next((each for each in configs if _reject(problem, each, device) is None), configs[-1])


def _work(problem: ForwardProblem, config: Config) -> Cost:
    """Every block of rows reads q once, and k and v up to its last unmasked column, in whole blocks."""
    rows, columns = config.number("BLOCK_M"), config.number("BLOCK_N")
    blocks = rows_and_tiles(problem.seq_q, problem.seq_k, rows, columns, *problem.limits)
    tiles, heads = sum(visited for _, visited in blocks), problem.batch * problem.heads
    width = problem.width * problem.torch_dtype.itemsize
    read = len(blocks) * rows * width + 2 * tiles * columns * width
    return Cost(4.0 * heads * tiles * rows * columns * problem.width, heads * read + problem.queries * (width + 4))


SPACE = Space(
    axes={
        "BLOCK_M": (64, 128, 256),
        "BLOCK_N": (32, 64, 128, 256),
        "num_warps": (4, 8, 16),
        "num_stages": (1, 2, 3, 4),
        "HEADS": (1, 2, 4, 8),
        "DESCRIPTORS": (MADE_BY_KERNEL, 0, 1),  # either kind is a step from pointers
        "MAXNREG": (0, 168, 128),
    },
    reject=_reject,
    default=_default,
    work=_work,
    later={"MAXNREG": 0},
)
