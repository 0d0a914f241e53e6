"""The configs of the MLP kernels: one product with three epilogues, hence one space; the gradients have their own."""

from __future__ import annotations

import triton

from tilebook.device import Device
from tilebook.kernels.mlp.problem import Problem
from tilebook.launch import HOST_DESCRIPTORS_S
from tilebook.op import Config, Cost, Space, Value


def _blocks(config: Config) -> tuple[int, int, int]:
    return config.number("BLOCK_M"), config.number("BLOCK_N"), config.number("BLOCK_K")


def _unfit(
    config: Config, device: Device, itemsize: int, least: int, extents: tuple[tuple[str, int], ...]
) -> str | None:
    """Why no product is to be computed in such tiles. least: accumulators a thread; extents: of M, N and K."""
    (block_m, block_n, block_k), stages = _blocks(config), config.number("num_stages")
    # wgmma and its successor read tiles where they land; older instructions keep the one in use in registers.
    in_flight = stages if device.capability >= 90 else stages - 1
    shared = itemsize * in_flight * block_k * (block_m + block_n)
    accumulators = block_m * block_n // (device.warp_size * config.number("num_warps"))
    if shared > device.shared_per_block:
        return f"{shared} bytes of tiles in flight, of {device.shared_per_block} shared memory"
    if accumulators >= 256:
        return f"{accumulators} accumulators a thread spill"
    if accumulators < least:
        return f"{accumulators} accumulators a thread do not keep the tensor cores busy"
    for block, (axis, extent) in zip(_blocks(config), extents, strict=True):
        if block > max(64, triton.next_power_of_2(extent)):
            return f"a block of {block} along {axis} = {extent} is mostly padding"
    if 90 <= device.capability < 120 and block_k < 64:
        return "BLOCK_K below 64 leaves half of a 128-byte shared memory line empty"
    if device.backend == "hip" and stages > 2:
        return "more than two stages do not pay where loads go through registers"
    return None


def _depth(device: Device, block_m: int, block_n: int, otherwise: int) -> dict[str, Value]:
    """As deep as the shared memory allows; stages `otherwise` where tiles pass through registers."""
    if device.backend == "hip":
        return {"BLOCK_K": 32, "num_stages": 2}
    if device.shared_per_block >= 3 * 2 * 64 * (block_m + block_n) and device.capability >= 90:
        return {"BLOCK_K": 64, "num_stages": 3}
    return {"BLOCK_K": 32, "num_stages": otherwise}


def _warps(block_m: int, block_n: int) -> int:
    return 8 if block_m * block_n == 128 * 128 else 4


def _split(config: Config) -> int:
    return int(config.get("SPLIT", 1))


def _few_rows(problem: Problem, config: Config, device: Device) -> str | None:
    """Why these are no tiles, or shares, of a product that reads its weights for a few rows only."""
    (m, n, k), (block_m, block_n, block_k), split = problem.gemm, _blocks(config), _split(config)
    if split > 1 and m > 64:
        return "there are tiles enough without shares of the sums"
    if block_m < 64 and m > block_m:
        return "each row of tiles would read the weights anew"
    if block_m > 16 and block_m // 2 >= m and block_m <= 64 and split > 1:
        return "tiles half as high hold all rows"
    if block_m < 64 and block_n < 16 * config.number("num_warps"):
        return "a warp takes 16 columns at least"
    if (block_m < 64 or split > 1) and config["DESCRIPTORS"]:
        return "tensor descriptors are for large tiles"
    if split == 1:
        return None
    if 2 * split * block_k > k:
        return "a share would be less than two blocks long"
    if triton.cdiv(n, block_n) * split > 8 * device.sm_count:
        return "fewer shares fill the GPU as well"
    return None


def _reject(problem: Problem, config: Config, device: Device) -> str | None:
    extents = tuple(zip("MNK", problem.gemm, strict=True))
    least = 1024 // device.warp_size if config.number("BLOCK_M") >= 64 else 0
    unfit = _few_rows(problem, config, device)
    unfit = unfit or _unfit(config, device, problem.torch_dtype.itemsize, least, extents)
    descriptors = config["DESCRIPTORS"]
    if unfit is not None:
        return unfit
    if config["GROUP_M"] != 1 and problem.rows <= config.number("BLOCK_M"):
        return "one row of tiles needs no grouping"
    if descriptors and device.capability < 90:
        return f"{device.arch} has no tensor descriptors"
    if descriptors and (problem.width % 8 or problem.inner % 8):
        return "rows are not multiples of 16 bytes, which tensor descriptors need"
    if descriptors and problem.floor_s(device) < HOST_DESCRIPTORS_S:
        return "the GPU would wait for the host to make its tensor descriptors"
    return None


def _default(problem: Problem, device: Device) -> Config:
    """The largest of three tiles that still gives every SM one, fed as deep as the shared memory allows."""
    m, n, _ = problem.gemm
    for block_m, block_n in ((128, 128), (64, 128), (64, 64)):
        tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
        # A tile more than half empty does twice the work.
        if tiles >= device.sm_count and n > block_n // 2 and m > block_m // 2:
            break
    described = device.capability >= 90 and tiles >= 2 * device.sm_count
    described = described and not (problem.width % 8 or problem.inner % 8)
    described = described and problem.floor_s(device) >= HOST_DESCRIPTORS_S
    return Config(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        **_depth(device, block_m, block_n, 4),
        GROUP_M=8 if m > block_m else 1,
        num_warps=_warps(block_m, block_n),
        DESCRIPTORS=int(described),
    )


def _work(problem: Problem, config: Config) -> Cost:
    """Padded tiles; each reads its rows of both operands anew, so what L2 serves counts as bytes too."""
    m, n, k = problem.gemm
    block_m, block_n, block_k = _blocks(config)
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    depth = triton.cdiv(k, block_k) * block_k
    moved = tiles * (block_m + block_n) * depth + problem.tiles_moved * m * n + n
    if _split(config) > 1:  # shares are written and read, in fp32
        moved += _split(config) * 2 * m * n * 4 // problem.torch_dtype.itemsize
    return Cost(2.0 * tiles * block_m * block_n * depth, float(moved * problem.torch_dtype.itemsize))


SPACE = Space(
    axes={
        "BLOCK_M": (16, 32, 64, 128, 256),
        "BLOCK_N": (64, 128, 256),
        "BLOCK_K": (32, 64, 128),
        "GROUP_M": (1, 4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
        # 0: pointers; 1: tensor descriptors (TMA) for the operands; 2: for what the epilogue reads and writes too.
        "DESCRIPTORS": (0, 1, 2),
        # Shares of each sum that programs of their own make, where few rows leave too few programs to read the weights.
        "SPLIT": (1, 2, 4, 8, 16),
    },
    reject=_reject,
    default=_default,
    work=_work,
    later={"SPLIT": 1},
)


# The gradients in one launch


def grads_tiles(problem: Problem, block_m: int, block_n: int) -> tuple[int, int, int]:
    """How many tiles dW1, dW2 and dx have."""
    m, width, inner = problem.rows, problem.width, problem.inner
    shapes = ((inner, width), (width, inner), (m, width))
    one, two, three = (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) for rows, columns in shapes)
    return one, two, three


def _reject_grads(problem: Problem, config: Config, device: Device) -> str | None:
    widest = max(problem.width, problem.inner)
    return _unfit(config, device, problem.torch_dtype.itemsize, 16, tuple((axis, widest) for axis in "MNK"))


def _default_grads(problem: Problem, device: Device) -> Config:
    """The largest of three tiles that still gives every SM one."""
    for block_m, block_n in ((128, 128), (64, 128), (64, 64)):
        if sum(grads_tiles(problem, block_m, block_n)) >= device.sm_count and block_n <= 2 * problem.width:
            break
    depth, warps = _depth(device, block_m, block_n, 3), _warps(block_m, block_n)
    return Config(BLOCK_M=block_m, BLOCK_N=block_n, **depth, GROUP_M=8, num_warps=warps)


def _work_grads(problem: Problem, config: Config) -> Cost:
    """Padded tiles; each reads its rows and columns of the operands anew, so what L2 serves counts as bytes too."""
    block_m, block_n, block_k = _blocks(config)
    flops = moved = 0.0
    lengths = (problem.rows, problem.rows, problem.inner)
    for tiles, length in zip(grads_tiles(problem, block_m, block_n), lengths, strict=True):
        depth = triton.cdiv(length, block_k) * block_k
        flops += 2.0 * tiles * block_m * block_n * depth
        moved += tiles * ((block_m + block_n) * depth + block_m * block_n)
    moved += problem.rows * (problem.width + problem.inner)
    return Cost(flops, moved * problem.torch_dtype.itemsize)


SPACE_GRADS = Space(
    axes={
        **{axis: SPACE.axes[axis] for axis in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages")},
        **{"BLOCK_M": (64, 128, 256), "GROUP_M": (1, 8)},
    },
    reject=_reject_grads,
    default=_default_grads,
    work=_work_grads,
)
