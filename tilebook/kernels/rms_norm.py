"""RMSNorm over the last axis: y = x · rstd · weight, rstd = 1 / √(mean(x²) + eps)    (Zhang & Sennrich, 2019)."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import triton
import triton.language as tl
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.call import Entry, Tensors, recorded, vector, way
from tilebook.call import rows as rows_first
from tilebook.device import Device
from tilebook.launch import launch
from tilebook.op import Config, Cost, Space, powers_of_two

__all__ = ["rms_norm"]


@dataclass(frozen=True)
class Problem(op.Problem):
    """`rows` vectors of `width`; calls round their rows up to a power of two, so that one verdict serves a bucket."""

    EXACT = frozenset({"width"})

    dtype: str
    rows: int = op.size("M")
    width: int = op.size("N")

    @classmethod
    def of(cls, *args: Any) -> Self:
        x = args[0]
        return cls(op.dtype_name(x.dtype), triton.next_power_of_2(x.shape[0]), x.shape[1])

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        x, weight = self._random(device, seed, (self.rows, self.width), (self.width,))
        return x, weight, 1e-6

    def cost(self) -> Cost:
        # x read, y written; the weight; rstd written in fp32.
        itemsize, elements = self.torch_dtype.itemsize, self.rows * self.width
        return Cost(4.0 * elements, float(itemsize * (2 * elements + self.width) + 4 * self.rows))

    def neighbours(self) -> Sequence[Self]:
        more = min(max(1024, 2 * self.rows), (1 << 26) // self.width)  # cheap, and yet more than any GPU runs at once
        rows = [333, 1, *([more] if more > self.rows else [])]
        return [dataclasses.replace(self, rows=each) for each in rows if each != self.rows]

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("M64,N128", "bf16"),
            ("M17,N100", "fp16"),
            ("M1,N1024", "bf16"),
            ("M5,N1500", "fp32"),
            ("M2,N1", "fp32"),
            ("M100,N24", "bf16"),
            ("M3,N4097", "fp16"),
            ("M33,N64", "fp32"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        return {"norms": [cls.parse(f"M8192,N{width}", "bf16") for width in (1024, 4096, 16384)]}

    def _random(self, device: torch.device | str, seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        source = op.generator(device, seed)
        return [op.normal(shape, source, device, torch.float32).to(self.torch_dtype) for shape in shapes]


@dataclass(frozen=True)
class BackwardProblem(Problem):
    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        shape = (self.rows, self.width)
        dy, x, weight = self._random(device, seed, shape, shape, (self.width,))
        rstd = torch.empty(self.rows, device=device) if x.is_meta else _rstd(x.float(), 1e-6)
        return dy, x, weight, rstd

    def cost(self) -> Cost:
        # dy and x read, dx written; the weight read, its gradient written; rstd read in fp32.
        itemsize, elements = self.torch_dtype.itemsize, self.rows * self.width
        return Cost(10.0 * elements, float(itemsize * (3 * elements + 2 * self.width) + 4 * self.rows))


# References, in fp64: fp32 inputs are judged too


def _rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.square().mean(-1) + eps)


@op.define("rms_norm_fwd", Problem, fused=lambda problem: True)
def rms_norm_fwd(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, N), weight (N,) → y (M, N) in the dtype of x, rstd (M,) in fp32."""
    rstd = _rstd(x.double(), eps)
    return (x.double() * rstd[:, None] * weight.double()).to(x.dtype), rstd.float()


@op.define("rms_norm_bwd", BackwardProblem, direction="bwd", fused=lambda problem: True)
def rms_norm_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂ = x · rstd, g = dy · weight → dx = rstd · (g − x̂ · mean(g · x̂)), dweight = Σ dy · x̂ over the rows."""
    dx, dweight = _backward(dy.double(), x.double(), weight.double(), rstd.double())
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    normal, g = x * rstd[:, None], dy * weight
    return rstd[:, None] * (g - normal * (g * normal).mean(-1, keepdim=True)), (dy * normal).sum(0)


rms_norm_fwd.backward = rms_norm_bwd

# Spaces


def _block(problem: Problem, config: Config) -> int:
    """Columns in registers at a time; if they are not all, a row is read twice, the second time from the L2 cache."""
    width: int = triton.next_power_of_2(problem.width)
    return min(config.number("BLOCK"), width)


def _reject(problem: Problem, config: Config, device: Device, registers: int) -> str | None:
    """`registers`: how many each element takes."""
    block, rows, warps = _block(problem, config), config.number("ROWS"), config.number("num_warps")
    threads = warps * device.warp_size
    if threads > 1024:
        return f"{threads} threads in a block"
    if block < config.number("BLOCK") and config["BLOCK"] != FORWARD_AXES["BLOCK"][0]:
        return "a smaller BLOCK holds the row"
    if rows > 1 and rows > triton.next_power_of_2(problem.rows):
        return "more rows than there are"
    most = min(device.registers_per_sm // threads, 256) // registers
    if rows * block > most * threads:
        return f"{rows * block // threads} elements a thread, of {most} that registers hold"
    if warps > 1 and rows * block < 16 // problem.torch_dtype.itemsize * threads:
        return "less than 16 bytes a thread"
    return None


def _reject_fwd(problem: Problem, config: Config, device: Device) -> str | None:
    return _reject(problem, config, device, 2)


def _reject_bwd(problem: Problem, config: Config, device: Device) -> str | None:
    threads = config.number("num_warps") * device.warp_size
    if config["PER_SM"] != 1 and config.number("PER_SM") * threads > device.threads_per_sm:
        return "more programs than an SM can hold at once"
    return _reject(problem, config, device, 4)


def _default_fwd(problem: Problem, device: Device) -> Config:
    """As many rows as have 1024 elements, else one row, 16384 columns at a time; 16 elements a thread."""
    width = triton.next_power_of_2(problem.width)
    rows = max(1, min(16, 1024 // width, triton.next_power_of_2(problem.rows)))
    block = max(1024, min(16384, width))
    warps = max(1, rows * min(block, width) // (16 * device.warp_size))
    return Config(ROWS=rows, BLOCK=block, num_warps=warps)


def _default_bwd(problem: Problem, device: Device) -> Config:
    return Config({**_default_fwd(problem, device), "PER_SM": 1 if problem.width > 4096 else 2})


def _work(problem: Problem, config: Config) -> Cost:
    """Rows in a last program that are not there count, and the second reading of what registers do not hold."""
    floor = problem.cost()
    rows = triton.cdiv(problem.rows, config.number("ROWS")) * config.number("ROWS")
    again = 1.5 if _block(problem, config) < problem.width else 1.0
    return Cost(floor.flops * rows / problem.rows, floor.bytes * again)


FORWARD_AXES = {
    "ROWS": powers_of_two(1, 16),
    "BLOCK": powers_of_two(1024, 65536),
    "num_warps": powers_of_two(1, 32),
}
SPACE = Space(FORWARD_AXES, _reject_fwd, _default_fwd, _work)
SPACE_BWD = Space({**FORWARD_AXES, "PER_SM": powers_of_two(1, 8)}, _reject_bwd, _default_bwd, _work)


# Kernels. A program takes ROWS rows at a time, BLOCK columns of them at a time.


@triton.jit
def _place(row, first, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column numbers of a block, and which of them exist."""
    r = row + tl.arange(0, ROWS)
    c = first + tl.arange(0, BLOCK)
    return r.to(tl.int64)[:, None], c[None, :], (r < rows)[:, None] & (c < width)[None, :]


@triton.jit
def _load(pointer, r, c, stride, inside):
    return tl.load(pointer + r * stride + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def fwd_kernel(
    x, weight, y, rstd, rows, width, stride_x, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    row = tl.program_id(0) * ROWS
    if WHOLE:
        r, c, inside = _place(row, 0, rows, width, ROWS, BLOCK)
        values = _load(x, r, c, stride_x, inside)
        scale = tl.rsqrt(tl.sum(values * values, 1) / width + eps)[:, None]
        gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
        tl.store(y + r * width + c, (values * scale * gain).to(y.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, width, BLOCK):
            r, c, inside = _place(row, first, rows, width, ROWS, BLOCK)
            values = _load(x, r, c, stride_x, inside)
            squares += values * values
        scale = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
        for first in range(0, width, BLOCK):
            r, c, inside = _place(row, first, rows, width, ROWS, BLOCK)
            values = _load(x, r, c, stride_x, inside)
            gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
            tl.store(y + r * width + c, (values * scale * gain).to(y.dtype.element_ty), mask=inside)
    own, _, _ = _place(row, 0, rows, width, ROWS, 1)
    tl.store(rstd + own, scale, mask=own < rows)


@triton.jit(do_not_specialize=["rows"])
def bwd_kernel(
    dy, x, weight, rstd, dx, partial, rows, width, stride_dy, stride_x,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dx, and in partial (programs, width) each program's share of dweight. Rows go round the programs in turn."""
    mine = tl.program_id(0)
    step = tl.num_programs(0) * ROWS
    if WHOLE:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        columns = tl.arange(0, BLOCK)[None, :]
        for row in range(mine * ROWS, rows, step):
            r, c, inside = _place(row, 0, rows, width, ROWS, BLOCK)
            scale = tl.load(rstd + r, mask=r < rows, other=0.0)
            normal = _load(x, r, c, stride_x, inside) * scale
            upper = _load(dy, r, c, stride_dy, inside)
            total += upper * normal
            # Here and not above: it waits in the L1 cache, and registers are what is short.
            upper *= tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
            mean = (tl.sum(upper * normal, 1) / width)[:, None]
            tl.store(dx + r * width + c, (scale * (upper - normal * mean)).to(dx.dtype.element_ty), mask=inside)
        share = partial + mine.to(tl.int64) * width + tl.arange(0, BLOCK)
        tl.store(share, tl.sum(total, 0), mask=tl.arange(0, BLOCK) < width)
    else:
        for row in range(mine * ROWS, rows, step):
            products = tl.zeros((ROWS, BLOCK), tl.float32)
            for first in range(0, width, BLOCK):
                r, c, inside = _place(row, first, rows, width, ROWS, BLOCK)
                gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
                products += _load(dy, r, c, stride_dy, inside) * gain * _load(x, r, c, stride_x, inside)
            own, _, _ = _place(row, 0, rows, width, ROWS, 1)
            scale = tl.load(rstd + own, mask=own < rows, other=0.0)
            mean = tl.sum(products, 1)[:, None] * scale / width
            known = tl.where(row == mine * ROWS, 0, width)  # in the first turn there are no shares to add to
            for first in range(0, width, BLOCK):
                r, c, inside = _place(row, first, rows, width, ROWS, BLOCK)
                gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
                normal = _load(x, r, c, stride_x, inside) * scale
                upper = _load(dy, r, c, stride_dy, inside)
                # The share of dweight waits in the L2 cache: registers hold a BLOCK of it only.
                columns = first + tl.arange(0, BLOCK)
                share = partial + mine.to(tl.int64) * width + columns
                so_far = tl.load(share, mask=columns < known, other=0.0)
                tl.store(share, so_far + tl.sum(upper * normal, 0), mask=columns < width)
                upper *= gain
                tl.store(dx + r * width + c, (scale * (upper - normal * mean)).to(dx.dtype.element_ty), mask=inside)
            tl.debug_barrier()  # other threads may read these shares in the next turn


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(partial, dweight, programs, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dweight = the sum of all programs' shares, in one fixed order."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for row in range(0, programs, ROWS):
        r, c, inside = _place(row, tl.program_id(0) * BLOCK, programs, width, ROWS, BLOCK)
        total += _load(partial, r, c, width, inside)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dweight + columns, tl.sum(total, 0).to(dweight.dtype.element_ty), mask=columns < width)


# Ours


def _supports(problem: Problem) -> bool:
    return problem.dtype in ("bf16", "fp16", "fp32") and problem.width <= 65536


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The matrix with contiguous rows; a copy only where it is not so."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _columns(width: int, config: Config) -> dict[str, Any]:
    block = min(config.number("BLOCK"), triton.next_power_of_2(width))
    return {"ROWS": config["ROWS"], "BLOCK": block, "WHOLE": block >= width, "num_warps": config["num_warps"]}


@rms_norm_fwd.implementation("triton", space=SPACE, supports=_supports)
def _triton_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    x, (rows, width) = _rows(x), x.shape
    y, rstd = x.new_empty(rows, width), x.new_empty(rows, dtype=torch.float32)
    grid = (triton.cdiv(rows, config.number("ROWS")),)
    launch(fwd_kernel, grid, x, weight, y, rstd, rows, width, x.stride(0), eps, **_columns(width, config))
    return y, rstd


@rms_norm_bwd.implementation("triton", space=SPACE_BWD, supports=_supports)
def _triton_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    dy, x, (rows, width) = _rows(dy), _rows(x), x.shape
    dx, dweight = x.new_empty(rows, width), torch.empty_like(weight)
    # Interpreted, on the CPU: a few programs that each take several turns.
    sms = 3 if x.is_cpu else devices.current(x.device.index or 0).sm_count
    programs = min(triton.cdiv(rows, config.number("ROWS")), sms * config.number("PER_SM"))
    partial = x.new_empty(programs, width, dtype=torch.float32)
    launch(
        bwd_kernel, (programs,), dy, x, weight, rstd, dx, partial, rows, width, dy.stride(0), x.stride(0),
        **_columns(width, config),
    )  # fmt: skip
    launch(
        sum_kernel, (triton.cdiv(width, 32),), partial, dweight, programs, width, ROWS=64, BLOCK=32, num_warps=4
    )  # fmt: skip
    return dx, dweight


# PyTorch's


@rms_norm_fwd.implementation("torch")
def _torch_fwd(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    if _fused(x, weight):
        y, rstd = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
        return y, rstd[..., 0]
    return _plain((x, weight), (eps,)), _rstd(x.float(), eps)


@rms_norm_bwd.implementation("torch")
def _torch_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if _fused(x, weight):
        both = torch.ops.aten._fused_rms_norm_backward(dy, x, weight.shape, rstd[..., None], weight, [True, True])
        return both[0], both[1]
    dx, dweight = _backward(dy.float(), x.float(), weight.float(), rstd)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _fused(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Does PyTorch have a kernel for this, whose statistic can then be had?"""
    return x.is_cuda and x.dtype == weight.dtype


def _plain(tensors: tuple[Any, ...], options: tuple[float]) -> torch.Tensor:
    """y in PyTorch's own functions."""
    (x, weight), (eps,) = tensors, options
    if weight is None or weight.dtype == x.dtype:
        y: torch.Tensor = torch.rms_norm(x, x.shape[-1:], weight, eps)
        return y
    return torch.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


# As one of PyTorch's ops


def _entry_forward(choice: Any, tensors: Tensors, options: tuple[float]) -> tuple[torch.Tensor, ...]:
    if choice is None:
        x, weight = tensors
        assert x is not None
        assert weight is not None
        tensors = rows_first(x), vector(weight)
        choice = dispatch.lookup(rms_norm_fwd, (*tensors, *options))
    return choice(*tensors, *options)  # type: ignore[no-any-return]


def _entry_backward(
    dy: torch.Tensor, tensors: Tensors, kept: Tensors, options: tuple[float], needs: Sequence[bool]
) -> Tensors:
    (x, weight), (rstd,) = tensors, kept
    assert weight is not None
    assert rstd is not None
    dx, dweight = dispatch.run(rms_norm_bwd, dy, x, vector(weight), vector(rstd))
    return dx, dweight


def _entry_fake(tensors: Tensors, options: Any) -> tuple[torch.Tensor, ...]:
    x = tensors[0]
    assert x is not None
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


NORM = Entry(
    name="rms_norm",
    tensors=("x", "weight"),
    options=("float eps",),
    outputs=("y", "rstd"),
    kept=(1,),
    forward=_entry_forward,
    backward=_entry_backward,
    plain=_plain,
    fake=_entry_fake,
    shards=lambda tensors: [dict.fromkeys(("x", "y", "rstd"), 0)],
)

_HOST_BOUND = 1 << 22
"""Elements up to which the GPU is done with an eager call before the host has made the next one."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """y = x / √(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich, 2019, eq. 4), in fp32 inside.

    Args:
        x: (…, N), floating point; any strides, fastest where the last axis is contiguous.
        weight: (N,), in the dtype of x or another; None for ones.
        eps: added to the mean square, so that a zero vector stays one.

    Returns:
        (…, N) in the dtype of x.

    Kernels of ours run for fp16, bf16 and fp32 with N ≤ 65536 on a GPU where a verdict has them ahead; all else, and
    `torch.compile`, runs as plain PyTorch. Differentiable in x and weight; both gradients of our kernels repeat bit for
    bit.

    Raises:
        ValueError: a weight that does not fit x in shape or device, or tensors that are not floating point.
    """
    if has_torch_function((x, weight)):
        found: torch.Tensor = handle_torch_function(rms_norm, (x, weight), x, weight, eps)
        return found
    route = way(x, weight)
    if route == "pytorch" or weight is None or torch.compiler.is_compiling() or not x.ndim:
        _check(x, weight)
        return _plain((x, weight), (eps,))
    if route == "direct" and x.numel() <= _HOST_BOUND and x.dtype == weight.dtype and not _graph():
        if x.shape[-1:] != weight.shape or not weight.is_cuda:
            _check(x, weight)
        return torch.rms_norm(x, weight.shape, weight, eps)  # type: ignore[no-any-return]
    eps = float(eps)
    flat = rows_first(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) if x.numel() else x)
    tensors = flat, vector(weight)
    choice = dispatch.known(rms_norm_fwd, (*tensors, eps)) if route == "direct" else None
    if choice is None:
        _check(x, weight)
        if not x.numel() or weight.dtype == torch.float64:
            return _plain((x, weight), (eps,))
        if route == "op":
            if NORM.left_to_pytorch(lambda: (rms_norm_fwd, Problem.of(*tensors, eps)), tensors):
                return _plain((x, weight), (eps,))
            return NORM.through(tensors, (eps,))[0].view(x.shape)
        choice = dispatch.lookup(rms_norm_fwd, (*tensors, eps))
    if choice.native and (not recorded(tensors) or dispatch.backward_of(choice).native):
        choice.calls += 1
        return _plain((x, weight), (eps,))
    return NORM.direct(choice, tensors, (eps,))[0].view(x.shape)


def _graph() -> bool:
    """Is a graph being captured, which is replayed without the host, or an implementation forced?"""
    return dispatch.forced() or torch.cuda.is_current_stream_capturing()


def _check(x: torch.Tensor, weight: torch.Tensor | None) -> None:
    if weight is None:
        if x.ndim < 1 or not x.is_floating_point():
            raise ValueError(f"x must be floating point (…, N), not {x.dtype} {tuple(x.shape)}")
        return
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"expected x (…, N) and weight (N,), not {tuple(x.shape)} and {tuple(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, but x on {x.device}")
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"x and weight must be floating point, not {x.dtype} and {weight.dtype}")
