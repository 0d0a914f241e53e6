"""The GPU worker: one killable process that verifies and times candidates, and the runner that drives it.

Started as `python -m tilebook.tuner.worker`, never through the user's script, so that no candidate can take the run,
or the user's process, down with it.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tilebook import device as devices
from tilebook import op as ops
from tilebook.op import Config, Op, Problem
from tilebook.registry import Failure, Json
from tilebook.tuner.child import Child, ChildDied, ChildTimedOut, children, left_behind, serve

SAMPLES = 15

FAR = 2.0
"""A candidate is dropped after a first estimate when it is this many times slower than the incumbent."""


@dataclass(frozen=True)
class Candidate:
    """An implementation with one of its configs; the config is empty for those without a space."""

    implementation: str
    config: Config = field(default_factory=Config)

    def __str__(self) -> str:
        return f"{self.implementation} {self.config}".strip()


@dataclass(frozen=True)
class Attempt:
    """What came of one candidate: samples, or the class of its failure with the text."""

    failure: Failure | None = None
    reason: str = ""
    time_ms: float | None = None
    samples_ms: tuple[float, ...] = ()
    facts: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """How long one request may take, in seconds. An attempt may have to compile (60 s) before it runs (30 s)."""

    prepare_s: float = 180.0
    attempt_s: float = 90.0
    confirm_s: float = 300.0
    probe_s: float = 20.0


class Runner(Protocol):
    """What the session needs of a GPU; a recorded sweep or a test can stand in for one."""

    def prepare(self, op: Op[Any], problem: Problem) -> None:
        """Makes inputs and truths for a problem. Raises RuntimeError where that cannot be done."""

    def attempt(self, candidate: Candidate, incumbent_ms: float | None) -> Attempt:
        """Verifies the candidate, then times it. Never raises."""

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int) -> list[list[float]]:
        """Interleaved samples of each candidate, ms. Raises RuntimeError where they cannot be had."""

    def close(self) -> None: ...


class GpuRunner:
    """Drives one worker process; kills and replaces it when a candidate breaks or hangs it."""

    def __init__(
        self,
        index: int = 0,
        limits: Limits | None = None,
        modules: Sequence[str] = (),
        worker: str = "tilebook.tuner.worker",
    ) -> None:
        """`modules` are imported by the worker first, for ops that live outside of `tilebook.kernels`."""
        self._child = Child(worker, modules, env={"TRITON_INTERPRET": None}, name=f"gpu {index}")
        self._limits = limits or Limits()
        self._index = index
        self._current: tuple[str, str] | None = None
        self._prepared = False

    def start(self) -> None:
        """Starts the process without waiting for it, so that importing PyTorch overlaps with compiling."""
        self._child.start()

    def prepare(self, op: Op[Any], problem: Problem) -> None:
        self._current, self._prepared = (op.name, problem.key), False
        self._ensure()

    def _ensure(self) -> None:
        if not self._child.alive:
            self._prepared = False
        if not self._prepared and self._current is not None:
            reply = self._ask(
                {"do": "prepare", "gpu": self._index, "op": self._current[0], "problem": self._current[1]},
                self._limits.prepare_s,
            )
            if "error" in reply:
                self._child.close()
                raise RuntimeError(_text(reply))
            self._prepared = True

    def _ask(self, message: dict[str, Json], limit_s: float) -> dict[str, Any]:
        try:
            reply = self._child.request(message, limit_s)
        except ChildTimedOut:
            raise RuntimeError(f"no answer to {message['do']!r} within {limit_s:.0f} s") from None
        except ChildDied as died:
            raise RuntimeError(f"the worker died: {died}") from None
        assert isinstance(reply, dict)
        return reply

    def attempt(self, candidate: Candidate, incumbent_ms: float | None) -> Attempt:
        more: dict[str, Json] = {"incumbent_ms": incumbent_ms}
        return self._try({"do": "attempt", **_named(candidate), **more}, self._limits.attempt_s)

    def verify(self, candidate: Candidate, seed: int) -> Attempt:
        """Verifies a finalist on numbers that no candidate of the run with this seed has met. Never raises.

        `confirm` does the same, but cannot tell which of its candidates it was that took the worker down.
        """
        return self._try({"do": "verify", **_named(candidate), "seed": seed}, self._limits.attempt_s)

    def _try(self, message: dict[str, Json], limit_s: float) -> Attempt:
        try:
            self._ensure()
        except RuntimeError as broken:
            return Attempt(Failure.WORKER_DIED, f"the worker could not be prepared again: {broken}")
        try:
            reply: Any = self._child.request(message, limit_s)
        except ChildTimedOut:
            return Attempt(Failure.RUN_TIMEOUT, f"no result within {limit_s:g} s; the worker was killed")
        except ChildDied as died:
            return Attempt(Failure.WORKER_DIED, str(died))
        if "error" in reply:
            # An exception may have left the GPU's context broken, quietly: a known answer tells.
            if not self._healthy():
                self._child.close()
                return Attempt(Failure.RUN_ERROR, f"{_text(reply)} (the worker was replaced)")
            return Attempt(Failure.RUN_ERROR, _text(reply))
        try:
            failure = Failure(reply["failure"]) if reply["failure"] else None
            return Attempt(failure, reply["reason"], reply["time_ms"], tuple(reply["samples_ms"]), reply["facts"])
        except (KeyError, TypeError, ValueError):
            self._child.close()
            return Attempt(Failure.WORKER_DIED, f"the worker was replaced: it replied {str(reply)[:200]}")

    def _healthy(self) -> bool:
        try:
            return self._ask({"do": "probe"}, self._limits.probe_s).get("healthy") is True
        except RuntimeError:
            return False

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int) -> list[list[float]]:
        self._ensure()
        listed: list[Json] = [_named(c) for c in candidates]
        reply = self._ask(
            {"do": "confirm", "candidates": listed, "rounds": rounds, "seed": seed}, self._limits.confirm_s
        )
        if "error" in reply:
            self._child.close()
            raise RuntimeError(_text(reply))
        for candidate, failed in zip(candidates, reply["failures"], strict=True):
            if failed is not None:
                raise RuntimeError(f"{candidate} failed as a finalist: {failed['failure']}: {failed['reason']}")
        return [list(series) for series in reply["samples_ms"]]

    def close(self) -> None:
        self._child.close()


def _named(candidate: Candidate) -> dict[str, Json]:
    return {"implementation": candidate.implementation, "config": dict(candidate.config)}


def _text(reply: Mapping[str, Any]) -> str:
    error = reply["error"]
    return f"{error['type']}: {str(error['text']).strip()[:500]}"


_CLASSES = {
    "CompilationError": Failure.COMPILE_ERROR,  # Triton's; its kinds of compilation errors derive from it
    "PTXASError": Failure.COMPILE_ERROR,
    "OutOfResources": Failure.OUT_OF_RESOURCES,
    "OutOfMemoryError": Failure.OUT_OF_RESOURCES,
}


def failure_of(error: Exception) -> Failure | None:
    """The class of what a candidate raised before its kernel ran; None where the kernel, or who knows what, raised."""
    from tilebook.tuner.verify import NotRepeatable, Wrong

    if isinstance(error, Wrong):
        return Failure.NOT_REPEATABLE if isinstance(error, NotRepeatable) else Failure.WRONG_ANSWER
    if "PassManager::run failed" in str(error):
        return Failure.COMPILE_ERROR
    return next((_CLASSES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _CLASSES), None)


class _Server:
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
            "verify": self._verify,
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
        from tilebook.tuner.verify import trial_cases

        self._cases, self._finals, self._bench = [], None, None
        self._proven.clear()
        gc.collect()
        self._gpu = self._claim(message["gpu"])
        self._op = ops.get(message["op"])
        self._problem = self._op.problem.from_key(message["problem"])
        self._cases = trial_cases(self._op, self._problem, self._gpu)
        self._bench = self._make_bench(self._cases[0].inputs)
        return {"yardstick": [[e.max, e.rms] for e in self._cases[0].yardstick]}

    def _claim(self, index: int) -> torch.device:
        torch.cuda.empty_cache()
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def _make_bench(self, inputs: tuple[Any, ...]) -> Any:
        from tilebook.tuner.measure import Bench

        bench = Bench(inputs, devices.current(self._gpu.index).l2)
        torch.cuda.synchronize()
        return bench

    def _call(self, message: Mapping[str, Any]) -> Any:
        assert self._op is not None
        implementation = self._op.implementations[message["implementation"]]
        config = Config(message["config"]) if implementation.space is not None else None
        return implementation, config

    def _attempt(self, message: Mapping[str, Any]) -> dict[str, Any]:
        from tilebook.tuner.stats import median
        from tilebook.tuner.verify import verify

        implementation, config = self._call(message)

        def run(*inputs: Any) -> Any:
            return implementation(*inputs, config=config)

        try:
            errors = verify(implementation, config, self._cases)
        except Exception as broken:
            return self._failed(broken)
        facts = {"errors": [[[e.max, e.rms] for e in case] for case in errors]}
        estimate = self._bench.estimate(run)
        incumbent = message["incumbent_ms"]
        if incumbent is not None and estimate > FAR * incumbent:
            text = f"{estimate / incumbent:.1f} times slower than the best so far"
            return _reply(Failure.SLOW, text, time_ms=estimate, facts=facts)
        samples = self._bench.capture(run, estimate).samples(SAMPLES)
        return _reply(None, time_ms=median(samples), samples_ms=samples, facts=facts)

    def _failed(self, error: Exception) -> dict[str, Any]:
        """The reply for what a candidate raised, where its class is known and the GPU is as it was. Else raises it."""
        failure = failure_of(error)
        if failure is None or self._probe({}) != {"healthy": True}:
            raise error
        if failure is Failure.OUT_OF_RESOURCES and self._gpu.type == "cuda":
            torch.cuda.empty_cache()
        return _reply(failure, str(error))

    def _verify(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A finalist's verification: fresh numbers, and repeats enough to see a race that shows seldom."""
        from tilebook.tuner.verify import FINAL_REPEATS, final_cases, verify

        assert self._op is not None
        assert self._problem is not None
        implementation, config = self._call(message)
        seed = message["seed"]
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
        from tilebook.tuner.measure import interleave

        replies = [self._verify({**each, "seed": message["seed"]}) for each in message["candidates"]]
        failures = [{k: each[k] for k in ("failure", "reason")} if each["failure"] else None for each in replies]
        samplers = []
        for each, failed in zip(message["candidates"], failures, strict=True):
            if failed is not None:
                continue
            implementation, config = self._call(each)

            def run(*inputs: Any, _implementation: Any = implementation, _config: Any = config) -> Any:
                return _implementation(*inputs, config=_config)

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


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    serve(_Server().handle)
