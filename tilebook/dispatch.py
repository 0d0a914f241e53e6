"""Runs an op with the winner for this GPU and problem: memo → snapshot → nearest → default.

Never tunes, never waits, never raises into training: where the registry is missing or broken, or a winner does not run
here, the default config computes the right numbers, after one warning.
"""

from __future__ import annotations

import atexit
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tilebook import device as devices
from tilebook import registry as store
from tilebook.device import Device
from tilebook.op import Config, Implementation, Op, Problem
from tilebook.replay import Plan, record

Source = Literal["exact", "nearest", "default", "fallback"]

FARTHEST = 8.0
"""A verdict serves problems up to this distance: a factor of 256 in one dimension, or less in several."""

# The first call may compile, and what is called once is not worth a plan.
_RECORDED_CALL = 2

# An implementation of ours reaches about this share of the roofline: enough to weigh one miss against another.
_TYPICAL_EFFICIENCY = 0.5


@dataclass(slots=True)
class Choice:
    """What runs for one problem, and why. `calls` counts how often it did; `plan` repeats it at least cost."""

    implementation: Implementation
    config: Config | None
    source: Source
    problem: Problem
    gpu: Device | None = None
    layer: str = ""
    verdict: store.Verdict | None = None
    calls: int = 0
    plan: Plan | None = None

    def __call__(self, *args: Any) -> tuple[torch.Tensor, ...]:
        if self.calls == _RECORDED_CALL and self.implementation.space is not None and args[0].is_cuda:
            outputs, self.plan = record(self._run, args)
            return outputs
        return self._run(*args)

    def _run(self, *args: Any) -> tuple[torch.Tensor, ...]:
        return self.implementation(*args, config=self.config)


class Snapshot:
    """The verdicts for one GPU model, read once and kept in memory."""

    def __init__(self, gpu: Device, explicit: str | None = None) -> None:
        self.gpu = gpu
        self._verdicts: dict[str, list[tuple[str, store.Verdict, Problem]]] = {}
        try:
            layers = store.Layers.default(explicit)
            found = layers.verdicts(device=store.Device(gpu.name, gpu.arch, gpu.sm_count))
            problems = list(layers.problems)
        except Exception as broken:  # whatever is wrong with it, training goes on
            found, problems = [], [f"the registry cannot be read: {broken}"]
        self._raw = found
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
        found = self.verdicts(op)
        exact = [each for each in found if each[1].problem == problem.key]
        near = sorted(
            ((problem.distance(p), not v.measured, layer, v) for layer, v, p in found if v.problem != problem.key),
            key=lambda each: each[:2],
        )
        for layer, verdict, _ in exact:
            if (candidate := self._first(op, problem, verdict)) is not None:
                return Choice(*candidate, "exact", problem, self.gpu, layer, verdict)
        for distance, _, layer, verdict in near:
            if distance > FARTHEST:
                break
            if (candidate := self._first(op, problem, verdict)) is not None:
                return Choice(*candidate, "nearest", problem, self.gpu, layer, verdict)
        return default(op, problem, self.gpu)

    def _first(
        self, op: Op[Any], problem: Problem, verdict: store.Verdict
    ) -> tuple[Implementation, Config | None] | None:
        """The best candidate of a verdict that can run this problem here."""
        for name, values in verdict.ranking():
            implementation = op.implementations.get(name)
            if implementation is None or not implementation.can_run(problem, self.gpu):
                continue
            space = implementation.space
            if space is None:
                return implementation, None
            config = Config(values)
            if space.contains(config) and space.reject(problem, config, self.gpu) is None:
                return implementation, config
        return None


def default(op: Op[Any], problem: Problem, gpu: Device) -> Choice:
    """What runs where nothing is known: our kernel with its default config, else PyTorch."""
    ours = op.tunable
    if ours.can_run(problem, gpu) and ours.space is not None:
        return Choice(ours, ours.space.default(problem, gpu), "default", problem, gpu)
    return Choice(op.implementations["torch"], None, "fallback", problem, gpu)


_lock = threading.Lock()
_memo: dict[tuple[Any, ...], Choice] = {}
_snapshots: dict[int, Snapshot] = {}
_forced: tuple[str, Config | None] | None = None
_warned: set[str] = set()


@contextmanager
def use(implementation: str, config: Config | None = None) -> Iterator[None]:
    """Inside the block every op that has it runs this implementation, with this config or its default.

    For tests and comparisons; it holds for tensors on the CPU too (a Triton kernel then needs `TRITON_INTERPRET=1`).
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


def serves(op: Op[Any], *args: Any) -> bool:
    """Can a kernel run this call? If not, the family's public function runs PyTorch's own implementation."""
    if _forced is None:
        return args[0].is_cuda and _choice(op, args).source != "fallback"
    forced = op.implementations.get(_forced[0])
    return forced is not None and forced.supports(op.problem.of(*args))


def run(op: Op[Any], *args: Any) -> tuple[torch.Tensor, ...]:
    """One call of the op with the implementation and config chosen for it."""
    if _forced is not None and _forced[0] in op.implementations:
        return _run_forced(op, args)
    choice = _choice(op, args)
    choice.calls += 1
    try:
        if choice.plan is not None:
            return choice.plan(args)
        return choice(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as broken:
        return _replace(op, args, choice, broken)


def _key(op: Op[Any], args: Sequence[Any]) -> tuple[Any, ...]:
    key: list[Any] = [op.name, args[0].device]
    for each in args:
        if isinstance(each, torch.Tensor):
            key += (each.shape, each.stride(), each.dtype, each.data_ptr() % 16 == 0)
        else:
            key.append(each)
    return tuple(key)


def _choice(op: Op[Any], args: Sequence[Any]) -> Choice:
    key = _key(op, args)
    choice = _memo.get(key)
    if choice is None:
        choice = choose(op, op.problem.of(*args), args[0].device)
        # A choice made blind, because a graph was being captured, is not kept.
        if choice.gpu is None or choice.gpu in [s.gpu for s in _snapshots.values()]:
            _memo[key] = choice
    return choice


def choose(op: Op[Any], problem: Problem, device: torch.device) -> Choice:
    """What would run for this problem on this device. Reads the registry once per process and device."""
    if device.type != "cuda":
        return Choice(op.implementations["torch"], None, "fallback", problem)
    index = device.index or 0
    gpu = devices.current(index)
    with _lock:
        if index not in _snapshots:
            if torch.cuda.is_current_stream_capturing():
                return default(op, problem, gpu)
            _snapshots[index] = Snapshot(gpu)
        snapshot = _snapshots[index]
    try:
        return snapshot.choose(op, problem)
    except Exception as broken:  # a verdict that nobody thought of must not stop a training run
        _warn_once(f"{op.name} {problem.label}", f"no verdict could be used ({broken}); the default serves")
        return default(op, problem, gpu)


def _run_forced(op: Op[Any], args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    assert _forced is not None
    name, config = _forced
    chosen = op.implementations[name]
    if chosen.space is None or (config is not None and not chosen.space.contains(config)):
        config = None
    if chosen.space is not None and config is None:
        gpu = devices.current(args[0].device.index or 0) if args[0].is_cuda else devices.find("H200")
        config = chosen.space.default(op.problem.of(*args), gpu)
    return chosen(*args, config=config)


def _replace(op: Op[Any], args: Sequence[Any], broken: Choice, error: Exception) -> tuple[torch.Tensor, ...]:
    """A choice that raised is put aside: the default config serves from now on, then PyTorch; their errors are real."""
    plain = Choice(op.implementations["torch"], None, "fallback", broken.problem, broken.gpu)
    spare = default(op, broken.problem, broken.gpu) if broken.gpu is not None else plain
    if (spare.implementation, spare.config) == (broken.implementation, broken.config):
        spare = plain
    if broken.implementation is plain.implementation:
        raise error
    _warn_once(
        f"{op.name} {broken.problem.label}",
        f"{broken.implementation.name} {broken.config or ''} failed ({type(error).__name__}: {str(error)[:200]}); "
        f"{spare.implementation.name} serves instead",
    )
    _memo[_key(op, args)] = spare
    return run(op, *args)


def _warn_once(key: str, text: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"tilebook: {key}: {text}", RuntimeWarning, stacklevel=4)


def misses() -> list[store.Miss]:
    """The problems that this process asked for and no verdict covers, heaviest first."""
    found = []
    for (name, *_), choice in list(_memo.items()):
        if choice.gpu is None or choice.source == "exact" or not choice.calls:
            continue
        cost, gpu = choice.problem.cost(), choice.gpu
        floor_s = max(cost.flops / gpu.flops, cost.bytes / gpu.bandwidth)
        where = store.Device(gpu.name, gpu.arch, gpu.sm_count)
        time_ms = 1e3 * floor_s / _TYPICAL_EFFICIENCY
        if math.isfinite(time_ms):
            found.append(store.Miss(name, choice.problem.key, where, choice.calls, time_ms))
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
