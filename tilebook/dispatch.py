"""Runs an op with the winner for this GPU and problem: memo → snapshot → nearest → default.

Never tunes, never waits, never raises into training: where the registry is missing or broken, or a winner does not run
here, the default config computes the right numbers, after one warning. What a registry revokes never runs.
"""

from __future__ import annotations

import atexit
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tilebook import device as devices
from tilebook import registry as store
from tilebook.device import Device
from tilebook.op import Config, Implementation, Op, Problem
from tilebook.replay import Plan, record

Outputs = tuple[torch.Tensor, ...]
Source = Literal["exact", "nearest", "default", "fallback", "forced"]

FARTHEST = 8.0
"""A verdict serves problems up to this distance: a factor of 256 in one dimension, or less in several."""

# Choices kept in memory; a program whose shapes never repeat must not grow for ever.
_MOST_CHOICES = 10_000

# The first call may compile, and what is called once is not worth a plan.
_RECORDED_CALL = 2

# An implementation of ours reaches about this share of the roofline: enough to weigh one miss against another.
_TYPICAL_EFFICIENCY = 0.5


@dataclass(slots=True)
class Choice:
    """What runs for one problem, and why. `calls` counts how often it did; `plan` repeats it at least cost.

    `spare` runs instead once this one has raised; `following` holds the choices of calls that follow from this one's.
    """

    implementation: Implementation
    config: Config | None
    source: Source
    problem: Problem
    gpu: Device | None = None
    layer: str = ""
    verdict: store.Verdict | None = None
    calls: int = 0
    plan: Plan | None = None
    spare: Choice | None = None
    following: dict[tuple[Any, ...], Choice] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Outputs:
        """One call of the op. A choice that raises is replaced, for this call and the following ones."""
        self.calls += 1
        if self.plan is not None:
            return self.plan(args)
        if self.spare is not None:
            return self.spare(*args)
        try:
            if self.calls == _RECORDED_CALL and self._replayable and args[0].is_cuda:
                outputs, self.plan = record(self._run, args)
                return outputs
            return self._run(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as broken:
            self.spare = _spare(self, broken)
            return self.spare(*args)

    def follow(self, op: Op[Any], new: tuple[torch.Tensor, ...], *args: Any) -> Outputs:
        """One call of another op, as `run` makes it, whose arguments follow from those of this choice's own call.

        All but `new` are its arguments or its outputs, and the shapes and dtypes of `new` follow from theirs: only
        strides and alignment of `new` remain to be looked at, which spares the backward pass the making of a key.
        """
        key = (op, *[part for each in new for part in (each.stride(), each.data_ptr() & 15)])
        choice = self.following.get(key) if _forced is None else None
        if choice is None:
            if _forced is not None or self.source == "forced":
                return run(op, *args)
            choice = _choice(op, args)
            if _settled(choice):
                self.following[key] = choice
        return choice(*args)

    @property
    def _replayable(self) -> bool:
        return self.implementation.space is not None and not self.implementation.external

    def _run(self, *args: Any) -> Outputs:
        first = args[0]
        if self.config is not None and first.is_cuda and torch.cuda.current_device() != first.get_device():
            with torch.cuda.device(first.device):  # Triton starts kernels on the current GPU, PyTorch on the tensor's
                return self.implementation(*args, config=self.config)
        return self.implementation(*args, config=self.config)


class Snapshot:
    """The verdicts for one GPU model and the revocations, read once and kept in memory."""

    def __init__(self, gpu: Device, explicit: str | None = None) -> None:
        self.gpu = gpu
        self._verdicts: dict[str, list[tuple[str, store.Verdict, Problem]]] = {}
        try:
            layers = store.Layers.default(explicit)
            found, revoked = layers.read(device=store.Device(*gpu.identity))
            problems = list(layers.problems)
        except Exception as broken:  # whatever is wrong with it, training goes on
            found, revoked, problems = [], [], [f"the registry cannot be read: {broken}"]
        self._raw = found
        self._denied = store.DenyList(revoked, devices.package_version("triton"))
        if problems:
            warnings.warn(f"tilebook: {'; '.join(problems)}; default configs are used", RuntimeWarning, stacklevel=2)

    def verdicts(self, op: Op[Any]) -> list[tuple[str, store.Verdict, Problem]]:
        """The verdicts that may be served for this op: trusted, and made with the kernels as they are now."""
        if op.name not in self._verdicts:
            kept = []
            for layer, verdict in self._raw:
                if verdict.op == op.name and verdict.trusted and verdict.kernel == op.digest:
                    try:
                        kept.append((layer, verdict, op.problem.from_key(verdict.problem)))
                    except (TypeError, ValueError):
                        continue
            self._verdicts[op.name] = kept
        return self._verdicts[op.name]

    def choose(self, op: Op[Any], problem: Problem) -> Choice:
        """The exact verdict's winner, else the nearest verdict's whose config is feasible here, else the default."""
        return next(choice for choice in self.candidates(op, problem) if self.revocation(choice) is None)

    def default(self, op: Op[Any], problem: Problem) -> Choice:
        """What runs where no verdict serves: our kernel with its default config, or what may stand in for it."""
        return next(choice for choice in self._defaults(op, problem) if self.revocation(choice) is None)

    def revocation(self, choice: Choice) -> store.Revocation | None:
        """Why a choice may not run, or None where it may."""
        implementation = choice.implementation
        op = implementation.op
        if op.name not in self._denied.ops:
            return None  # before its source is asked for, which may not be here
        kernel = implementation.digest
        return self._denied.find(op.name, kernel, self.gpu.arch, implementation.name, choice.config or {})

    def candidates(self, op: Op[Any], problem: Problem) -> Iterator[Choice]:
        """All that can run this problem here, revoked or not, best first; PyTorch's own implementation ends it."""
        found = self.verdicts(op)
        exact = [each for each in found if each[1].problem == problem.key]
        near = sorted(
            ((problem.distance(p), not v.measured, layer, v) for layer, v, p in found if v.problem != problem.key),
            key=lambda each: each[:2],
        )
        for layer, verdict, _ in exact:
            for candidate in self._feasible(op, problem, verdict):
                yield Choice(*candidate, "exact", problem, self.gpu, layer, verdict)
        for distance, _, layer, verdict in near:
            if distance > FARTHEST:
                break
            for candidate in self._feasible(op, problem, verdict):
                yield Choice(*candidate, "nearest", problem, self.gpu, layer, verdict)
        yield from self._defaults(op, problem)

    def _feasible(
        self, op: Op[Any], problem: Problem, verdict: store.Verdict
    ) -> Iterator[tuple[Implementation, Config | None]]:
        """The candidates of a verdict that can run this problem here, best first, but those whose source changed."""
        for name, values in verdict.ranking():
            implementation = op.implementations.get(name)
            if implementation is None or not implementation.can_run(problem, self.gpu):
                continue
            if implementation.digest not in ("", verdict.kernel_of(name)):
                continue
            space = implementation.space
            if space is None:
                yield implementation, None
                continue
            # One that won before it had a space ran as it does by default now.
            config = Config(values) if values else space.default(problem, self.gpu)
            if space.contains(config) and space.reject(problem, config, self.gpu) is None:
                yield implementation, config

    def _defaults(self, op: Op[Any], problem: Problem) -> Iterator[Choice]:
        """Our kernel with its default config; in its place configs verified on other problems, then its neighbours."""
        ours = op.tunable
        if ours.can_run(problem, self.gpu) and ours.space is not None and ours.proven(problem):
            configs = ours.space.defaults(problem, self.gpu)
            yield Choice(ours, next(configs), "default", problem, self.gpu)
            for layer, verdict, _ in self.verdicts(op):
                for candidate in self._feasible(op, problem, verdict) if verdict.measured else ():
                    if candidate[0] is ours:
                        yield Choice(*candidate, "default", problem, self.gpu, layer)
            for config in configs:
                yield Choice(ours, config, "default", problem, self.gpu)
        yield _pytorch(op, problem, self.gpu)


def _pytorch(op: Op[Any], problem: Problem, gpu: Device | None = None) -> Choice:
    """What runs where no kernel can, or may."""
    return Choice(op.implementations["torch"], None, "fallback", problem, gpu)


_lock = threading.Lock()
_memo: dict[tuple[Any, ...], Choice] = {}
_snapshots: dict[int, Snapshot] = {}
_forced: tuple[str, Config | None] | None = None
_warned: set[str] = set()


@contextmanager
def use(implementation: str, config: Config | None = None) -> Iterator[None]:
    """Inside the block every op that has it runs this implementation, with this config or its default.

    For tests and comparisons: it holds for what is revoked, and for tensors on the CPU too (a Triton kernel then needs
    `TRITON_INTERPRET=1`).
    """
    global _forced
    previous, _forced = _forced, (implementation, config)
    try:
        yield
    finally:
        _forced = previous


def reload() -> None:
    """Forgets what was read: the next call reads the registry again."""
    with _lock:
        _memo.clear()
        _snapshots.clear()
        _warned.clear()


def may_serve(x: torch.Tensor) -> bool:
    """Is a call with this tensor one that kernels may serve: on a GPU, or inside `use`, and not being compiled?"""
    return (x.is_cuda or _forced is not None) and not torch.compiler.is_compiling()


def known(op: Op[Any], *args: Any) -> Choice | None:
    """The choice for a call like one made before, in about a microsecond an argument; else None.

    Such a call needs no checks: its shapes, strides, dtypes and other arguments passed them the first time.
    """
    usual = _forced is None and args[0].is_cuda and not torch.compiler.is_compiling()
    return _memo.get(_key(op, args)) if usual else None


def find(op: Op[Any], *args: Any) -> Choice | None:
    """What runs this call, or None where no kernel can: the family's public function then runs PyTorch's own.

    So it does under `torch.compile`, which has kernels of its own and could not look into ours.
    """
    if torch.compiler.is_compiling():
        return None
    if _forced is not None:
        return _force(op, args)
    if not args[0].is_cuda:
        return None
    choice = _choice(op, args)
    return None if choice.source == "fallback" else choice


def run(op: Op[Any], *args: Any) -> Outputs:
    """One call of the op with the implementation and config chosen for it; PyTorch's where no kernel can run it."""
    choice = _force(op, args) if _forced is not None else None
    return (choice or _choice(op, args))(*args)


def _key(op: Op[Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """All that a choice and its plan depend on: whose call, on which GPU, and what the arguments are like."""
    key: list[Any] = [op, args[0].get_device()]
    for each in args:
        if isinstance(each, torch.Tensor):
            strides = None if each.is_contiguous() else each.stride()
            key += (each.shape, strides, each.dtype, each.data_ptr() & 15)
        else:
            key.append(each)
    return tuple(key)


def _choice(op: Op[Any], args: Sequence[Any]) -> Choice:
    key = _key(op, args)
    choice = _memo.get(key)
    if choice is None:
        choice = choose(op, op.problem.of(*args), args[0].device)
        if _settled(choice):
            while len(_memo) >= _MOST_CHOICES:
                _memo.pop(next(iter(_memo)), None)
            _memo[key] = choice
    return choice


def _settled(choice: Choice) -> bool:
    """May this choice be kept? Not one made blind, because a graph was being captured."""
    return choice.gpu is None or choice.gpu in [snapshot.gpu for snapshot in _snapshots.values()]


def choose(op: Op[Any], problem: Problem, device: torch.device) -> Choice:
    """What would run for this problem on this device. Reads the registry once per process and device."""
    if device.type != "cuda":
        return _pytorch(op, problem)
    index = device.index or 0
    gpu = devices.current(index)
    with _lock:
        if index not in _snapshots:
            if torch.cuda.is_current_stream_capturing():
                # Nothing may be read now, so nobody knows whether the default is revoked.
                return _pytorch(op, problem, gpu)
            _snapshots[index] = Snapshot(gpu)
        snapshot = _snapshots[index]
    try:
        return snapshot.choose(op, problem)
    except Exception as broken:  # a verdict that nobody thought of must not stop a training run
        _warn_once(f"{op.name} {problem.label}", f"no verdict could be used ({broken}); the default serves")
        return snapshot.default(op, problem)


def _force(op: Op[Any], args: Sequence[Any]) -> Choice | None:
    """The choice that `use` asks for, if the op has it and it can run this."""
    assert _forced is not None
    name, config = _forced
    implementation, problem = op.implementations.get(name), op.problem.of(*args)
    if implementation is None or not implementation.supports(problem):
        return None
    space = implementation.space
    if space is not None and config is not None:
        config = space.config(config)
    if space is None or (config is not None and not space.contains(config)):
        config = None
    if space is not None and config is None:
        gpu = devices.current(args[0].get_device()) if args[0].is_cuda else devices.find("H200")
        config = space.default(problem, gpu)
    return Choice(implementation, config, "forced", problem)


def _spare(broken: Choice, error: Exception) -> Choice:
    """What serves instead of a choice that raised: the default config, then PyTorch, whose errors are real."""
    op = broken.implementation.op
    plain = _pytorch(op, broken.problem, broken.gpu)
    snapshot = next((each for each in _snapshots.values() if each.gpu == broken.gpu), None)
    spare = plain if snapshot is None else snapshot.default(op, broken.problem)
    if (spare.implementation, spare.config) == (broken.implementation, broken.config):
        spare = plain
    if broken.implementation is plain.implementation or broken.source == "forced":
        raise error
    _warn_once(
        f"{op.name} {broken.problem.label}",
        f"{broken.implementation.name} {broken.config or ''} failed ({type(error).__name__}: {str(error)[:200]}); "
        f"{spare.implementation.name} serves instead",
    )
    return spare


def _warn_once(key: str, text: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"tilebook: {key}: {text}", RuntimeWarning, stacklevel=4)


def misses() -> list[store.Miss]:
    """The problems that this process asked for and no verdict covers, heaviest first."""
    found = []
    for choice in list(_memo.values()):
        if choice.gpu is None or choice.source == "exact" or not choice.calls:
            continue
        gpu = choice.gpu
        where = store.Device(*gpu.identity)
        time_ms = 1e3 * choice.problem.floor_s(gpu) / _TYPICAL_EFFICIENCY
        if math.isfinite(time_ms):
            found.append(store.Miss(choice.implementation.op.name, choice.problem.key, where, choice.calls, time_ms))
    return sorted(found, key=lambda miss: -miss.calls * miss.time_ms)


@atexit.register
def _store_misses() -> None:
    """Adds this process's misses to the ledger, where a registry that can be written exists already."""
    try:
        counted = misses()
        there = [
            target for name, target in store.Layers.default().layers if name != "shipped" and Path(target).exists()
        ]
        if counted and there:
            with store.Registry.open(there[0], write=True) as registry:
                registry.count_misses(counted)
    except Exception:  # the program is over; what it computed stands
        return
