"""Drives a GPU: candidates are verified and timed by worker processes, which can be killed and replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tilebook.errors import TuningError
from tilebook.op import Config, Op, Problem
from tilebook.registry import Failure, Json
from tilebook.tuner.judge.measure import Mode
from tilebook.tuner.judge.stats import median
from tilebook.tuner.process.child import Child, ChildDied, ChildError, ChildTimedOut

AGAIN = 2
"""So many times more is a problem prepared of somebody else's kernel: its own configs say what is right, and one that
hangs, or ends the process, is not asked again."""


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
    """How long one request may take, in seconds. An attempt may have to compile (60 s) before it runs (30 s).

    external_s: on top, for each external candidate. Nobody compiled it ahead, and its package does so anew in every
    process, for each kind of problem that it is verified on.
    """

    prepare_s: float = 180.0
    attempt_s: float = 90.0
    confirm_s: float = 600.0
    probe_s: float = 20.0
    external_s: float = 120.0


class Runner(Protocol):
    """What the session needs of a GPU; a recorded sweep or a test can stand in for one."""

    def prepare(self, op: Op[Any], problem: Problem) -> None:
        """Makes inputs and truths for a problem. Raises TuningError where that cannot be done."""

    def attempt(self, candidate: Candidate, most_ms: float | None) -> Attempt:
        """Verifies the candidate, then times it; one whose first estimate is over `most_ms` is SLOW, and not sampled.

        Raises TuningError where no process can be made ready for it."""

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, *, fresh: bool = False) -> list[Attempt]:
        """Verifies each candidate again, more thoroughly, and times those that pass interleaved, `rounds` samples each.

        fresh: in a process that has run no candidate before; it then stays the one that measures. Raises TuningError
        where no samples can be had.
        """

    def close(self) -> None:
        """Ends the processes, from any thread; a request under way fails, and none is started again."""


class _Broken(TuningError):
    """The process hung, died, or met what nobody has foreseen: another may do better."""


class GpuRunner:
    """Drives the processes of one GPU: one that measures, and a spare that has imported everything and waits.

    The spare takes over when a confirmation asks for a fresh process and when a candidate kills or hangs the other,
    so that neither costs the seconds of a start. It does nothing while the other confirms.
    """

    def __init__(
        self,
        index: int = 0,
        mode: Mode = "graph",
        limits: Limits | None = None,
        modules: Sequence[str] = (),
        worker: str = "tilebook.tuner.process.worker",
    ) -> None:
        """`modules` are imported by the worker first, for ops that live outside of `tilebook.kernels`."""
        self._index, self._mode, self._limits = index, mode, limits or Limits()
        self._child, self._spare = (
            Child(worker, [str(index), *modules], {"TRITON_INTERPRET": None}, f"gpu {index}") for _ in range(2)
        )
        self._current: tuple[str, str] | None = None
        self._external: frozenset[str] = frozenset()
        self._again = 0
        self._prepared = self._closed = False

    def start(self) -> None:
        """Starts the process without waiting for it, so that importing PyTorch overlaps with compiling."""
        self._child.start()

    def prepare(self, op: Op[Any], problem: Problem) -> None:
        self._current, self._prepared = (op.name, problem.key), False
        self._external = frozenset(name for name, each in op.implementations.items() if each.external)
        self._again = AGAIN if op.answers is not None else 0
        self._ensure()
        self._start_spare()

    def attempt(self, candidate: Candidate, most_ms: float | None) -> Attempt:
        self._take_over()
        self._start_spare()  # before the next process is prepared: it may have to take over as soon
        self._ensure()
        message: dict[str, Json] = {"do": "attempt", **_named(candidate), "most_ms": most_ms}
        limit_s = self._limit_s(self._limits.attempt_s, [candidate])
        try:
            reply: Any = self._child.request(message, limit_s)
        except ChildTimedOut:
            return Attempt(Failure.RUN_TIMEOUT, f"no result within {limit_s:g} s; the worker was killed")
        except ChildDied as died:
            return Attempt(Failure.WORKER_DIED, str(died))
        if "error" in reply:
            # An exception may have left the GPU's context broken, quietly: a known answer tells.
            if not self._healthy(self._child):
                self._child.close()
                return Attempt(Failure.RUN_ERROR, f"{_text(reply)} (the worker was replaced)")
            return Attempt(Failure.RUN_ERROR, _text(reply))
        try:
            failure = Failure(reply["failure"]) if reply["failure"] else None
            return Attempt(failure, reply["reason"], reply["time_ms"], tuple(reply["samples_ms"]), reply["facts"])
        except (KeyError, TypeError, ValueError):
            self._child.close()
            return Attempt(Failure.WORKER_DIED, f"the worker was replaced: it replied {str(reply)[:200]}")

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, *, fresh: bool = False) -> list[Attempt]:
        if fresh:
            self._swap()
        elif self._spare.alive:
            self._healthy(self._spare)  # returns once its start is over, and with it all that could disturb
        try:
            return self._confirm(candidates, rounds, seed, self._limit_s(self._limits.confirm_s, candidates))
        except TuningError:
            if self._closed or len(candidates) == 1:
                raise
        # One of them broke the process, and would every time: each alone shows which, and the rest goes on without.
        alone = [self._confirm_alone(candidate, seed) for candidate in candidates]
        sound = [c for c, attempt in zip(candidates, alone, strict=True) if attempt.failure is None]
        together = iter(self._confirm(sound, rounds, seed, self._limit_s(self._limits.confirm_s, sound)))
        return [next(together) if attempt.failure is None else attempt for attempt in alone]

    def _confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, limit_s: float) -> list[Attempt]:
        self._ensure()
        listed: list[Json] = [_named(c) for c in candidates]
        reply = self._ask({"do": "confirm", "candidates": listed, "rounds": rounds, "seed": seed}, limit_s)
        if "error" in reply:
            self._child.close()
            raise TuningError(_text(reply))
        return [
            Attempt(None, "", median(samples), tuple(samples))
            if failed is None
            else Attempt(Failure(failed["failure"]), failed["reason"])
            for failed, samples in zip(reply["failures"], reply["samples_ms"], strict=True)
        ]

    def _confirm_alone(self, candidate: Candidate, seed: int) -> Attempt:
        self._ensure()
        try:
            return self._confirm([candidate], 1, seed, self._limit_s(self._limits.attempt_s, [candidate]))[0]
        except TuningError as broken:
            return Attempt(Failure.RUN_ERROR, str(broken))

    def _limit_s(self, base_s: float, candidates: Sequence[Candidate]) -> float:
        return base_s + self._limits.external_s * sum(each.implementation in self._external for each in candidates)

    def close(self) -> None:
        self._closed = True
        for child in (self._child, self._spare):
            child.close()

    def _ensure(self) -> None:
        """Makes the measuring process alive and prepared; the spare takes over from one that is gone."""
        for left in reversed(range(self._again + 1)):
            try:
                return self._prepare()
            except _Broken:
                if self._closed or not left:
                    raise

    def _prepare(self) -> None:
        self._take_over()
        if not self._prepared and self._current is not None:
            reply = self._ask(
                {
                    "do": "prepare",
                    "gpu": self._index,
                    "op": self._current[0],
                    "problem": self._current[1],
                    "mode": self._mode,
                },
                self._limits.prepare_s,
            )
            if "error" in reply:
                self._child.close()
                foreseen = reply["error"]["type"] in ("TuningError", "NoYardstick", "UsageError")
                raise (TuningError if foreseen else _Broken)(_text(reply))
            self._prepared = True

    def _take_over(self) -> None:
        if not self._child.alive:
            self._prepared = False
            if self._spare.alive:
                self._swap()

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
            raise TuningError("the runner is closed")
        try:
            reply = self._child.request(message, limit_s)
        except ChildTimedOut:
            raise _Broken(f"no answer to {message['do']!r} within {limit_s:.0f} s") from None
        except ChildDied as died:
            raise _Broken(f"the worker died: {died}") from None
        assert isinstance(reply, dict)
        return reply

    def _healthy(self, child: Child) -> bool:
        try:
            return child.request({"do": "probe"}, self._limits.probe_s).get("healthy") is True
        except ChildError:
            return False


def _named(candidate: Candidate) -> dict[str, Json]:
    return {"implementation": candidate.implementation, "config": dict(candidate.config)}


def _text(reply: Mapping[str, Any]) -> str:
    error = reply["error"]
    return f"{error['type']}: {str(error['text']).strip()[:500]}"
