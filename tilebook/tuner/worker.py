"""The GPU worker: one killable process that verifies and times candidates, and the runner that drives it.

Started as `python -m tilebook.tuner.worker`, never through the user's script, so that no candidate can take the run,
or the user's process, down with it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tilebook import device as devices
from tilebook import op as ops
from tilebook.op import Config, Op, Problem
from tilebook.registry import Failure, Json
from tilebook.tuner.child import Child, ChildDied, ChildError, ChildTimedOut, serve
from tilebook.tuner.measure import Bench, Mode, interleave
from tilebook.tuner.stats import median

PREPARE_S, ATTEMPT_S, CONFIRM_S, PROBE_S = 180.0, 90.0, 300.0, 20.0
"""Limits of one request. An attempt may have to compile (60 s) before it runs (30 s)."""

SAMPLES = 15
SEEDS = (0, 1)
_FAR = 2.0  # dropped after the first rung when this many times slower than the incumbent


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


class Runner(Protocol):
    """What the session needs of a GPU; a recorded sweep or a test can stand in for one."""

    def prepare(self, op: Op[Any], problem: Problem) -> None:
        """Makes inputs and truths for a problem. Raises RuntimeError where that cannot be done."""

    def attempt(self, candidate: Candidate, incumbent_ms: float | None) -> Attempt:
        """Verifies the candidate, then times it. Raises RuntimeError where no process can be made ready for it."""

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, *, fresh: bool = False) -> list[Attempt]:
        """Verifies each candidate again, more thoroughly, and times those that pass interleaved, `rounds` samples each.

        fresh: in a process that has run no candidate before; it then stays the one that measures. Raises RuntimeError
        where no samples can be had.
        """

    def close(self) -> None:
        """Ends the processes, from any thread; a request under way fails, and none is started again."""


class GpuRunner:
    """Drives the processes of one GPU: one that measures, and a spare that has imported everything and waits.

    The spare takes over when a confirmation asks for a fresh process and when a candidate kills or hangs the other,
    so that neither costs the seconds of a start. It does nothing while the other confirms.
    """

    def __init__(self, index: int = 0, mode: Mode = "graph") -> None:
        self._index, self._mode = index, mode
        self._child, self._spare = (
            Child("tilebook.tuner.worker", [str(index)], {"TRITON_INTERPRET": None}, f"gpu {index}") for _ in range(2)
        )
        self._current: tuple[str, str] | None = None
        self._prepared = self._closed = False

    def start(self) -> None:
        """Starts the process without waiting for it, so that importing PyTorch overlaps with compiling."""
        self._child.start()

    def prepare(self, op: Op[Any], problem: Problem) -> None:
        self._current, self._prepared = (op.name, problem.key), False
        self._ensure()
        self._start_spare()

    def attempt(self, candidate: Candidate, incumbent_ms: float | None) -> Attempt:
        self._ensure()
        self._start_spare()
        message: dict[str, Json] = {
            "do": "attempt",
            "implementation": candidate.implementation,
            "config": dict(candidate.config),
            "incumbent_ms": incumbent_ms,
        }
        try:
            reply: Any = self._child.request(message, ATTEMPT_S)
        except ChildTimedOut:
            return Attempt(Failure.RUN_TIMEOUT, f"no result within {ATTEMPT_S:.0f} s; the worker was killed")
        except ChildDied as died:
            return Attempt(Failure.WORKER_DIED, str(died))
        if "error" in reply:
            # An exception may have left the GPU's context broken, quietly: a known answer tells.
            if not self._healthy(self._child):
                self._child.close()
                return Attempt(Failure.RUN_ERROR, f"{_text(reply)} (the worker was replaced)")
            return Attempt(Failure.RUN_ERROR, _text(reply))
        failure = Failure(reply["failure"]) if reply["failure"] else None
        return Attempt(failure, reply["reason"], reply["time_ms"], tuple(reply["samples_ms"]), reply["facts"])

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, *, fresh: bool = False) -> list[Attempt]:
        if fresh:
            self._swap()
        elif self._spare.alive:
            self._healthy(self._spare)  # returns once its start is over, and with it all that could disturb
        try:
            return self._confirm(candidates, rounds, seed, CONFIRM_S)
        except RuntimeError:
            if self._closed or len(candidates) == 1:
                raise
        # One of them broke the process, and would every time: each alone shows which, and the rest goes on without.
        alone = [self._confirm_alone(candidate, seed) for candidate in candidates]
        sound = [c for c, attempt in zip(candidates, alone, strict=True) if attempt.failure is None]
        together = iter(self._confirm(sound, rounds, seed, CONFIRM_S))
        return [next(together) if attempt.failure is None else attempt for attempt in alone]

    def _confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, limit_s: float) -> list[Attempt]:
        self._ensure()
        listed: list[Json] = [{"implementation": c.implementation, "config": dict(c.config)} for c in candidates]
        reply = self._ask({"do": "confirm", "candidates": listed, "rounds": rounds, "seed": seed}, limit_s)
        if "error" in reply:
            self._child.close()
            raise RuntimeError(_text(reply))
        return [
            Attempt(None, "", median(samples), tuple(samples))
            if failed is None
            else Attempt(Failure(failed["failure"]), failed["reason"])
            for failed, samples in zip(reply["failures"], reply["samples_ms"], strict=True)
        ]

    def _confirm_alone(self, candidate: Candidate, seed: int) -> Attempt:
        self._ensure()
        try:
            return self._confirm([candidate], 1, seed, ATTEMPT_S)[0]
        except RuntimeError as broken:
            return Attempt(Failure.RUN_ERROR, str(broken))

    def close(self) -> None:
        self._closed = True
        for child in (self._child, self._spare):
            child.close()

    def _ensure(self) -> None:
        """Makes the measuring process alive and prepared; the spare takes over from one that is gone."""
        if not self._child.alive:
            self._prepared = False
            if self._spare.alive:
                self._swap()
        if not self._prepared and self._current is not None:
            reply = self._ask(
                {
                    "do": "prepare",
                    "gpu": self._index,
                    "op": self._current[0],
                    "problem": self._current[1],
                    "mode": self._mode,
                },
                PREPARE_S,
            )
            if "error" in reply:
                self._child.close()
                raise RuntimeError(_text(reply))
            self._prepared = True

    def _swap(self) -> None:
        # The old process goes first, so that two never hold a problem's tensors at a time.
        self._child.close()
        self._child, self._spare = self._spare, self._child
        self._prepared = False

    def _start_spare(self) -> None:
        if not self._closed:
            self._spare.start()

    def _ask(self, message: dict[str, Json], limit_s: float) -> dict[str, Any]:
        if self._closed:
            raise RuntimeError("the runner is closed")
        try:
            reply = self._child.request(message, limit_s)
        except ChildTimedOut:
            raise RuntimeError(f"no answer to {message['do']!r} within {limit_s:.0f} s") from None
        except ChildDied as died:
            raise RuntimeError(f"the worker died: {died}") from None
        assert isinstance(reply, dict)
        return reply

    @staticmethod
    def _healthy(child: Child) -> bool:
        try:
            return child.request({"do": "probe"}, PROBE_S).get("healthy") is True
        except ChildError:
            return False


def _text(reply: Mapping[str, Any]) -> str:
    error = reply["error"]
    return f"{error['type']}: {str(error['text']).strip()[:500]}"


class _Server:
    """The worker's side. Holds the inputs, truths and timing copies of one problem at a time."""

    def __init__(self) -> None:
        self._op: Op[Any] | None = None
        self._cases: list[Any] = []
        self._bench: Any = None

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        action = {"prepare": self._prepare, "attempt": self._attempt, "confirm": self._confirm, "probe": self._probe}
        reply: dict[str, Any] = action[message["do"]](message)
        return reply

    def _prepare(self, message: Mapping[str, Any]) -> dict[str, Any]:
        from tilebook.tuner.verify import Case

        self._cases, self._bench = [], None
        gc.collect()
        torch.cuda.empty_cache()
        gpu = torch.device("cuda", message["gpu"])
        torch.cuda.set_device(gpu)
        self._op = ops.get(message["op"])
        problem = self._op.problem.from_key(message["problem"])
        self._cases = [Case.make(self._op, problem, gpu, seed) for seed in SEEDS]
        self._cases += [Case.make(self._op, near, gpu, 2) for near in problem.neighbours()]
        self._bench = Bench(self._cases[0].inputs, devices.current(gpu.index).l2, message["mode"])
        torch.cuda.synchronize()
        return {"yardstick": [[e.max, e.rms] for e in self._cases[0].yardstick]}

    def _call(self, message: Mapping[str, Any]) -> Any:
        assert self._op is not None
        implementation = self._op.implementations[message["implementation"]]
        config = Config(message["config"]) if implementation.space is not None else None
        return implementation, config

    def _attempt(self, message: Mapping[str, Any]) -> dict[str, Any]:
        from tilebook.tuner.verify import NotRepeatable, Wrong, verify

        implementation, config = self._call(message)

        def run(*inputs: Any) -> Any:
            return implementation(*inputs, config=config)

        def reply(failure: Failure | None, reason: str = "", **more: Any) -> dict[str, Any]:
            return {"failure": failure, "reason": reason, "time_ms": None, "samples_ms": [], "facts": {}, **more}

        try:
            errors = verify(implementation, config, self._cases)
        except NotRepeatable as wrong:
            return reply(Failure.NOT_REPEATABLE, str(wrong))
        except Wrong as wrong:
            return reply(Failure.WRONG_ANSWER, str(wrong))
        except Exception as broken:
            if type(broken).__name__ == "OutOfResources":
                return reply(Failure.OUT_OF_RESOURCES, str(broken))
            raise
        facts = {"errors": [[[e.max, e.rms] for e in case] for case in errors]}
        estimate = self._bench.estimate(run)
        incumbent = message["incumbent_ms"]
        if incumbent is not None and estimate > _FAR * incumbent:
            text = f"{estimate / incumbent:.1f} times slower than the best so far"
            return reply(Failure.SLOW, text, time_ms=estimate, facts=facts)
        samples = self._bench.capture(run, estimate).samples(SAMPLES)
        return reply(None, time_ms=median(samples), samples_ms=samples, facts=facts)

    def _confirm(self, message: Mapping[str, Any]) -> dict[str, Any]:
        samplers = []
        for each in message["candidates"]:
            implementation, config = self._call(each)

            def run(*inputs: Any, _implementation: Any = implementation, _config: Any = config) -> Any:
                return _implementation(*inputs, config=_config)

            run(*self._cases[0].inputs)
            samplers.append(self._bench.capture(run, self._bench.estimate(run)))
        series = [list(samples) for samples in interleave(samplers, message["rounds"], message["seed"])]
        return {"failures": [None] * len(series), "samples_ms": series}

    def _probe(self, message: Mapping[str, Any]) -> dict[str, Any]:
        del message
        x = torch.arange(256, dtype=torch.float32, device="cuda").reshape(16, 16)
        return {"healthy": bool((x @ torch.eye(16, device="cuda") == x).all().item())}


def _main(gpu: int) -> None:
    # Before the first request is accepted, so that whoever waits for an answer knows that the start is over.
    torch.cuda.set_device(gpu)
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    ops.ops()
    serve(_Server().handle)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
