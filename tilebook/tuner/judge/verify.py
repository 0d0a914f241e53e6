"""Is a candidate right? Judged before it is timed, against the fp32 truth, with PyTorch's same-dtype error as the rule.

The candidate runs on inputs that lie between guard bands, with outputs and scratch poisoned; it must leave inputs and
guard bands as they were, write every element, repeat bit for bit beside other poison, and err at most `FACTOR` times as
much as PyTorch. It does so on several seeds, on the neighbours of its problem and on inputs with outliers; a finalist
does it again on inputs that nothing in the run has seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

from tilebook.errors import TuningError
from tilebook.op import Answers, Config, Implementation, Op, Problem
from tilebook.tuner.judge.poison import INPUT, KINDS, NAN, PLAIN, Poisoned, bits, written

FACTOR = 2.0
"""A candidate may err this many times as much as PyTorch's implementation in the same dtype."""

SEEDS = (0, 1)
"""Every candidate is judged on the tuned problem with these; neighbours and finalists have seeds of their own."""

FINAL_REPEATS = 50
"""A race that shows in every tenth run gets past this many with probability 0.5 %."""

OUTLIER, OUTLIER_EVERY = 32.0, 61
"""Every so-manieth input is this many times as large: attention's scores then pass the end of fp32's `exp`."""

LARGE = 128.0
"""So many times as large are the inputs of somebody else's kernel that multiplies nothing: past the end of `exp`."""

# Statistics kept in fp32 beside 16-bit results (log-sum-exp, rstd): 1e-5 of them moves a result by far less than its
# rounding, whatever error PyTorch's own path happens to have in them.
_STATISTIC_FLOOR = 1e-5
_TF32_STEP = 2**-10

_LONG = {torch.float64, torch.int32, torch.int64}  # have numbers that fp32 has not

_FEW = 8
"""Numbers of an fp32 output up to which PyTorch may be exact by luck, in a mean or a sum that nearly cancels."""

_CANCELLED = 8 * torch.finfo(torch.float32).eps

# Where the problem is fp32 throughout: the GPU's `rsqrt` and `exp2` err by 2 ulp, and a long sum in another order than
# PyTorch's, whose vector lanes make it nearly pairwise, by a few more.
_FP32_STEPS = 8


@dataclass(frozen=True)
class Error:
    """How far an output is from the truth: largest absolute and root-mean-square difference."""

    max: float
    rms: float


class Wrong(Exception):
    """The candidate's answer is wrong, or it touched what it must not; the text says where."""


class NotRepeatable(Wrong):
    """Two runs on the same inputs differ, though the implementation is declared deterministic."""


class NoYardstick(TuningError):
    """PyTorch's own answer is not finite where the truth is: nothing says how large an error may be."""


def error(output: torch.Tensor, truth: torch.Tensor) -> Error:
    """The error of an output against its truth; NaN or infinity anywhere gives infinity unless the truth has it too."""
    nan = output.isnan() & truth.isnan()
    if output.dtype in _LONG and output.dtype == truth.dtype:
        same, difference = (output == truth) | nan, (output.double() - truth.double()).abs()
        difference = difference if output.dtype.is_floating_point else difference.clamp(min=1.0)
    else:
        same, difference = (output.float() == truth.float()) | nan, (output.float() - truth.float()).abs()
    difference = torch.where(same, 0.0, difference)
    if difference.numel() == 0:
        return Error(0.0, 0.0)
    largest, square = torch.stack([difference.max(), difference.square().mean(dtype=torch.float64).float()]).tolist()
    infinite = largest != largest or square != square
    return Error(float("inf"), float("inf")) if infinite else Error(largest, square**0.5)


def floors(truth: torch.Tensor, dtype: torch.dtype, problem_dtype: torch.dtype, tf32: bool = False) -> Error:
    """What is allowed even where PyTorch is exact: half a rounding step of the largest value, in RMS a quarter.

    Of fp32, four steps and two; where products round to tf32, one of its steps and a half, since tensor cores cut off.
    """
    if truth.numel() == 0:
        return Error(0.0, 0.0)
    finite = torch.where(truth.isfinite(), truth, 0.0)
    statistic = dtype == torch.float32 and problem_dtype != torch.float32
    eps = torch.finfo(dtype).eps * (_FP32_STEPS if dtype == torch.float32 else 1)
    step = 2 * _STATISTIC_FLOOR if statistic else 2 * _TF32_STEP if tf32 else eps
    largest = finite.abs().max().item()
    return Error(step / 2 * largest, step / 4 * finite.square().mean(dtype=torch.float64).sqrt().item())


def cancelled(inputs: Sequence[Any], dtype: torch.dtype) -> Error:
    """What is allowed where the truth is zero throughout; `dtype` tells the problem's tensors from its statistics.

    Such an output, dq where there is one key, has no size to measure an error by, and PyTorch may be exact by luck. It
    is left of sums of products of up to three inputs, each off by some rounding steps of fp32.
    """
    sizes = [a.abs().max().item() for a in inputs if isinstance(a, torch.Tensor) and a.dtype == dtype and a.numel()]
    rounding = _CANCELLED * max(filter(math.isfinite, sizes), default=0.0) ** 3
    return Error(rounding, rounding)


def _rounded(inputs: Sequence[Any]) -> float:
    """A rounding step of fp32 at the size of the first tensor's numbers."""
    first = next(each for each in inputs if isinstance(each, torch.Tensor))
    return torch.finfo(torch.float32).eps * first.float().square().mean().sqrt().item()


class Unusual(TorchFunctionMode):
    """Inside it `torch.randn`, which problems make their inputs of, has a heavy tail ("outliers"), no positive number
    ("negative": what is padded with zeros then has another largest), or large ones alone ("large")."""

    def __init__(self, numbers: str) -> None:
        super().__init__()
        self._numbers = numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.randn:
            match self._numbers:
                case "outliers":
                    made.view(-1)[::OUTLIER_EVERY] *= OUTLIER
                case "negative":
                    made.abs_().neg_()
                case "large":
                    made.mul_(LARGE)
        return made


@dataclass
class Case:
    """One problem with one seed: its inputs, the truth, and the error each output is allowed."""

    problem: Problem
    label: str
    inputs: tuple[Any, ...]
    truth: tuple[torch.Tensor, ...]
    dtypes: tuple[torch.dtype, ...]
    allowed: tuple[Error, ...]
    yardstick: tuple[Error, ...]

    @classmethod
    def make(cls, op: Op[Any], problem: Problem, device: torch.device | str, seed: int, numbers: str = "") -> Self:
        """numbers: what is unusual about them, see `Unusual`. Raises NoYardstick where PyTorch's answer overflows,
        TuningError where nothing says what is right."""
        label = f"{problem.label} (seed {seed}{', ' if numbers else ''}{numbers})"
        if op.answers is not None:
            op.answers.learn(problem, device)
            with Unusual(numbers), Poisoned(), torch.no_grad():
                return cls._answered(problem, label, op.answers(problem, device, seed), numbers in op.answers.numbers)
        with Unusual(numbers):
            inputs = problem.inputs(device, seed)
        truth = truths(op, inputs)
        plain = op.implementations["torch"](*inputs)
        yardstick = tuple(error(output, right) for output, right in zip(plain, truth, strict=True))
        if not all(math.isfinite(theirs.max) for theirs in yardstick):
            raise NoYardstick(f"PyTorch's answer to {label} is not finite")
        allowed = []
        for output, right, theirs in zip(plain, truth, yardstick, strict=True):
            if right.numel() and not right.any():
                floor = cancelled(inputs, problem.torch_dtype)
            else:
                floor = floors(right, output.dtype, problem.torch_dtype, getattr(problem, "tf32", False))
                if output.dtype == torch.float32 and right.numel() <= _FEW:
                    step = _rounded(inputs)
                    floor = Error(max(floor.max, step), max(floor.rms, step))
            allowed.append(Error(FACTOR * theirs.max + floor.max, FACTOR * theirs.rms + floor.rms))
        dtypes = tuple(output.dtype for output in plain)
        return cls(problem, label, inputs, truth, dtypes, tuple(allowed), yardstick)

    @classmethod
    def _answered(cls, problem: Problem, label: str, answers: Answers, strict: bool) -> Self:
        """Of what configs agree on: no error of PyTorch's is the yardstick, but rounding. strict: where the inputs are
        such that a kernel may overflow, one that does is not judged by it."""
        allowed = []
        for output, steps in zip(answers.outputs, answers.steps, strict=True):
            number = output.float().isfinite()
            finite = torch.where(number, output.float(), 0.0)
            told = written(output)
            if int((told & ~number).sum()) > (0 if strict else int(told.sum()) // 2):
                raise TuningError(f"most of the results of {label} are no numbers; rules may be wanted for its inputs")
            largest = finite.abs().max().item() if finite.numel() else 0.0
            rms = finite.square().mean(dtype=torch.float64).sqrt().item() if finite.numel() else 0.0
            floor = cancelled(answers.inputs, output.dtype) if steps and not largest else Error(0.0, 0.0)
            allowed.append(Error(steps * largest + floor.max, steps / 2 * rms + floor.rms))
        dtypes = tuple(output.dtype for output in answers.outputs)
        return cls(problem, label, answers.inputs, answers.outputs, dtypes, tuple(allowed), tuple(allowed))

    def judge(self, outputs: Sequence[torch.Tensor]) -> tuple[Error, ...]:
        """The errors of these outputs. Raises Wrong where one is larger than allowed."""
        if len(outputs) != len(self.truth):
            raise Wrong(f"{len(outputs)} outputs instead of {len(self.truth)}")
        found = []
        for index, (output, truth, allowed) in enumerate(zip(outputs, self.truth, self.allowed, strict=True)):
            if output.shape != truth.shape:
                raise Wrong(f"output {index} has shape {tuple(output.shape)} instead of {tuple(truth.shape)}")
            if output.dtype != self.dtypes[index]:
                raise Wrong(f"output {index} is {output.dtype} instead of {self.dtypes[index]}")
            seen = error(output, truth)
            if not (seen.max <= allowed.max and seen.rms <= allowed.rms):
                worst = (output.float() - truth).abs().nan_to_num(torch.inf).argmax().item()
                at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
                raise Wrong(
                    f"output {index} of {self.label}: max error {seen.max:.3g} "
                    f"(allowed {allowed.max:.3g}), rms {seen.rms:.3g} (allowed {allowed.rms:.3g}), worst at {at}"
                )
            found.append(seen)
        return tuple(found)


def truths(op: Op[Any], inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """The reference's outputs on the inputs upcast to fp32, with PyTorch's reduced-precision shortcuts off.

    Where all inputs are fp32 already they become fp64: nothing is judged by a truth of its own precision.
    """
    tensors = [a for a in inputs if isinstance(a, torch.Tensor) and a.dtype.is_floating_point]
    wide = torch.float64 if all(a.dtype == torch.float32 for a in tensors) else torch.float32
    upcast = [a.to(wide) if any(a is each for each in tensors) else a for a in inputs]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            found = op.reference(*upcast)
    finally:
        torch.set_float32_matmul_precision(before)
    return found if isinstance(found, tuple) else (found,)


def trial_cases(op: Op[Any], problem: Problem, device: torch.device | str) -> list[Case]:
    """What every candidate must get right before it is timed: the problem itself first."""
    near = problem.neighbours()
    cases = [Case.make(op, problem, device, seed) for seed in SEEDS]
    cases += [Case.make(op, each, device, max(SEEDS) + 1) for each in near]
    return cases + _unusual(op, near[0] if near else problem, device, max(SEEDS) + 2)


def final_cases(op: Op[Any], problem: Problem, device: torch.device | str, seed: int) -> list[Case]:
    """The same on numbers that no candidate has met in this run, whose seed is `seed`; outliers at full size."""
    fresh = random.Random(f"finals {seed}")
    cases = [Case.make(op, each, device, fresh.randrange(1000, 1 << 30)) for each in (problem, *problem.neighbours())]
    return cases + _unusual(op, problem, device, fresh.randrange(1000, 1 << 30))


def _unusual(op: Op[Any], problem: Problem, device: torch.device | str, seed: int) -> list[Case]:
    """Without those that PyTorch cannot do either, or on which a kernel's own configs do not agree."""
    found = []
    for numbers in ("outliers", *(op.answers.numbers if op.answers else ())):
        with suppress(TuningError):
            found.append(Case.make(op, problem, device, seed, numbers))
    return found


def run_guarded(
    implementation: Implementation, config: Config | None, case: Case, kind: int = NAN
) -> tuple[torch.Tensor, ...]:
    """One poisoned run. Raises Wrong where the candidate changed an input or wrote outside its tensors."""
    guard = Poisoned(kind)
    inputs = tuple(guard.place(a, a, INPUT) if isinstance(a, torch.Tensor) else a for a in case.inputs)
    with guard, torch.no_grad():
        outputs = implementation(*inputs, config=config)
    for index, (now, before) in enumerate(zip(inputs, case.inputs, strict=True)):
        if isinstance(now, torch.Tensor) and not _same_bits(now, before):
            raise Wrong(f"changed its input {index} on {case.label}")
    if not guard.guards_intact():
        raise Wrong(f"wrote outside its tensors on {case.label}")
    guard.settle(outputs)
    return outputs


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(bits(one.contiguous()), bits(other.contiguous()))


def verify(
    implementation: Implementation, config: Config | None, cases: Sequence[Case], repeats: int = 1
) -> tuple[tuple[Error, ...], ...]:
    """Runs the candidate on every case, `repeats` more times on the first. Returns the errors, raises Wrong."""
    found, first = [], None
    for place, case in enumerate(cases):
        outputs = run_guarded(implementation, config, case, PLAIN if place == 1 else NAN)
        found.append(case.judge(outputs))
        first = first or outputs
    for turn in range(repeats if first else 0):
        _repeat(implementation, config, cases[0], first or (), KINDS[turn % len(KINDS)])
    return tuple(found)


def _repeat(
    implementation: Implementation, config: Config | None, case: Case, first: tuple[torch.Tensor, ...], kind: int
) -> None:
    """Once more, in memory of its own and beside another poison: the same bits, or as right where other bits are
    declared. What reads past the end, or what nobody wrote, may not see a NaN, but then sees a large number."""
    again = run_guarded(implementation, config, case, kind)
    if any(a.numel() and a.data_ptr() == b.data_ptr() for a, b in zip(first, again, strict=True)):
        raise Wrong(f"returned the memory of an earlier result on {case.label}")
    if not implementation.deterministic:
        case.judge(again)
    elif not all(_same_bits(a, b) for a, b in zip(first, again, strict=True)):
        raise NotRepeatable(f"two runs on {case.label} gave different bits")
