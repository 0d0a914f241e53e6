"""A product of matrices in Triton whose tile sizes tilebook looks up, with no search in the program.

    python examples/matmul_autotuned.py                                     # the first config, and a miss
    TILEBOOK_TRITON=record python examples/matmul_autotuned.py              # notes what the kernel is called with
    tilebook tune --recorded                                                # finds the best config, proves it, keeps it
    python examples/matmul_autotuned.py                                     # runs it

MATMUL_SPACE=1 has all combinations of the list's values searched instead of the list.
Without a GPU: TRITON_INTERPRET=1 python examples/matmul_autotuned.py --size 64 --device cpu
"""

from __future__ import annotations

import argparse
import os

import torch
import triton
import triton.language as tl

import tilebook


def product(a, b):
    return a @ b


def listed() -> list[triton.Config]:
    """Tiles that fit most GPUs, the safest first: it runs where no verdict says more."""
    tiles = [
        (64, 64, 32, 4),
        (128, 64, 32, 4),
        (64, 128, 64, 4),
        (128, 128, 64, 8),
        (128, 256, 64, 8),
        (256, 128, 64, 8),
    ]
    return [
        triton.Config({"TILE_M": m, "TILE_N": n, "TILE_K": k, "GROUP": 8}, num_warps=warps, num_stages=stages)
        for m, n, k, warps in tiles
        for stages in (3, 4)
    ]


SPACE = {
    "TILE_M": (64, 128, 256),
    "TILE_N": (64, 128, 256),
    "TILE_K": (32, 64, 128),
    "GROUP": (1, 4, 8, 16),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}


def fitting(configs, arguments, **options):
    """Without tiles that no GPU's shared memory holds, and those whose accumulator fills no registers, or all."""
    size = arguments["a"].element_size()
    found = []
    for config in configs:
        m, n, k = (config.kwargs[f"TILE_{axis}"] for axis in "MNK")
        shared, held = config.num_stages * (m + n) * k * size, m * n // (32 * config.num_warps)
        if shared <= 232_448 and 16 <= held <= 256:
            found.append(config)
    return found


@tilebook.autotune(
    configs=listed(),
    key=["M", "N", "K"],
    space=SPACE if os.environ.get("MATMUL_SPACE") else None,
    prune_configs_by={"early_config_prune": fitting},
    reference=product,
)
@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, a_row, a_col, b_row, b_col, c_row, c_col,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Programs go down a band of GROUP tiles before they go right, so that what they read stays in L2.
    n_rows, n_cols = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    band, inside = tl.program_id(0) // (GROUP * n_cols), tl.program_id(0) % (GROUP * n_cols)
    height = min(n_rows - band * GROUP, GROUP)
    rows = (band * GROUP + inside % height) * TILE_M + tl.arange(0, TILE_M)
    cols = (inside // height) * TILE_N + tl.arange(0, TILE_N)
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(0, K, TILE_K):
        inner = start + tl.arange(0, TILE_K)
        left_in, right_in = (rows[:, None] < M) & (inner < K), (inner[:, None] < K) & (cols < N)
        left = tl.load(a + rows[:, None] * a_row + inner * a_col, mask=left_in, other=0.0)
        right = tl.load(b + inner[:, None] * b_row + cols * b_col, mask=right_in, other=0.0)
        acc = tl.dot(left, right, acc)
    inside_c = (rows[:, None] < M) & (cols < N)
    tl.store(c + rows[:, None] * c_row + cols * c_col, acc.to(c.dtype.element_ty), mask=inside_c)


def matmul(a: torch.Tensor, b: torch.Tensor, kernel=matmul_kernel) -> torch.Tensor:
    """(M, K) times (K, N), of any strides."""
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty((M, N), device=a.device, dtype=a.dtype)

    def grid(meta):
        return (triton.cdiv(M, meta["TILE_M"]) * triton.cdiv(N, meta["TILE_N"]),)

    kernel[grid](a, b, c, M, N, K, *a.stride(), *b.stride(), *c.stride())
    return c


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "this example runs a Triton kernel: it wants a GPU, and PyTorch sees none here\n")
    a, b = (torch.randn(options.size, options.size, device=options.device, dtype=torch.float16) for _ in range(2))
    c = matmul(a, b)
    print(f"{matmul_kernel.best_config}; largest error {(c - a @ b).abs().max().item():.3g}")
