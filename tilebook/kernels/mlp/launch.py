"""How the MLP's kernels are started."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tilebook.kernels.mlp.grads_kernels import COLUMNS, grads_kernel
from tilebook.kernels.mlp.kernels import Tile, act_bwd_kernel, down_fwd_kernel, share_kernel, up_fwd_kernel
from tilebook.launch import launch
from tilebook.op import Config


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The matrix with contiguous rows that do not overlap; a copy only where it is not so."""
    if tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]:
        return tensor
    return tensor.contiguous()


def _start(
    kernel: Any,
    config: Config,
    a: torch.Tensor,
    b: torch.Tensor,
    b_is_kn: bool,
    vectors: tuple[torch.Tensor, ...],
    tiles: tuple[torch.Tensor, ...],
    **constants: Any,
) -> None:
    """Starts `kernel` on operands a (M, K) and b, a bias of N, and contiguous (M, N) tensors of the epilogue."""
    m, k = a.shape
    n = b.shape[1 if b_is_kn else 0]
    block_m, block_n, block_k = config.number("BLOCK_M"), config.number("BLOCK_N"), config.number("BLOCK_K")
    # Hardware takes 16-byte aligned rows only; what a caller's view does not offer, pointers do.
    descriptors = config.number("DESCRIPTORS")
    if descriptors and not all(t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (a, b, *tiles)):
        descriptors = 0
    # Columns that the epilogue works on at a time: 32 values a thread keep its intermediates in registers.
    part = 32 * 32 * config.number("num_warps") // block_m
    left, right, outputs = a, b, tiles
    if descriptors:
        left = _described(a, block_m, block_k)
        right = _described(b, block_k, block_n) if b_is_kn else _described(b, block_n, block_k)
    if descriptors == 2:
        outputs = tuple(_described(t, block_m, min(part, block_n)) for t in tiles)
    split = int(config.get("SPLIT", 1))
    grid, sizes = triton.cdiv(m, block_m) * triton.cdiv(n, block_n), (m, n, k)
    tile = _tile(config, n, k, descriptors, part, split)
    if split > 1:
        left = right = a.new_empty(split, m, n, dtype=torch.float32)
        given = a, b, left, a.stride(0), b.stride(0)
        launch(share_kernel, (grid, split), *given, *sizes, tile, B_IS_KN=b_is_kn, **_warps(config))
    launch(
        kernel,
        (grid,),
        *(left, right, *vectors, *outputs, a.stride(0), b.stride(0), *sizes),
        tile,
        **_warps(config),
        **constants,
    )


def _tile(config: Config, n: int, k: int, descriptors: int, part: int, split: int = 1) -> Tile:
    """The constants of a product with these sizes."""
    blocks = [config.number(axis) for axis in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")]
    return Tile(*map(tl.constexpr, (*blocks, n % blocks[1] == 0, k % blocks[2] == 0, descriptors, part, split)))


def _warps(config: Config) -> dict[str, Any]:
    return {option: config[option] for option in ("num_warps", "num_stages")}


def _described(tensor: torch.Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def up(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, activation: str, save: bool, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x.new_empty(x.shape[0], w1.shape[0])
    z = torch.empty_like(h) if save else x.new_empty(0)
    # What is not saved is not written, but the kernel takes a tensor for it all the same.
    outputs = (h, z if save else h)
    _start(
        up_fwd_kernel, config, _rows(x), _rows(w1), False, (b1.contiguous(),), outputs, ACTIVATION=activation, SAVE=save
    )
    return h, z


def down(h: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor, *, config: Config) -> tuple[torch.Tensor]:
    y = h.new_empty(h.shape[0], w2.shape[0])
    _start(down_fwd_kernel, config, _rows(h), _rows(w2), False, (b2.contiguous(),), (y,))
    return (y,)


def act_bwd(
    dy: torch.Tensor, w2: torch.Tensor, z: torch.Tensor, activation: str, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.contiguous()
    dz, h = torch.empty_like(z), torch.empty_like(z)
    _start(act_bwd_kernel, config, _rows(dy), _rows(w2), True, (), (z, dz, h), ACTIVATION=activation)
    return dz, h


def grads(
    dy: torch.Tensor, h: torch.Tensor, dz: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, *, config: Config
) -> tuple[torch.Tensor, ...]:
    dy, h, dz, x, w1 = _rows(dy), h.contiguous(), dz.contiguous(), _rows(x), _rows(w1)
    (m, width), inner = dy.shape, h.shape[1]
    dx, dw1, db1 = x.new_empty(m, width), w1.new_empty(inner, width), dz.new_empty(inner)
    dw2, db2 = h.new_empty(width, inner), dy.new_empty(width)
    block_m, block_n = config.number("BLOCK_M"), config.number("BLOCK_N")
    columns = COLUMNS.value
    tiles = triton.cdiv(inner, block_m) * triton.cdiv(width, block_n)
    tiles += triton.cdiv(width, block_m) * triton.cdiv(inner, block_n)
    tiles += triton.cdiv(m, block_m) * triton.cdiv(width, block_n)
    launch(
        grads_kernel,
        (tiles + triton.cdiv(inner, columns) + triton.cdiv(width, columns),),
        *(dy, h, dz, x, w1, dx, dw1, db1, dw2, db2),
        *(dy.stride(0), x.stride(0), w1.stride(0), m, width, inner),
        _tile(config, width, inner, 0, 0),
        EVEN_H=width % block_m == 0 and width % block_n == 0,
        EVEN_I=inner % block_m == 0 and inner % block_n == 0,
        ROWS=32 * 32 * config.number("num_warps") // columns,
        **_warps(config),
    )
    return dx, dw1, db1, dw2, db2
