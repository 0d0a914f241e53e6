"""The configs of the backward pass, whose two kernels have axes of their own: which can run, and the default."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from tilebook.device import Device
from tilebook.kernels.attention.problem import BackwardProblem
from tilebook.kernels.attention.triton.forward_space import skipping, usual
from tilebook.launch import HOST_DESCRIPTORS_S
from tilebook.occupancy import asynchronous, crowded, oversized, pointless, rows_and_tiles, too_large
from tilebook.op import Config, Cost, Space


@dataclass(frozen=True)
class Half:
    """One of the two kernels: which way it goes, and the names of its axes end with `axis`."""

    axis: str
    rows: int
    columns: int
    warps: int
    stages: int
    cap: int

    @property
    def swept(self) -> int:
        """Rows or columns of one step of its loop."""
        return self.rows if self.axis == "1" else self.columns

    @property
    def held(self) -> int:
        """Columns or rows that a program holds sums for."""
        return self.columns if self.axis == "1" else self.rows

    @property
    def sums(self) -> int:
        """Accumulators: dk and dv, or dq."""
        return 2 if self.axis == "1" else 1


def halves(config: Config) -> tuple[Half, Half]:
    """The dk/dv kernel and the dq kernel."""
    names = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"

    def half(axis: str) -> Half:
        rows, columns, warps, stages = (config.number(f"{name}{axis}") for name in names)
        return Half(axis, rows, columns, warps, stages, int(config.get(f"MAXNREG{axis}", 0)))

    return half("1"), half("2")


def _reject(problem: BackwardProblem, config: Config, device: Device) -> str | None:
    heads, descriptors = config.number("HEADS"), config["DESCRIPTORS"]
    if descriptors and device.capability < 90:
        return "tensor descriptors need sm_90 or later"
    if descriptors and problem.exact:
        return "products in full fp32 read their operands through registers"
    if descriptors and problem.floor_s(device) < HOST_DESCRIPTORS_S:
        return "the GPU would wait for the host to make its tensor descriptors"
    if heads > 1 and (not problem.causal or heads > problem.batch * problem.heads_kv):
        return "taking turns between heads only balances causal masks, over as many heads as there are"
    for half in halves(config):
        if device.backend == "hip" and half.stages > 2:
            return "more than 2 stages do not pay on AMD GPUs"
        if asynchronous(device) and half.held < 64 and not problem.exact:
            return "tensor cores that read shared memory take blocks of at least 64"
        longest, other = (problem.seq_k, problem.seq_q)[:: 1 if half.axis == "1" else -1]
        if half.cap and not descriptors:
            return "addresses take what a cap would leave: with pointers these kernels spill already"
        if half.cap and half.cap != (168 if half.warps == 4 else 128):
            return "a cap makes room for one more program on an SM"
        if oversized(half.held, longest, 64) or oversized(half.swept, other, 32):
            return "a block is larger than the sequence"
        # Half of what one tile a warp would take: warps may share rows here, where nothing is reduced along a row.
        fewest = 4 if problem.exact else 8
        if half.held < fewest * half.warps:
            return f"{half.warps} warps need a block of at least {fewest * half.warps}"
        shared, tiles = _shared(problem, half, device), _tiles(problem, half, device)
        heads = problem.heads_kv if half.axis == "1" else problem.heads
        programs = triton.cdiv(longest, half.held) * problem.batch * heads
        reason = (
            too_large(shared, device)
            or crowded(tiles, half.warps, device)
            or pointless(half.cap, tiles, half.warps, shared, programs, device)
        )
        if reason:
            return reason
    return None


def needs(problem: BackwardProblem, config: Config, device: Device) -> list[tuple[int, int]]:
    """fp32 numbers in registers and bytes of shared memory of a program, of the dk/dv kernel and of the dq kernel."""
    return [(_tiles(problem, half, device), _shared(problem, half, device)) for half in halves(config)]


def _tiles(problem: BackwardProblem, half: Half, device: Device) -> int:
    """fp32 numbers that a program holds: sums, then scores with their gradients and what those need."""
    operands = 0 if asynchronous(device) else problem.width  # two held tiles, two halves in a register
    return half.held * (half.sums * problem.width + (2 + problem.companions) * half.swept + operands)


def _shared(problem: BackwardProblem, half: Half, device: Device) -> int:
    """Bytes of shared memory, as compiled kernels report them or a little more: two held tiles, a ring of two swept."""
    width = problem.width * problem.torch_dtype.itemsize
    scores = half.held * half.swept * problem.torch_dtype.itemsize  # where they pass through shared memory
    if device.backend == "hip":  # held tiles live in registers, and the newest of the ring is on its way there
        return max(width * max(half.held, half.swept), scores) + 2 * width * half.swept * (half.stages - 1)
    # Tiles of a bias or mask wait there too.
    table = problem.table_itemsize * half.held * half.swept * max(1, half.stages - 1)
    if not asynchronous(device):  # one of the held tiles moves on to registers, once all are loaded
        held = 2 * width * (half.held + half.swept) + 4096
        return max(width * (half.held + 2 * half.swept * half.stages), held) + table
    deeper = device.capability >= 100 and half.stages > 1  # tcgen05 lets go of a tile one step later
    ring = half.swept * (half.stages + deeper)
    return 2 * (width * (half.held + ring) + 4 * ring) + table


def _default(problem: BackwardProblem, device: Device) -> Config:
    """Of each half the first that fits of a few good shapes: 128 held where that gives every SM a block, else less."""
    pairs = {"1": problem.batch * problem.heads_kv, "2": problem.batch * problem.heads}
    lengths = {"1": problem.seq_k, "2": problem.seq_q}
    # fp32 passes through registers to be rounded: tiles that come by descriptors have to leave shared memory again.
    descriptors = device.capability >= 90 and problem.floor_s(device) >= HOST_DESCRIPTORS_S and problem.dtype != "fp32"
    hopper = device.capability == 90 and descriptors and usual(problem) and problem.width <= 128
    heads = 4 if hopper and problem.causal and problem.width > 64 and min(pairs.values()) >= 4 else 1
    small_tiles = skipping(problem, device)
    rest = {"HEADS": heads, "DESCRIPTORS": int(descriptors and not small_tiles)}

    def shapes(axis: str) -> list[tuple[int, int, int, int]]:
        """Held, swept, warps, stages."""
        if problem.exact:  # operands live in registers too
            return [(32, 32, 8, 1)]
        small = [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 1)]
        padded = problem.head_dim != problem.width and not asynchronous(device)
        if padded or problem.dtype == "fp32":  # masks along the head dimension, and wide numbers, take registers too
            first = 3 if problem.dtype == "fp32" and problem.width > 64 else 2
            small = [] if device.backend == "hip" else small[first:]
        elif device.backend == "hip" or device.capability >= 100:
            # Wider ones spill in what Triton makes of them there; and wide heads with a bias on 4 warps.
            small = small[2 if problem.bias and problem.width > 64 and device.backend == "cuda" else 1 :]
        if not asynchronous(device):
            return [*small, (32, 32, 4, 2), (32, 32, 4, 1)]
        if device.capability >= 100:
            return small
        if small_tiles:
            return [(64, 32, 4, 3), *small]
        if hopper:  # several programs an SM, as in the forward
            narrow = problem.width <= 64
            return [(64, 128 if narrow else 64, 4, 2) if axis == "1" else (128, 64 if narrow else 32, 4, 3), *small]
        enough = triton.cdiv(lengths[axis], 128) * pairs[axis] >= device.sm_count
        return [(128, 64, 8, 2), *small] if enough else small

    def half(axis: str, held: int, swept: int, warps: int, stages: int) -> dict[str, int]:
        rows, columns = (swept, held) if axis == "1" else (held, swept)
        blocks = {f"BLOCK_M{axis}": rows, f"BLOCK_N{axis}": columns}
        return blocks | {f"num_warps{axis}": warps, f"num_stages{axis}": stages}

    # The halves are judged apart: each beside the smallest shape of the other, which always fits.
    chosen: dict[str, int] = {}
    for axis, other in ("12", "21"):
        beside = half(other, *shapes(other)[-1]) | rest
        options = [half(axis, *shape) for shape in shapes(axis)]
        fits = (each for each in options if _reject(problem, Config(each | beside), device) is None)
        chosen |= next(fits, options[-1])
    return Config({axis: (chosen | rest)[axis] for axis in SPACE.axes if axis not in SPACE.later})


def _work(problem: BackwardProblem, config: Config) -> Cost:
    """Four products in the dk/dv kernel and three in the dq kernel, in whole blocks; each sweeps two tensors.

    With dropout the dq kernel sweeps them twice, for two products more.
    """
    width, heads = problem.width * problem.torch_dtype.itemsize, problem.batch * problem.heads
    flops = read = 0.0
    for half, products in zip(halves(config), (4, 5 if problem.dropout else 3), strict=True):
        # By blocks of rows for both: the pairs of blocks that a mask leaves do not depend on who sweeps whom.
        blocks = rows_and_tiles(problem.seq_q, problem.seq_k, half.rows, half.columns, *problem.limits)
        tiles = sum(visited for _, visited in blocks)
        flops += 2.0 * products * heads * tiles * half.rows * half.columns * problem.width
        read += 2.0 * heads * tiles * half.swept * width
    return Cost(flops, read + problem.cost().bytes + 2 * 4 * problem.queries)


SPACE = Space(
    axes={
        "BLOCK_M1": (32, 64, 128),
        "BLOCK_N1": (32, 64, 128),
        "num_warps1": (4, 8),
        "num_stages1": (1, 2, 3),
        "BLOCK_M2": (32, 64, 128),
        "BLOCK_N2": (32, 64, 128),
        "num_warps2": (4, 8),
        "num_stages2": (1, 2, 3),
        "HEADS": (1, 4),
        "DESCRIPTORS": (0, 1),
        "MAXNREG1": (0, 168, 128),
        "MAXNREG2": (0, 168, 128),
    },
    reject=_reject,
    default=_default,
    work=_work,
    later={"MAXNREG1": 0, "MAXNREG2": 0},
)
