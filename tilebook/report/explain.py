"""Why dispatch would run what it would run for one problem."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tilebook import op as ops
from tilebook import registry as store
from tilebook.device import Device, package_version
from tilebook.dispatch import Snapshot
from tilebook.op import Op, Problem, UsageError
from tilebook.registry import Layers, Verdict
from tilebook.registry.serving import Served
from tilebook.report.asked import target
from tilebook.report.finalists import evidence, passed_over, running, written
from tilebook.report.rows import label, row, stale


def explain(op: Op[Any], problem: Problem, gpu: str | None, registry: str | None) -> tuple[str, dict[str, Any]]:
    """A text for people and the same as data. Raises UsageError where there is no GPU here and none was named.

    A call asks for the problem's bucket; `asked` is the problem as it was written.
    """
    asked, problem = problem.label, problem.bucket()
    device = target(gpu)
    snapshot = Snapshot(device, registry)
    choice = snapshot.choose(op, problem)
    passed = list(_passed(snapshot, op, problem))
    before = list(passed_over(snapshot, choice))
    cost = problem.cost()
    floor_ms = 1e3 * problem.floor_s(device)
    verdict = None if choice.verdict is None else _whole(choice.verdict, device, registry)
    changed = stale(verdict) if verdict is not None else []
    told, measured = ("", None) if verdict is None else evidence(verdict, running(verdict, choice))
    data: dict[str, Any] = {
        "op": op.name,
        "problem": problem.label,
        "asked": asked,
        "device": device.name,
        "source": choice.source,
        "implementation": choice.implementation.name,
        "config": dict(choice.config) if choice.config is not None else {},
        "kernel": op.digest,
        "floor_ms": floor_ms,
        "verdict": row(verdict, choice.layer) if verdict is not None else None,
        "environment": dict(verdict.environment.versions) if verdict is not None else None,
        "changed": changed,
        "revoked": passed,
        "passed_over": before,
        "measured": measured,
    }
    unused = snapshot.exact(op, problem) if choice.verdict is None and before else None
    if unused is not None:
        because = f"of the {unused.status} verdict for exactly this problem, layer {unused.layer}, nothing may run here"
    else:
        because = _reason(choice.source, data["verdict"], [each["source"] for each in passed], op.fused(problem))
    lines = [
        f"{op.name} {asked}{f' (asks for {problem.label})' if asked != problem.label else ''} on {device.name}",
        f"  runs     {choice.implementation.name} {choice.config or ''}".rstrip(),
        *(f"  revoked  {each['implementation']} {written(each['config'])}: {each['reason']}" for each in passed),
        *(f"  not      {_of(each)}: {each['reason']}" for each in _once(before)),
        f"  because  {because}",
        f"  floor    {floor_ms:.4g} ms ({cost.flops / 1e9:.3g} GFLOP, {cost.bytes / 1e6:.3g} MB)",
    ]
    if verdict is not None:
        lines.append(f"  measured {told}")
        lines.append(f"  made     {made(data['verdict'])}")
        lines.append(f"  with     {', '.join(f'{k} {v}' for k, v in sorted(verdict.environment.versions.items()))}")
        lines.append(f"  stale    {'yes: ' + ', '.join(changed) if changed else 'no'}")
    return "\n".join(lines), data


def explain_foreign(name: str, shape: str, gpu: str | None, registry: str | None) -> tuple[str, dict[str, Any]]:
    """The same for somebody else's kernel: its verdict on the problem of that label, and whether it would be served.

    Raises UsageError where there is no such verdict, or several.
    """
    device, layers = target(gpu), Layers.default(registry)
    found, revocations = layers.read(op=name, device=store.Device(*device.identity))
    denied = store.DenyList((each for _, each in revocations), package_version("triton"))
    now = _source_now(name)
    found = sorted(found, key=lambda each: each[1].kernel == now)  # what is of this source hides what is not
    told = {label(name, verdict.problem): (layer, verdict) for layer, verdict in found}
    wanted = [each for each in told if f"{each} ".startswith(f"{shape} ")]
    if len(wanted) != 1:
        known = "; ".join(sorted(told)) or "none"
        raise UsageError(f"{name} {shape!r} is {'several' if wanted else 'none'} of what has verdicts: {known}")
    layer, verdict = told[wanted[0]]
    arch = device.arch
    allowed = (
        each
        for each in verdict.finalists
        if not denied.find(name, verdict.kernel, arch, each.implementation, each.config)
    )
    winner = next(allowed, None)
    why, changed = "" if now in ("", verdict.kernel) else "its source is another now", stale(verdict)
    if not verdict.trusted:
        why = why or "the verdict is not trusted: tune the record here, or import it with --trust"
    runs = None if why or winner is None else winner
    because = f"layer {layer} has a {verdict.status.value} verdict for exactly this problem"
    nothing = f"its autotuner's own choice, or the first config that fits: {why or 'all finalists are revoked'}"
    data: dict[str, Any] = {
        "op": name,
        "problem": wanted[0],
        "device": device.name,
        "verdict": row(verdict, layer),
        "changed": changed,
    }
    numbers, measured = evidence(verdict, winner)
    data |= {"config": None if runs is None else dict(runs.config), "reason": because if runs else nothing}
    data["measured"] = measured
    lines = [f"{name} {wanted[0]} on {device.name}"]
    lines += [f"  runs     {'nothing of ours' if runs is None else written(dict(runs.config))}"]
    lines += [f"  because  {data['reason']}", f"  measured {numbers}"]
    lines += [f"  made     {made(data['verdict'])}"]
    lines += [f"  with     {', '.join(f'{k} {v}' for k, v in sorted(verdict.environment.versions.items()))}"]
    lines += [f"  stale    {'yes: ' + ', '.join(changed) if changed else 'no'}"]
    return "\n".join(lines), data


def _source_now(name: str) -> str:
    """The digest of a kernel's source, "" where it cannot be imported here."""
    try:
        return ops.get(name).digest
    except UsageError:
        return ""


def _whole(served: Served, gpu: Device, registry: str | None) -> Verdict | None:
    """The verdict behind what is served of it, with its notes; None where it is gone since."""
    layers = Layers.default(registry)
    device = store.Device(*gpu.identity)
    found = (v for _, v in layers.verdicts(op=served.op, problem=served.problem, device=device))
    return next((v for v in found if v.kernel == served.kernel), None)


def _passed(snapshot: Snapshot, op: Op[Any], problem: Problem) -> Iterator[dict[str, Any]]:
    """What would have run before the choice, were it not revoked: the verdicts' candidates and the default."""
    seen = set()
    for candidate in snapshot.candidates(op, problem):
        revocation = snapshot.revocation(candidate)
        if revocation is None:
            return
        if (what := (candidate.implementation.name, candidate.config)) in seen and candidate.source != "default":
            continue
        seen.add(what)
        yield {
            "implementation": candidate.implementation.name,
            "config": dict(candidate.config or {}),
            "source": candidate.source,
            "layer": candidate.layer,
            "reason": revocation.reason,
            "id": revocation.scope,
        }
        if candidate.source == "default":
            return


def _once(passed: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The first of each implementation of which the same is to be said."""
    seen = set()
    for each in passed:
        if (what := (each["implementation"], each["reason"])) not in seen:
            seen.add(what)
            yield each


def _of(finalist: dict[str, Any]) -> str:
    named = f"{finalist['implementation']} {written(finalist['config'])}".rstrip()
    return named if finalist["time_ms"] is None else f"{named} ({finalist['time_ms']:.4g} ms)"


def _reason(source: str, verdict: dict[str, Any] | None, revoked: Sequence[str], fused: bool) -> str:
    if source == "exact" and verdict is not None:
        return f"layer {verdict['layer']} has a {verdict['status']} verdict for exactly this problem"
    if source == "nearest" and verdict is not None:
        return f"the nearest verdict is for {verdict['problem']} ({verdict['status']}, layer {verdict['layer']})"
    if "default" in revoked:
        what = "a config in its place" if source == "default" else "PyTorch's implementation"
        return f"no verdict can serve, and the default config is revoked: {what}"
    if source == "default":
        return f"no verdict {'that is near can serve' if revoked else 'is near'}: the space's default config"
    if fused:
        return "no measured verdict is for exactly this problem: PyTorch's own function"
    return "our kernel does not support this problem: PyTorch's implementation"


def made(verdict: dict[str, Any]) -> str:
    """When, by whom, where and in which run, as far as it is known."""
    told = verdict["made"] or {}
    names = (("by", "by {}"), ("machine", "on machine {}"), ("run", "in run {}"))
    return " ".join([verdict["measured_at"], *(text.format(told[name]) for name, text in names if name in told)])
