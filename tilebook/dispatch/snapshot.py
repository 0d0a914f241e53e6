"""What the registry's layers say about one GPU model: from verdicts to choices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, cast, get_args

from tilebook import device as devices
from tilebook.device import Device
from tilebook.dispatch.agreement import Told
from tilebook.dispatch.choice import Choice, Source
from tilebook.dispatch.nearness import FARTHEST, away, by_distance, nearest, order, unlike
from tilebook.op import Config, Implementation, Op, Problem
from tilebook.registry import serving
from tilebook.registry.current import may_run, stands
from tilebook.registry.layers import DenyList
from tilebook.registry.records import Device as Known
from tilebook.registry.records import Revocation
from tilebook.registry.serving import Answer, Question, Served

_SURE, _THIN = 1.02, 1.05
"""By what factor a finalist must have beaten what PyTorch runs to serve in its place: in the verdict's own environment,
where two processes, or two cards of one model, may see what is equal so far apart; and in any other."""

_DECISIVE = ("torch", "cudnn", "cuda")
"""Packages whose versions decide how fast PyTorch's own call is."""

COMPILED = frozenset({"inductor", "flex_attention"})
"""Implementations that compile for seconds when they are first called: a program must not wait for that."""

CANNOT = "it cannot run this problem here"
"""What is said of an implementation that is not there, or does not take a problem."""

_ALIKE = 1
"""In so many flags and names a problem may differ whose winner is tried (see `Snapshot.contenders`)."""

_FIRST, _MORE = 1, 32
"""How many verdicts on near problems are asked of a large registry: the nearest serves nearly always."""


class _Read(NamedTuple):
    """The verdicts of small layers on an op, and the same by the `kin` of their problems."""

    verdicts: list[tuple[Served, Problem]]
    kin: dict[tuple[Any, ...], list[tuple[Served, Problem]]]


class Snapshot:
    """The verdicts for one GPU model, read op by op and kept in memory, and the revocations, read at once.

    Of a registry that holds much on an op only what bears on a problem is read, when it is asked for.
    A layer that another process has locked is asked again with the next problem. What is wrong with a layer is warned
    of once, and the others serve.
    """

    def __init__(self, gpu: Device, explicit: str | None = None) -> None:
        self.gpu = gpu
        self._read: dict[str, _Read] = {}
        self._warned: set[str] = set()
        self._observed: dict[tuple[str, str], Served] = {}
        try:
            self._table = serving.read(*gpu.identity, explicit)
        except Exception as broken:  # whatever is wrong with it, training goes on
            self._table = serving.Table((), Known(*gpu.identity))
            self._table.problems.append(f"the registry cannot be read: {broken}")
        self._denied = self._deny()
        self._warn()

    def verdicts(self, op: Op[Any]) -> list[tuple[Served, Problem]]:
        """The verdicts that may be served for this op: trusted, and made with the kernels as they are now.

        Without those of large registries.
        """
        return self._known(op).verdicts

    def _known(self, op: Op[Any]) -> _Read:
        """What has been read on an op. Other threads may ask for it, or forget it, at the same time."""
        if (read := self._read.get(op.name)) is None:
            read = _Read([], {})
            for verdict in self._table.small(op.name):
                if verdict.trusted and stands(verdict, op.digest):
                    try:
                        known = verdict, op.problem.from_key(verdict.problem)
                    except (TypeError, ValueError):
                        continue
                    read.verdicts.append(known)
                    read.kin.setdefault(known[1].kin, []).append(known)
            self._read[op.name] = read
            self._denied = self._deny()  # a layer that was locked may have told its revocations only now
            self._warn()
        return read

    def observe(self, verdict: Served) -> None:
        """Has a verdict that this program has come to itself served from now on."""
        self._observed[verdict.op, verdict.problem] = verdict

    def contenders(self, op: Op[Any], problem: Problem, most: int) -> list[tuple[Implementation, Config | None]]:
        """What may be faster than PyTorch's own: the best of verdicts on the nearest problems, if none is on this one.

        Those that are too far for a verdict to serve count too, and our default comes last. Not what is compiled when
        it is first called.
        """
        exact, near = self._around(op, problem, _MORE)
        if exact:
            return []
        others = [(*unlike(op, problem, each.problem), each.problem, each) for each in self._some(op)]
        others = [each for each in others if each[0] <= _ALIKE and each[1] <= FARTHEST]
        far = (verdict for *_, verdict in sorted(others, key=lambda each: each[:3]))
        found: dict[tuple[Implementation, Config | None], None] = {}
        for verdict in chain(near, far):
            for implementation, config in self._feasible(op, problem, verdict) if verdict.measured else ():
                theirs = op.native(implementation.name, problem, self.gpu) or implementation.external
                if not theirs and not self.revocation(Choice(implementation, config, "nearest", problem, self.gpu)):
                    found[implementation, config] = None
                    break
            if len(found) == most:
                return list(found)
        ours = next(iter(self._defaults(op, problem)))
        if ours.implementation is op.tunable and not self.revocation(ours):
            found[ours.implementation, ours.config] = None
        return list(found)

    def _deny(self) -> DenyList:
        return DenyList(self._table.revocations, devices.package_version("triton"))

    def _warn(self) -> None:
        problems = [each for each in self._table.problems if each not in self._warned]
        self._warned.update(problems)
        if problems:
            rest = "the verdicts that can be read serve; without one run PyTorch's own functions and default configs"
            told = f"tilebook: {'; '.join(problems)}; {rest}"
            warnings.warn(told, RuntimeWarning, stacklevel=3)

    def choose(self, op: Op[Any], problem: Problem) -> Choice:
        """The exact verdict's winner; PyTorch's own where it has a kernel for this; else the nearest, the default."""
        if self._table.locked:
            self._read.clear()
        return next(choice for choice in self.candidates(op, problem) if self.revocation(choice) is None)

    def default(self, op: Op[Any], problem: Problem) -> Choice:
        """What runs where no verdict serves: PyTorch's kernel where it has one, else ours with its default config."""
        if op.fused(problem):
            return pytorch(op, problem, self.gpu)
        return next(choice for choice in self._defaults(op, problem) if self.revocation(choice) is None)

    def told(self, op: Op[Any], problem: Problem, decided: Told) -> Choice | None:
        """The choice that another process has made, None where it cannot run here."""
        name, values, source, digest = decided
        implementation = op.implementations.get(name)
        if implementation is None or not implementation.can_run(problem, self.gpu):
            return None
        if implementation.digest != digest or source not in get_args(Source):
            return None
        config, space = None if values is None else Config(values), implementation.space
        if space is None or config is None:
            runs = space is None and config is None
        else:
            runs = space.contains(config) and space.reject(problem, config, self.gpu) is None
        if not runs:
            return None
        choice = Choice(implementation, config, cast(Source, source), problem, self.gpu, verified=False)
        return choice if self.revocation(choice) is None else None

    def own(self, op: Op[Any], problem: Problem) -> Choice | None:
        """Our own kernel as the nearest verdict has it, whatever that says of PyTorch's; None where none may run."""
        exact, near = self._around(op, problem, _FIRST)
        known = (
            Choice(*candidate, "nearest", problem, self.gpu, verdict.layer, verdict)
            for verdict in chain(exact, near)
            for candidate in (self._feasible if verdict in exact else self._carried)(op, problem, verdict)
        )
        found = (each for each in chain(known, self._defaults(op, problem)) if each.implementation is op.tunable)
        return next((each for each in found if not self.revocation(each)), None)

    def lead(self, op: Op[Any], verdict: Served) -> float | None:
        """How many times as fast as PyTorch's own call its winner was measured to be; None where that was not."""
        its = verdict.finalists[0].time_ms if verdict.measured else None
        theirs = min(self._native_ms(op, verdict, op.problem.from_key(verdict.problem)), default=None)
        return theirs / its if theirs and its else None

    def exact(self, op: Op[Any], problem: Problem) -> Served | None:
        """The verdict on just this problem, whether or not anything of it may run here."""
        return next(iter(self._around(op, problem, 0)[0]), None)

    def near(self, op: Op[Any], problem: Problem) -> Served | None:
        """The nearest verdict of the same kind, on another problem, that was measured beside PyTorch's own call."""
        near = self._around(op, problem, _FIRST)[1]
        return next((each for each in near if self.lead(op, each)), None)

    def revocation(self, choice: Choice) -> Revocation | None:
        """Why a choice may not run, or None where it may."""
        implementation = choice.implementation
        op = implementation.op
        if op.name not in self._denied.ops:
            return None  # before its source is asked for, which may not be here
        kernel = implementation.digest
        return self._denied.find(op.name, kernel, self.gpu.arch, implementation.name, choice.config or {})

    def candidates(self, op: Op[Any], problem: Problem) -> Iterator[Choice]:
        """All that can run this problem here, revoked or not, best first; PyTorch's own implementation ends it."""
        fused = op.fused(problem)
        exact, near = self._around(op, problem, 0 if fused else _FIRST)
        for verdict in exact:
            for candidate in self._feasible(op, problem, verdict):
                if self.counts(candidate[0], problem, verdict):
                    yield Choice(*candidate, "exact", problem, self.gpu, verdict.layer, verdict)
        if fused:
            # Faster than PyTorch's own kernel only where that was measured, or follows from what was.
            yield from self._expected(op, problem)
            yield pytorch(op, problem, self.gpu)
        for verdict in near:
            for candidate in self._carried(op, problem, verdict):
                yield Choice(*candidate, "nearest", problem, self.gpu, verdict.layer, verdict)
        yield from self._defaults(op, problem)

    def _expected(self, op: Op[Any], problem: Problem) -> Iterator[Choice]:
        """Winners of verdicts on problems like this one, nearest first, if all are far enough ahead of PyTorch's.

        Far enough is what leaves a lead here when as much of it is lost as was ever seen to be, see `Problem.TRANSFER`.
        """
        if not problem.TRANSFER or not problem.like(problem):
            return
        found = []
        for verdict, other in self.verdicts(op):
            if not problem.like(other):
                continue
            theirs = self._theirs(op, verdict, other)
            ours = [each.time_ms for each in verdict.finalists if each.time_ms and op.digest_of(each.implementation)]
            if theirs and ours:
                found.append((problem.apart(other), verdict.problem, theirs / min(ours), theirs, verdict))
        if not found or min(lead for _, _, lead, _, _ in found) * problem.TRANSFER < _THIN:
            return
        for _, _, _, theirs, verdict in sorted(found, key=lambda each: each[:2]):
            times = {(each.implementation, Config(each.config)): each.time_ms for each in verdict.finalists}
            for implementation, config in self._feasible(op, problem, verdict):
                its = times.get((implementation.name, config or Config()))
                if implementation.digest and its and theirs / its * problem.TRANSFER >= _THIN:
                    yield Choice(implementation, config, "nearest", problem, self.gpu, verdict.layer, verdict)

    def _theirs(self, op: Op[Any], verdict: Served, measured: Problem) -> float | None:
        """How long PyTorch's own kernel took beside ours, None where no tune has measured it in this environment."""
        counts = verdict.measured and verdict.origin != "observed" and _here(verdict)
        return min(self._native_ms(op, verdict, measured), default=None) if counts else None

    def _native_ms(self, op: Op[Any], verdict: Served, problem: Problem) -> list[float]:
        """What a verdict on the problem says of the implementations that PyTorch's own function runs for it."""
        return [ms for name, ms in _times(verdict).items() if op.native(name, problem, self.gpu)]

    def _around(self, op: Op[Any], problem: Problem, most: int) -> tuple[list[Served], Iterator[Served]]:
        """The verdicts on a problem itself, and those that are near enough to serve it, nearest first.

        most: how many near ones to ask of a large registry at once; more are asked for when these have been looked at.
        """
        observed = self._observed.get((op.name, problem.key))
        if observed is not None:
            return [observed], iter(())
        known = self._known(op).kin.get(problem.kin, [])
        if not self._table.large(op.name):
            return [verdict for verdict, _ in known if verdict.problem == problem.key], nearest(problem, known)
        measure, kind = partial(away, op, problem), op.problem
        question = Question(op.name, op.digest, problem.key, most, measure, FARTHEST, kind.EXACT, kind.HALVED)
        answer = self._table.find(question)
        self._warn()
        exact = [answer.exact] if answer.exact is not None and answer.exact.trusted else []
        return exact, self._near_in_large(problem, known, question, answer)

    def _near_in_large(
        self, problem: Problem, known: Sequence[tuple[Served, Problem]], question: Question, answer: Answer
    ) -> Iterator[Served]:
        """The near ones of all layers; those of small ones give way to what a large one has on the same problem."""
        seen = {problem.key}
        small = by_distance(problem, known)
        for more in (False, True):
            told = self._table.find(replace(question, most=_MORE, beside=True)) if more else answer
            large = [(distance, not each.measured, each) for distance, each in told.near]
            for distance, _, verdict in sorted([*small, *large], key=order):
                # Farther away there may be others in a large one, nearer than what is here of the rest.
                if verdict.problem in seen or (distance > told.complete and not more):
                    continue
                seen.add(verdict.problem)
                best = self._table.find(question.about(verdict.problem)).exact
                yield best if best is not None and best.trusted else verdict

    def counts(self, candidate: Implementation, problem: Problem, verdict: Served) -> bool:
        """Does an exact verdict say of this finalist how it compares here with what PyTorch's own call would do?

        A prediction compares our configs with each other only. A lead that another card may not see does not count; in
        another environment PyTorch's own may have become faster, so that a thin margin over it does not either.
        """
        op = candidate.op
        if not op.fused(problem):
            return True
        if not verdict.measured or op.native(candidate.name, problem, self.gpu):
            return verdict.measured
        native = self._native_ms(op, verdict, problem)
        its = _times(verdict).get(candidate.name, verdict.finalists[0].time_ms)
        return not native or its is None or min(native) >= (_SURE if _here(verdict) else _THIN) * its

    def _feasible(
        self, op: Op[Any], problem: Problem, verdict: Served
    ) -> Iterator[tuple[Implementation, Config | None]]:
        """The candidates of a verdict that can run this problem here, best first, but those whose source changed."""
        for finalist in verdict.finalists:
            found = self.judged(op, problem, verdict, finalist)
            if not isinstance(found, str):
                yield found

    def judged(
        self, op: Op[Any], problem: Problem, verdict: Served, finalist: Any
    ) -> tuple[Implementation, Config | None] | str:
        """A finalist of a verdict as it can run this problem here, or why it cannot."""
        name, values = finalist.implementation, finalist.config
        implementation = op.implementations.get(name)
        if implementation is None:
            return "this version of tilebook has no such implementation"
        if name in COMPILED:
            return "it compiles for seconds when it is first called, and is never served"
        if not implementation.can_run(problem, self.gpu):
            return CANNOT
        if not may_run(verdict, name, implementation.digest):
            return "its source is another now"
        space = implementation.space
        if space is None:
            return implementation, None
        # One that won before it had a space ran as it does by default now.
        config = Config(values) if values else space.default(problem, self.gpu)
        if not space.contains(config):
            return "its config is none of the space any more"
        refused = space.reject(problem, config, self.gpu)
        return (implementation, config) if refused is None else f"its config cannot run this problem here: {refused}"

    def _carried(
        self, op: Op[Any], problem: Problem, verdict: Served
    ) -> Iterator[tuple[Implementation, Config | None]]:
        """The candidates of a verdict on a near problem that may serve this one before our kernel as it is by default.

        Not what others lost by there, who may lose by more here.
        """
        for its, config in self._feasible(op, problem, verdict):
            lost = its.name != verdict.finalists[0].implementation
            if lost and (its.external or op.native(its.name, problem, self.gpu)):
                continue
            if its.space is None or config is None or its.space.carries(problem, config, self.gpu):
                yield its, config

    def _some(self, op: Op[Any]) -> list[Served]:
        """Verdicts that may be served, on whatever problems: all, but of large registries."""
        if self._table.large(op.name):
            return self._table.some(op.name, op.digest)
        return [verdict for verdict, _ in self.verdicts(op)]

    def _defaults(self, op: Op[Any], problem: Problem) -> Iterator[Choice]:
        """Our kernel with its default config; in its place configs verified on other problems, then its neighbours."""
        ours = op.tunable
        if ours.can_run(problem, self.gpu) and ours.space is not None and ours.proven(problem):
            configs = ours.space.defaults(problem, self.gpu)
            yield Choice(ours, next(configs), "default", problem, self.gpu)
            for verdict in self._some(op):
                for candidate in self._feasible(op, problem, verdict) if verdict.measured else ():
                    if candidate[0] is ours:
                        yield Choice(*candidate, "default", problem, self.gpu, verdict.layer)
            for config in configs:
                yield Choice(ours, config, "default", problem, self.gpu)
        yield pytorch(op, problem, self.gpu)


def pytorch(op: Op[Any], problem: Problem, gpu: Device | None = None) -> Choice:
    """PyTorch's own implementation, which runs everywhere."""
    return Choice(op.implementations["torch"], None, "fallback", problem, gpu)


def ahead(choice: Choice, other: str) -> bool:
    """Did the choice's verdict measure it as faster than this implementation, by more than a thin margin?"""
    times = _times(choice.verdict) if choice.verdict is not None and choice.verdict.measured else {}
    its = times.get(choice.implementation.name)
    return its is not None and times.get(other, 0.0) >= _THIN * its


def _here(verdict: Served) -> bool:
    """Was it made with the versions that are here of what decides how fast PyTorch's own call is?"""
    then, now = verdict.environment, devices.environment()
    return all(then.get(package, now.get(package)) == now.get(package) for package in _DECISIVE)


def _times(verdict: Served) -> dict[str, float]:
    """Milliseconds of each implementation's best finalist."""
    found: dict[str, float] = {}
    for each in verdict.finalists:
        if each.time_ms is not None:
            found[each.implementation] = min(each.time_ms, found.get(each.implementation, math.inf))
    return found
