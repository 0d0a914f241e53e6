"""What runs for one problem, and how it is repeated at least cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tilebook import device as devices
from tilebook.assembler import unverified
from tilebook.device import Device
from tilebook.op import Config, Implementation, Problem
from tilebook.replay import Plan, record

Outputs = tuple[torch.Tensor, ...]
Source = Literal["exact", "nearest", "default", "fallback", "forced"]

# The first call may compile, and what is called once is not worth a plan.
_RECORDED_CALL = 2

_COMPILERS = ("triton", "ptxas")


@dataclass(slots=True, eq=False)
class Choice:
    """An implementation and its config for one problem on one GPU, and why.

    `calls` counts how often it ran; `plan` repeats it at least cost. `spare` runs instead once this one has raised
    where the spare did not; `instead` makes the spare. `native` says that PyTorch's own function would run the
    same here, so that the call may be left to it; `backward` is what the backward pass would run; `aligned` says that
    the tensors of its calls lie as kernels that load whole vectors want them, and `kept` that it serves calls to come.
    `verified` says that this very config was found right on this very problem, as that of a verdict is which was
    measured with the compiler that is here; None leaves it to the verdict.
    `own` is our own kernel for the same problem, once somebody has asked for it. `probe` settles a problem that no
    verdict is on, in calls that it looks at (see `dispatch.probing`).
    """

    implementation: Implementation
    config: Config | None
    source: Source
    problem: Problem
    gpu: Device | None = None
    layer: str = ""
    verdict: Any = None
    instead: Callable[[Choice], Choice | None] = field(default=lambda choice: None, repr=False)
    calls: int = 0
    plan: Plan | None = None
    spare: Choice | None = None
    native: bool = field(init=False)
    backward: Choice | None = None
    own: Choice | None = None
    aligned: bool = True
    kept: bool = False
    probe: Any = None
    verified: bool | None = None

    def __post_init__(self) -> None:
        forced = self.source == "forced"
        if self.verified is None:
            self.verified = self.source == "exact" and (self.verdict is None or _compiled_here(self.verdict))
        op, name = self.implementation.op, self.implementation.name
        self.native = not forced and (self.gpu is None or op.native(name, self.problem, self.gpu))

    @property
    def because(self) -> str:
        """What runs and why, for people."""
        op, why = self.implementation.op, f"by {self.source}"
        if self.verdict is not None:
            of = op.problem.from_key(self.verdict.problem)
            on = "just this problem" if self.source == "exact" else of.label
            why = f"by the {self.verdict.status} verdict on {on}, layer {self.layer}"
        elif self.source == "default":
            why = "our kernel's default: no verdict is near that can serve"
        elif self.source == "fallback":
            why = "PyTorch's own: no verdict has another ahead, or no kernel takes it"
        problem = f"{self.problem.label} {getattr(self.problem, 'dtype', '')}"
        return f"{op.name} {problem}: {self.implementation.name} {self.config or ''}".rstrip() + f" ({why})"

    def __call__(self, *args: Any) -> Outputs:
        """One call of the op, by the choice or what is compared with it."""
        if self.probe is not None and self.probed:
            return self.probe(self.usual, args)  # type: ignore[no-any-return]
        return self.usual(*args)

    @property
    def open(self) -> bool:
        """Does a probe look at such calls, so that nothing is settled about them?"""
        return self.probe is not None and bool(self.probe.active)

    @property
    def probed(self) -> bool:
        """Does it look at calls made now? At none that is captured."""
        return self.open and not torch.cuda.is_current_stream_capturing()

    def usual(self, *args: Any) -> Outputs:
        """One call by the choice. One that raises where its spare does not is replaced, now and from now on."""
        self.calls += 1
        if self.plan is not None:
            return self.plan(args)
        if self.spare is not None:
            return self.spare(*args)
        if self.calls == 1 and self._compiles and _capturing(args[0]):
            # Compiling and loading a kernel while a graph is captured can spoil the graph: PyTorch's own serves.
            self.calls = 0
            return self.implementation.op.uncompiled(self.problem, self.gpu)(*args)
        try:
            if self.calls == _RECORDED_CALL and self._compiles and not self.implementation.external and args[0].is_cuda:
                outputs, self.plan = record(self._run, args)
                return outputs
            return self._run(*args)
        except torch.OutOfMemoryError:
            self.calls -= 1  # it may have been before anything was compiled
            raise
        except Exception as broken:
            return self._serve_instead(broken, args)

    @property
    def _compiles(self) -> bool:
        return self.implementation.space is not None or bool(self.implementation.external)

    def _serve_instead(self, broken: Exception, args: Sequence[Any]) -> Outputs:
        spare = self.instead(self)
        if spare is None:
            raise broken
        try:
            outputs = spare(*args)
        except torch.OutOfMemoryError:
            self.calls -= 1
            raise
        except Exception:
            # Nothing takes this call, so that the call is at fault, and the choice stays as good as it was.
            self.calls -= 1
            raise broken from None
        self.spare = spare
        warnings.warn(
            f"tilebook: {self.implementation.op.name} {self.problem.label}: {self.implementation.name} "
            f"{self.config or ''} failed ({type(broken).__name__}: {str(broken)[:200]}); "
            f"{spare.implementation.name} serves instead",
            RuntimeWarning,
            stacklevel=4,
        )
        return outputs

    def _run(self, *args: Any) -> Outputs:
        first = args[0]
        if self.config is None:
            return self.implementation(*args)
        # What lies otherwise than the tensors it was verified with is other machine code.
        with nullcontext() if self.verified and self.aligned else unverified():
            if first.is_cuda and torch.cuda.current_device() != first.get_device():
                with torch.cuda.device(
                    first.device
                ):  # Triton starts kernels on the current GPU, PyTorch on the tensor's
                    return self.implementation(*args, config=self.config)
            return self.implementation(*args, config=self.config)


def _compiled_here(verdict: Any) -> bool:
    """Was a verdict's config run, and as it is compiled here?"""
    then, now = verdict.environment, devices.environment()
    return bool(verdict.measured) and all(then.get(name) in (None, now.get(name)) for name in _COMPILERS)


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
