"""Do verdicts still speak of the machine code that there is? A refactor changes source, and seldom code.

A verdict is of machine code: its finalists of ours keep a digest of theirs (`Compiled.fingerprint`). At run time nobody
compiles to find that out, so dispatch goes by digests of source. Here both are brought together, without a GPU: what
compiles to the code that was measured takes the digests of today's source; what does not has to be measured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

from tilebook import device as devices
from tilebook import op as ops
from tilebook.device import Device
from tilebook.registry import Finalist, Verdict
from tilebook.tuner.process.compile import Compiled, CompilePool, Compilers

Outcome = Literal["current", "renewed", "retired", "skipped"]
"""current: its source is today's. renewed: its code is, so its source digests are now. retired: the winner's code is
another. skipped: what it needs to be compiled is not here; `reason` says what."""


@dataclass(frozen=True)
class Finding:
    """What became of a verdict. after: what to keep in its place, where it is renewed. changed: finalists of ours whose
    code is another now, to be measured anew."""

    verdict: Verdict
    outcome: Outcome
    changed: tuple[Finalist, ...] = ()
    reason: str = ""
    after: Verdict | None = None


def _ours(verdict: Verdict) -> list[Finalist]:
    """Those whose machine code we make: of implementations that are here and have a source of ours."""
    there = ops.get(verdict.op).implementations
    return [each for each in verdict.finalists if each.implementation in there and there[each.implementation].digest]


def is_current(verdict: Verdict) -> bool:
    """Are the sources that the verdict names today's? Of finalists that were removed since, none is asked for."""
    op = ops.get(verdict.op)
    same = (
        op.implementations[each.implementation].digest == verdict.source_of(each.implementation)
        for each in _ours(verdict)
    )
    return verdict.kernel == op.digest and all(same)


def here(verdict: Verdict) -> str:
    """Why the verdict's code cannot be compiled here, or nothing: code belongs to a version of Triton and of ptxas."""
    if verdict.op not in ops.ops():
        return f"there is no op {verdict.op}"
    versions, known = devices.environment(), verdict.environment.versions
    for name in ("triton", "ptxas"):
        if known.get(name) != versions.get(name):
            return f"made with {name} {known.get(name)}; here is {versions.get(name)}"
    return "" if _device(verdict) else f"{verdict.device.name} is not in the catalogue of GPUs"


def _device(verdict: Verdict) -> Device | None:
    """The verdict's GPU, with the catalogue's limits."""
    wanted = verdict.device
    for model in devices.CATALOGUE.values():
        if model.name in wanted.name and model.arch == wanted.arch:
            return replace(model, name=wanted.name, sm_count=wanted.sm_count)
    return None


def recheck(
    verdicts: Sequence[Verdict],
    *,
    everything: bool = False,
    workers: int | None = None,
    pool: Callable[[Device, int | None], CompilePool] | None = None,
) -> Iterator[Finding]:
    """Compiles the finalists of verdicts whose source is not today's, or of all with `everything`; says what became of
    each, GPU by GPU. Equal source under an equal Triton is equal code, so the others need no compiling."""
    by_device: dict[Device, list[Verdict]] = {}
    for verdict in verdicts:
        reason = here(verdict)
        device = _device(verdict)
        if verdict.op in ops.ops() and not everything and is_current(verdict):
            yield Finding(verdict, "current")
        elif reason or device is None:
            yield Finding(verdict, "skipped", reason=reason)
        else:
            by_device.setdefault(device, []).append(verdict)
    for device, some in by_device.items():
        with (pool or CompilePool)(device, workers) as compilers:
            yield from _compared(some, compilers)


def _compared(verdicts: Sequence[Verdict], compilers: Compilers) -> Iterator[Finding]:
    """Compiles all finalists of ours of one GPU's verdicts; each candidate once, however many verdicts name it."""
    futures: dict[tuple[str, str, str, str], Future[Compiled]] = {}
    asked: list[tuple[Verdict, list[tuple[Finalist, Future[Compiled]]]]] = []
    for verdict in verdicts:
        mine = []
        for each in _ours(verdict):
            key = verdict.op, verdict.problem, *each.key
            if key not in futures:
                config = _config(verdict, each)
                futures[key] = compilers.submit(verdict.op, each.implementation, verdict.problem, config)
            mine.append((each, futures[key]))
        asked.append((verdict, mine))
    for verdict, mine in asked:
        yield _judged(verdict, [each for each, future in mine if future.result().fingerprint != each.code])


def _config(verdict: Verdict, finalist: Finalist) -> Mapping[str, ops.Value]:
    """The config of a finalist; the default of one that won before its implementation had a space."""
    implementation, device = ops.get(verdict.op).implementations[finalist.implementation], _device(verdict)
    if finalist.config or implementation.space is None or device is None:
        return finalist.config
    return implementation.space.default(implementation.op.problem.from_key(verdict.problem), device)


def _judged(verdict: Verdict, changed: Iterable[Finalist]) -> Finding:
    """What becomes of a verdict some of whose finalists have other code now.

    Where the winner is among them it is retired: it was measured and is no more. Else it stands without them, as what
    is left of the ranking is still what was measured; they are listed all the same.
    """
    others = tuple(changed)
    if verdict.winner in others:
        return Finding(verdict, "retired", others)
    if not others and is_current(verdict):
        return Finding(verdict, "current")
    return Finding(verdict, "renewed", others, after=_renewed(verdict, others))


def _renewed(verdict: Verdict, without: Sequence[Finalist]) -> Verdict:
    """The verdict with the digests of today's source, and without the finalists whose code is another now."""
    op = ops.get(verdict.op)
    kept = tuple(each for each in verdict.finalists if each not in without)
    here = {name: op.implementations[name].digest for name in verdict.sources if name in op.implementations}
    ours = {name: digest for name, digest in here.items() if digest}
    return replace(verdict, kernel=op.digest, finalists=kept, sources={**verdict.sources, **ours})
