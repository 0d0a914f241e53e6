"""Is a candidate right? Judged before it is timed, against the fp32 truth, with PyTorch's same-dtype error as the rule.

The candidate runs on inputs that lie between guard bands, with outputs and scratch poisoned; it must leave inputs and
guard bands as they were, write every element, repeat bit for bit, and err at most `FACTOR` times as much as PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

from tilebook.op import Config, Implementation, Op, Problem

FACTOR = 2.0
"""A candidate may err this many times as much as PyTorch's implementation in the same dtype."""

GUARD = 2048
"""Elements before and after every tensor that must come back untouched; keeps the tensor's alignment."""

# Statistics kept in fp32 beside 16-bit results (log-sum-exp, rstd): 1e-5 of them moves a result by far less than its
# rounding, whatever error PyTorch's own path happens to have in them.
_STATISTIC_FLOOR = 1e-5


@dataclass(frozen=True)
class Error:
    """How far an output is from the truth: largest absolute and root-mean-square difference."""

    max: float
    rms: float


class Wrong(Exception):
    """The candidate's answer is wrong, or it touched what it must not; the text says where."""


class NotRepeatable(Wrong):
    """Two runs on the same inputs differ, though the implementation is declared deterministic."""


def error(output: torch.Tensor, truth: torch.Tensor) -> Error:
    """The error of an output against its truth; NaN or infinity anywhere gives infinity unless the truth has it too."""
    difference = (output.float() - truth.float()).abs()
    same = (output.float() == truth.float()) | (output.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, difference)
    if difference.numel() == 0:
        return Error(0.0, 0.0)
    largest, square = torch.stack([difference.max(), difference.square().mean(dtype=torch.float64).float()]).tolist()
    infinite = largest != largest or square != square
    return Error(float("inf"), float("inf")) if infinite else Error(largest, square**0.5)


def floors(truth: torch.Tensor, dtype: torch.dtype, problem_dtype: torch.dtype) -> Error:
    """What is allowed even where PyTorch is exact: half a rounding step of the largest value, in RMS a quarter."""
    if truth.numel() == 0:
        return Error(0.0, 0.0)
    finite = torch.where(truth.isfinite(), truth, 0.0)
    statistic = dtype == torch.float32 and problem_dtype != torch.float32
    step = 2 * _STATISTIC_FLOOR if statistic else torch.finfo(dtype).eps
    largest = finite.abs().max().item()
    return Error(step / 2 * largest, step / 4 * finite.square().mean(dtype=torch.float64).sqrt().item())


class Poisoned(TorchFunctionMode):
    """Inside it, `torch.empty` and its kin return NaN (integers: a bit pattern) between guard bands."""

    _ALLOCATORS = frozenset(
        {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided}
    )

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return self.place(made) if func in self._ALLOCATORS and made.device.type != "meta" else made

    def place(self, like: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor of the same shape and strides between guard bands, poisoned or holding `values`."""
        extent = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
        extent = extent if like.numel() else 0
        poison = float("nan") if like.dtype.is_floating_point else 0x5A
        buffer = torch.full((extent + 2 * GUARD,), poison, dtype=like.dtype, device=like.device)
        placed = buffer.as_strided(like.shape, like.stride(), GUARD)
        if values is not None:
            placed.copy_(values)
        self._buffers.append(buffer)
        return placed

    def guards_intact(self) -> bool:
        bands = [band for buffer in self._buffers for band in (buffer[:GUARD], buffer[-GUARD:])]
        intact = [(band.isnan() if band.dtype.is_floating_point else band == 0x5A).all() for band in bands]
        return bool(torch.stack(intact).all()) if intact else True


@dataclass
class Case:
    """One problem with one seed: its inputs, the truth, and the error each output is allowed."""

    problem: Problem
    seed: int
    inputs: tuple[Any, ...]
    truth: tuple[torch.Tensor, ...]
    allowed: tuple[Error, ...]
    yardstick: tuple[Error, ...]

    @classmethod
    def make(cls, op: Op[Any], problem: Problem, device: torch.device | str, seed: int) -> Self:
        inputs = problem.inputs(device, seed)
        truth = truths(op, inputs)
        plain = op.implementations["torch"](*inputs)
        yardstick = tuple(error(output, right) for output, right in zip(plain, truth, strict=True))
        allowed = []
        for output, right, theirs in zip(plain, truth, yardstick, strict=True):
            floor = floors(right, output.dtype, problem.torch_dtype)
            allowed.append(Error(FACTOR * theirs.max + floor.max, FACTOR * theirs.rms + floor.rms))
        return cls(problem, seed, inputs, truth, tuple(allowed), yardstick)

    def judge(self, outputs: Sequence[torch.Tensor]) -> tuple[Error, ...]:
        """The errors of these outputs. Raises Wrong where one is larger than allowed."""
        if len(outputs) != len(self.truth):
            raise Wrong(f"{len(outputs)} outputs instead of {len(self.truth)}")
        found = []
        for index, (output, truth, allowed) in enumerate(zip(outputs, self.truth, self.allowed, strict=True)):
            if output.shape != truth.shape:
                raise Wrong(f"output {index} has shape {tuple(output.shape)} instead of {tuple(truth.shape)}")
            seen = error(output, truth)
            if not (seen.max <= allowed.max and seen.rms <= allowed.rms):
                worst = (output.float() - truth).abs().nan_to_num(torch.inf).argmax().item()
                at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
                raise Wrong(
                    f"output {index} of {self.problem.label} (seed {self.seed}): max error {seen.max:.3g} "
                    f"(allowed {allowed.max:.3g}), rms {seen.rms:.3g} (allowed {allowed.rms:.3g}), worst at {at}"
                )
            found.append(seen)
        return tuple(found)


def truths(op: Op[Any], inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """The reference's outputs on the inputs upcast to fp32, with PyTorch's reduced-precision shortcuts off."""
    upcast = [a.float() if isinstance(a, torch.Tensor) and a.dtype.is_floating_point else a for a in inputs]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            found = op.reference(*upcast)
    finally:
        torch.set_float32_matmul_precision(before)
    return found if isinstance(found, tuple) else (found,)


def run_guarded(implementation: Implementation, config: Config | None, case: Case) -> tuple[torch.Tensor, ...]:
    """One poisoned run. Raises Wrong where the candidate changed an input or wrote outside its tensors."""
    guard = Poisoned()
    inputs = tuple(guard.place(a, a) if isinstance(a, torch.Tensor) else a for a in case.inputs)
    with guard, torch.no_grad():
        outputs = implementation(*inputs, config=config)
    for index, (now, before) in enumerate(zip(inputs, case.inputs, strict=True)):
        if isinstance(now, torch.Tensor) and not _same_bits(now, before):
            raise Wrong(f"changed its input {index} on {case.problem.label}")
    if not guard.guards_intact():
        raise Wrong(f"wrote outside its tensors on {case.problem.label}")
    return outputs


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = _BITS[one.element_size()]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def verify(
    implementation: Implementation, config: Config | None, cases: Sequence[Case], repeats: int = 1
) -> tuple[tuple[Error, ...], ...]:
    """Runs the candidate on every case, `repeats` more times on the first. Returns the errors, raises Wrong."""
    found, first = [], None
    for case in cases:
        outputs = run_guarded(implementation, config, case)
        found.append(case.judge(outputs))
        first = first or outputs
    if implementation.deterministic and first is not None:
        for _ in range(repeats):
            again = run_guarded(implementation, config, cases[0])
            if not all(_same_bits(a, b) for a, b in zip(first, again, strict=True)):
                raise NotRepeatable(f"two runs on {cases[0].problem.label} gave different bits")
    return tuple(found)
