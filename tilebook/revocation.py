"""Revoking: from what a user writes to the record, and what it changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tilebook import device as devices
from tilebook import provenance
from tilebook.errors import UsageError
from tilebook.registry import DenyList, Layers, Revocation
from tilebook.registry.checks import in_range
from tilebook.report.rows import row as verdict_row

if TYPE_CHECKING:
    from tilebook.op import Implementation, Value

_ARCH = re.compile(r"sm_\d{2,3}[a-z]?|gfx[0-9a-f]{3,5}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{4,64}")


def make(
    op: str,
    implementation: str | None,
    config: str | None,
    arch: str | None,
    triton: str | None,
    kernel: str | None,
    reason: str | None,
) -> Revocation:
    """The record of what the command line says; its docstring has the defaults. Raises UsageError."""
    from tilebook import op as ops

    found = ops.get(op)
    name = implementation or found.tunable.name
    if name not in found.implementations:
        raise UsageError(f"{op} has no implementation {name!r}; there are {', '.join(found.implementations)}")
    chosen = found.implementations[name]
    if chosen.space is None and config:
        raise UsageError(f"{name} has no --config: nothing of it is tuned")
    if not chosen.digest and (triton or kernel):
        raise UsageError(f"{name} is not ours: neither --triton nor --kernel changes it")
    if arch is not None and not _ARCH.fullmatch(arch):
        raise UsageError(f"no GPU has arch {arch!r}; they are called sm_90, gfx942 …")
    if not reason or not reason.strip():
        raise UsageError("a revocation needs a --reason")
    try:
        return Revocation(
            op=op,
            implementation=name,
            reason=reason,
            kernel=_kernel(chosen, kernel or ("any" if triton else "current")),
            arch=arch,
            triton=triton,
            config=_config(chosen, config or ""),
            made=provenance.made(),
        )
    except ValueError as wrong:
        raise UsageError(str(wrong)) from wrong


def _kernel(implementation: Implementation, text: str) -> str | None:
    if not implementation.digest or text == "any":
        return None
    if text != "current" and not _DIGEST.fullmatch(text):
        raise UsageError(f"kernel {text!r} is neither current nor any nor a digest of 64 hex digits")
    return implementation.digest if text == "current" else text


def _config(implementation: Implementation, text: str) -> Mapping[str, Value]:
    """Reads `BLOCK_M=64,num_warps=4`, axes and values of the space."""
    config: dict[str, Value] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        axis, equals, written = (each.strip() for each in part.partition("="))
        assert implementation.space is not None
        axes = implementation.space.axes
        if axis not in axes:
            raise UsageError(f"config {part!r}: there is no axis {axis!r}, but {', '.join(axes)}")
        values = {str(value): value for value in axes[axis]}
        if not equals or written not in values:
            raise UsageError(f"config {part!r}: {axis} is one of {', '.join(values)}")
        if axis in config:
            raise UsageError(f"config {text!r}: {axis} stands twice")
        if values[written] == implementation.space.later.get(axis):
            raise UsageError(f"config {part!r}: configs leave {axis} out there, so nothing can be revoked by it")
        config[axis] = values[written]
    return config


def revoke(layers: Layers, revocation: Revocation) -> tuple[bool, list[dict[str, Any]]]:
    """Stores it; returns whether it is new, and rows of the verdicts whose winners it keeps from running."""
    with layers.writer() as registry:
        new = registry.revoke(revocation)
    denied = DenyList([revocation], devices.package_version("triton"))
    from tilebook import op as ops

    kernel = ops.get(revocation.op).digest
    return new, [
        verdict_row(verdict, layer, revocation)
        for layer, verdict in layers.verdicts(op=revocation.op)
        if verdict.trusted and verdict.kernel == kernel and denied.winner(verdict) is not None
    ]


def undo(layers: Layers, scope: str) -> None:
    """Removes the revocation whose id begins so from the registry that is written to. Raises UsageError."""
    if not _ID.fullmatch(scope):
        raise UsageError(f"{scope!r} is not the id of a revocation: see tilebook revoke --list")
    holders = [layer for layer, each in layers.revocations() if each.scope.startswith(scope)]
    # A damaged one is not listed, but a problem names its id.
    if not holders and not layers.problems:
        raise UsageError(f"no revocation {scope}: see tilebook revoke --list")
    with layers.writer() as registry:
        try:
            removed = registry.unrevoke(scope)
        except ValueError as several:
            raise UsageError(str(several)) from several
    if not removed:
        where = f"is in the {holders[0]} layer, which this command does not change" if holders else "is in no layer"
        raise UsageError(f"revocation {scope} {where}")


def row(layer: str, revocation: Revocation) -> dict[str, Any]:
    """One revocation as plain data; null means any."""
    return {
        "id": revocation.scope,
        **revocation.portable(),
        "made": dict(revocation.made),
        "layer": layer,
        "origin": revocation.origin,
        "trusted": revocation.trusted,
    }


def line(row: Mapping[str, Any]) -> str:
    """One revocation for people, in one line."""
    config = " ".join(f"{axis}={value}" for axis, value in row["config"].items())
    where = [row["arch"] or "every GPU"]
    where += [f"Triton {row['triton']}"] if row["triton"] else []
    where += [f"source {row['kernel'][:8]}"] if row["kernel"] else []
    where += [f"layer {row['layer']}"] if row["layer"] else []
    where += [f"by {row['made']['by']}"] if "by" in row["made"] else []
    where += [] if row["trusted"] else ["not trusted: not honoured"]
    what = f"{row['op']} {row['implementation']} {config}".strip()
    return f"{row['id'][:8]}  {what} ({', '.join(where)}): {' '.join(row['reason'].split())}"


def told(revocation: Revocation, new: bool, rows: list[dict[str, Any]]) -> str:
    """What was revoked and which verdicts are no longer served, for people."""
    lines = [line(row("", revocation)) + ("" if new else " (was revoked already; the first reason stays)")]
    here = devices.package_version("triton")
    if revocation.triton is not None and not in_range(here, revocation.triton):
        lines.append(f"Triton here is {here}: nothing changes on this machine")
    elif not rows:
        lines.append("it is no verdict's winner here; as a runner-up or a default it does not run either")
    else:
        lines.append(f"no longer served, as the winner of {len(rows)} verdicts:")
    for each in rows:
        config = " ".join(f"{axis}={value}" for axis, value in each["config"].items())
        where = f"{each['op']} {each['problem']} on {each['device']} (layer {each['layer']})"
        lines.append(f"  {where}: {each['implementation']} {config}".rstrip())
    return "\n".join(lines)
