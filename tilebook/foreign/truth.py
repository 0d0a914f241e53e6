"""What is right, where the only word for it is the kernel's own: what most of its configs agree on.

The first configs that run vote. A tensor that most of them change is an output; one of them alone has damaged it. An
output whose old contents show in the new ones is read too, and begins with numbers instead of poison. A config in whose
run a process has ended, or was ended, has no vote in the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tilebook.errors import TuningError, one_line
from tilebook.foreign.call import WRITTEN, Call
from tilebook.foreign.kernel import is_given
from tilebook.foreign.ops import RECORDED
from tilebook.op import Answers, Config, Op

VOTERS = 3
"""Configs that say together what is right. Of a kernel whose config the program names, that one does alone."""

_TRIED = 12  # of those that may run, to find so many that do
_UNFIT = ("CompilationError", "PTXASError", "OutOfResources", "OutOfMemoryError", "CompileTimeAssertionFailure")
"""What a config may raise without anything being wrong with the inputs."""

_TF32_STEP = 2**-10
_FP32_STEP, _FP64_STEP = 2**-13, 2**-40  # sums of thousands of numbers, in any order
_FEW, _LUCK = 8, 2**-7  # numbers of an output that may nearly cancel, and how far apart they are then
_INT8_STEP = 2**-6  # where it is a rounded number, the last place of which may be another
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Truth:
    """`Op.answers` of a kernel."""

    def __init__(self, foreign: Any, op: Op[Any]) -> None:
        self._foreign, self._op = foreign, op
        self._voters: dict[Any, list[Config]] = {}
        self.numbers: tuple[str, ...] = () if foreign.kernel.multiplies else ("negative", "large")

    def __call__(self, problem: Any, device: Any, seed: int) -> Answers:
        """Raises TuningError where the configs do not agree, or the kernel changes nothing."""
        inputs = problem.inputs(device, seed)
        found = [(config, self._op.tunable(*inputs, config=config)) for config in self._voters[problem.pattern]]
        steps = _steps(inputs, found[0][1], self._foreign.kernel.multiplies or self._reference is not None)
        votes = [sum(_agree(mine, theirs, steps) for _, theirs in found) for _, mine in found]
        best = votes.index(max(votes))
        if 2 * votes[best] <= len(found) and self._reference is None:
            raise TuningError(f"its configs do not agree on {problem.label}: {'; '.join(str(c) for c, _ in found)}")
        return Answers(inputs, self._referred(problem.call, inputs, found[best][1]), steps)

    @property
    def _reference(self) -> Callable[..., Any] | None:
        found: Callable[..., Any] | None = getattr(self._foreign.kernel.tuner, "reference", None)
        return found

    def learn(self, problem: Any, device: Any) -> None:
        """What the kernel does to its tensors, and who votes: by the first of the calls that are alike in that."""
        if problem.pattern in self._voters:
            return
        foreign, call, pattern = self._foreign, problem.call, problem.pattern
        foreign.roles[pattern] = {}
        names = [name for name, each in call.tensors.items() if not each.same]
        inputs = problem.inputs(device, 0)
        changed: dict[Config, frozenset[str]] = {}
        for config, after in self._runs(problem, inputs):
            changed[config] = frozenset(
                n for n, x, y in zip(names, inputs, after, strict=False) if not _bits(x).equal(_bits(y))
            )
            if len(changed) == VOTERS:
                break
        outputs, votes = Counter(changed.values()).most_common(1)[0]
        if 2 * votes <= len(changed):
            raise TuningError(f"its configs do not change the same tensors: {'; '.join(map(str, changed))}")
        if not outputs:
            unknown = [n for n in names if not call.tensors[n].torch_dtype.is_floating_point]
            rules = f"; rules may be wanted for {', '.join(unknown)}" if unknown else ""
            raise TuningError(f"the kernel writes nothing on the inputs that were made for it{rules}")
        voters = [config for config, its in changed.items() if its == outputs]
        roles = {name: "out" for name in names if name in outputs}
        read = self._read(problem, inputs, names, outputs, voters[0])
        roles |= {name: "inout" for name in read}
        tuner = foreign.kernel.tuner
        roles |= {name: "inout" for name in tuner.restore_value if name in roles}
        roles |= {name: "zero" for name in tuner.reset_to_zero if name in roles}
        roles |= {name: rule["role"] for name, rule in foreign.rules.items() if "role" in rule and name in names}
        if not set(roles.values()) & set(WRITTEN):
            raise TuningError("its rules leave the kernel no outputs")
        foreign.roles[pattern] = roles
        self._voters[pattern] = voters

    def _runs(self, problem: Any, inputs: Sequence[Any]) -> Iterator[tuple[Config, list[Any]]]:
        """The configs that run, each with what it has left of copies of the inputs."""
        tunable, broken = self._op.tunable, ""
        assert tunable.space is not None
        ran = False
        listed = tunable.space.feasible(problem, None)[:_TRIED]  # type: ignore[arg-type]
        if is_given(self._foreign.kernel.tuner):
            listed = [tunable.space.default(problem, None)]  # type: ignore[arg-type]
        for config in listed:
            mine = [_copy(x) if isinstance(x, torch.Tensor) else x for x in inputs]
            note = _Note(self._op.name, problem, config)
            if note.left():
                broken = f"{config} ends its process, or hangs"
                continue
            try:
                tunable(*mine, config=config)
                _wait(mine)
            except Exception as error:
                if not any(kind.__name__ in _UNFIT for kind in type(error).__mro__):
                    raise  # and the note stays, for this process is of no more use
                broken = f"{config}: {one_line(error)}"
                note.remove()
                continue
            note.remove()
            ran = True
            yield config, mine
        if not ran:
            raise TuningError(f"none of its configs runs here ({broken})" if broken else "none of its configs may run")

    def _read(
        self, problem: Any, inputs: Sequence[Any], names: Sequence[str], outputs: frozenset[str], config: Config
    ) -> set[str]:
        """The outputs whose old contents show in the new: two runs over different ones leave different numbers."""
        before, after = [], []
        for fill in (1, 2):
            mine = [_copy(x) if isinstance(x, torch.Tensor) else x for x in inputs]
            for name, x in zip(names, mine, strict=False):
                if name in outputs:
                    x.fill_(fill / 4 if x.dtype.is_floating_point else fill - 1)
            before.append([_copy(x) if isinstance(x, torch.Tensor) else x for x in mine])
            self._op.tunable(*mine, config=config)
            after.append(mine)
        found = set()
        for place, name in enumerate(names):
            if name in outputs:
                (one, other), (left, right) = ([_bits(x[place]) for x in both] for both in (before, after))
                untouched = (left == one) & (right == other)
                if bool((~untouched & (left != right)).any()):
                    found.add(name)
        return found

    def _referred(self, call: Call, inputs: Sequence[Any], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The outputs as the kernel's reference has them, where it has one; what it says nothing of, as they are."""
        if (reference := self._reference) is None:
            return outputs
        *given, problem = inputs
        named = self._foreign.arguments(call, given)
        wide = {
            name: value.float() if isinstance(value, torch.Tensor) and value.dtype.is_floating_point else value
            for name, value in named.items()
        }
        accepted = inspect.signature(reference).parameters
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in accepted.values()):
            wide = {name: value for name, value in wide.items() if name in accepted}
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            answer = reference(**wide)
        finally:
            torch.set_float32_matmul_precision(precision)
        roles = self._foreign.roles[problem.pattern]
        written = [name for name in call.tensors if roles.get(name, "in") in WRITTEN]
        if not isinstance(answer, dict):
            answer = dict(zip(written, answer if isinstance(answer, tuple) else (answer,), strict=True))
        told = []
        for name, output in zip(written, outputs, strict=True):
            whole = _copy(output)
            if name in answer:
                each = call.tensors[name]
                whole.as_strided(each.shape, each.stride).copy_(answer[name])
            told.append(whole)
        return tuple(told)


class _Note:
    """Says to the processes of a tune that a config is being run for the first time: one that hangs, or ends its
    process, would do so in the next, too."""

    def __init__(self, op: str, problem: Any, config: Config) -> None:
        name = hashlib.sha256("\n".join((op, *map(str, problem.pattern), config.key)).encode()).hexdigest()
        folder = os.environ.get(RECORDED)
        self._file = None if folder is None else Path(folder) / f"{name}.trying"

    def left(self) -> bool:
        """Has a process written it that is there no longer? Else this one does."""
        if self._file is None:
            return False
        with contextlib.suppress(OSError, ValueError):
            return not Path("/proc", str(int(self._file.read_text()))).exists()
        self._file.write_text(str(os.getpid()))
        return False

    def remove(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _wait(tensors: Sequence[Any]) -> None:
    """Until a GPU has run what it was given: only then it says what was wrong with that."""
    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in tensors):
        torch.cuda.synchronize()


def _copy(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(_BITS[x.element_size()])


def _steps(inputs: Sequence[Any], outputs: Sequence[torch.Tensor], rough: bool) -> tuple[float, ...]:
    """How far apart two right configs may be, by the coarsest dtype in which a number may have been rounded.

    rough: where products round to tf32, or a reference need not compute to the last digit."""
    floats = [x.dtype for x in inputs if isinstance(x, torch.Tensor) and x.dtype.is_floating_point]
    single = _TF32_STEP if rough else _FP32_STEP
    mixed = min(map(torch.Tensor.numel, outputs)) <= _FEW and any(map(_mixed, inputs))
    coarse = max([torch.finfo(each).eps for each in floats if each.itemsize < 4], default=single)

    def step(dtype: torch.dtype) -> float:
        if not dtype.is_floating_point:
            return _INT8_STEP if dtype is torch.int8 and floats else 0.0
        if dtype is torch.float64 and set(floats) == {torch.float64} and not rough:
            return _FP64_STEP
        return coarse if dtype.itemsize >= 4 else 2 * torch.finfo(dtype).eps

    return tuple(
        max(step(each.dtype), _LUCK if mixed and each.numel() <= _FEW and each.dtype.is_floating_point else 0.0)
        for each in outputs
    )


def _mixed(x: Any) -> bool:
    """Are its numbers of both signs, so that a sum of them may be nothing?"""
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
        return False
    return bool((x.float() < 0).any() & (x.float() > 0).any())


def _agree(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor], steps: Sequence[float]) -> bool:
    for a, b, step in zip(one, other, steps, strict=True):
        if not (step or torch.equal(a, b)):
            return False
        x, y = a.double(), b.double()
        if not bool((x.isnan() == y.isnan()).all()) or not x.numel():
            return not x.numel()
        apart = torch.where((x == y) | x.isnan(), 0.0, (x - y).abs())
        largest = torch.where(x.isfinite(), x, 0.0).abs().max()
        if not bool(apart.max() <= step * largest):
            return False
    return True
