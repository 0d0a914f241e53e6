"""Recorded sweeps: a whole space compiled and measured on one problem, as JSON Lines for searches to be replayed over.

    {"format":"tilebook-sweep","version":1,"op":"attention_fwd","problem":"…","device":{…},"axes":{…},"default":{…},…}
    {"implementation":"triton","config":{…},"compiled":{…},"status":"ok","time_ms":0.2,"samples_ms":[…],"run_s":0.1}

`run_s` is the wall time that the GPU's worker took over the candidate, verification included; `compiled.seconds` that
of its compile process. Candidates come in the order in which they were measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TextIO

from tilebook import device as devices
from tilebook.device import Device
from tilebook.errors import TuningError, UsageError, one_line
from tilebook.op import Config, Implementation, Op, Problem
from tilebook.registry import Failure, Json, Status
from tilebook.tuner.known import source_of
from tilebook.tuner.process.compile import Compiled, CompilePool, Compilers, check_cache, outcome
from tilebook.tuner.process.runner import Attempt, Candidate, GpuRunner, Runner
from tilebook.tuner.progress import ProblemState, Run, Watch

FORMAT = "tilebook-sweep"
VERSION = 1

SLOW = 5.0
"""A candidate this many times slower than the best so far keeps its first estimate and is not sampled."""

_HASH = 16  # hexadecimal digits kept of the hashes that tell machine codes of one sweep apart
_REASON = 200


@dataclass(frozen=True)
class Measured:
    """One candidate of a sweep. `compiled` is None for implementations that are not ours to compile."""

    candidate: Candidate
    compiled: Compiled | None
    attempt: Attempt
    run_s: float

    def to_json(self) -> dict[str, Json]:
        attempt = self.attempt
        line: dict[str, Json] = {
            "implementation": self.candidate.implementation,
            "config": dict(self.candidate.config),
            "status": self.status,
            "failure": attempt.failure,
            "reason": attempt.reason[:_REASON],
            "time_ms": None if attempt.time_ms is None else round(attempt.time_ms, 6),
            "samples_ms": [round(sample, 6) for sample in attempt.samples_ms],
            "run_s": round(self.run_s, 4),
        }
        if self.compiled is not None:
            binaries = tuple(
                dataclasses.replace(each, hash=each.hash[:_HASH], launch=each.launch[:_HASH])
                for each in self.compiled.binaries
            )
            seconds, reason = round(self.compiled.seconds, 4), self.compiled.reason[:_REASON]
            short = dataclasses.replace(self.compiled, binaries=binaries, seconds=seconds, reason=reason)
            line["compiled"] = short.to_json()
        return line

    @property
    def status(self) -> Status:
        if self.attempt.failure is None:
            return Status.OK
        compiles = self.compiled is None or self.compiled.failure is None
        return Status.FAILED if compiles and self.attempt.failure is not Failure.SLOW else Status.REJECTED

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        failure = Failure(line["failure"]) if line["failure"] else None
        return cls(
            Candidate(line["implementation"], Config(line["config"])),
            Compiled.from_json(line["compiled"]) if "compiled" in line else None,
            Attempt(failure, line["reason"], line["time_ms"], tuple(line["samples_ms"])),
            line["run_s"],
        )


@dataclass(frozen=True)
class Sweep:
    """A sweep as read from its file."""

    header: Mapping[str, Any]
    measured: tuple[Measured, ...]

    @property
    def device(self) -> Device:
        return Device(**self.header["device"])

    @property
    def ours(self) -> list[Measured]:
        """The configs of the space, without the other implementations."""
        name = self.implementation
        return [each for each in self.measured if each.candidate.implementation == name]

    @property
    def implementation(self) -> str:
        """The name of the one whose space was swept; of our own kernel the header does not say it."""
        compiled = (each.candidate.implementation for each in self.measured if each.compiled is not None)
        return str(self.header.get("implementation") or next(compiled, ""))


def _line(content: Mapping[str, Json]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"


def read(path: Path) -> Sweep:
    """The sweep in a file; a last line that was cut short is left out. Raises UsageError on any other file."""
    with path.open(encoding="utf-8", newline="\n") as stream:
        try:
            lines = [json.loads(line) for line in stream if line.endswith("\n")]
            if not lines or lines[0]["format"] != FORMAT:
                raise ValueError("it has no header")
            if lines[0]["version"] != VERSION:
                raise ValueError(f"its version is {lines[0]['version']!r}, not {VERSION}")
            return Sweep(lines[0], tuple(Measured.from_json(line) for line in lines[1:]))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not a sweep that can be read: {type(error).__name__}: {error}") from None


def tunable(op: Op[Any], name: str | None) -> Implementation:
    """The implementation of that name, our own kernel by default. Raises UsageError where it has no space."""
    found = op.tunable if name is None else op.implementations.get(name)
    if found not in op.tunables:
        known = ", ".join(each.name for each in op.tunables)
        raise UsageError(f"{op.name} has no implementation {name!r} with a space; there are {known}")
    assert found is not None
    return found


def plan(
    implementation: Implementation, problem: Problem, gpu: Device, most: int | None, seed: int
) -> tuple[dict[str, Any], list[Config]]:
    """The header of a sweep and the configs to measure: the default, then the others in a random order, `most` in all.

    Random, so that a drift of the GPU's clocks is no slope along an axis.
    """
    op, space = implementation.op, implementation.space
    assert space is not None
    default = space.default(problem, gpu)
    others = [config for config in space.feasible(problem, gpu) if config != default]
    random.Random(seed).shuffle(others)
    configs = [default, *others]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "op": op.name,
        "problem": problem.key,
        "label": problem.label,
        "device": dataclasses.asdict(gpu),
        "environment": dict(devices.environment()),
        "kernel": source_of(implementation),
        "axes": {axis: list(values) for axis, values in space.axes.items()},
        "default": dict(default),
        "feasible": len(configs),
        "whole": most is None or most >= len(configs),
        "configs": len(configs[:most]),
        "seed": seed,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if implementation.name != op.tunable.name:
        header["implementation"] = implementation.name
    return header, configs[:most]


def resume(path: Path, header: Mapping[str, Any]) -> tuple[Measured, ...]:
    """What a sweep with this header has measured into the file before, which is created or cut after its last whole
    line. Raises UsageError where the file is something else."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if not whole:
        beginning = _line({"format": FORMAT}).encode()[:-2]
        if not beginning.startswith(text[: len(beginning)]):
            raise UsageError(f"{path} is not a sweep")
        path.write_text(_line(header), encoding="utf-8", newline="\n")
        return ()
    found = read(path)
    for field in header:
        if field != "created_at" and found.header.get(field) != header[field]:
            raise UsageError(f"{path} is a sweep of something else ({field} differs): give another --out")
    with path.open("r+b") as stream:
        stream.truncate(len(whole))
    return found.measured


class Recorder:
    """Measures candidates into an open sweep file, line by line."""

    def __init__(self, stream: TextIO, runner: Runner, state: ProblemState, run: Run, default: Candidate) -> None:
        self._stream, self._runner, self._state, self._run, self._default = stream, runner, state, run, default
        self._best_ms: float | None = None

    def note(self, measured: Measured) -> None:
        """Counts a candidate in the view."""
        state, attempt, ours = self._state, measured.attempt, self._is_ours(measured.candidate)
        state.compiled += measured.compiled is not None
        if attempt.failure is None:
            state.passed += 1
            state.timed += 1
        else:
            state.rejected[attempt.failure] += 1
        if ours and attempt.failure is None and attempt.time_ms is not None:
            if measured.candidate == self._default:
                state.default_ms = attempt.time_ms
            if self._best_ms is None or attempt.time_ms < self._best_ms:
                self._best_ms = state.best_ms = attempt.time_ms
                state.best = str(measured.candidate)
        self._run.changed()

    def record(self, candidate: Candidate, compiled: Compiled | None) -> None:
        """Measures the candidate if it compiled, and appends its line."""
        began = time.monotonic()
        if compiled is not None and compiled.failure is not None:
            measured = Measured(candidate, compiled, Attempt(Failure(compiled.failure), compiled.reason), 0.0)
        else:
            attempt = self._attempt(candidate)
            measured = Measured(candidate, compiled, attempt, time.monotonic() - began)
        self._stream.write(_line(measured.to_json()))
        self._stream.flush()
        self.note(measured)

    def _is_ours(self, candidate: Candidate) -> bool:
        return candidate.implementation == self._default.implementation

    def _attempt(self, candidate: Candidate) -> Attempt:
        best = self._best_ms if self._is_ours(candidate) and candidate != self._default else None
        attempt = self._runner.attempt(candidate, None if best is None else best * SLOW)
        if attempt.failure is Failure.SLOW and attempt.time_ms is not None and best is not None:
            reason = f"{attempt.time_ms / best:.1f} times slower than the best so far; time_ms is a first estimate"
            attempt = dataclasses.replace(attempt, reason=reason)
        return attempt


def _compiled(futures: Mapping[Future[Compiled], Config]) -> Iterator[tuple[Config, Compiled]]:
    """The first candidate, then the others as they come from the compilers."""
    first = list(futures)[:1]  # the default, unless it was measured before: without it nothing can be replayed
    for future in itertools.chain(first, as_completed([each for each in futures if each not in first])):
        yield futures[future], outcome(future)


def record(
    op: Op[Any],
    problem: Problem,
    gpu: Device,
    path: Path,
    pool: Compilers,
    runner: Runner,
    run: Run,
    most: int | None = None,
    seed: int = 0,
    implementation: str | None = None,
) -> None:
    """Records one problem's sweep into `path`, or what an interrupted run left of it; our own kernel's by default.

    Raises UsageError where the file holds something else. A problem that the GPU cannot hold is the state's `error`.
    """
    swept = tunable(op, implementation)
    header, configs = plan(swept, problem, gpu, most, seed)
    before = resume(path, header)
    known = {measured.candidate for measured in before}
    others = [
        Candidate(each.name)
        for each in op.implementations.values()
        if each.space is None and each.can_run(problem, gpu) and Candidate(each.name) not in known
    ]
    left = [config for config in configs if Candidate(swept.name, config) not in known]
    feasible, space = header["feasible"], len(swept.space or ())
    state = ProblemState(op.name, problem.label, feasible, space - feasible, len(before) + len(left) + len(others))
    run.begin(state)
    try:
        with path.open("a", encoding="utf-8", newline="\n") as stream:
            recorder = Recorder(stream, runner, state, run, Candidate(swept.name, configs[0]))
            for measured in before:
                recorder.note(measured)
            # All of them at once: the compilers keep ahead of the GPU, which prepares and measures meanwhile.
            ahead = [] if swept.external else left
            futures = {pool.submit(op.name, swept.name, problem.key, config): config for config in ahead}
            try:
                if left or others:
                    runner.prepare(op, problem)
                for candidate in others:
                    recorder.record(candidate, None)
                for config in left if swept.external else ():
                    recorder.record(Candidate(swept.name, config), None)
                for config, compiled in _compiled(futures):
                    recorder.record(Candidate(swept.name, config), compiled)
            finally:
                for future in futures:
                    future.cancel()
    except TuningError as broken:
        state.error = one_line(broken)
    finally:
        run.end(state)


def record_problems(
    problems: Sequence[tuple[Op[Any], Problem]],
    out: Path,
    *,
    most: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    implementation: str | None = None,
    watch: Watch = contextlib.nullcontext,
) -> list[ProblemState]:
    """Records a sweep of each problem on the GPU that is here, into `out`: a file.jsonl for one, else a directory.

    watch: shows the run while it goes.
    Raises UsageError without a GPU, and where a file holds another sweep.
    """
    for op, _ in problems:
        tunable(op, implementation)
    if not devices.present():
        raise UsageError("there is no GPU here, and a sweep is measured or it is nothing")
    check_cache()
    single = out.suffix == ".jsonl"
    if single and len(problems) != 1:
        raise UsageError(f"{len(problems)} problems do not go into one file: give --out a directory")
    (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    gpu, runner = devices.current(), GpuRunner()
    with CompilePool(gpu, workers) as pool:
        try:
            runner.start()
            run = Run(len(problems), True)
            with watch(run):
                for op, problem in problems:
                    path = out if single else out / file_name(op, problem, implementation)
                    record(op, problem, gpu, path, pool, runner, run, most, seed, implementation)
        finally:
            runner.close()
    return run.done


def file_name(op: Op[Any], problem: Problem, implementation: str | None = None) -> str:
    dtype = getattr(problem, "dtype", "")
    return "-".join([op.name, *problem.label.split(","), dtype, *filter(None, [implementation])]) + ".jsonl"
