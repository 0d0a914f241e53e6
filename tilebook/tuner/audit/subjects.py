"""What is looked at again, why, and in what order; what may come of it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tilebook import op as ops
from tilebook import registry as store
from tilebook.device import Device
from tilebook.op import Config, Op, Problem
from tilebook.registry import ConfigValue, DenyList, Layers, Registry, Status, Verdict
from tilebook.registry.current import retired
from tilebook.tuner.process.runner import Candidate, Runner

VERIFY, AUDIT = "verify", "audit"
UNTRUSTED = "untrusted"

_SOFT = ("python", "tilebook")  # versions that no kernel's time depends on


class Outcome(StrEnum):
    """What came of a verdict. FAILED: it could not be looked at, and stays as it was; so does what was NOT_REACHED."""

    KEPT = "kept"
    DEMOTED = "demoted"
    QUARANTINED = "quarantined"
    FAILED = "not checked"
    NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Subject:
    """A verdict to look at.

    why: "untrusted", or the versions that changed. weight: seconds of GPU time that its problem is worth, by what
    programs asked for, else by the least that one call takes.
    """

    layer: str
    verdict: Verdict
    op: Op[Any]
    problem: Problem
    winner: Candidate
    weight: float
    why: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """What came of a subject. rival: what the winner was compared with; ratio: how many times as fast the winner was,
    before: by the verdict's own evidence. served: what dispatch has from the verdict now. seconds: that it took."""

    subject: Subject
    outcome: Outcome
    reason: str = ""
    served: str = ""
    rival: str = ""
    ratio: float | None = None
    before: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Bench:
    """The GPU that verdicts are looked at on: its model, its software, what measures on it, by mode.

    clock: what the time of a run is by. ops: as they can run on it.
    """

    gpu: Device
    environment: Mapping[str, str]
    runner: Callable[[str], Runner]
    clock: Callable[[], float] = time.monotonic
    ops: Callable[[], Mapping[str, Op[Any]]] = ops.ops


def candidate_of(
    op: Op[Any], problem: Problem, gpu: Device, name: str, config: Mapping[str, ConfigValue]
) -> Candidate | None:
    """What dispatch would run of a finalist, None where it would pass over it."""
    implementation = op.implementations.get(name)
    if implementation is None or not implementation.can_run(problem, gpu):
        return None
    space = implementation.space
    if space is None:
        return Candidate(name)
    values = Config(config) if config else space.default(problem, gpu)
    return Candidate(name, values) if space.contains(values) and not space.reject(problem, values, gpu) else None


def changed(verdict: Verdict, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The versions that are others now than when the verdict was measured, as `show` has them."""
    then = verdict.environment.versions
    return tuple(
        f"{name} {version} → {environment[name]}"
        for name, version in sorted(then.items())
        if name not in _SOFT and environment.get(name, version) != version
    )


def subjects(
    layers: Layers, here: Bench, by: str, op: str | None = None, left_out: list[Verdict] | None = None
) -> list[Subject]:
    """The verdicts for this GPU that there is something to find out about, what is worth most first.

    To verify, those that are not trusted and those that are stale; to audit, the stale ones that were measured. What
    would not be served whatever is found goes to `left_out`: of source as it was, revoked, or of what cannot run here.
    """
    device = store.Device(*here.gpu.identity)
    found, revocations = layers.read(op=op, device=device)
    denied = DenyList((each for _, each in revocations), here.environment.get("triton", ""))
    used = {(miss.op, miss.problem): miss.calls * miss.time_ms / 1e3 for miss in layers.misses(device)}
    chosen: list[Subject] = []
    for layer, verdict in found:
        why = changed(verdict, here.environment)
        if by == VERIFY and not verdict.trusted:
            why = (UNTRUSTED, *why)
        if not why or (by == AUDIT and not (verdict.trusted and verdict.measured)):
            continue
        made = None if denied.winner(verdict) is not None else _subject(layer, verdict, here, why, used)
        if made is not None:
            chosen.append(made)
        elif left_out is not None:
            left_out.append(verdict)
    return sorted(chosen, key=lambda each: (-each.weight, each.verdict.op, each.verdict.problem))


def _subject(
    layer: str, verdict: Verdict, here: Bench, why: tuple[str, ...], used: Mapping[tuple[str, str], float]
) -> Subject | None:
    known, gpu = here.ops().get(verdict.op), here.gpu
    if known is None or retired(verdict, verdict.implementation, known.digest, known.digest_of):
        return None
    try:
        problem: Problem = known.problem.from_key(verdict.problem)
        problem.check()
        problem.demand_room()
        cost_s = problem.floor_s(gpu)
        winner = candidate_of(known, problem, gpu, verdict.implementation, verdict.config)
    except (ArithmeticError, TypeError, ValueError):
        return None
    if winner is None or not known.tunable.can_run(problem, gpu):
        return None
    weight = max(used.get((verdict.op, verdict.problem), 0.0), cost_s)
    return Subject(layer, verdict, known, problem, winner, weight, why)


def sampled(found: Sequence[Subject], seed: int) -> list[Subject]:
    """A random order, in which every beginning is a sample weighted by use (Efraimidis and Spirakis, 2006)."""
    draw = random.Random(seed)
    keys = [-math.log(1.0 - draw.random()) / max(each.weight, 1e-12) for each in found]
    return [each for _, each in sorted(zip(keys, found, strict=True), key=lambda pair: pair[0])]


def nearest_first(waiting: Sequence[Subject], regressed: Subject) -> list[Subject]:
    """The rest of the order once a verdict proved to have regressed: its like come first, by their distance to it."""

    def alike(each: Subject) -> bool:
        return each.op is regressed.op and each.winner.implementation == regressed.winner.implementation

    near = sorted(filter(alike, waiting), key=lambda each: regressed.problem.distance(each.problem))
    return [*near, *(each for each in waiting if not alike(each))]


def tuning_s(found: Sequence[Subject]) -> float | None:
    """Seconds that tuning took for these verdicts, by their notes; None where none says it."""
    total = 0.0
    for each in found:
        seconds: Any = each.verdict.notes.get("seconds")
        its = seconds.get("total") if isinstance(seconds, dict) else None
        total += its if isinstance(its, float | int) else 0.0
    return total or None


def looked(registry: Registry, here: Bench, subject: Subject) -> bool:
    """Has an audit looked at it in this environment already, and found nothing? A trial says so."""
    verdict, winner = subject.verdict, (subject.winner.implementation, dict(subject.winner.config))
    trials = registry.trials(op=verdict.op, problem=verdict.problem, device=verdict.device, origin="local")
    return any(
        trial.facts.get("by") == AUDIT
        and trial.status is Status.OK
        and trial.facts.get("mode") == verdict.mode
        and trial.environment.versions == dict(here.environment)
        and (trial.implementation, trial.config) == winner
        and trial.created_at > verdict.created_at
        for trial in trials
    )
