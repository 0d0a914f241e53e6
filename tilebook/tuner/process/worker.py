"""The GPU worker: one killable process that verifies and times candidates.

Started as `python -m tilebook.tuner.process.worker GPU [MODULE …]`, never through the user's script, so that no
candidate can take the run, or the user's process, down with it.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tilebook import device as devices
from tilebook import op as ops
from tilebook.op import Config, Op, Problem
from tilebook.registry import Failure
from tilebook.tuner.judge.measure import Bench, Mode, interleave
from tilebook.tuner.judge.stats import median
from tilebook.tuner.judge.verify import FINAL_REPEATS, NotRepeatable, Wrong, final_cases, trial_cases, verify
from tilebook.tuner.process.child import serve
from tilebook.tuner.process.processes import children, left_behind

SAMPLES = 15

_CLASSES = {
    "CompilationError": Failure.COMPILE_ERROR,  # Triton's; its kinds of compilation errors derive from it
    "PTXASError": Failure.COMPILE_ERROR,
    "OutOfResources": Failure.OUT_OF_RESOURCES,
    "OutOfMemoryError": Failure.OUT_OF_RESOURCES,
}


def failure_of(error: Exception) -> Failure | None:
    """The class of what a candidate raised before its kernel ran; None where the kernel, or who knows what, raised."""
    if isinstance(error, Wrong):
        return Failure.NOT_REPEATABLE if isinstance(error, NotRepeatable) else Failure.WRONG_ANSWER
    if "PassManager::run failed" in str(error):
        return Failure.COMPILE_ERROR
    return next((_CLASSES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _CLASSES), None)


class Server:
    """The worker's side. Holds the inputs, truths and timing copies of one problem at a time."""

    def __init__(self) -> None:
        self._op: Op[Any] | None = None
        self._problem: Problem | None = None
        self._gpu = torch.device("cuda")
        self._cases: list[Any] = []
        self._finals: tuple[int, list[Any]] | None = None
        self._proven: set[tuple[str, str, int]] = set()
        self._bench: Any = None
        self._helpers: frozenset[int] = frozenset()

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        action: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "attempt": self._attempt,
            "confirm": self._confirm,
            "probe": self._probe,
        }
        if message["do"] == "prepare":
            reply = self._prepare(message)
            self._helpers = frozenset(children())  # no candidate has started these
            return reply
        try:
            reply = action[message["do"]](message)
        finally:
            processes = left_behind(self._helpers)
        if processes:
            raise RuntimeError(f"left {processes} processes behind, which were killed")
        return reply

    def _prepare(self, message: Mapping[str, Any]) -> dict[str, Any]:
        self._cases, self._finals, self._bench = [], None, None
        self._proven.clear()
        gc.collect()
        self._gpu = self._claim(message["gpu"])
        self._op = ops.get(message["op"])
        self._problem = self._op.problem.from_key(message["problem"])
        self._cases = trial_cases(self._op, self._problem, self._gpu)
        self._bench = self._make_bench(self._cases[0].inputs, message["mode"])
        return {"yardstick": [[e.max, e.rms] for e in self._cases[0].yardstick]}

    def _claim(self, index: int) -> torch.device:
        torch.cuda.empty_cache()
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def _make_bench(self, inputs: tuple[Any, ...], mode: Mode) -> Any:
        bench = Bench(inputs, devices.current(self._gpu.index).l2, mode)
        torch.cuda.synchronize()
        return bench

    def _call(self, message: Mapping[str, Any]) -> Any:
        assert self._op is not None
        implementation = self._op.implementations[message["implementation"]]
        config = Config(message["config"]) if implementation.space is not None else None
        return implementation, config

    def _attempt(self, message: Mapping[str, Any]) -> dict[str, Any]:
        implementation, config = self._call(message)

        def run(*inputs: Any) -> Any:
            return implementation.to_time(*inputs, config=config)

        try:
            errors = verify(implementation, config, self._cases)
        except Exception as broken:
            return self._failed(broken)
        facts = {"errors": [[[e.max, e.rms] for e in case] for case in errors]}
        try:
            estimate = self._bench.estimate(run)
            most_ms = message["most_ms"]
            if most_ms is not None and estimate > most_ms:
                text = f"the first estimate, {estimate:.4g} ms, is over {most_ms:.4g} ms"
                return _reply(Failure.SLOW, text, time_ms=estimate, facts=facts)
            samples = self._bench.capture(run, estimate).samples(SAMPLES)
        except torch.OutOfMemoryError as broken:
            return self._failed(broken)
        return _reply(None, time_ms=median(samples), samples_ms=samples, facts=facts)

    def _failed(self, error: Exception) -> dict[str, Any]:
        """The reply for what a candidate raised, where its class is known and the GPU is as it was. Else raises it."""
        failure = failure_of(error)
        if failure is None or self._probe({}) != {"healthy": True}:
            raise error
        if failure is Failure.OUT_OF_RESOURCES and self._gpu.type == "cuda":
            torch.cuda.empty_cache()
        return _reply(failure, str(error))

    def _verify(self, candidate: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """A finalist's verification: fresh numbers, and repeats enough to see a race that shows seldom."""
        assert self._op is not None
        assert self._problem is not None
        implementation, config = self._call(candidate)
        key = implementation.name, config.key if config is not None else "", seed
        if key not in self._proven:
            if self._finals is None or self._finals[0] != seed:
                self._finals = seed, final_cases(self._op, self._problem, self._gpu, seed)
            try:
                verify(implementation, config, self._finals[1], FINAL_REPEATS)
            except Exception as broken:
                return self._failed(broken)
            self._proven.add(key)
        return _reply(None)

    def _confirm(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Verifies every candidate as a finalist and times those that pass; the others have a failure, no samples."""
        replies = [self._verify(each, message["seed"]) for each in message["candidates"]]
        failures = [{k: each[k] for k in ("failure", "reason")} if each["failure"] else None for each in replies]
        samplers = []
        for each, failed in zip(message["candidates"], failures, strict=True):
            if failed is not None:
                continue
            implementation, config = self._call(each)

            def run(*inputs: Any, _implementation: Any = implementation, _config: Any = config) -> Any:
                return _implementation.to_time(*inputs, config=_config)

            run(*self._cases[0].inputs)
            samplers.append(self._bench.capture(run, self._bench.estimate(run)))
        series = iter(interleave(samplers, message["rounds"], message["seed"]))
        return {"failures": failures, "samples_ms": [[] if failed else list(next(series)) for failed in failures]}

    def _probe(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A product whose answer is known; it raises, or comes out wrong, where the GPU's context is broken."""
        del message
        x = torch.arange(256, dtype=torch.float32, device=self._gpu).reshape(16, 16)
        return {"healthy": bool((x @ torch.eye(16, device=self._gpu) == x).all().item())}


def _reply(failure: Failure | None, reason: str = "", **more: Any) -> dict[str, Any]:
    return {"failure": failure, "reason": reason, "time_ms": None, "samples_ms": [], "facts": {}, **more}


def _main(gpu: int, modules: Sequence[str]) -> None:
    # Before the first request is accepted, so that whoever waits for an answer knows that the start is over.
    torch.cuda.set_device(gpu)
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    ops.ops()
    for name in modules:
        importlib.import_module(name)
    serve(Server().handle)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
