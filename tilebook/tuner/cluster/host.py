"""What runs on a cluster's nodes: compilers and GPU processes as a run on one host has them, in an actor."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tilebook import device as devices
from tilebook import op as ops
from tilebook import provenance
from tilebook.tuner.judge.measure import Mode
from tilebook.tuner.process.compile import Compiled, CompilePool, Compilers, check_cache
from tilebook.tuner.process.runner import Attempt, Candidate, GpuRunner, Runner


@dataclass(frozen=True)
class Hello:
    """What a host says of itself. sources: the digests of each op that it was asked for, by implementation."""

    device: devices.Device
    environment: Mapping[str, str]
    machine: str
    sources: Mapping[str, Mapping[str, str]]


def sources(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The digests of these ops' implementations, here. Raises UsageError for an op that is not known."""
    found = {}
    for name in names:
        op = ops.get(name)
        found[name] = {"": op.digest, **{each: its.digest for each, its in op.implementations.items()}}
    return found


class Host:
    """One GPU of a node, or some of its cores that stand for one. Its methods are those of Ray's asyncio actors: many
    compilations wait side by side, and `close` is heard meanwhile."""

    def __init__(self, gpu: devices.Device | None, mode: Mode, workers: int) -> None:
        """gpu: a model to compile for, without one; None is the GPU that this process was given. workers: compilers."""
        self._gpu = gpu or self.here()
        self._begun = False
        self._pool = self.compilers(workers)
        self._runner = self.measurer(mode) if gpu is None else None

    def here(self) -> devices.Device:
        return devices.current()

    def compilers(self, workers: int) -> Compilers:
        return CompilePool(self._gpu, workers)

    def measurer(self, mode: Mode) -> Runner:
        return GpuRunner(0, mode)

    async def hello(self, names: Sequence[str]) -> Hello:
        """Raises UsageError for an op that is not known here, TuningError where nothing can be compiled."""
        check_cache()
        return Hello(self._gpu, dict(devices.environment()), provenance.made()["machine"], sources(names))

    async def compile(self, op: str, implementation: str, problem: str, config: Mapping[str, ops.Value]) -> Compiled:
        self._begin()
        return await asyncio.wrap_future(self._pool.submit(op, implementation, problem, config))

    async def prepare(self, op: str, problem: str) -> None:
        self._begin()
        its = ops.get(op)
        await asyncio.to_thread(self._measuring.prepare, its, its.problem.from_key(problem))

    async def attempt(self, candidate: Candidate, most_ms: float | None) -> Attempt:
        return await asyncio.to_thread(self._measuring.attempt, candidate, most_ms)

    async def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, fresh: bool) -> list[Attempt]:
        return await asyncio.to_thread(self._measuring.confirm, candidates, rounds, seed, fresh=fresh)

    async def close(self) -> None:
        """Ends all processes. The actor itself is for its driver to kill."""
        if self._runner is not None:
            await asyncio.to_thread(self._runner.close)
        if isinstance(self._pool, CompilePool):
            await asyncio.to_thread(self._pool.close)

    @property
    def _measuring(self) -> Runner:
        assert self._runner is not None, "asked to measure without a GPU"
        return self._runner

    def _begin(self) -> None:
        """Starts all processes with the first request, side by side: they take seconds to import PyTorch."""
        if self._begun:
            return
        self._begun = True
        if isinstance(self._runner, GpuRunner):
            self._runner.start()
        if isinstance(self._pool, CompilePool):
            self._pool.start()
